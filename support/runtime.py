"""What is not the paper: user errors, flags, processes, signals, files, downloads.

There is one code path with and without torchrun: a process group always exists (one process talks to itself
through an in-memory store), so no loop asks "am I distributed?".
"""
import argparse
import atexit
import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

# ---- 1. Errors that a user can fix, and flags --------------------------------------------------------------

class UserError(ValueError):
    """A mistake of the user: one line, naming the flag or file and the way out of it."""


def require(condition, message):
    """Raise `UserError(message)` unless `condition` holds. For users' mistakes; `assert` is for ours."""
    if not condition:
        raise UserError(message)


def run_script(main, get_args):
    """Entry point of every script. An error that is meant `in_one_line` ends with it and status 2, a bug with
    its traceback, a signal with status 128 + its number: the one that `main` returns, or one that arrives
    where nobody waits for it (see `StopRequest`)."""
    stop = StopRequest(at_once=True)
    try:
        try:
            number = main(get_args())
            sys.exit(128 + number if number else 0)
        except BrokenPipeError:                            # as in `python -m support.data | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            text = in_one_line(error)
            if text is None:
                tell_torchrun(traceback.format_exc())
                raise
            say_why(f"error: {text}")
            sys.exit(2)
    except Stopped as stopped:                             # out here: an error may just be on its way
        say_why(f"signal {stopped.number}: stopped, {stopped.kept}")
        sys.exit(128 + stopped.number)
    finally:
        stop.at_once = False                               # what is left to do is short
        if dist.is_initialized():
            dist.destroy_process_group()


def in_one_line(error):
    """What a user can do about an exception; None for a bug. Beside what disk and memory say, a `UserError`
    is meant for users, and a ValueError by a `raise` in our own files, as that of a config, but none by any
    other line, say `a, b = 1, 2, 3`."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "memory does not suffice; use a smaller --batch-size, --global-batch-size or --image-size"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: {error.filename or 'while writing'}; free some space"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}; check the path, or use another one"
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = pathlib.Path(last.filename).resolve().parent in pathlib.Path(__file__).resolve().parents[:2]
    meant = ours and isinstance(error, ValueError) and last.line.startswith("raise ")
    return str(error) if meant else None


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviated flags, and mistakes as `UserError`."""

    def __init__(self, description, **options):
        # The first paragraph of a docstring is the description; the commands below it would be re-wrapped.
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message):
        """One line without the usage, and a hint for a flag under its name in other projects."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            word = unknown[1].lower().replace("_", "-")
            commands = self._subparsers._group_actions[0].choices.values() if self._subparsers else ()
            flags = [flag for parser in (self, *commands) for flag in parser._option_string_actions]
            meant = SYNONYMS.get(word, word)
            if meant not in flags:
                meant = SYNONYMS.get(meant, meant)         # what one script calls so, another calls so
            close = difflib.get_close_matches(meant, flags, 1)
            if close:
                message += f" (did you mean {close[0]}?)"
        raise UserError(f"{message} (see --help)")


# What other projects call the flags of this one.
SYNONYMS = {"--epochs": "--length", "--max-epochs": "--length", "--steps": "--length", "--cfg": "--cfg-scale",
            "--lr-rate": "--lr", "--learning-rate": "--lr", "--batch-size": "--global-batch-size",
            "--output-dir": "--results-dir", "--data-dir": "--data-path", "--checkpoint": "--ckpt",
            "--model": "--preset", "--seed": "--global-seed", "--amp": "--mixed-precision",
            "--max-samples": "--num-samples", "--num-images": "--num-samples",
            "--num-samples": "--num-images"}


def bounded(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) in low .. high."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            limits = f"{low} or more" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value
    parse.__name__ = kind.__name__                         # argparse names it where int() itself fails
    return parse


positive_int = bounded(int, 1, 2 ** 31 - 1)
non_negative_int = bounded(int, 0, 2 ** 31 - 1)
non_negative_float = bounded(float, 0.0)
fraction = bounded(float, 0.0, 1.0)


def add_config_flags(group, config):
    """A flag for every field of the preset `config` that has a help text in its metadata: a bool is switched
    off by --no-NAME, a tuple takes several integers. metadata["flag"] is another name than the field's."""
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        default = getattr(config, field.name)
        options = {"default": default, "dest": field.name, **field.metadata}
        name = options.pop("flag", f"--{field.name.replace('_', '-')}")
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = bounded(int, 0, 2 ** 20) if isinstance(default, (int, tuple)) else type(default)
        if isinstance(default, tuple):
            options["nargs"] = "*"
        group.add_argument(name, help=options.pop("help"), **options)


