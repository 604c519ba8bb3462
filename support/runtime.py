"""Everything that is not the paper: user errors, flags, processes, files, downloads, what both loops share.

Nothing here knows what a token is. There is one code path with and without torchrun: a process group always
exists (one process talks to itself through an in-memory store), so no loop asks "am I distributed?".
"""
import argparse
import collections
import contextlib
import copy
import dataclasses
import difflib
import errno
import hashlib
import json
import math
import mmap
import os
import pathlib
import re
import shutil
import signal
import sys
import time
import traceback
import urllib.error

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---- 1. Errors that a user can fix, and flags --------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user: one line, naming the flag or file and the way out of it."""


def require(condition, message):
    """Raise `UserError(message)` unless `condition` holds. For users' mistakes; `assert` is for ours."""
    if not condition:
        raise UserError(message)


def run_script(main, get_args):
    """Entry point of every script: parse, run, and turn a user's mistake into one line and exit status 2.

    That is what we raise for a user (see `in_one_line`), what the disk says, and memory that does not suffice.
    Other exceptions are bugs and keep their traceback. A signal number that `main` returns becomes the exit status 128 + signal.
    """
    try:
        signal_number = main(get_args())
        sys.exit(128 + signal_number if signal_number else 0)
    except BrokenPipeError:                                # as in `python -m support.data | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        where = f"[rank {rank()}] " if world_size() > 1 else ""
        text = in_one_line(error)
        if text is None:
            raise
        print(f"error: {where}{text}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_one_line(error):
    """What a user can do about an exception, None if nothing: then it is a bug.

    Meant for users are a `UserError`, and a ValueError by a `raise` in our own files, such as that of a config
    or a model on a shape that it cannot take. A ValueError by any other line, say `a, b = 1, 2, 3`, is a bug.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "memory does not suffice; use a smaller --batch-size, --global-batch-size or --image-size"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: {error.filename or 'while writing'}; free some space"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}; check the path, or use another one"
    last = traceback.extract_tb(error.__traceback__)[-1]
    support = pathlib.Path(__file__).resolve().parent
    ours = pathlib.Path(last.filename).resolve().parent in (support, support.parent)
    meant = ours and isinstance(error, ValueError) and last.line.startswith("raise ")
    return str(error) if meant else None


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviated flags, and one-line errors of exit status 2."""

    def __init__(self, description, **options):
        # The first paragraph of a docstring is the description; the commands below it would be re-wrapped.
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message):
        """One line without the usage, a hint for a flag under its name in other projects, exit status 2."""
        if message.startswith("unrecognized arguments: --"):
            word = message.split()[2].split("=")[0].lower().replace("_", "-")
            close = difflib.get_close_matches(SYNONYMS.get(word, word), self._option_string_actions, 1)
            if close:
                message += f" (did you mean {close[0]}?)"
        self.exit(2, f"error: {message} (see --help)\n")


# What other projects call the flags of this one.
SYNONYMS = {"--epochs": "--length", "--max-epochs": "--length", "--steps": "--length", "--lr-rate": "--lr",
            "--batch-size": "--global-batch-size", "--learning-rate": "--lr", "--output-dir": "--results-dir",
            "--data-dir": "--data-path", "--checkpoint": "--ckpt", "--model": "--preset",
            "--seed": "--global-seed", "--cfg": "--cfg-scale", "--amp": "--mixed-precision"}


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


def duration(text):
    """argparse type: "5000" is steps, "270ep" is epochs; kept as text until the data set's size is known."""
    if not re.fullmatch(r"\d+(\.\d+)?ep|\d+", text):
        raise argparse.ArgumentTypeError(f"must be steps as in 5000 or epochs as in 2.5ep, not {text}")
    return text


def to_steps(text, steps_per_epoch):
    """A `duration` in steps."""
    return round(float(text[:-2]) * steps_per_epoch) if text.endswith("ep") else int(text)


def add_config_flags(group, config):
    """A flag for every field of the dataclass `config` that has a help text in its metadata.

    The defaults are the field values of `config`, a preset. A bool can be switched off by --no-NAME, a tuple
    takes several integers. metadata["flag"] is another name than that of the field.
    """
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        default = getattr(config, field.name)
        options = {"default": default, "dest": field.name, **field.metadata}
        name = options.pop("flag", f"--{field.name.replace('_', '-')}")
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options.update(type=bounded(int, 0, 2 ** 20), nargs="*")
        else:
            options["type"] = bounded(int, 0, 2 ** 20) if isinstance(default, int) else type(default)
        group.add_argument(name, help=options.pop("help"), **options)


