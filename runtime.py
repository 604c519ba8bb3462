"""Everything that is not the paper: processes, user errors, checkpoints on disk, logs, downloads, pictures.

The other files are lectures on tokenizers and transformers; this one keeps the plumbing out of their way.
Nothing here knows what a token is. Two habits run through it:

* One code path with and without torchrun. A process group always exists (one process talks to itself through
  an in-memory store, no port needed), so training loops never ask "am I distributed?".
* A user's mistake raises `UserError` with one line that names the cause and the fix; `run_script` prints it
  and leaves with status 2. Tracebacks are for our own bugs.
"""
import argparse
import collections
import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import sys
import time
import urllib.error
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel


# ------------------------------------------------------------------------------------------------------------
# Errors that a user can fix
# ------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake of the user: one line, naming the flag or file and the way out of it."""


def require(condition, message):
    """Raise `UserError(message)` unless `condition` holds. For users' mistakes; `assert` is for ours."""
    if not condition:
        raise UserError(message)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviated flags, and one-line errors of exit status 2."""

    def __init__(self, description, **options):
        # The first paragraph of a script's docstring is its description; the commands below it would be
        # re-wrapped.
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def positive_int(text):
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def non_negative_int(text):
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def non_negative_float(text):
    """argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, not {text}")
    return value


def probability(text):
    """argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def run_script(main, get_args):
    """Entry point of every script: parse, run, and turn a `UserError` into one line and exit status 2."""
    args = get_args()
    try:
        main(args)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):             # a full disk, a folder that may not be written, ...
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or "while writing"
            error = f"{error.strerror}: {where}; free some space or use another path"
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# Processes and devices
# ------------------------------------------------------------------------------------------------------------

def setup_process_group(device="auto"):
    """Join torchrun's process group, or make one of a single process. Returns this process's `torch.device`.

    `device` is "auto" (CUDA where there is one), "cpu" or "cuda". Tensors on the CPU are reduced with gloo
    and those on a GPU with NCCL, in the same group, so that small control messages never wait for a GPU.
    """
    require(
        device != "cuda" or torch.cuda.is_available(),
        "--device cuda: no CUDA GPU is visible; use --device cpu",
    )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        require(local_rank < torch.cuda.device_count(),
                f"--nproc-per-node is larger than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
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


def print_facts(*facts):
    """Print (name, value) pairs, a line each, from rank 0: what is about to happen."""
    for name, value in facts:
        print_main(f"{name:<8} {value}")


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor):
    """Sum of `tensor` over the ranks, a new tensor without gradient on every rank."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_reduce_mean(tensor):
    """Mean of `tensor` over the ranks, a new tensor without gradient on every rank."""
    return all_reduce_sum(tensor) / world_size()


