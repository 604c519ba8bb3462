"""Signals as Slurm, torchrun and people send them: nothing is lost, no process stays, the screen is true.

All on plain processes; `make test-slurm` tries a real Slurm.
"""
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import train_tokenizer
from support import loops, runtime
from helpers import Run, assert_same, call, newest, run_script, save_images

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(sys.platform != "linux", reason="signals runs that were forked")]
TERM, INT = signal.SIGTERM, signal.SIGINT
TINY = ["--blocks", 1, "--image-size", 16, "--bits", 6, "--global-batch-size", 4, "--log-every", 1]
LENGTH = 80                                # steps: enough for a signal to come in time on a busy machine
FLAGS = {"train_tokenizer.py": [*TINY, "--length", LENGTH],
         "train_ar.py": ["--split", 3, 3, "--width", 32, "--heads", 2, "--inter-blocks", 2, "--online",
                         "--global-batch-size", 4, "--val-size", 8, "--log-every", 1, "--length", LENGTH]}
NEVER_SAVED = "stopped, nothing saved: no new checkpoint, no result"


@pytest.fixture(scope="module", autouse=True)
def tokenizer_path(tmp_path_factory):
    """A tokenizer that was trained for two steps, for stage II."""
    folder = tmp_path_factory.mktemp("tokenizer")
    call(train_tokenizer, *TINY, "--length", 2, "--results-dir", folder)
    FLAGS["train_ar.py"][:0] = ["--tokenizer", runtime.latest_checkpoint(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(script, ranks): the last checkpoint of a run that nobody interrupts."""
    done = {}

    def of(script, ranks=1):
        if (script, ranks) not in done:
            folder = tmp_path_factory.mktemp("whole")
            run_script(script, *FLAGS[script], "--results-dir", folder, ranks=ranks)
            done[script, ranks] = newest(folder)
        return done[script, ranks]
    return of


def tree(pid):
    """All processes below `pid`."""
    table = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True).stdout
    found = [pid]
    for parent in found:
        found += [int(line.split()[0]) for line in table.splitlines() if int(line.split()[1]) == parent]
    return found[1:]


def assert_gone(pids, seconds=8):
    """None of them is left after that time, but those that nobody has buried."""
    end = time.time() + seconds
    for pid in pids:
        stat = pathlib.Path(f"/proc/{pid}/stat")
        while stat.exists() and ") Z " not in stat.read_text():
            assert time.time() < end, stat.read_text()
            time.sleep(0.02)


def wait_for(ready, run):
    """Wait until `ready()`, which is before the end of `run`."""
    end = time.time() + 120
    while not ready():
        assert time.time() < end and os.path.exists(f"/proc/{run.pid}"), run.wait()
        time.sleep(0.003)


def started(folder, script, *flags, method="fork", before="", **how):
    """(a run in `folder` that has logged its first step, its processes)."""
    before += f"import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)"
    run = Run(script, *FLAGS[script], *flags, "--results-dir", folder, before=before, **how)
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 0, run)
    return run, tree(run.pid)


def slowly(function, folder, seconds=1.5):
    """For `Run(before=)`: `function`, as in "torch.save", makes folder/entered and waits `seconds` first."""
    owner, name = function.rsplit(".", 1)
    return (f"import pathlib, pydoc, time\nowner = pydoc.locate({owner!r})\noriginal = owner.{name}\n"
            f"def slow(*args, **named):\n    pathlib.Path({str(folder / 'entered')!r}).touch()\n"
            f"    time.sleep({seconds})\n    return original(*args, **named)\nowner.{name} = slow\n")


def assert_saved(done, folder, number=TERM, code=None):
    """The run says that a signal has stopped it, names a file that is there, and leaves no half of one."""
    assert done.returncode == (128 + number if code is None else code), done
    path = runtime.latest_checkpoint(folder)
    assert f"signal {number}: saved {path}; --resume continues from here" in done.stdout, done
    assert "Traceback" not in done.stderr or code == 1, done.stderr                      # torchrun's own
    assert newest(folder)["step"] < LENGTH and not list(folder.glob(".step*")), "too late to prove anything"


def assert_resumes(script, folder, expected, ranks=1):
    """With --resume, the run ends as one that nobody interrupts, bit for bit."""
    run_script(script, *FLAGS[script], "--results-dir", folder, "--resume", ranks=ranks)
    assert_same(expected, newest(folder))


# ---- who gets the signal, and how often -------------------------------------------------------------------

@pytest.mark.parametrize("script, method, workers, number", [
    ("train_tokenizer.py", "fork", 0, TERM), ("train_tokenizer.py", "fork", 2, TERM),
    ("train_tokenizer.py", "forkserver", 1, TERM), ("train_tokenizer.py", "spawn", 1, TERM),
    ("train_tokenizer.py", "fork", 2, INT), ("train_ar.py", "fork", 2, TERM)])
def test_a_signal_to_every_process_saves_and_leaves_none(tmp_path, whole, script, method, workers, number):
    run, processes = started(tmp_path, script, "--num-workers", workers, method=method)
    assert len(processes) >= 1 + workers
    run.kill(number)
    assert_saved(run.wait(), tmp_path, number)
    assert_gone(processes)
    assert_resumes(script, tmp_path, whole(script))


@pytest.mark.parametrize("method, workers", [("fork", 2), ("forkserver", 1)])
def test_workers_end_with_a_killed_trainer(tmp_path, method, workers):
    run, processes = started(tmp_path, "train_tokenizer.py", "--length", 10 ** 6, "--num-workers", workers,
                             method=method)
    os.kill(processes[0], signal.SIGKILL)
    assert_gone(processes)
    run.wait()


@pytest.mark.parametrize("number, gap", [(TERM, 0.01), (TERM, 0.1), (TERM, 0.5), (INT, 0.1)])
def test_a_second_signal_soon_after_changes_nothing(tmp_path, whole, number, gap):
    run, _ = started(tmp_path, "train_tokenizer.py", before=slowly("torch.save", tmp_path, 1))
    run.kill(number)
    time.sleep(gap)
    run.kill(number)
    assert_saved(run.wait(), tmp_path, number)
    if gap == 0.1:
        assert_resumes("train_tokenizer.py", tmp_path, whole("train_tokenizer.py"))


def test_ctrl_c_again_a_second_later_stops_at_once(tmp_path):
    run, _ = started(tmp_path, "train_tokenizer.py", before=slowly("torch.save", tmp_path, 60))
    run.kill(INT)
    time.sleep(1.1)
    run.kill(INT)
    done = run.wait()
    assert done.returncode == 130 and done.stderr == f"signal 2: {NEVER_SAVED}\n", done
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".step*"))


# ---- where the run is when it comes -----------------------------------------------------------------------

def signalled(folder, script, *flags, at, number=TERM, seconds=1.5, **how):
    """A run whose processes all get a signal while it is in the function `at`, which is slowed down."""
    run = Run(script, *flags, before=slowly(at, folder, seconds), **how)
    wait_for((folder / "entered").exists, run)
    processes = tree(run.pid)
    time.sleep(0.3)
    run.kill(number)
    done = run.wait()
    assert_gone(processes)
    return done


@pytest.mark.parametrize("script, at, flags, step", [
    ("train_tokenizer.py", "torch.save", ["--checkpoint-every", 3], 3),
    ("train_tokenizer.py", "support.metrics.psnr", ["--checkpoint-every", 3], 3),
    ("train_tokenizer.py", "torch.set_num_threads", ["--num-workers", 2], 1),
    ("train_ar.py", "torch.save", ["--checkpoint-every", 3], 3),
    ("train_ar.py", "sample.generate", ["--val-every", 3], 4)],
    ids=["saving", "reconstructing", "workers-starting", "ar-saving", "ar-evaluating"])
def test_a_signal_at_any_time_saves_once(tmp_path, whole, script, at, flags, step):
    done = signalled(tmp_path, script, *FLAGS[script], *flags, "--results-dir", tmp_path, at=at)
    assert_saved(done, tmp_path)
    assert [path.name for path in runtime.list_checkpoints(tmp_path)] == [f"step-{step:08d}.pt"]
    assert_resumes(script, tmp_path, whole(script))


@pytest.mark.parametrize("script, ranks", [("train_tokenizer.py", 1), ("train_tokenizer.py", 2),
                                           ("train_ar.py", 1), ("evaluate.py", 1)])
def test_a_signal_before_the_first_step_says_that_there_is_no_checkpoint(tmp_path, script, ranks):
    flags = ["reconstruction", "--ckpt", FLAGS["train_ar.py"][1]]
    if script in FLAGS:
        flags = [*FLAGS[script], "--results-dir", tmp_path / "run"]
    done = signalled(tmp_path, script, *flags, at="support.sources.build_dataset", ranks=ranks, cwd=tmp_path)
    assert done.returncode == 143 and set(done.stderr.splitlines()) == {f"signal 15: {NEVER_SAVED}"}, done
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["entered"]


def test_a_signal_while_tokens_are_encoded_keeps_those_that_are(tmp_path):
    images = save_images(tmp_path / "images", 300)
    flags = [flag for flag in FLAGS["train_ar.py"] if flag != "--online"]
    script = ["train_ar.py", *flags, "--data-path", images, "--length", 2, "--results-dir"]
    run_script(*script, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    done = signalled(tmp_path, *script, stopped, at="tokenizer.Tokenizer.encode", seconds=0.2)
    assert done.returncode == 143, done
    line = done.stderr.splitlines()[-1]
    assert line.startswith("signal 15: stopped, ") and f"{stopped / 'tokens.bin'} keeps what is" in line, done
    run_script(*script, stopped)
    assert (stopped / "tokens.bin").read_bytes() == (tmp_path / "whole" / "tokens.bin").read_bytes()
    assert_same(newest(tmp_path / "whole"), newest(stopped))


# ---- what torchrun makes of it ----------------------------------------------------------------------------

def test_torchrun_saves_whoever_is_signalled_twice_and_warns_of_a_slow_save(tmp_path, whole):
    runtime.write_json(tmp_path / loops.SLOW_SAVE, {"seconds": 100})
    run, processes = started(tmp_path, "train_tokenizer.py", "--num-workers", 1, ranks=2, forked=False)
    os.kill(run.pid, TERM)
    time.sleep(0.1)
    for pid in [run.pid, *processes]:                                      # as Slurm's linuxproc does
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, TERM)
    done = run.wait()
    assert_saved(done, tmp_path, code=1)
    assert_gone(processes)
    assert done.stdout.startswith("warning: the last save took 100 s, but 30 s after a signal torchrun")
    assert_resumes("train_tokenizer.py", tmp_path, whole("train_tokenizer.py", 2), ranks=2)


def run_line(folder, line, **how):
    """A script whose `main` is that line, as a user types it."""
    path = folder / "a.py"
    path.write_text(f"from support import loops, runtime\n\ndef main(args):\n"
                    f"    runtime.setup_process_group()\n    {line}\n\n"
                    f"runtime.run_script(main, lambda: None)\n")
    return run_script(str(path), forked=False, check=False, **how)


def test_torchrun_ends_with_a_users_mistake_which_one_rank_prints_and_tells_its_patience(tmp_path):
    done = run_line(tmp_path, "runtime.on_main(runtime.require, False, f'patience {loops.grace()}')", ranks=2,
                    torchrun=["--shutdown-timeout", "110"])
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and [line for line in lines if line[:5] == "error"] == ["error: patience 110"]
    assert any("traceback : error: patience 110" in line for line in lines[-3:]), done


def test_a_bug_under_python_keeps_one_traceback_and_no_rank(tmp_path):
    done = run_line(tmp_path, "{}['a bug']")
    assert done.returncode == 1 and done.stderr.endswith("\nKeyError: 'a bug'\n"), done
    assert done.stderr.startswith("Traceback") and done.stderr.count("Traceback") == 1, done.stderr