def config_from_args(preset, args, **more):
    """The config `preset` with the fields that flags in `args` have set, and with those in `more`."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(preset)
              if "help" in field.metadata} | more
    return dataclasses.replace(preset, **{name: tuple(value) if isinstance(value, list) else value
                                          for name, value in values.items()})


# ---- 2. Processes, devices, precision ----------------------------------------------------------------------

def setup_process_group(device="auto"):
    """Join torchrun's process group, or make one of a single process; the `torch.device` of this process.
    device: "auto" (CUDA where there is one), "cpu" or "cuda". Tensors on the CPU are reduced by gloo, those
    on a GPU by NCCL, in the same group, so that small control messages never wait for a GPU."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    require(on_gpu or device != "cuda", "--device cuda: no CUDA GPU is visible; use --device cpu")
    if on_gpu:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        require(local_rank < torch.cuda.device_count(),
                f"--nproc-per-node is larger than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.allow_tf32 = False            # fp32 means fp32: ten bits would flip signs near 0
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        hook = sys.excepthook
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **alone)
        if alone:
            sys.excepthook = hook                          # or each line of a traceback began with [rank0]
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def rank():
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes, 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True in the one process that prints and writes files."""
    return rank() == 0


def print_main(*values):
    """Print from rank 0 only."""
    if is_main():
        print(*values, flush=True)


def print_facts(*facts):
    """Print (name, value) pairs, a line each, from rank 0: what is about to happen."""
    print_main("\n".join(f"{name:<8} {value}" for name, value in facts))


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def main_first(function):
    """`function()` on every rank, on rank 0 before the others: it downloads, and they find the file."""
    result = function() if is_main() else None
    barrier()
    return result if is_main() else function()


def on_main(function, *values):
    """`function(*values)`, computed on rank 0 for all ranks; all raise its `UserError`. A collective."""
    found = [None]
    if is_main():
        try:
            found = [function(*values)]
        except UserError as error:
            found = [error]
    if world_size() > 1:
        dist.broadcast_object_list(found)                  # the files of a data set are too much to gather
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def all_reduce_sum(tensor):
    """Sum of `tensor` over the ranks, a new tensor without gradient on every rank."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_reduce_mean(tensor):
    """Mean of `tensor` over the ranks, a new tensor without gradient on every rank."""
    return all_reduce_sum(tensor) / world_size()


def gather_objects(value):
    """The `value` of every rank, in rank order, on every rank. For small Python objects and CPU tensors."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, mixed_precision):
    """The autocast context for `--mixed-precision` fp32, bf16 or fp16 on `device`. Half precision is for
    GPUs: on CPUs torch 2.14 convolves 27 to 70 times slower than in fp32 (without AVX-512), or (with it) bf16
    makes garbage of the weight gradients of a 5 x 5 convolution on one pixel, of a conv3d of depth 2."""
    dtype = AUTOCAST_DTYPES[mixed_precision]
    warn_of_slow_half(device.type, mixed_precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@functools.cache
def warn_of_slow_half(device, precision):
    """Say once if `device` is a CPU that computes in this "bf16" or "fp16" by slow, old kernels."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    if device == "cpu" and supported and not supported():
        print_main(f"warning: this CPU has no instructions for {precision}: training is 5 to 22 times slower "
                   f"than with --mixed-precision fp32; half precision is for GPUs")


# ---- 3. Signals: no work is lost when somebody ends a script -----------------------------------------------

# SIGINT is Ctrl-C, to all processes of a terminal; SIGTERM that of kill, scancel and torchrun, of Slurm twice
# within milliseconds. SIGKILL follows after a time of grace, torchrun's of 30 s, and cannot be answered.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """Raised by signal `number`, which ends the script; `kept` is what is said then of its work."""

    def __init__(self, number, kept):
        self.number = number
        self.kept = kept


class StopRequest:
    """Turns signals into a question that a training loop asks once a step, so that it can save first. With
    at_once, where there is nothing to save, they raise `Stopped`: files are whole or not there. Later ones
    change nothing, but Ctrl-C a second after the first is impatience, and raises it, too."""

    def __init__(self, at_once=False):
        self.at_once = at_once
        self.received = 0
        self.interrupted = math.inf                        # when Ctrl-C came first
        self.agreed = 0                                    # the signal that all ranks stop for, 0 for none
        self.kept = "nothing saved: no new checkpoint, no result"
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        """The signal handler."""
        now = time.monotonic()
        is_first = not self.received
        self.received = self.received or number
        if number == signal.SIGINT:
            self.interrupted = min(self.interrupted, now)
        if is_first and self.at_once or number == signal.SIGINT and now > self.interrupted + 1:
            raise Stopped(number, self.kept)

    def requested(self, step):
        """Whether any rank has received a signal, and step `step` is to be saved. A collective."""
        self.agree()
        if self.agreed:
            print_main(f"signal {self.agreed}: saving step {step} ...")
        return self.agreed > 0

    def saved(self, path):
        """Say which file to resume from, if a signal stops the run. A collective. To be called after each
        save: a signal that came meanwhile needs no second one."""
        self.kept = f"but {path} is saved; --resume continues from there"
        self.agree()
        if self.agreed:
            line = f"signal {self.agreed}: saved {path}; --resume continues from here"
            tell_torchrun(line)
            print_main(line)

    def agree(self):
        """Set `agreed`, the same on every rank. A collective."""
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.agreed = int(flag)


def say_why(line):
    """Print why this process ends; of the ranks of torchrun rank 0 does, and torchrun for the others."""
    if is_main() or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)