def distributed(module, device):
    """`module` in DistributedDataParallel: gradients are averaged over ranks, buffers are each rank's own."""
    options = dict(device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    try:
        return DistributedDataParallel(module, forward_sync_buffers=False, **options)      # torch >= 2.13
    except TypeError:
        return DistributedDataParallel(module, broadcast_buffers=False, **options)


def gather_objects(value):
    """The `value` of every rank, in rank order, on every rank. For small Python objects and CPU tensors."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def first_of_any_rank(value):
    """The first `value` of any rank that is not None, on every rank. Cheap when all are None."""
    found = torch.tensor(int(value is not None))
    if world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return next((v for v in gather_objects(value) if v is not None), None) if found else None


class StopRequest:
    """Turns SIGTERM and SIGINT into a question that the loop asks once a step, so that it can save before it
    goes.

    A second signal of the same kind kills at once, as people expect of a second Ctrl-C.
    """

    def __init__(self):
        self.signal = 0
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self):
        """The signal's number if any rank has received one, else 0. A collective, to be called in step."""
        flag = torch.tensor(self.signal)
        if world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def close(self):
        """Give the signals back to whoever had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# Precision
# ------------------------------------------------------------------------------------------------------------

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, mixed_precision):
    """The autocast context for `--mixed-precision` fp32, bf16 or fp16 on `device`."""
    dtype = AUTOCAST_DTYPES[mixed_precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: literal dicts of tensors and primitives, never pickled code
# ------------------------------------------------------------------------------------------------------------

def save_checkpoint(path, checkpoint):
    """Write atomically: a kill or a full disk leaves the old file or the whole new one, never a part."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Plain containers that Lightning files hold beside the weights. None of them runs code when it is unpickled.
HARMLESS = [argparse.Namespace, collections.defaultdict, collections.Counter, dict, list, set,
            pathlib.PosixPath, pathlib.PurePosixPath]


def load_checkpoint(path, trust=False, mmap=False):
    """Read a checkpoint file into CPU memory without running anything that is stored in it.

    mmap: read each tensor from disk when it is first used, so that optimizer states cost neither time nor
    memory where only the weights are wanted.

    Raises `UserError` for a missing or truncated file, and for a file that needs classes outside of PyTorch;
    those are unpickled only with `trust=True` (flag --trust-checkpoint), because unpickling can run any code
    its author wished.
    """
    path = pathlib.Path(path)
    require(path.exists(), f"checkpoint {path} does not exist; check the path")
    require(path.is_file(), f"checkpoint {path} is a folder; name the .pt or .ckpt file inside it")
    options = dict(map_location="cpu", mmap=mmap and zipfile.is_zipfile(path))     # old files are no zip
    try:
        if trust:
            return torch.load(path, weights_only=False, **options)
        with torch.serialization.safe_globals(HARMLESS):
            checkpoint = torch.load(path, weights_only=True, **options)
    except UserError:
        raise
    except Exception as error:
        foreign = re.search(r"(?:GLOBAL|global|class|type)\W+([A-Za-z_]\w*(?:\.\w+)+)", str(error))
        if foreign and "nsupported" in str(error):
            raise UserError(
                f"checkpoint {path} holds a pickled {foreign.group(1)}, which could run code when loaded; "
                f"nothing was executed. If you trust its author, add --trust-checkpoint"
            ) from None
        raise UserError(
            f"checkpoint {path} cannot be read: the file is truncated or is no PyTorch checkpoint "
            f"({type(error).__name__}); copy or download it again, or use an earlier one"
        ) from None
    require(
        isinstance(checkpoint, dict),
        f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary",
    )
    return checkpoint


def checkpoint_path(results_dir, step):
    """`results_dir`/step-00001234.pt: names that sort by age."""
    return pathlib.Path(results_dir) / f"step-{step:08d}.pt"


def list_checkpoints(results_dir):
    """All `step-*.pt` of a folder, oldest first."""
    return sorted(pathlib.Path(results_dir).glob("step-*.pt"))


def prune_checkpoints(results_dir, keep):
    """Remove all but the newest `keep` checkpoints of a run."""
    for path in list_checkpoints(results_dir)[:-keep]:
        path.unlink(missing_ok=True)


def latest_checkpoint(results_dir, what="checkpoint"):
    """The newest `step-*.pt` in `results_dir`. Raises `UserError` where there is none."""
    paths = list_checkpoints(results_dir)
    require(paths, f"no {what} (step-*.pt) in {results_dir}; train one first or give another path")
    return paths[-1]


def check_same(saved, current, what, ignore=()):
    """Raise `UserError` that lists each key in which the dict `saved` differs from `current`."""
    differing = [f"{key}: {saved.get(key)!r} there, {current.get(key)!r} here"
                 for key in sorted(saved.keys() | current.keys())
                 if key not in ignore and saved.get(key) != current.get(key)]
    require(not differing, f"{what} differs ({'; '.join(differing)})")


def check_flags(saved, args, names, source):
    """Raise `UserError` unless the flags `names` are in `args` what they were in the dict `saved`."""
    check_same({name: saved.get(name) for name in names}, {name: getattr(args, name) for name in names},
               f"--resume {source}: a flag that must stay as it was")


def load_state_strictly(module, state, source):
    """`module.load_state_dict(state)`, with an error that lists missing, extra and wrongly shaped names."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
              for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [
        f"not expected: {', '.join(extra)}"
    ] * bool(extra)
    problems += [f"wrong shapes: {'; '.join(sorted(shapes))}"] * bool(shapes)
    require(not problems, f"{source} does not fit this model; {'; '.join(problems)}")
    module.load_state_dict(state)


def rng_states():
    """The state of torch's global generators on every rank, as tensors that fit into a checkpoint."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return gather_objects(own)


def restore_rng_state(states):
    """Restore what `rng_states` saved for this rank. Ranks that the saved run did not have start afresh."""
    if rank() < len(states):
        torch.set_rng_state(states[rank()]["cpu"])
        if torch.cuda.is_available() and "cuda" in states[rank()]:
            torch.cuda.set_rng_state(states[rank()]["cuda"])


# ------------------------------------------------------------------------------------------------------------
# Pieces of a training loop that all trainers share
# ------------------------------------------------------------------------------------------------------------

def duration(text):
    """argparse type: "5000" is steps, "270ep" is epochs; kept as text until the data set's size is known."""
    if not re.fullmatch(r"\d+(\.\d+)?ep|\d+", text):
        raise argparse.ArgumentTypeError(f"must be steps as in 5000 or epochs as in 2.5ep, not {text}")
    return text


def to_steps(text, steps_per_epoch):
    """A `duration` in steps."""
    return round(float(text[:-2]) * steps_per_epoch) if text.endswith("ep") else int(text)


def resume_path(args):
    """The checkpoint to continue, or None. Without --resume a folder that holds a run is left alone."""
    existing = list_checkpoints(args.results_dir)
    if args.resume == "latest":
        if not existing:
            print_main(f"--resume: no checkpoint in {args.results_dir} yet, starting from scratch")
        return existing[-1] if existing else None
    require(
        args.resume or not existing,
        f"{args.results_dir} already holds a run up to {existing and existing[-1]}; continue "
        f"it with --resume, or choose another --results-dir",
    )
    return args.resume


def micro_batch_size(args):
    """Samples of one forward pass: --global-batch-size over ranks and --accumulation."""
    passes = world_size() * args.accumulation
    require(
        args.global_batch_size % passes == 0,
        f"--global-batch-size {args.global_batch_size} does not divide "
        f"by {world_size()} ranks x --accumulation {args.accumulation}",
    )
    return args.global_batch_size // passes


def last_sync(ddp, micro, args):
    """Context for micro-batch `micro`: gradients are averaged over ranks only after the last one."""
    return ddp.no_sync() if micro < args.accumulation - 1 else contextlib.nullcontext()


def add(values, name, value, weight):
    """values[name] += weight * value, without gradient and without waiting for the device."""
    values[name] = values.get(name, 0.0) + weight * torch.as_tensor(value).detach().float()


def apply_gradients(name, values, parameters, optimizer, scaler, max_norm=0.0):
    """Clip (0: do not), check and apply the gradients of the network `name`. Returns (guilty, numbers).

    values: scalars to report, name -> tensor. guilty: the first of them, or "grad_norm/`name`", that is not
    finite on any rank, in which case no weight has changed; else None. numbers: all of them as floats.
    Reading them is the step's one wait for the device.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    values = {**values, f"grad_norm/{name}": norm}
    stacked = torch.stack([torch.as_tensor(value, device=norm.device).float() for value in values.values()])
    numbers = dict(zip(values, stacked.tolist()))
    bad = next((key for key, number in numbers.items() if not math.isfinite(number)), None)
    if scaler.is_enabled() and bad == f"grad_norm/{name}" and scaler.get_scale() > 1:
        del numbers[bad]  # fp16 is looking for its scale: `scaler.step` skips by itself
        bad = None
    guilty = first_of_any_rank(bad)
    if guilty is None:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return guilty, numbers


class Meters:
    """Averages of named numbers between two log lines. `sums` belongs into a checkpoint, for each rank."""

    def __init__(self):
        self.sums = {}

    def update(self, numbers):
        """Count a dict of floats once more."""
        for name, value in numbers.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def pop(self):
        """The averages over steps and ranks, in a dict; starts afresh. A collective."""
        everyone, self.sums = gather_objects(self.sums), {}
        return {
            name: sum(s[name][0] / s[name][1] for s in everyone if name in s)
            / sum(name in s for s in everyone)
            for name in everyone[0]
        }


def skip_or_stop(step, guilty, in_a_row, results_dir):
    """Report a step skipped because `guilty` was not finite; raise `UserError` after ten in a row."""
    print_main(f"step {step}: {guilty} is not finite, step skipped ({in_a_row} in a row)")
    require(
        in_a_row < 10,
        f"{guilty} was not finite in 10 steps in a row; the checkpoints in {results_dir} are "
        f"sound; try a smaller --lr, or --mixed-precision bf16 or fp32",
    )


@contextlib.contextmanager
@torch.no_grad()
def averaged_weights(model, averages):
    """Within the context `model` has the weights `averages` (by name); then, bit for bit, its own again."""
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.copy_(averages[name])
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.copy_(raw[name])


# ------------------------------------------------------------------------------------------------------------
# Logs
# ------------------------------------------------------------------------------------------------------------

class Logger:
    """Writes one status line to the screen and the same numbers to metrics.jsonl (and TensorBoard if
    installed).

    Only rank 0 writes. A resumed run drops the lines that were logged after its checkpoint: it will log them
    again.
    """

    def __init__(self, results_dir, total_steps, start_step=0):
        self.total_steps, self.start_step, self.start_time = total_steps, start_step, time.perf_counter()
        self.directory, self.tensorboard = pathlib.Path(results_dir), None
        if not is_main():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines()
                    if line.endswith("}") and json.loads(line)["step"] <= start_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self.path)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(str(self.directory / "tensorboard"), purge_step=start_step + 1)
        except ImportError:
            pass

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
        elapsed = time.perf_counter() - self.start_time
        remaining = elapsed / max(1, step - self.start_step) * (self.total_steps - step)
        shown = " | ".join(f"{name} {format_number(values[name])}" for name in show if name in values)
        print(f"step {step}/{self.total_steps} | {shown} | ETA {format_seconds(remaining)}", flush=True)

    def image(self, step, name, image):
        """Write the uint8 array `image` (H, W, 3) to `name`-STEP.png and to TensorBoard."""
        if is_main():
            save_png(self.directory / f"{name}-{step:08d}.png", image)
            if self.tensorboard:
                self.tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self):
        """Flush what TensorBoard holds back."""
        if self.tensorboard:
            self.tensorboard.close()


def format_number(value):
    """Four significant digits for the status line, integers whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_seconds(seconds):
    """Seconds as people say them: 42s, 3m07s, 5h12m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def print_table(rows, header):
    """Print `rows` (lists of cells) under `header` in aligned columns, on rank 0."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    print_main("\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]))


