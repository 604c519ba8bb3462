"""What a script still does when somebody ends it: Ctrl-C, a scheduler, torchrun. No work is lost.

    SIGINT     Ctrl-C, which a terminal sends to a whole process group, torchrun to its ranks' groups
    SIGTERM    kill, scancel, torchrun; Slurm sends it twice within milliseconds, to some or all processes
    SIGKILL    follows after a time of grace, torchrun's of 30 s, and cannot be answered

A training loop asks a `StopRequest` once a step and saves. Elsewhere a signal raises `Stopped`: files are
whole or not there (see `runtime.atomic`), and one line says what is kept. Processes that load data hear none.
"""
import atexit
import contextlib
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

import torch
import torch.distributed as dist

BOTH = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """Raised by signal `number`, which ends the script; `kept` is what is said then of its work."""

    def __init__(self, number, kept):
        self.number = number
        self.kept = kept


@contextlib.contextmanager
def keeping(what):
    """Within it, a signal that ends the script says `what`: that parts are stored, and how to go on."""
    try:
        yield
    except Stopped as stopped:
        stopped.kept = what
        raise


class StopRequest:
    """Turns SIGTERM and SIGINT into a question that the loop asks once a step, so that it can save first.

    With at_once, where there is nothing to save, they raise `Stopped`. Later ones change nothing, as machines
    send two; but Ctrl-C a second after the first is a person's impatience, and raises it, too.
    """

    def __init__(self, at_once=False):
        self.at_once = at_once
        self.received = 0
        self.interrupted = math.inf                        # when Ctrl-C came first
        self.agreed = 0                                    # the signal that all ranks stop for, 0 for none
        self.kept = "nothing saved: no new checkpoint, no result"
        for number in BOTH:
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
        if self.agreed and is_main():
            print(f"signal {self.agreed}: saving step {step} ...", flush=True)
        return self.agreed > 0

    def saved(self, path):
        """To be called after each save, for a signal that came meanwhile needs no second one: says which file
        to resume from, if a signal stops the run. A collective."""
        self.kept = f"but {path} is saved; --resume continues from there"
        self.agree()
        if self.agreed:
            line = f"signal {self.agreed}: saved {path}; --resume continues from here"
            tell_torchrun(line)
            if is_main():
                print(line, flush=True)

    def agree(self):
        """Set `agreed`, the same on every rank. A collective."""
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.agreed = int(flag)


# ---- torchrun: one screen for all ranks --------------------------------------------------------------------

def is_main():
    """Whether this is rank 0, before the process group is there, too."""
    return os.environ.get("RANK", "0") == "0"


def say_why(line):
    """Print why this process ends; of the ranks of torchrun rank 0 does, and torchrun for the others."""
    if is_main() or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)


def tell_torchrun(text):
    """Let torchrun say `text` in its own last lines, should this rank be the first to fail."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        facts = {"py_callstack": text, "timestamp": str(int(time.time()))}
        pathlib.Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": facts}}))


def grace():
    """Seconds after which torchrun kills what it has passed a signal on to; infinite without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    command = pathlib.Path(f"/proc/{os.getppid()}/cmdline")              # torchrun's; on Linux
    given = command.exists() and re.search(rb"\0--shutdown[-_]timeout[\0=](\d+)", command.read_bytes())
    return int(given[1] if given else os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))


# ---- the processes that load data --------------------------------------------------------------------------

@contextlib.contextmanager
def held():
    """Within it both signals wait. Processes that start there never get them: they inherit that."""
    if not hasattr(signal, "pthread_sigmask"):             # as on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_trainer(worker):
    """Make a worker of a DataLoader ignore both signals: its death would keep the trainer from saving. It
    ends with the trainer instead, which torch sees to but under forkserver, the default of Python 3.14."""
    for number in BOTH:
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
