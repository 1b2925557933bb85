"""The backend that computes the ops of this package, chosen for the process by `use`.

auto       C++ kernels on a CPU (`native`), Triton kernels on a GPU, chunked PyTorch if those are missing
reference  PyTorch's operations and autograd, which keeps the basis in memory: for comparisons
cpu        as auto on a CPU
triton     Triton kernels
compile    the reference through torch.compile
"""
import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad

from vision_kan.kernels import native
from vision_kan.kernels.basis import MAX_POINTS

BACKENDS = ("auto", "reference", "cpu", "triton", "compile")
PLAIN = (torch.Tensor, torch.nn.Parameter)
CPU = torch.device("cpu")
# Values of the basis in memory at a time: on a CPU 1 MiB, about its L2 cache; on a GPU only a bound on memory.
CHUNK_VALUES = {"cpu": 2 ** 18}
CHUNK_VALUES_OTHER = 2 ** 27
# Inputs of an elementwise op at a time on a CPU: a few arrays of this size fit into its L2 cache.
CHUNK_INPUTS = 2 ** 17
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
_chosen = "auto"


def chunk_values(device: str) -> int:
    return CHUNK_VALUES.get(device, CHUNK_VALUES_OTHER)


def row_chunks(u: torch.Tensor) -> list[slice]:
    """Slices of the rows of u [T, I] for an elementwise op to work on at a time; one of all rows on a GPU."""
    step = max(1, CHUNK_INPUTS // max(1, u.shape[1])) if u.device.type == "cpu" else max(1, len(u))
    return [slice(start, start + step) for start in range(0, len(u), step)]


def check_groups(groups: int, channels: int) -> None:
    """Raises ValueError if the groups do not divide the channels."""
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a basis is computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def use(name: str) -> None:
    """Choose the backend of every op from now on. Raises ValueError for an unknown one, or one that cannot work here."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"{name} is not one of {', '.join(BACKENDS)}")
    if name == "triton" and not has_triton():
        raise ValueError("it needs the package triton, which is not installed: take auto")
    if name == "triton" and not (torch.cuda.is_available() or _interpreted()):
        raise ValueError("it needs a GPU, and PyTorch finds none here: take auto")
    _chosen = name


def chosen() -> str:
    """The backend last chosen by `use`; auto at first."""
    return _chosen


@functools.lru_cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from vision_kan.kernels.triton_common import INTERPRETED
    return INTERPRETED


def _is_for_triton(name: str, device: str) -> bool:
    return name == "triton" or (name == "auto" and device == "cuda" and has_triton())


def takes_triton(name: str, device: str, dtype: torch.dtype, num_points: int) -> bool:
    """Whether `resolve` chooses Triton, whose kernels compute in float32."""
    return _is_for_triton(name, device) and dtype != torch.float64 and num_points <= MAX_POINTS


def resolve(name: str, tensor: torch.Tensor, num_points: int, points: tuple[float, ...] | None = None,
            h: float | None = None, base: str | None = None, function: str = "rswaf") -> str:
    """The code that computes an op on `tensor` with backend auto, cpu or triton: "native", "triton", "compiled" or "chunked".

    num_points: of the grid.
    points, h: the grid if it is fixed, else None.
    base: the base function of an activation.
    function: its basis."""
    device, dtype = tensor.device.type, tensor.dtype
    if function != "rswaf":
        return "compiled" if device == "cuda" and has_triton() else "chunked"
    if takes_triton(name, device, dtype, num_points):
        return "triton"
    if device == "cpu" and dtype != torch.float64 and points is not None and h is not None and native.supports(points, h) \
            and native.library(len(points), base) is not None:
        return "native"
    return "chunked"


def compiled(function: Callable, *constants: Any) -> Any:
    """`function` of tensors, and of these hashable constants after them, through torch.compile. Dynamo gives up on a code object
    after eight variants, and a process may have more: so each of these, with and without gradients, has one of its own."""
    return _compiled(function, constants, torch.is_grad_enabled())


@functools.cache
def _compiled(function: Callable, constants: tuple, grad: bool) -> Any:
    def call(*tensors: torch.Tensor | None) -> torch.Tensor:
        return function(*tensors, *constants)

    return torch.compile(FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__))


def _constant_in_graphs(function: Callable) -> Callable:
    """Makes Dynamo call the function while it traces, instead of tracing into it. `torch.compiler.assume_constant_result` does
    the same, but would import Dynamo in every run."""
    function._dynamo_marked_constant = True     # type: ignore[attr-defined]
    return function


@_constant_in_graphs
def exporting() -> bool:
    """Whether torch.export is running, strict or not: its graph must consist of PyTorch's own operations, for any batch size.

    `torch.compiler.is_exporting()` is also true under torch.compile before torch 2.12. The flag behind it is not."""
    return torch.compiler._is_exporting_flag


def intercepted(*tensors: torch.Tensor | None) -> bool:
    """Whether something intercepts an op on `tensors` in PyTorch's dispatcher or differentiates through it: torch.compile,
    torch.jit.trace, a mode (FakeTensor, FLOP counter, make_fx), a tensor subclass, or what `transformed` names. Otherwise an
    autograd.Function around the kernels computes the same at a fraction of a custom op's host time."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() \
            or torch._C._is_tracing() or transformed():
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg() or tensor._is_zerotensor()):
            return True
    return False


