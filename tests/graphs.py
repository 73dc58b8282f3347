# SPDX-License-Identifier: MIT
"""CUDA graphs for a machine without a GPU: the operations of a capture are recorded, undone, and done again at replay.

As there, a replay runs no Python: it repeats operations on the tensors of the capture, draws new random numbers, and
puts results where those of the capture lie. What reads a value on the host, or copies one from it, cannot be captured.
"""

import contextlib
import importlib
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "multinomial"}
# but not lift_fresh, of torch.tensor(1.0): Adam makes one where its counters lie on the CPU. See host_waits for ours.


def tensors(x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


class Graph(TorchDispatchMode):
    """What torch.cuda.CUDAGraph is to torch.cuda.graph."""

    captured = 0  # graphs of this process

    def __init__(self):
        super().__init__()
        self.operations, self.own, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, func._schema
        if schema.name.removeprefix("aten::") in HOST:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        named = {**dict(zip((x.name for x in schema.arguments), args, strict=False)), **kwargs}
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors(named.get(argument.name)):
                    storage = x.untyped_storage()
                    if storage._cdata not in self.own and storage._cdata not in self.before:
                        self.before[storage._cdata] = storage, storage.clone()
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        own = {x.untyped_storage()._cdata: x for x in tensors(out)}
        self.own |= {key: x for key, x in own.items() if key not in given}
        self.operations.append((func, args, kwargs, out))
        return out

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        self.random = torch.get_rng_state()
        self.__enter__()

    def capture_end(self):
        """Nothing has happened then, neither to tensors nor to the random state."""
        self.__exit__(None, None, None)
        for storage, values in self.before.values():
            storage.copy_(values)
        torch.set_rng_state(self.random)
        Graph.captured += 1

    def pool(self):
        return None

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph, stream=None, capture_error_mode="global"):
    """torch.cuda.graph."""
    assert stream is not None
    graph.capture_begin(capture_error_mode=capture_error_mode)
    try:
        yield
    except Exception as error:
        graph.__exit__(type(error), error, error.__traceback__)
        raise
    graph.capture_end()


def install(monkeypatch, *modules):
    """From here on Captured of these modules captures on the CPU, unless --no-cuda-graph is given."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(Stream=lambda: stream, current_stream=lambda: stream, stream=contextlib.nullcontext)
    fakes |= dict(CUDAGraph=Graph, graph=capture, manual_seed=torch.manual_seed)
    fakes |= dict(synchronize=lambda: None, empty_cache=lambda: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    adam = importlib.import_module("torch.optim.adam")  # torch.optim deletes the name
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    for module in modules:
        real, flags = module.Captured.__init__, lambda fn: getattr(fn, "func", fn).__self__.args
        init = lambda self, fn, on, real=real, flags=flags: real(self, fn, flags(fn).cuda_graph)
        monkeypatch.setattr(module.Captured, "__init__", init)