def tell_torchrun(text):
    """Let torchrun say `text` in its own last lines, should this rank be the first to fail."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        facts = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": facts}))


def start_workers(loader):
    """`iter(loader)` of a DataLoader, whose workers inherit that signals wait, and never get them: their
    death would keep the trainer from saving."""
    if not hasattr(signal, "pthread_sigmask"):             # as on Windows
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_trainer(worker):
    """Let a worker ignore signals, too (under spawn, none were held), but end with its trainer, which torch
    sees to except under forkserver, Python 3.14's default."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@atexit.register
def end_workers():
    """As multiprocessing does next with those that an exception has left, but by a signal that they obey."""
    if hasattr(signal, "SIGCHLD"):                         # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # torch's handler would raise
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


# ---- 4. Files ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as temporary:` a kill or a full disk leaves the old file or the whole new one. What
    is written to `temporary`, beside `path` and with its suffix, takes its place at the end, or is removed if
    anything fails. Makes missing folders."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:               # of torch.save a RuntimeError, whose context it is
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.filename is None:
            raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder, flag="--output"):
    """Refuse a `folder`, which need not exist, before work is done for it if nothing can be written there."""
    place = next(each for each in pathlib.Path(folder, "file").absolute().parents if each.exists())
    require(place.is_dir() and os.access(place, os.W_OK),
            f"{flag}: {place} may not be written to, or is no folder; name another")


def write_json(path, value):
    """Write `value` as indented JSON, atomically, on rank 0."""
    if is_main():
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The dict in a JSON file. Raises `UserError` that names the file if it holds anything else."""
    value = None
    with contextlib.suppress(ValueError):
        value = json.loads(pathlib.Path(path).read_text())
    require(isinstance(value, dict), f"{path} is damaged or was not written by this project; remove it")
    return value


# What a kill leaves of the files that a training run writes by `atomic`.
REMAINS = re.compile(r"\.((step|reconstructions|samples)-\d+|metrics|tokens[-.\w]*)\.\d+\.\w+")


def lock(results_dir, flag="--results-dir"):
    """Let nobody else write to `results_dir` as long as the value returned lives, a file that rank 0 holds; a
    kill frees it, too. Removes what a kill in the middle of a save has left there."""
    if not is_main():
        return None
    folder = pathlib.Path(results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        import fcntl                                       # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)   # unlike flock: workers do not inherit it
    except ImportError:
        pass
    except (BlockingIOError, PermissionError):
        raise UserError(f"another run writes to {folder}; stop it, or use another {flag}") from None
    except OSError as error:                               # ENOLCK, ENOSYS, EOPNOTSUPP: some network disks
        print(f"warning: {folder} cannot be locked ({error.strerror}); start no second run in it", flush=True)
        return file
    for path in folder.iterdir():
        if REMAINS.fullmatch(path.name):
            if path.name.startswith(".step-"):
                print(f"removed  {path}, {path.stat().st_size / 1e6:.0f} MB of a save that a kill ended; give"
                      f" the next one more time, under torchrun by --shutdown-timeout", flush=True)
            path.unlink()
    return file


def list_checkpoints(results_dir):
    """All `step-NUMBER.pt` of a folder, oldest first. Others, such as a user's step-best.pt, are not ours."""
    paths = [path for path in pathlib.Path(results_dir).glob("step-*.pt") if path.stem[5:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def latest_checkpoint(results_dir, what="checkpoint"):
    """The newest `step-*.pt` in `results_dir`. Raises `UserError` where there is none."""
    paths = list_checkpoints(results_dir)
    require(paths, f"no {what} (step-*.pt) in {results_dir}; train one first or give another path")
    return paths[-1]


def check_same(saved, current, what, names=None):
    """Raise `UserError` that lists each key (of `names`, or all) in which two dicts differ."""
    differing = [f"{name}: {saved.get(name)!r} there, {current.get(name)!r} here"
                 for name in sorted(names or saved.keys() | current.keys())
                 if saved.get(name) != current.get(name)]
    require(not differing, f"{what} differs ({'; '.join(differing)})")


def cache_dir():
    """Where downloads are kept: $OPEN_MAGVIT2_WEIGHTS, or ~/.cache/open-magvit2."""
    return os.environ.get("OPEN_MAGVIT2_WEIGHTS") or os.path.expanduser("~/.cache/open-magvit2")


def fetch(url, weights_dir=None, sha256=None):
    """Path of the file behind `url` in `weights_dir` (`cache_dir()`), downloaded on first use and checked for
    its sha256, or the first digits of it. $HF_ENDPOINT names a mirror of huggingface.co. Raises `UserError`
    without a connection or the published content."""
    path = pathlib.Path(os.path.expanduser(weights_dir or cache_dir())) / url.rsplit("/", 1)[1]
    url = url.replace("https://huggingface.co", os.environ.get("HF_ENDPOINT", "https://huggingface.co"))

    def download():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=is_main())
        return path

    try:
        return main_first(download)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download {url} ({error}); put it at {path}, or name its folder: "
                        f"$OPEN_MAGVIT2_WEIGHTS, of networks of metrics and losses --weights-dir") from None
