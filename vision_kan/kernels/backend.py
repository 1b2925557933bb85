"""Which code computes the ops of this package: one choice for the process, `use`.

auto       C++ kernels on a CPU (`native`), Triton kernels on a GPU, chunked PyTorch where those are missing
reference  plain PyTorch and its autograd, which keeps the basis in memory: for comparisons
cpu        as auto on a CPU
triton     Triton kernels
compile    the reference through torch.compile
"""
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad

from vision_kan.kernels import native
from vision_kan.kernels.basis import MAX_POINTS

BACKENDS = ("auto", "reference", "cpu", "triton", "compile")
PLAIN = (torch.Tensor, torch.nn.Parameter)
# Values of the basis that exist at once: 1 MiB on a CPU, which stays near its L2 cache; on a GPU only a bound on memory.
CHUNK_VALUES = {"cpu": 2 ** 18}
CHUNK_VALUES_OTHER = 2 ** 27
_chosen = "auto"


def chunk_values(device: str) -> int:
    return CHUNK_VALUES.get(device, CHUNK_VALUES_OTHER)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a basis is computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def use(name: str) -> None:
    """Choose the backend of every op from now on. Raises: ValueError for an unknown one, or one that cannot work here."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"{name} is not one of {', '.join(BACKENDS)}")
    if name == "triton" and not has_triton():
        raise ValueError("it needs the package triton, which is not installed: take auto")
    if name == "triton" and not (torch.cuda.is_available() or _interpreted()):
        raise ValueError("it needs a GPU, and PyTorch finds none here: take auto")
    _chosen = name


def chosen() -> str:
    """What `use` was last given; auto at first."""
    return _chosen


@functools.lru_cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from vision_kan.kernels.triton_common import INTERPRETED
    return INTERPRETED


def _is_for_triton(name: str, device: str) -> bool:
    return name == "triton" or (name == "auto" and device == "cuda" and has_triton())


def resolve(name: str, tensor: torch.Tensor, num_points: int, points: tuple[float, ...] | None = None,
            h: float | None = None, base: str | None = None) -> str:
    """native, triton or chunked: what computes an op on `tensor`, for backend auto, cpu or triton.

    num_points: of the grid; points, h: the grid where it is fixed, else None. base: of an activation."""
    device, dtype = tensor.device.type, tensor.dtype
    if dtype == torch.float64:                  # the kernels compute in float32
        return "chunked"
    if _is_for_triton(name, device):
        return "triton" if num_points <= MAX_POINTS else "chunked"
    if device == "cpu" and points is not None and h is not None and native.supports(points, h) \
            and native.library(len(points), base) is not None:
        return "native"
    return "chunked"


def _constant_in_graphs(function: Callable) -> Callable:
    """Dynamo calls the function while it traces, in place of tracing into it (`torch.compiler.assume_constant_result`, which
    would import Dynamo for every run)."""
    function._dynamo_marked_constant = True     # type: ignore[attr-defined]
    return function


@_constant_in_graphs
def exporting() -> bool:
    """Whether torch.export is at work, strict or not: its graph is to be of PyTorch's own operations, for any batch size.

    Not `torch.compiler.is_exporting()`: torch 2.7 to 2.11 take it for True under torch.compile too. The flag behind it tells
    them apart, but for a strict export by torch 2.7, which Dynamo's own state knows."""
    if torch.compiler._is_exporting_flag:
        return True
    tracer = sys.modules.get("torch._dynamo.symbolic_convert")
    return tracer is not None and getattr(getattr(tracer.tls, "current_tx", None), "export", False)


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether an op on `tensors` must go through PyTorch's dispatcher, because something looks on there: torch.compile,
    torch.jit.trace, a mode (FakeTensor, FLOP counter, make_fx), a tensor that is more than its memory. An autograd.Function
    right around the kernels costs a fraction of a custom op's time on the host, and computes the same."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() \
            or torch._C._is_tracing():
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg() or tensor._is_zerotensor()):
            return True
    return False


# Each of these asks before it calls: a call that changes nothing costs the host as much as one that does.
def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[..., I] -> contiguous [T, I]."""
    width = tensor.shape[-1]
    return tensor.view(-1, width) if tensor.is_contiguous() and width else tensor.reshape(-1, width).contiguous()


@_constant_in_graphs
def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, which plain PyTorch knows and the
    kernels don't."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_backward(dy: torch.Tensor) -> bool:
    """Whether a backward pass is itself to be differentiated, transformed or done for many dy at once (`is_grads_batched`),
    so that the kernels cannot compute it."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed()
                                                  or torch._C._functorch.is_legacy_batchedtensor(dy))


def gradients(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], needs: Sequence[bool],
              dy: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of function(*inputs), a composition of PyTorch's operations, that can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # own aliases: one input may be computed from another, and that way's share is not ours to add
        own = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor, need in zip(own, needs) if need and tensor is not None]
        found = iter(torch.autograd.grad(function(*own), wanted, dy, create_graph=again, allow_unused=True))
    return [next(found) if need and tensor is not None else None for tensor, need in zip(own, needs)]


def describe(device: str, grids: Sequence[tuple] = ()) -> str:
    """For the start of a run: what will compute the ops on `device` ("cpu", "cuda", ...), in eager mode and compiled.

    grids: of each layer, what `resolve` must know of it (the arguments after the tensor); none: one that the kernels take."""
    if _chosen in ("reference", "compile"):
        return {"reference": "plain PyTorch, the basis kept in memory", "compile": "plain PyTorch through torch.compile"}[_chosen]
    if device == "cpu" and native.compiler() is None and not _is_for_triton(_chosen, device):
        return "chunked PyTorch, slower than the C++ kernels, which need a C++ compiler (g++ or clang++)"
    layer: Any = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    ways = {resolve(_chosen, layer, *grid) for grid in grids}
    if not ways:
        ways = {"triton" if _is_for_triton(_chosen, device) else "native" if device == "cpu" else "chunked"}
    other = "chunked PyTorch" if device != "cpu" and not _is_for_triton(_chosen, device) else (
        "chunked PyTorch, for a grid that the kernels don't take")
    return " and ".join({"native": "C++ kernels", "triton": "Triton kernels", "chunked": other}[way]
                        for way in sorted(ways, reverse=True))
