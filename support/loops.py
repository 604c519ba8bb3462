"""What loops share, above all the two of training: lengths, ranks, skipped steps, logs, bars, saving."""
import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import threading
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support import runtime
from support.runtime import require


def duration(text):
    """argparse type: "5000" is steps, "270ep" is epochs; kept as text until the data set's size is known."""
    if not re.fullmatch(r"\d+(\.\d+)?ep|\d+", text):
        raise argparse.ArgumentTypeError(f"must be steps as in 5000 or epochs as in 2.5ep, not {text}")
    return text


def to_steps(text, steps_per_epoch):
    """A `duration` in steps."""
    return round(float(text[:-2]) * steps_per_epoch) if text.endswith("ep") else int(text)


def micro_batch_size(global_batch_size, accumulation):
    """Samples of one forward pass: the global batch over ranks and accumulation."""
    passes = runtime.world_size() * accumulation
    require(global_batch_size % passes == 0, f"--global-batch-size {global_batch_size} cannot be shared by "
            f"{runtime.world_size()} ranks with --accumulation {accumulation}; choose a multiple of {passes}")
    return global_batch_size // passes


def fit_batch(args, dataset):
    """With --init-from, a set smaller than --global-batch-size lowers that, to what the ranks can share."""
    passes = runtime.world_size() * args.accumulation
    most = len(dataset) // passes * passes
    if args.init_from and args.global_batch_size > len(dataset):
        require(most, f"{dataset.name} has {len(dataset)} {dataset.kind}s, too few for "
                      f"{runtime.world_size()} ranks and --accumulation {args.accumulation}; lower that")
        runtime.print_main(f"--global-batch-size {args.global_batch_size} is lowered to {most}, as "
                           f"{dataset.name} has {len(dataset)} {dataset.kind}s")
        args.global_batch_size = most


def distributed(module, device):
    """`module` in DistributedDataParallel: gradients are averaged over ranks, buffers are each rank's own."""
    wrapped = DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False                      # the flag of this name is deprecated since 2.13
    return wrapped


def report_skipped(step, in_a_row, logs, results_dir):
    """Say why `step` was skipped: the first scalar in `logs`, dicts of them, that is not finite. Raises
    `UserError` after ten in a row."""
    guilty = next(name for values in logs for name in values if not values[name].isfinite())
    runtime.print_main(f"step {step}: {guilty} is not finite, step skipped")
    require(in_a_row < 10, f"{guilty} was not finite in 10 steps in a row; weights may have grown too large "
                           f"before step {step - 9}: --resume an earlier checkpoint in {results_dir}, with a "
                           f"smaller --lr, or without --mixed-precision fp16 if that is on")


class Meters:
    """Means of named scalars between two log lines, and the speed. Only `means` waits for the device."""

    def __init__(self):
        self.values = collections.defaultdict(list)
        self.times = []

    def update(self, *logs):
        """Count in the dicts of scalar tensors of one step."""
        self.times.append(time.perf_counter())
        for values in logs:
            for name, value in values.items():
                self.values[name].append(value.detach().double())

    def means(self, batch_size):
        """The means over steps and ranks so far and "samples/s", a dict of floats. A collective. The speed is
        that between the first step and the last, so what comes before, such as validation, does not count."""
        report = {}
        if self.values:
            means = torch.stack([torch.stack(values).mean() for values in self.values.values()])
            report = dict(zip(self.values, runtime.all_reduce_mean(means).tolist()))
        if len(self.times) > 1:
            report["samples/s"] = batch_size * (len(self.times) - 1) / (self.times[-1] - self.times[0])
        return report

    def pop(self, batch_size):
        """`means`, and starts afresh. A collective."""
        report = self.means(batch_size)
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
        if not runtime.is_main():
            return
        if start_step >= length:
            print(f"done     step {start_step:,}, of {length:,}; to go on give a larger --length", flush=True)
        kept = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):      # a kill may tear the last line
                if json.loads(line)["step"] <= start_step:
                    kept.append(line + b"\n")
        with runtime.atomic(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=start_step + 1)

    def log(self, step, values, show=()):
        """Record the dict `values` (numbers or lists of them) for `step`; print those that `show` names."""
        if not runtime.is_main():
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        self.show(step, values, show)

    def early(self, step):
        """Whether `step` is one of this process's first, after which to `show` a sign of life."""
        return step - self.start_step in (1, 2, 5, 10, 20, 50)

    def show(self, step, values, names):
        """Print the status line: of `values` those in `names` ("loss/": all such), and the time left."""
        elapsed = time.perf_counter() - self.start_time
        remaining = elapsed / max(1, step - self.start_step) * (self.length - step)
        shown = [f"{name.removeprefix('loss/')} {values[name]:.4g}" for listed in names for name in values
                 if name == listed or listed.endswith("/") and name.startswith(listed)]
        eta = tqdm.format_interval(remaining)
        runtime.print_main(" | ".join([f"step {step}/{self.length}", *shown, f"ETA {eta}"]))


