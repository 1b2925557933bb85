"""Graphs on a CPU: what `captured.CudaGraphs` makes on a GPU, from a recorder below autograd."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS_THE_DEVICE = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
                    torch.ops.aten.is_nonzero.default)


class RecordedGraphs:
    """A graph keeps every operation with its arguments: scalars are frozen and memory is static, as in a CUDA graph."""

    def __init__(self, *place):
        self.graphs: list[RecordedGraph] = []

    def record(self, function: Callable[[], Any]) -> tuple["RecordedGraph", Any]:
        graph, random = RecordedGraph(), torch.get_rng_state()
        try:
            with graph:
                result = function()
        finally:        # the operations were computed too, for shapes and values: a CUDA graph's are not
            with torch.no_grad():
                for tensor, before in graph.written:
                    tensor.copy_(before)
            torch.set_rng_state(random)
        graph.close()
        self.graphs.append(graph)
        return graph, result


class RecordedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.written: list[tuple[Tensor, Tensor]] = []      # tensors from outside, and what was in them
        self.own: set[int] = set()                          # storages made by the graph
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS_THE_DEVICE:
            raise RuntimeError(f"{func} reads the device\nwhich a graph cannot")
        arguments = func._schema.arguments
        values = dict(zip((a.name for a in arguments), args)) | kwargs
        for argument in arguments:
            statistics = "batch_norm" in func._schema.name and argument.name.startswith("running_")    # its schema hides them
            if statistics or argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(values.get(argument.name)):
                    storage = tensor.untyped_storage().data_ptr()
                    if storage not in self.own and all(tensor is not seen for seen, _ in self.written):
                        self.written.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in _tensors([args, kwargs])}
        self.own |= {t.untyped_storage().data_ptr() for t in _tensors(out)} - inputs
        self.calls.append((func, args, kwargs, out))
        return out

    def close(self) -> None:
        self.written.clear()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs))):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [t for y in x for t in _tensors(y)] if isinstance(x, (tuple, list)) else []
