"""What several tests share: the weights behind the golden vectors, and ways to run the scripts."""

import atexit
import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import json
import os
import pathlib
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
import tokenizer
import video
from support import checkpoints, runtime

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


def published_video_name(name):
    """What they call a parameter of a tokenizer of clips: there is a `.conv_1` inside each convolution."""
    parts = name.split(".")
    is_conv = parts[-2] in ("conv_in", "conv_out", "conv1", "conv2", "nin_shortcut", "downsample")
    return ".".join([*parts[:-1], "conv_1", parts[-1]]) if is_conv else name


def stored(model, /, **more):
    """A checkpoint of `model` as the trainers write it, as far as loading goes."""
    return {"format": checkpoints.format_of(model), "config": dataclasses.asdict(model.config), "step": 3,
            "preset": "custom", "model": model.state_dict(), "ema": {}, "args": {}, **more}


def save_pair(folder, clips=False, seed=0, classes=("ant", "bee", "cat"), bits=(3, 3)):
    """(AR checkpoint, that of its tokenizer) with random weights, of 16 x 16 images or nine frames."""
    torch.manual_seed(seed)
    shape = {"resolution": 16, "channels": 32, "channel_multipliers": (1, 1, 1), "blocks": 1, "mid_blocks": 0,
             "patch": 2, "bits": 6}
    if clips:
        first = video.VideoTokenizer(video.VideoTokenizerConfig(**shape, frames=9, time_strides=(2, 2)))
    else:
        first = tokenizer.Tokenizer(tokenizer.TokenizerConfig(**shape))
    grid = first.config.latent_grid(*((9, 16, 16) if clips else (16, 16)))
    config = ar_model.ARConfig(width=48, heads=2, inter_blocks=1, intra_blocks=1, bits=bits, grid=grid,
                               num_classes=len(classes), ffn_multiple=16)
    model = fill_module(ar_model.ARModel(config), "", published_ar_name)
    record = {"path": "runs/x.pt", "weights": "raw", "sha256": checkpoints.weights_hash(first)}
    folder.mkdir(exist_ok=True, parents=True)
    torch.save(stored(first), folder / "tokenizer.pt")
    torch.save(stored(model, classes=list(classes), tokenizer=record, first_stage=stored(first)),
               folder / "step-00000020.pt")
    return folder / "step-00000020.pt", folder / "tokenizer.pt"


def save_images(folder, count):
    """Small files in two classes."""
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@contextlib.contextmanager
def chromium():
    """A headless Chromium, the system's or playwright's own; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)       # None: that of `playwright install`
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except api.Error:
            pytest.skip("no Chromium here")
        yield browser
        browser.close()


def golden(name):
    """The arrays of tests/golden/`name`.npz as a dict of torch tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


# ---- scripts in processes of their own ---------------------------------------------------------------------
# Importing torch and our modules takes longer than most runs do. So each pytest process has a fork server: a
# process that has imported everything, computes nothing and has no threads. A run is a fork of it, in
# milliseconds, and inherits no state but modules. `forked=False` types the command line instead, and so does
# macOS, whose libraries may not be used after a fork.

def environment():
    """The environment for child processes: one thread each, so that two ranks do not fight over the cores."""
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