def intercepted_backward(dy: torch.Tensor, *saved: torch.Tensor | None) -> bool:
    """Whether a backward pass is `intercepted` or a `differentiable_backward`."""
    return intercepted(dy, *saved) or torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy)


def device_type(tensor: torch.Tensor) -> str:
    """`tensor.device.type`, which makes its string anew on every call: 8 us of a training step on the host."""
    return "cuda" if tensor.is_cuda else "cpu" if tensor.device == CPU else tensor.device.type


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Autocast's dtype if it is on, else the tensor's own."""
    device = device_type(tensor)
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):      # as on meta
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """No autocast on the tensor's device, for code that nothing traces: a sixth of the host time of `torch.autocast`."""
    return (torch._C._ExcludeDispatchKeyGuard(AUTOCAST) if tensor.is_cuda or tensor.is_cpu
            else torch.autocast(tensor.device.type, enabled=False))


# These check before they call, because a call that changes nothing costs the host as much as one that does.
def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[..., I] -> contiguous [T, I]."""
    width = tensor.shape[-1]
    return tensor.view(-1, width) if tensor.is_contiguous() and width else tensor.reshape(-1, width).contiguous()


@_constant_in_graphs
def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active, which the kernels don't support."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_backward(dy: torch.Tensor) -> bool:
    """Whether a backward pass is itself differentiated, transformed or batched (`is_grads_batched`), so that the kernels cannot
    compute it."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed()
                                                  or torch._C._functorch.is_legacy_batchedtensor(dy))


def gradients(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], needs: Sequence[bool],
              dy: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of function(*inputs), a composition of PyTorch's operations; they can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: if one input is computed from another, the gradient through that path must not be added here
        own = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor, need in zip(own, needs) if need and tensor is not None]
        found = iter(torch.autograd.grad(function(*own), wanted, dy, create_graph=again, allow_unused=True))
    return [next(found) if need and tensor is not None else None for tensor, need in zip(own, needs)]


def describe(device: str, grids: Sequence[tuple] = ()) -> str:
    """A phrase that says what computes the ops on `device` ("cpu", "cuda", ...), in eager mode and compiled.

    grids: for each layer, the arguments of `resolve` after the tensor; without any: a grid that the kernels support."""
    if _chosen in ("reference", "compile"):
        return {"reference": "plain PyTorch, the basis kept in memory", "compile": "plain PyTorch through torch.compile"}[_chosen]
    in_cpp = not grids or any(len(grid) < 5 or grid[4] == "rswaf" for grid in grids)       # with a compiler
    if in_cpp and device == "cpu" and native.compiler() is None and not _is_for_triton(_chosen, device):
        return "chunked PyTorch, slower than the C++ kernels, which need a C++ compiler (g++ or clang++)"
    layer: Any = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    ways = {resolve(_chosen, layer, *grid) for grid in grids}
    if not ways:
        ways = {"triton" if _is_for_triton(_chosen, device) else "native" if device == "cpu" else "chunked"}
    other = "chunked PyTorch" if device != "cpu" and not _is_for_triton(_chosen, device) else (
        "chunked PyTorch, for a grid or a basis that the kernels don't take")
    return " and ".join({"native": "C++ kernels", "triton": "Triton kernels", "chunked": other,
                         "compiled": "PyTorch through torch.compile, for a basis that the kernels don't take"}[way]
                        for way in sorted(ways, reverse=True))