def watched(items, title, size=lambda item: 1, unit="files"):
    """Yield `items`, and show on rank 0 how many have passed: a bar on a terminal, elsewhere a line after a
    second and every half minute. size: how many of `unit` an item is."""
    total = len(items) if hasattr(items, "__len__") else None
    of = f" of {total:,}" if total else ""
    count = 0
    due = time.monotonic() + 1
    silent = None if runtime.is_main() else True          # None: silent if this is no terminal
    with tqdm(desc=title, total=total, unit=f" {unit}", leave=False, disable=silent) as bar:
        for item in items:
            count += size(item)
            bar.update(size(item))
            if bar.disable and time.monotonic() > due:
                runtime.print_main(f"{title}: {count:,}{of} {unit}")
                due = time.monotonic() + 30
            yield item


def sha256_of(path):
    """The sha256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    content = np.memmap(path, mode="r")
    for first in watched(range(0, len(content), 2 ** 26), f"hashing {path}", unit="times 64 MiB"):
        digest.update(content[first:first + 2 ** 26])
    return digest.hexdigest()


def print_table(rows, header):
    """Print `rows` (lists of cells) under `header` in aligned columns, on rank 0."""
    cells = [[str(cell) for cell in row] for row in [header, ["-" * len(name) for name in header], *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        runtime.print_main("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def rng_states():
    """The states of torch's global generators on every rank, as tensors that fit into a checkpoint."""
    return runtime.gather_objects([torch.get_rng_state(), *torch.cuda.get_rng_state_all()])


def restore_rng_state(states):
    """Restore what `rng_states` saved for this rank. Ranks that the saved run did not have start afresh."""
    if runtime.rank() < len(states):
        cpu, *cuda = states[runtime.rank()]
        torch.set_rng_state(cpu)
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)


def save_checkpoint(results_dir, step, checkpoint, keep=3):
    """Write step-STEP.pt on rank 0 and remove all but the newest `keep`. Returns its path. A collective."""
    path = pathlib.Path(results_dir) / f"step-{step:08d}.pt"             # names that sort by age
    if runtime.is_main():
        start = time.monotonic()
        with runtime.atomic(path) as temporary, open(temporary, "wb") as file, flushed(file):
            torch.save(checkpoint, file)
        seconds = time.monotonic() - start
        path.with_name(SLOW_SAVE).unlink(missing_ok=True)
        if seconds > 0.8 * min(grace(), 30):
            runtime.write_json(path.with_name(SLOW_SAVE), {"seconds": round(seconds, 1)})
            warn_of_slow_save(results_dir)
        for old in runtime.list_checkpoints(results_dir)[:-keep]:
            if old != path:
                old.unlink(missing_ok=True)
    runtime.barrier()
    return path


@contextlib.contextmanager
def flushed(file):
    """Within it the disk writes what `file` has got so far, rather than all of it at the end, in fsync."""
    done = threading.Event()

    def flush():
        while not done.wait(0.1):
            os.fsync(file.fileno())

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            done.set()
            flushing.result()                              # raises what the disk said


SLOW_SAVE = ".slow-save.json"                              # how long the last save took, if that was long


def check_results_dir(results_dir):
    """Before anything takes time: raise `UserError` where nothing can be written; `warn_of_slow_save`."""
    runtime.check_writable(results_dir, "--results-dir")
    warn_of_slow_save(results_dir)


def warn_of_slow_save(results_dir):
    """Say so if the last save in `results_dir` took longer than a signal leaves time for."""
    slow = pathlib.Path(results_dir, SLOW_SAVE)
    if slow.exists() and (seconds := runtime.read_json(slow)["seconds"]) > 0.8 * grace():
        runtime.print_main(f"warning: the last save took {seconds} s, but {grace()} s after a signal torchrun"
                           f" kills; start it with --shutdown-timeout {math.ceil(2 * seconds) + 10}")


def grace():
    """Seconds after which torchrun kills what it has passed a signal on to; infinite without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    command = pathlib.Path(f"/proc/{os.getppid()}/cmdline")              # torchrun's; on Linux
    given = command.exists() and re.search(rb"\0--shutdown[-_]timeout[\0=](\d+)", command.read_bytes())
    return int(given[1] if given else os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