def config_from_args(preset, args, **more):
    """The config `preset` with the fields that flags in `args` have set, and with those in `more`."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(preset)
              if "help" in field.metadata}
    values.update(more)
    return dataclasses.replace(preset, **{name: tuple(v) if isinstance(v, list) else v
                                          for name, v in values.items()})


# ---- 2. Processes, devices, precision ----------------------------------------------------------------------

def setup_process_group(device="auto"):
    """Join torchrun's process group, or make one of a single process. Returns this process's `torch.device`.

    `device` is "auto" (CUDA where there is one), "cpu" or "cuda". Tensors on the CPU are reduced with gloo
    and those on a GPU with NCCL, in the same group, so that small control messages never wait for a GPU.
    """
    require(device != "cuda" or torch.cuda.is_available(),
            "--device cuda: no CUDA GPU is visible; use --device cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        require(local_rank < torch.cuda.device_count(),
                f"--nproc-per-node is larger than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.allow_tf32 = False            # fp32 means fp32: ten bits would flip codes near 0
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **alone)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def rank():
    """This process's number, 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


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


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def print_facts(*facts):
    """Print (name, value) pairs, a line each, from rank 0: what is about to happen."""
    print_main("\n".join(f"{name:<8} {value}" for name, value in facts))


def on_main(function, *values):
    """`function(*values)`, computed on rank 0 for all ranks. A collective."""
    return gather_objects(function(*values) if is_main() else None)[0]


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
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def distributed(module, device):
    """`module` in DistributedDataParallel: gradients are averaged over ranks, buffers are each rank's own."""
    options = {"gradient_as_bucket_view": True, "device_ids": [device] if device.type == "cuda" else None}
    try:
        return DistributedDataParallel(module, forward_sync_buffers=False, **options)      # torch >= 2.13
    except TypeError:
        return DistributedDataParallel(module, broadcast_buffers=False, **options)


class StopRequest:
    """Turns SIGTERM and SIGINT into a question that the loop asks once a step, so that it can save first.

    A second signal of the same kind kills at once, as people expect of a second Ctrl-C.
    """

    def __init__(self):
        self.received = 0
        self.agreed = 0                                    # the signal that all ranks stop for, 0 for none
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        """The signal handler."""
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def requested(self, step):
        """Whether any rank has received a signal; `agreed` then names it, and step `step` is to be saved. A
        collective."""
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.agreed = int(flag)
        if self.agreed:
            print_main(f"signal {self.agreed}: saving step {step} ...")
        return self.agreed > 0


AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, mixed_precision):
    """The autocast context for `--mixed-precision` fp32, bf16 or fp16 on `device`."""
    dtype = AUTOCAST_DTYPES[mixed_precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def rng_states():
    """The states of torch's global generators on every rank, as tensors that fit into a checkpoint."""
    return gather_objects([torch.get_rng_state(), *torch.cuda.get_rng_state_all()])


def restore_rng_state(states):
    """Restore what `rng_states` saved for this rank. Ranks that the saved run did not have start afresh."""
    if rank() < len(states):
        cpu, *cuda = states[rank()]
        torch.set_rng_state(cpu)
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)


# ---- 3. Files ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as temporary:` a kill or a full disk leaves the old file or the whole new one.

    Yields a path beside `path` with the same suffix; what is written there takes the place of `path` at the
    end, or is removed if anything fails. Makes missing folders.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:                          # so torch.save tells of a full disk
        require(shutil.disk_usage(path.parent).free > 1 << 20, f"no space left to write {path}; free some")
        raise error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, atomically, on rank 0."""
    if is_main():
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The dict in a JSON file. Raises `UserError` that names the file if it holds anything else."""
    try:
        value = json.loads(pathlib.Path(path).read_text())
    except ValueError:
        value = None
    require(isinstance(value, dict), f"{path} is damaged or was not written by this project; remove it")
    return value


def lock(results_dir):
    """Let nobody else write to `results_dir` as long as the value returned lives; a kill frees it, too.

    Removes what a kill in the middle of a save has left there. Rank 0 holds the lock.
    """
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
    except OSError:
        raise UserError(f"another run writes to {folder}; stop it, or use another --results-dir") from None
    for temporary in folder.glob(".step-*.pt"):
        temporary.unlink()
    return file


