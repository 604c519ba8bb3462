"""The plumbing: files are whole or not there, logs resume, downloads are verified."""
import errno
import json
import math
import os
import re
import resource
import time

import pytest
import torch

import evaluate
import sample
import train_tokenizer
from support import loops, runtime
from helpers import error_line, refused, run_script


# ---- logs -------------------------------------------------------------------------------------------------

def test_early_steps_show_means_that_the_log_still_counts(tmp_path, capsys):
    logger = loops.Logger(tmp_path, 200, start_step=100)                # a resumed run: its own first steps
    meters = loops.Meters()
    assert [step for step in range(101, 201) if logger.early(step)] == [101, 102, 105, 110, 120, 150]
    meters.update({"loss/a": torch.tensor(1.0), "loss/b": torch.tensor(2.0)}, {"other": torch.tensor(3.0)})
    logger.show(101, meters.means(4), ("loss/", "speed"))
    meters.update({"loss/a": torch.tensor(3.0)})
    logger.log(102, meters.pop(4), ("other", "loss/a"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 101/200 | a 1 | b 2 | ETA ") and "| other 3 | a 2 | ETA" in said[1]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())           # one line
    assert line["step"] == 102 and line["loss/a"] == 2 and meters.means(4) == {}


# ---- files ------------------------------------------------------------------------------------------------

def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    loops.save_checkpoint(tmp_path, 1, {"a": torch.ones(3)})
    with pytest.raises(Exception):
        loops.save_checkpoint(tmp_path, 1, {"a": torch.ones(3), "b": lambda: None})     # cannot be pickled
    path = tmp_path / "step-00000001.pt"
    assert torch.equal(torch.load(path)["a"], torch.ones(3)) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("word, flag", [("--epochs", "--length"), ("--image_size", "--image-size"),
                                        ("--batch-size", "--global-batch-size")])
def test_flags_of_other_projects_get_a_hint(word, flag):
    assert f"did you mean {flag}" in error_line(train_tokenizer, word, 3)


@pytest.mark.parametrize("script, flag, words", [
    (evaluate, "--num-samples", ("--num-images", "--max-samples")),
    (sample, "--num-images", ("--num-samples", "--max-samples"))])
def test_a_count_under_the_name_of_another_script_gets_a_hint(script, flag, words):
    for word in words:
        assert f"did you mean {flag}?" in error_line(script, word, 3)


def test_a_full_disk_and_little_memory_are_one_line(tmp_path):
    assert "free some space" in runtime.in_one_line(OSError(28, "No space left on device", "x.pt"))
    assert "check the path" in runtime.in_one_line(PermissionError(13, "Permission denied", "x.pt"))
    assert "--batch-size" in runtime.in_one_line(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(KeyError) as caught:
        {}["a bug"]
    assert runtime.in_one_line(caught.value) is None
    (tmp_path / "a.json").write_text("[1, 2")
    refused("a.json is damaged", runtime.read_json, tmp_path / "a.json")


@pytest.mark.parametrize("steps, keep, left", [((5, 40, 300), 2, [40, 300]), ((20, 30, 15), 1, [15, 30])])
def test_old_checkpoints_are_pruned_but_not_the_last_written(tmp_path, steps, keep, left):
    for step in steps:
        loops.save_checkpoint(tmp_path, step, {}, keep=keep)
    assert [p.name for p in runtime.list_checkpoints(tmp_path)] == [f"step-{step:08d}.pt" for step in left]
    refused("train one first", runtime.latest_checkpoint, tmp_path / "none")


def test_a_slow_save_is_said_at_once_and_first_thing_of_the_next_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: time.sleep(1) or save(*args))
    for say in (lambda: loops.save_checkpoint(tmp_path, 1, {}), lambda: loops.warn_of_slow_save(tmp_path)):
        say()
        said = re.fullmatch(r"warning: the last save took ([1-4]\.\d) s, but 1 s after a signal torchrun "
                            r"kills; start it with --shutdown-timeout (\d\d)\n", capsys.readouterr().out)
        assert int(said[2]) == math.ceil(2 * float(said[1])) + 10
    monkeypatch.setattr(torch, "save", save)
    loops.save_checkpoint(tmp_path, 2, {})
    assert not capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2


def test_a_start_removes_what_kills_have_left_and_nothing_else(tmp_path, capsys):
    ours = [".step-00000012.77.pt", ".reconstructions-00000012.77.png", ".samples-00000012.77.webp",
            ".metrics.77.jsonl", ".tokens.77.bin", ".tokens-val.77.json", ".tokens.bin.77.done"]
    theirs = [".notes.77.txt", "step-00000010.pt", ".step-by-step.md", "tokens.bin", "metrics.jsonl"]
    for name in [*ours, *theirs]:
        (tmp_path / name).write_text("")
    lock = runtime.lock(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, ".lock"}
    said = capsys.readouterr().out
    assert ".step-00000012.77.pt, 0 MB of a save that a kill ended" in said and "--shutdown-timeout" in said
    lock.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_a_warning_and_another_run_an_error(tmp_path, monkeypatch, capsys, number):
    def lockf(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    (tmp_path / ".step-00000012.77.pt").write_text("")                     # maybe of a run that goes on
    runtime.lock(tmp_path)
    assert "cannot be locked" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2
    number = errno.EAGAIN
    refused("another run writes", runtime.lock, tmp_path)


def test_a_disk_that_refuses_a_save_is_named_with_its_reason(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 5, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            loops.save_checkpoint(tmp_path, 1, {"weights": torch.ones(10 ** 5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = f"{os.strerror(errno.EFBIG)}: {tmp_path / 'step-00000001.pt'}"
    assert runtime.in_one_line(caught.value).startswith(line) and not list(tmp_path.iterdir())


def test_log_drops_what_a_resumed_run_logs_again(tmp_path, capsys):
    logger = loops.Logger(tmp_path, 4)
    for step in (1, 2, 3):
        logger.log(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n[3]\n{"step": 4, "lo')                      # no UTF-8; killed within a line
    loops.Logger(tmp_path, 4, start_step=2)
    assert "done" not in capsys.readouterr().out
    loops.Logger(tmp_path, 2, start_step=2)
    assert "done     step 2, of 2; to go on give a larger --length" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_downloads_are_verified_and_offline_is_one_line(tmp_path, monkeypatch):
    source = tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    url, sha = source.as_uri(), loops.sha256_of(source)
    assert runtime.fetch(url, tmp_path / "cache", sha).read_bytes() == b"weights"
    refused("cannot download", runtime.fetch, url, tmp_path / "other", "0" * 64)
    assert not (tmp_path / "other" / "weights.bin").exists()
    refused("put it at .*none.bin", runtime.fetch, (tmp_path / "none.bin").as_uri(), tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri())
    path = runtime.fetch("https://huggingface.co/weights.bin", tmp_path / "mirrored")
    assert path.read_bytes() == b"weights"


# ---- flags and mistakes -----------------------------------------------------------------------------------

def test_durations_are_steps_or_epochs():
    assert loops.to_steps("50", 7) == 50 and loops.to_steps("2.5ep", 10) == 25
    for text in ("ten", "-1", "5 ep", ""):
        with pytest.raises(Exception):
            loops.duration(text)


def test_our_own_errors_are_one_line_and_bugs_are_tracebacks(monkeypatch, capsys):
    def wrong_shape(args):
        import tokenizer
        tokenizer.Tokenizer(tokenizer.PRESETS["toy"]).encode(torch.zeros(1, 3, 5, 5))

    with pytest.raises(SystemExit) as caught:
        runtime.run_script(wrong_shape, lambda: None)
    assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(json.JSONDecodeError):                              # a ValueError of a library
        runtime.run_script(lambda args: json.loads("{"), lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, problem", [
    ("support.data", ["--data-path", "/no/such"], "/no/such"),
    ("support.data", ["--image-size", 0], "--image-size"),
    ("support.pictures", ["no-run"], "no-run"), ("tokenizer.py", ["decode", "a.npz"], "a.npz"),
    ("train_tokenizer.py", ["--channels", 40], "channels 40"),
    ("train_tokenizer.py", ["--resume"], "is damaged"), ("train_ar.py", [], "runs/tokenizer"),
    ("sample.py", [], "runs/ar"), ("evaluate.py", [], "runs/tokenizer"),
    ("evaluate.py", ["table", 9], "9"), ("tests/judge.py", ["a.npz"], "a.npz")])
def test_mistakes_with_each_script_are_one_line_and_status_2(tmp_path, script, flags, problem):
    if "--resume" in flags:
        flags = [*flags, "--results-dir", "."]
        (tmp_path / "step-00000001.pt").write_bytes(b"not a checkpoint")
    before = sorted(tmp_path.iterdir())
    done = run_script(script, *flags, cwd=tmp_path, check=False, forked=script != "sample.py")     # one typed
    assert done.returncode == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("supported", [False, True])
def test_half_precision_is_said_once_to_be_slow_on_a_cpu_without_it(monkeypatch, capsys, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    runtime.warn_of_slow_half.cache_clear()
    for precision in ("fp32", "bf16", "bf16"):
        runtime.autocast(torch.device("cpu"), precision)
    assert capsys.readouterr().out.count("for GPUs") == (not supported)