def write_json(path, value):
    """Write `value` as indented JSON, atomically, on rank 0."""
    if is_main():
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------
# Parts on disk: long work that may be interrupted, by any number of ranks
# ------------------------------------------------------------------------------------------------------------

# The work is cut into numbered parts, the same ones whoever does them. A part is a file that appears whole,
# by renaming, so that "is it done?" means "does it exist?", also after a kill or on another number of ranks,
# and no list of what is done can disagree with the files.

def open_parts(folder, count, settings):
    """The parts, of 0 .. count - 1, that this rank has to make: every R-th of those missing. A collective.

    settings: all that decides what is in the parts, a dict for JSON. Raises `UserError` where `folder` holds
    parts of other settings.
    """
    folder, settings = pathlib.Path(folder), json.loads(json.dumps(settings))
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
    barrier()
    require(path.exists(), f"{folder} was made by rank 0, but rank {rank()} does not see it; "
                                   f"put it on a disk that all machines share")
    check_same(json.loads(path.read_text()), settings,
                       f"{folder} holds what an interrupted run has left; delete it, or continue with that "
                       f"run's settings: what it was made with")
    missing = [part for part in range(count) if not part_path(folder, part).exists()]
    missing = gather_objects(missing)[0]                     # rank 0 looked before anyone went on
    return missing[rank()::world_size()]


