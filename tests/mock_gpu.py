"""A device that is not the CPU, for machines without one; in truth, it computes on the CPU.

Like a GPU it refuses to compute with tensors of both devices. So with `device("mock")`, whole scripts,
backward passes and optimizers included, show each tensor that is made in the wrong place. `Graph` stands for
torch.cuda.CUDAGraph: capturing computes nothing, and refuses what a CUDA graph cannot do; a replay repeats
the operations of the capture on the very same memory, whatever has become of Python's variables.
"""
import contextlib

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
BETWEEN_DEVICES = (aten._to_copy.default, aten.copy_.default)
NEVER_MIXED = (aten.cat.default, aten.stack.default)        # not even with scalars that lie on the CPU


class Module(backend_registration._DummyBackendModule):
    """What torch asks about the device."""

    def get_amp_supported_dtype(self):
        """The dtypes of autocast."""
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("mock", Module())
MOCK = torch.device("mock", 0)


class OnMock(torch.Tensor):
    """A tensor on the device; `inner` holds its values."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=MOCK)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):                      # torch.save, which torch.load brings to the CPU
        return self.inner.__reduce_ex__(protocol)

    def tolist(self):
        """torch has none for subclasses."""
        return self.cpu().tolist()


class Mock(TorchDispatchMode):
    """`with Mock():` tensors can be made on the device."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)           # torch.tensor: made here, then moved
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """The result of any operator, on the device that it belongs to."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_mock = {id(x.inner): x for x in tensors if isinstance(x, OnMock)}
    if on_mock and function not in BETWEEN_DEVICES:
        mixed = [x for x in tensors if not isinstance(x, OnMock) and (x.dim() or function in NEVER_MIXED)]
        assert not mixed, f"{function} of tensors on both devices: {[(x.device, x.shape) for x in tensors]}"
    target = tensors[0].device if tensors else torch.device("cpu")
    if function not in BETWEEN_DEVICES[1:]:
        target = torch.device(kwargs.get("device") or (MOCK if on_mock else "cpu"))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if Graph.capturing:
        Graph.check(function, tensors, target)
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnMock) else x, (args, kwargs))
    if function is aten._fused_sdp_choice.default:
        return 0                                            # the attention that is made of other operators

    def wrapped(x):
        if not isinstance(x, torch.Tensor) or target.type == "cpu":
            return x
        return on_mock.get(id(x)) if id(x) in on_mock else OnMock(x)        # itself, if changed in place
    if Graph.capturing:
        return tree_map(wrapped, Graph.capturing.record(function, args, kwargs))
    return tree_map(wrapped, function(*args, **kwargs))


class Graph:
    """torch.cuda.CUDAGraph, by recording operators and repeating them."""
    capturing = None

    def __init__(self):
        self.calls = []                                     # (operator, args, kwargs, what it has returned)

    @classmethod
    @contextlib.contextmanager
    def graph(cls, graph, pool=None):
        """torch.cuda.graph"""
        cls.capturing = graph
        try:
            yield
        finally:
            cls.capturing = None

    @staticmethod
    def check(function, tensors, target):
        """Raise for what a CUDA graph forbids, or would do once only."""
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            waits = any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])           # masks
        assert not waits, f"{function} in a graph: the host waits for values"
        assert torch.Tag.nondeterministic_seeded not in function.tags, f"{function} in a graph: random"
        assert all(isinstance(x, OnMock) for x in tensors) and target.type != "cpu", \
            f"{function} in a graph: what the CPU computes or copies is not repeated"

    def record(self, function, args, kwargs):
        """Note a call; returns memory for its result, with no values in it yet."""
        if any(result.alias_info for result in function._schema.returns):   # a view; or in place
            out = args[0] if function._schema.is_mutable else function(*args, **kwargs)
        else:
            def empty(x):
                return torch.zeros_like(x) if isinstance(x, torch.Tensor) else x
            out = function(*tree_map(empty, args), **tree_map(empty, kwargs))
        self.calls.append((function, args, kwargs, out))
        return out

    def replay(self):
        """Repeat all of it."""
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Undistributed(torch.nn.Module):
    """What DistributedDataParallel is for one process; its own knows only real devices."""

    def __init__(self, module, device):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        """That of the module."""
        return self.module(*args, **kwargs)

    def no_sync(self):
        """Nothing to wait for."""
        return contextlib.nullcontext()