def save_checkpoint(results_dir, step, checkpoint, keep=3):
    """Write step-STEP.pt on rank 0 and remove all but the newest `keep` of the run. Returns its path. A
    collective."""
    path = pathlib.Path(results_dir) / f"step-{step:08d}.pt"             # names that sort by age
    if is_main():
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)
        for old in list_checkpoints(results_dir)[:-keep]:
            if old != path:
                old.unlink(missing_ok=True)
    barrier()
    return path


def list_checkpoints(results_dir):
    """All `step-*.pt` of a folder, oldest first."""
    return sorted(pathlib.Path(results_dir).glob("step-*.pt"))


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


def sha256_of(path):
    """The sha256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def cache_dir():
    """Where downloads are kept: $OPEN_MAGVIT2_WEIGHTS, or ~/.cache/open-magvit2."""
    return os.environ.get("OPEN_MAGVIT2_WEIGHTS") or os.path.expanduser("~/.cache/open-magvit2")


def main_first(function):
    """`function()` on every rank, on rank 0 before the others: it downloads, and they find the file."""
    result = function() if is_main() else None
    barrier()
    return result if is_main() else function()


def fetch(url, weights_dir=None, sha256=None):
    """Path of the file behind `url` in `weights_dir` (`cache_dir()`), downloaded on first use with a bar.

    `sha256` (or its first digits) is checked as the file arrives. $HF_ENDPOINT names a mirror of
    huggingface.co. Raises `UserError` without a connection, or where the content is not what was published.
    """
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
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(f"cannot download {url} ({error}); fetch it on another machine and put it at {path}, "
                        f"or name the folder that holds it with --weights-dir") from None


# ---- 4. What both training loops share: the schedule, the size of a batch, logs ----------------------------

def learning_rate_factor(step, length, warmup, schedule, final, milestones=()):
    """What the peak learning rate is multiplied with in `step` (from 0) of `length`; changes in every step.

    After `warmup` steps: "constant"; "milestones" (x 0.1 from each one on); "cosine" or "linear", from 1 to
    `final`, which the last step has; "plateau", the transformer's: 1 for a twentieth of the steps, then
    linear to `final`. The warm-up is linear from 0, that of "plateau" from 0.005.
    """
    if step < warmup:
        start = 0.005 if schedule == "plateau" else 0.0
        return start + (1 - start) * step / warmup
    if schedule == "milestones":
        return 0.1 ** sum(step >= milestone for milestone in milestones)
    done = min(1, (step - warmup) / max(1, length - 1 - warmup))
    if schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return final + (1 - final) * (1 - done)
    if schedule == "plateau":
        return 1 - (1 - final) * max(0, done - 0.05) / 0.95
    return 1.0


def micro_batch_size(global_batch_size, accumulation):
    """Samples of one forward pass: the global batch over ranks and accumulation."""
    passes = world_size() * accumulation
    require(global_batch_size % passes == 0, f"--global-batch-size {global_batch_size} cannot be shared by "
            f"{world_size()} ranks with --accumulation {accumulation}; choose a multiple of {passes}")
    return global_batch_size // passes


@contextlib.contextmanager
def micro_batch(ddp, micro, args):
    """Context for the forward and backward pass number `micro` of the --accumulation passes of a step.

    Computes in --mixed-precision, and lets the ranks average their gradients after the last pass only.
    """
    waiting = ddp.no_sync() if micro < args.accumulation - 1 else contextlib.nullcontext()
    with waiting, autocast(next(ddp.parameters()).device, args.mixed_precision):
        yield


def report_skipped(step, in_a_row, logs, results_dir):
    """Say why `step` was skipped; raise `UserError` after ten in a row.

    logs: dicts of scalars of that step, of which the first that is not finite is to blame.
    """
    guilty = next(name for values in logs for name in values if not values[name].isfinite())
    print_main(f"step {step}: {guilty} is not finite, step skipped")
    require(in_a_row < 10, f"{guilty} was not finite in 10 steps in a row; weights may have grown too large "
                           f"before step {step - 9}: --resume an earlier checkpoint in {results_dir}, with a "
                           f"smaller --lr, or without --mixed-precision fp16 if that is on")


def describe_cost(networks, loss, bytes_a_parameter, args):
    """For --dry-run: a line on the memory and time of a step on a GPU, counted without one.

    loss(*networks): a scalar of one micro-batch, on fake tensors of a GPU, which have shapes but no values.
    Counted: `bytes_a_parameter` that learns, 4 of others (LPIPS); what autograd keeps for backward, eagerly;
    operations, backward as two forward passes (one, where nothing learns). A network may be None.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode           # here: importing them takes a second
    from torch.utils.flop_counter import FlopCounterMode
    kept = {}                                              # storages, each of them once

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    fakes = [network and copy.deepcopy(network).to("meta") for network in networks]
    dtype = AUTOCAST_DTYPES[args.mixed_precision]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), \
            FlopCounterMode(display=False) as counter, \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", enabled=False):          # at its end, all casts of weights are forgotten
        fakes = [fake and fake.to_empty(device="cuda") for fake in fakes]
        torch.set_autocast_dtype("cuda", dtype or torch.float16)
        torch.set_autocast_enabled("cuda", dtype is not None)          # torch.autocast asks for a real GPU
        try:
            total = loss(*fakes)                           # holds the graph, and so what is kept
        finally:
            torch.set_autocast_enabled("cuda", False)
    flops = state = 0
    for fake in filter(None, fakes):
        once = sum(counter.get_flop_counts()[type(fake).__name__].values())
        flops += args.accumulation * once * (3 if any(p.requires_grad for p in fake.parameters()) else 1.5)
        state += sum(p.numel() * (bytes_a_parameter if p.requires_grad else 4) for p in fake.parameters())
        for p in fake.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
    activations = sum(storage.nbytes() for storage in kept.values())
    gib = 2 ** 30
    return (f"{(state + activations) / gib:.3g} GiB a rank, {activations / gib:.3g} of them activations; "
            f"{flops / 1e12:.3g} TFLOP a step, {flops / 4e14:.2g} s at 40 % of an H100's peak in bf16")