@functools.cache
def fork_server():
    """Our end of a socket to this process's fork server, which ends when we do."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen([sys.executable, "-c", "import helpers; helpers.serve()"], env=environment(),
                         stdin=theirs)
    return ours


def serve():
    """What the fork server does: a request is a JSON text and files for stdout, stderr, status."""
    ours = [path.stem for path in ROOT.glob("*.py")]
    ours += [f"support.{path.stem}" for path in ROOT.glob("support/[a-z]*.py")]
    for name in [*ours, "torch._dynamo"]:                               # the last: optimizers do
        importlib.import_module(name)
    gc.freeze()                                                         # a run need not collect what we hold
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)      # by python -m: they are
    assert threading.active_count() == 1
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)                       # no launcher is waited for
    link = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    while True:
        text, files, _, _ = socket.recv_fds(link, 2 ** 16, 3)
        if not text:
            return
        if os.fork() == 0:
            link.close()
            launch(json.loads(text), *files)
        for file in files:
            os.close(file)


def launch(run, stdout, stderr, status):
    """Be a launcher: fork the ranks, write our process id, and at their end the exit status, to `status`.

    Like torchrun, it ends all ranks when one fails. Ranks and workers keep `status` open, so that after a
    kill its end is not read before all of them are gone.
    """
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for rank in range(run["ranks"]):
        if os.fork() == 0:
            if run["ranks"] > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["ranks"]),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(run["port"]))
            os.chdir(run["cwd"])
            be_script(run["argv"], run["module"], run["before"])
    for number in (signal.SIGINT, signal.SIGTERM):                         # sent to all, but for the ranks
        signal.signal(number, signal.SIG_IGN)
    os.write(status, f"{os.getpid()}\n".encode())
    code = 0
    for _ in range(run["ranks"]):
        code = code or os.waitstatus_to_exitcode(os.wait()[1])
        if code:
            break
    os.write(status, f"{code}\n".encode())
    if code and run["ranks"] > 1:
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def be_script(argv, module, before):
    """End as `python script.py` does, but for freeing all objects one by one, which takes a while."""
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    code = 0
    try:
        exec(before, {})
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


class Run:
    """A script, or a module as support.data, in processes of its own, running in the background; `flags` are
    what a user would type; forked runs begin with the Python code `before`, others take flags of torchrun."""

    def __init__(self, script, *flags, ranks=1, cwd=ROOT, forked=True, before="", torchrun=()):
        module = None if script.endswith(".py") else script
        argv = [str(ROOT / script), *map(str, flags)]
        self.files = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.process = None
        if forked and sys.platform == "linux":
            ours, theirs = os.pipe()
            request = {"argv": argv, "module": module, "ranks": ranks, "port": port, "cwd": str(cwd),
                       "before": before}
            socket.send_fds(fork_server(), [json.dumps(request).encode()],
                            [*[file.fileno() for file in self.files], theirs])
            os.close(theirs)
            self.status = open(ours)
            self.pid = int(self.status.readline())
            return
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
        typed = ["-m", module, *argv[1:]] if module else argv
        command = [sys.executable, *([*launcher, *torchrun] if ranks > 1 else []), *typed]
        self.process = subprocess.Popen(command, env=environment(), cwd=cwd, start_new_session=True,
                                        stdout=self.files[0], stderr=self.files[1])
        self.pid = self.process.pid

    def kill(self, number=signal.SIGKILL):
        """Send a signal to all its processes."""
        os.killpg(self.pid, number)

    def wait(self):
        """Its CompletedProcess, with text output, once it has ended."""
        alarm = threading.Timer(300, self.kill)
        alarm.start()
        code = self.process.wait() if self.process else int(self.status.readline() or -signal.SIGKILL)
        alarm.cancel()
        for file in self.files:
            file.seek(0)
        return subprocess.CompletedProcess((), code, *[file.read() for file in self.files])


def run_script(script, *flags, check=True, **how):
    """Run a script to its end; returns the CompletedProcess with text output."""
    result = Run(script, *flags, **how).wait()
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def kill_when(script, *flags, until, number=signal.SIGKILL, **how):
    """Start a script, send a signal (kill -9) to it and its ranks once `until()`; the CompletedProcess."""
    run = Run(script, *flags, **how)
    deadline = time.time() + 120
    while not until():
        assert time.time() < deadline, run.wait()
        time.sleep(0.003)
    run.kill(number)
    return run.wait()


def call(script, *flags):
    """A script's main in this process: starting Python and torch anew would take longer than most runs."""
    return script.main(script.get_args([str(flag) for flag in flags]))


def error_line(script, *flags):
    """What a script says of a user's mistake: one line beside its downloads, and exit status 2."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(said):
        runtime.run_script(script.main, lambda: script.get_args([str(flag) for flag in flags]))
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("downloading ")]
    assert caught.value.code == 2 and len(lines) == 1, said.getvalue()
    return lines[0]


def refused(words, function, *args, kind=runtime.UserError, **named):
    """Assert that a call is refused as a user's mistake, in one line that matches `words`."""
    with pytest.raises(kind, match=words) as caught:
        function(*args, **named)
    assert "\n" not in str(caught.value)


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
