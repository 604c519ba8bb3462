# make demo    install into .venv, train the toy models on generated pictures, leave pictures and numbers in runs/
# make test    install into .venv with the test tools, run all tests
# make bench   time and memory of what this project claims to do fast
# PYTHON picks the interpreter that makes .venv (3.10 or newer); TORCH_INDEX another wheel index for torch.

PYTHON ?= python3
VENV := .venv
# Threads that wait spin for some 20 microseconds, then sleep. Without a limit, spinning can cost a factor of ten on
# a busy or virtual machine; without any, waking up costs a factor of two on an idle one.
RUN := GOMP_SPINCOUNT=10000 $(VENV)/bin/python

.PHONY: demo test bench clean

demo: $(VENV)/installed
	$(RUN) train_tokenizer.py --resume
	$(RUN) evaluate.py reconstruction
	$(RUN) train_ar.py --resume
	$(RUN) sample.py
	@echo; echo "Look at runs/evaluation/*.png (reconstructions) and runs/samples/*.png (generated pictures)."

test: $(VENV)/tested
	$(RUN) -m pytest

bench: $(VENV)/installed
	$(RUN) tests/bench.py

# A virtual environment needs no root. Where Debian's python3 lacks ensurepip, virtualenv from PyPI does the same.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name it with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m pip install --user virtualenv && \
		$(PYTHON) -m virtualenv $(VENV); }

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/tested: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) runs
