"""What both training loops share: the size of a batch, skipped steps, the means that are logged and where.

Nothing here knows what is trained.
"""
import collections
import contextlib
import json
import pathlib
import time

import torch
from tqdm import tqdm

from support import runtime
from support.runtime import require


def micro_batch_size(global_batch_size, accumulation):
    """Samples of one forward pass: the global batch over ranks and accumulation."""
    passes = runtime.world_size() * accumulation
    require(global_batch_size % passes == 0, f"--global-batch-size {global_batch_size} cannot be shared by "
            f"{runtime.world_size()} ranks with --accumulation {accumulation}; choose a multiple of {passes}")
    return global_batch_size // passes


def report_skipped(step, in_a_row, logs, results_dir):
    """Say why `step` was skipped; raise `UserError` after ten in a row.

    logs: dicts of scalars of that step, of which the first that is not finite is to blame.
    """
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
        """The means over steps and ranks so far and "samples/s", a dict of floats. A collective.

        The speed is that between the first step and the last, so what comes before, such as validation, does
        not count.
        """
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
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        kept = []
        for line in lines:                                 # a kill may have torn the last one, or worse
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= start_step:
                    kept.append(line)
        with runtime.atomic(self.path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
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
        time_left = tqdm.format_interval(remaining)
        runtime.print_main(" | ".join([f"step {step}/{self.length}", *shown, f"ETA {time_left}"]))


def print_table(rows, header):
    """Print `rows` (lists of cells) under `header` in aligned columns, on rank 0."""
    cells = [[str(cell) for cell in row] for row in [header, ["-" * len(name) for name in header], *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        runtime.print_main("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