def part_path(folder, part):
    """The file of a part."""
    return pathlib.Path(folder) / f"{part:06d}.npy"


def save_part(folder, part, array):
    """Write `array` as the finished part `part`."""
    path = part_path(folder, part)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_parts(folder, count):
    """The arrays of all parts in order, one at a time."""
    return (np.load(part_path(folder, part)) for part in range(count))


# ------------------------------------------------------------------------------------------------------------
# Downloads
# ------------------------------------------------------------------------------------------------------------

def default_weights_dir():
    """Where downloaded weights are kept: $OPEN_MAGVIT2_WEIGHTS, or ~/.cache/open-magvit2."""
    return os.environ.get("OPEN_MAGVIT2_WEIGHTS") or str(pathlib.Path.home() / ".cache" / "open-magvit2")


def sha256_of(path):
    """The sha256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(url, weights_dir, sha256=None, flag="--weights-dir"):
    """Path of the file behind `url` in `weights_dir`, downloaded on first use and checked against `sha256`
    every time.

    `sha256` may be a prefix (torchvision's names carry the first 8 digits). `flag` is what the error names as
    the way to give a local copy. Raises `UserError` without a connection, or where the content is not what
    was published.
    """
    path = pathlib.Path(weights_dir).expanduser() / url.rsplit("/", 1)[1]
    for turn in (0, 1):                                      # rank 0 downloads, then the others find the file
        if (rank() == 0) == (turn == 0) and not path.exists():
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=is_main())
            except (urllib.error.URLError, OSError, RuntimeError) as error:
                raise UserError(
                    f"cannot download {url} ({error}); fetch it on another machine and put it at {path}, "
                    f"or point {flag} at your copy"
                ) from None
        barrier()
    if sha256 and not sha256_of(path).startswith(sha256):
        raise UserError(f"{path} is not the published file (its sha256 does not start with {sha256[:8]}); "
                        f"delete it, so that it is downloaded again from {url}")
    return path


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------

def to_uint8(images):
    """Float images in [-1, 1], any shape, to uint8 0..255, rounded (not truncated)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_png(path, array):
    """Write a uint8 array (H, W, 3) as PNG, atomically."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(array).save(temporary, format="PNG")
    os.replace(temporary, path)


def image_grid(images, columns, labels=None, scale=1, gap=2):
    """Lay out uint8 images (N, 3, H, W) row by row on white, `columns` to a row; returns a uint8 array (h, w,
    3).

    `labels`: one caption for each image, printed under it. `scale` enlarges small pictures by pixel
    repetition.
    """
    images = images.cpu().numpy().transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    caption = 14 if labels is not None else 0
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + caption) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=11)
    for i in range(count):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + gap + caption)
        canvas.paste(Image.fromarray(images[i]), (x, y))
        if caption:
            text = labels[i]
            while len(text) > 1 and draw.textlength(text, font=font) > width:
                text = text[:-1]
            draw.text((x + width / 2, y + height + caption / 2), text, fill="black", font=font, anchor="mm")
    return np.asarray(canvas)


# ------------------------------------------------------------------------------------------------------------
# Learning curves: python runtime.py runs/tokenizer runs/ar --values loss/l1 val_loss --output curves.png
# ------------------------------------------------------------------------------------------------------------

def read_metrics(results_dir):
    """metrics.jsonl of a run as {name: ([steps], [values])}, numbers only."""
    path = pathlib.Path(results_dir) / "metrics.jsonl"
    require(path.exists(), f"{path} does not exist; name the --results-dir of a training run")
    curves = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                steps, numbers = curves.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(value)
    return curves


def plot_curves(args):
    """Draw one panel for each of `args.values`, with a line for each run that has logged it, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("curves need matplotlib; install it with: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    runs = {pathlib.Path(path).name or str(path): read_metrics(path) for path in args.runs}
    known = sorted({name for curves in runs.values() for name in curves})
    unknown = [name for name in args.values if name not in known]
    require(not unknown, f"--values {' '.join(unknown)}: not logged; choose of {' '.join(known)}")
    figure, panels = pyplot.subplots(1, len(args.values), figsize=(4.2 * len(args.values), 3), squeeze=False)
    for panel, name in zip(panels[0], args.values):
        for run, curves in runs.items():
            if name in curves:
                panel.plot(*curves[name], label=run)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.tight_layout()
    pathlib.Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110, format="png")
    print(f"curves: {args.output}")


def get_args(argv=None):
    """Flags of `python runtime.py`, which draws learning curves."""
    parser = ArgumentParser("Draw the learning curves of one or more training runs.")
    parser.add_argument("runs", nargs="+", help="--results-dir of each run")
    parser.add_argument("--values", nargs="+", default=["loss/l1"],
                        help="names in metrics.jsonl, a panel each")
    parser.add_argument("--output", default="runs/curves.png", help="PNG to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(plot_curves, get_args)
