"""What several tests share: the weights behind the golden vectors, and ways to run the scripts."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import zlib

import numpy as np
import torch

import checkpoints
import runtime

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
CLOCK = ("samples/s", "tokens/s", "tflops", "mfu")                     # logged, but of no two runs the same


def fill(name, shape):
    """The float32 weights behind the golden vectors, for the parameter of this official full name."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return (1 + 0.1 * x).astype(np.float32) if name.endswith("weight") else (0.1 * x).astype(np.float32)
    return (x / np.sqrt(int(np.prod(shape[1:])))).astype(np.float32)


def fill_module(module, prefix, official=lambda name: name):
    """Fill all parameters of `module`; `official` maps our names to the official ones below `prefix`."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(fill(prefix + official(name), tuple(parameter.shape))))
    return module.eval()


def published_ar_name(name):
    """What the published files call our parameter `name` of a transformer."""
    for theirs, ours in checkpoints.AR_NAMES.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return f"transformer.{name}"


def golden(name):
    """The arrays of tests/golden/`name`.npz as a dict of torch tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def environment():
    """The environment for child processes: one thread each, so that two ranks do not fight over the cores."""
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(script, flags, ranks=1):
    """The command line of a script of the project as a user would type it, with torchrun for ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def run_script(script, *flags, ranks=1, check=True, cwd=ROOT):
    """Run a script to its end; returns the CompletedProcess with text output."""
    result = subprocess.run(command(script, flags, ranks), capture_output=True, text=True, timeout=300,
                            env=environment(), cwd=cwd)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def kill_when(script, *flags, until, ranks=1):
    """Start a script and kill -9 it and its ranks as soon as the file `until` exists."""
    process = subprocess.Popen(command(script, flags, ranks), env=environment(), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not until():
        assert time.time() < deadline and process.poll() is None, "it ended before it could be killed"
        time.sleep(0.003)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def call(script, *flags):
    """A script's main in this process: starting Python and torch anew would take longer than most runs."""
    return script.main(script.get_args([str(flag) for flag in flags]))


def logged(directory):
    """metrics.jsonl without what depends on the clock: {step: {name: value}}, lines of a step merged."""
    lines = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        lines.setdefault(values["step"], {}).update({k: v for k, v in values.items() if k not in CLOCK})
    return lines


def newest(directory):
    """The newest checkpoint of a run, without the flags, which name its folder."""
    checkpoint = checkpoints.read(runtime.latest_checkpoint(directory))
    del checkpoint["args"]
    return checkpoint


def assert_same(a, b, path=""):
    """Bit-for-bit equality of nested checkpoints."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path