class Meters:
    """Means of named scalars between two log lines, and the speed. Only `pop` waits for the device."""

    def __init__(self):
        self.values = collections.defaultdict(list)
        self.times = []

    def update(self, *logs):
        """Count in the dicts of scalar tensors of one step."""
        self.times.append(time.perf_counter())
        for values in logs:
            for name, value in values.items():
                self.values[name].append(value.detach().double())

    def pop(self, batch_size):
        """The means over steps and ranks and "samples/s", a dict of floats; starts afresh. A collective.

        The speed is that between the first step and the last, so what comes before, such as validation, does
        not count.
        """
        report = {}
        if self.values:
            means = torch.stack([torch.stack(values).mean() for values in self.values.values()])
            report = dict(zip(self.values, all_reduce_mean(means).tolist()))
        if len(self.times) > 1:
            report["samples/s"] = batch_size * (len(self.times) - 1) / (self.times[-1] - self.times[0])
        self.__init__()
        return report


class Logger:
    """A status line on the screen; the same numbers in metrics.jsonl, and in TensorBoard if it is installed.

    Only rank 0 writes. A resumed run drops the lines logged after its checkpoint: it will log them again.
    """

    def __init__(self, results_dir, length, start_step=0):
        self.length = length
        self.start_step = start_step
        self.start_time = time.perf_counter()
        self.path = pathlib.Path(results_dir) / "metrics.jsonl"
        self.tensorboard = None
        if not is_main():
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = []
        for line in lines:                                 # a kill may have torn the last one
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= start_step:
                    kept.append(line)
        with atomic(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=start_step + 1)

    def log(self, step, values, show=()):
        """Record the dict `values` (numbers or lists of numbers) for `step`; `show` names what to print."""
        if not is_main():
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        elapsed = time.perf_counter() - self.start_time
        remaining = elapsed / max(1, step - self.start_step) * (self.length - step)
        shown = " | ".join(f"{name} {values[name]:.4g}" for name in show if name in values)
        print(f"step {step}/{self.length} | {shown} | ETA {tqdm.format_interval(remaining)}", flush=True)


def print_table(rows, header):
    """Print `rows` (lists of cells) under `header` in aligned columns, on rank 0."""
    cells = [[str(cell) for cell in row] for row in [header, ["-" * len(name) for name in header], *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print_main("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
