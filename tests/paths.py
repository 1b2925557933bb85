"""For tests of ops and layers: the paths by which an op is computed on a CPU, its definition in fp64, errors, gradients."""
import contextlib

import pytest
import torch

from vision_kan import kernels
from vision_kan.kernels import backend, native

PATHS = ("native", "chunked", "reference", "compile")

BASES_BY_HAND = {"none": lambda u: 0 * u, "identity": lambda u: u, "gelu": lambda u: u * (1 + torch.erf(u / 2 ** 0.5)) / 2,
                 "silu": lambda u: u / (1 + torch.exp(-u)), "relu": lambda u: u.clamp(min=0),
                 "relu2": lambda u: u.clamp(min=0) ** 2}


def exact_linear(u, weight, grid, h):
    """The definition of rswaf_linear, in fp64: u [..., I], weight [O, I*G] -> [..., O]."""
    h = h.double() if isinstance(h, torch.Tensor) else h
    basis = 1 - torch.tanh((u.double().unsqueeze(-1) - grid.double()) / h) ** 2
    return torch.einsum("...ig,oig->...o", basis, weight.double().unflatten(1, (-1, grid.numel())))


def exact_activation(u, c, points, h, base="none", scale=None):
    """The definition of rswaf_activation, in fp64, one grid point at a time: u [..., I], c [groups, G] -> [..., I]."""
    each = u.shape[-1] // c.shape[0]
    group = torch.arange(u.shape[-1]) // each
    c, u = c.double()[group], u.double()                # [I, G]
    y = BASES_BY_HAND[base](u) * (1 if scale is None else scale.double()[group])
    for k, point in enumerate(points):
        y = y + c[:, k] * (1 - torch.tanh((u - point) / h) ** 2)
    return y


@contextlib.contextmanager
def through(path):
    """Compute every op by `path`, and fail where another path was taken."""
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
