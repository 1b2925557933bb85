"""The ways in which an op is computed on a CPU, for the tests of `kernels`."""
import contextlib

import pytest
import torch

from vision_kan import kernels
from vision_kan.kernels import backend, native

PATHS = ("native", "chunked", "reference", "compile")


@contextlib.contextmanager
def through(path):
    """Every op is computed by `path`, and the test fails where another one was taken."""
    if path in ("reference", "compile"):
        kernels.use(path)
        try:
            yield
        finally:
            kernels.use("auto")
        return
    if path == "native" and native.compiler() is None:
        pytest.skip("the C++ kernels need a C++ compiler")
    taken, resolve = [], backend.resolve

    def watched(*args):
        how = resolve(*args) if path == "native" else "chunked"
        taken.append(how)
        return how

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "resolve", watched)
        yield
    assert taken and set(taken) == {path}


def error(a, b):
    """Largest difference relative to the largest value."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.numel() else 0.0


def gradients(function, leaves, dy):
    """The value, and its gradients with respect to `leaves`."""
    y = function()
    return [y, *torch.autograd.grad(y, leaves, dy)]


def saved(function):
    """{address: bytes} of what the backward pass of `function` keeps, and the largest saved tensor's elements."""
    storages, largest = {}, 0

    def pack(tensor):
        nonlocal largest
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return storages, largest
