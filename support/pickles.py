"""A checkpoint file, whoever wrote it: found, and read without running anything that is in it.

A checkpoint is a pickle, which may call any function of any package: in a stranger's file a risk, and an
obstacle where the package is not installed. Weights need none, so what a file names beside tensors becomes an
`Inert` object. The entries that models are made of are checked here: what goes wrong later is a bug.
"""
import collections
import contextlib
import pathlib
import pickle
import re
import struct
import traceback
import types
import zipfile
import zlib

import torch

from support import loops, runtime
from support.runtime import UserError, require

PUBLISHED = {                       # name: (repository of https://huggingface.co/TencentARC, file)
    "in1k-256": ("Open-MAGVIT2-Tokenizer-256-resolution", "imagenet_256_L.ckpt"),
    "in1k-128": ("Open-MAGVIT2-Tokenizer-128-resolution", "imagenet_128_L.ckpt"),
    "pt-256-2^18": ("Open-MAGVIT2-Tokenizer-262144-Pretrain", "pretrain256_262144.ckpt"),
    "pt-256-2^14": ("Open-MAGVIT2-Tokenizer-16384-Pretrain", "pretrain256_16384.ckpt"),
    "ucf-128": ("Open-MAGVIT2-Tokenizer-262144-Video", "video_128_262144.ckpt"),
    "AR-B": ("Open-MAGVIT2-AR-B-256-resolution", "AR_256_B.ckpt"),
    "AR-L": ("Open-MAGVIT2-AR-L-256-resolution", "AR_256_L.ckpt"),
    "AR-XL": ("Open-MAGVIT2-AR-XL-256-resolution", "AR_256_XL.ckpt")}
WEIGHTS = ("model", "ema", "discriminator", "state_dict")            # entries of {name: tensor}
KINDS = {**dict.fromkeys(WEIGHTS, dict), "format": str, "source": str, "preset": str, "step": int,
         "args": dict, "config": dict, "dataset": dict, "tokenizer": dict, "first_stage": dict,
         "rng": list, "classes": list}


class Inert:
    """Stands for what a file names and weights do not need, such as Lightning's schedules, callbacks and
    hyper-parameters: unpickling creates, calls and fills it, and nothing happens."""

    def __init__(self):
        self.__new__ = self                                # objects are created by cls.__new__(cls, ...)

    def __call__(self, *values, **named):
        return self

    append = extend = add = __setitem__ = __setstate__ = __call__


def rebuild(storage, offset, size, stride, *more):
    """A tensor. `more` is of autograd, or of the NPU on which it lay."""
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


class Unpickler(pickle._Unpickler):
    """Imports nothing. (Python's own: that in C takes as much memory as damaged bytes ask for, and that of
    torch.load(weights_only=True) refuses a file for what weights do not need.)"""
    MADE = {"collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor": rebuild, "torch._utils._rebuild_tensor_v2": rebuild,
            "torch_npu.utils.storage._rebuild_npu_tensor": rebuild,
            "torch._utils._rebuild_parameter": lambda tensor, *more: tensor,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda tensor, *more: tensor}     # of XLA

    def find_class(self, module, name):
        """What stands for the class or function `name` of `module`."""
        name = f"{module}.{name}"
        return self.MADE.get(name) or type(ascii(name)[1:-1], (Inert,), {})()


# What torch.load takes in place of Python's module pickle.
RESTRICTED = types.SimpleNamespace(__name__="restricted", Unpickler=Unpickler,
                                   load=lambda file, **how: Unpickler(file, **how).load())

# What damaged bytes raise where they are read.
DAMAGE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError, RuntimeError,
          MemoryError, OSError, EOFError, pickle.PickleError, struct.error, zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def guard(path):
    """Around ONE call that takes what a file holds: what goes wrong there becomes one `UserError`. Whatever
    can be wrong by itself, such as a model, does not belong inside."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, UserError) or isinstance(error, OSError) and error.filename:
            raise                                          # it speaks for itself, as "Permission denied" does
        if traceback.extract_tb(error.__traceback__)[-1].filename == __file__:
            raise                                          # a bug of this file
        raise UserError(f"{path} is damaged, cut off, of another version, or not what it claims to be "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:100]}); copy or download "
                        f"it again, or use another one") from None


def located(path):
    """The file that `path` means: of a published name, downloaded first; the newest step-*.pt of a folder."""
    path = pathlib.Path(path)
    if path.is_dir():
        return runtime.latest_checkpoint(path)
    if not path.exists() and str(path) in PUBLISHED:
        repository, file = PUBLISHED[str(path)]
        return runtime.fetch(f"https://huggingface.co/TencentARC/{repository}/resolve/main/{file}")
    names = [file.name for file in runtime.list_checkpoints(path.parent)[-10:]] or PUBLISHED
    require(path.exists(), f"checkpoint {path} does not exist; there are {', '.join(names)}")
    return path


def read(path, whole=False):
    """The dict in a checkpoint file, its tensors on the CPU, read from disk when they are first used; whole:
    now, so that a flipped bit is found wherever it is. Raises `UserError` for a missing or damaged file, and
    for entries that are not of their `KINDS`."""
    path = located(path)
    with guard(f"checkpoint {path}"):
        zipped = zipfile.is_zipfile(path)
        if zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            stored = Inert()                               # TorchScript, which torch.load would run in part
        else:
            stored = torch.load(path, "cpu", RESTRICTED, weights_only=False, mmap=zipped)
        archive = zipfile.ZipFile(path) if zipped and whole else None
        for name in loops.watched(archive.namelist() if archive else (), f"checking {path}", unit="parts"):
            with archive.open(name) as part:               # which compares checksums where it ends
                while part.read(1 << 20):
                    pass
    require(isinstance(stored, dict), f"checkpoint {path} is no dictionary of weights, but a pickled "
                                      f"{type(stored).__name__}")
    return checked(path, stored)


def checked(path, stored):
    """The dict of the file `path` with entries of their `KINDS`, or a `UserError`: what goes wrong later is a
    bug. Of files without one of our marks, the weights alone matter."""
    ours = "format" in stored
    for name in stored.keys() & (KINDS if ours else {"state_dict"}):
        require(isinstance(stored[name], (KINDS[name], types.NoneType)), f"{path} is damaged or of another "
                f"version: its {name} is a {type(stored[name]).__name__}")
        if name in WEIGHTS:
            stored[name] = named_tensors(f"{name} of {path}", stored[name] or {})
    inner = stored.get("first_stage")
    if ours and inner:
        inner.pop("first_stage", None)                     # it has none in turn
        stored["first_stage"] = checked(f"the tokenizer inside {path}", inner)
    return stored


def named_tensors(source, state):
    """`state`, {name: tensor}, without what DDP and torch.compile put before names; else a `UserError`."""
    for name, tensor in state.items():
        require(isinstance(name, str) and name.isprintable() and isinstance(tensor, torch.Tensor),
                f"{source} holds a {type(tensor).__name__} in place of the weights {ascii(name)}")
    return {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): state[name] for name in state}
