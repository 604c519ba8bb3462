# make demo        install into .venv, train the toy models on generated images, leave images and numbers in runs/
# make demo-video  the same for clips: an image tokenizer, inflated to one of clips, and a transformer that draws clips
# make test        install into .venv with the test tools, run all tests; make test-fast those of seconds
# make notebook    install what lecture.ipynb needs, and open it in a browser
# make report      one page of all that lies in runs/, to open in a browser: runs/report.html
# make play        a page to play with, tokenizer and transformer alive in the browser: runs/play.html
# make claims      the paper's claims on small models, three seeds each: hours; results/claims.md
# make test-slurm  results/slurm.sh under a real Slurm of two nodes, for root on Debian or Ubuntu: ten minutes
# make bench       time and memory of what this project claims to do fast
# PYTHON picks the interpreter that makes .venv (3.10 or newer).

PYTHON ?= python3
VENV := .venv
# Threads that wait spin for some 20 microseconds, then sleep. Without a limit, spinning can cost a factor of ten on
# a busy or virtual machine; without any, waking up costs a factor of two on an idle one.
RUN := GOMP_SPINCOUNT=10000 $(VENV)/bin/python
# Tests are many small runs: two at a time, one thread each; who has none left takes some of the other's.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo demo-video notebook report play test test-fast test-slurm claims bench clean

demo: $(VENV)/installed
	$(RUN) train_tokenizer.py --resume
	$(RUN) evaluate.py
	$(RUN) train_ar.py --resume
	$(RUN) sample.py
	$(RUN) evaluate.py generation --num-samples 500
	@echo; echo "Look at runs/evaluation/*.png (reconstructions) and runs/samples/*.png (generated images)."

demo-video: $(VENV)/installed
	$(RUN) train_tokenizer.py --channel-multipliers 1 1 2 --results-dir runs/video_start --resume
	$(RUN) train_tokenizer.py --preset toy-video --init-from runs/video_start/step-00001200.pt --resume
	$(RUN) evaluate.py reconstruction --ckpt runs/video/step-00000900.pt
	$(RUN) train_ar.py --tokenizer runs/video/step-00000900.pt --length 1500 --results-dir runs/video_ar --resume
	$(RUN) sample.py --ckpt runs/video_ar/step-00001500.pt --num-images 4
	@echo; echo "Look at runs/video/*.webp and runs/video_ar/*.webp, and at runs/samples/*.webp: a row for each motion."

test: $(VENV)/tested
	$(PYTEST)

test-fast: $(VENV)/tested
	$(PYTEST) -m "not slow"

test-slurm: $(VENV)/tested
	$(VENV)/bin/python tests/slurm.py

notebook: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet notebook ipykernel
	$(VENV)/bin/python -m notebook lecture.ipynb

report: $(VENV)/installed
	$(RUN) results/report.py runs

play: $(VENV)/installed
	$(RUN) results/play/build.py

claims: $(VENV)/installed
	$(RUN) results/claims.py

bench: $(VENV)/installed
	$(RUN) tests/bench.py

# A virtual environment needs no root. Where Debian's python3 lacks ensurepip, virtualenv from PyPI does the same.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name it with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m pip install --user virtualenv && \
		$(PYTHON) -m virtualenv $(VENV); }

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[curves]'
	touch $@

$(VENV)/tested: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) runs
