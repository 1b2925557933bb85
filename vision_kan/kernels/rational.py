"""`rational`: a quotient of polynomials, one for each group of channels, as the Kolmogorov-Arnold transformer has it.

    v = P(u)/Q(u),    P(u) = sum_{k=0..m} a_k u^k,    Q(u) = 1 + sum_{k=1..n} b_k |u|^k,  b_k >= 0

(Yang and Wang, arXiv:2409.10594, equation 9: the "safe" Pade unit, whose Q has no zero.) Saved for the backward pass: u and the
coefficients.
"""
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from vision_kan.kernels import backend, native
from vision_kan.kernels.backend import as_matrix, cast, check_groups, math_dtype, row_chunks


def rational(u: Tensor, coefficients: Tensor, degree: int = 5) -> Tensor:
    """P(u)/Q(u), by the backend that `kernels.use` chose.

    Args:
        u: [..., I], any floating dtype; under autocast rounded to its dtype first. Computed in at least float32.
        coefficients: [groups, m + 1 + n], a_0 .. a_m and b_1 .. b_n; group g has the channels g * I/groups to
            (g + 1) * I/groups - 1. The b_k must not be negative (take their absolute values). degree: m.
    Returns: [..., I] in u's dtype.
    Raises: ValueError if the groups do not divide the channels, or if Q has no coefficient.
    """
    u = cast(u, backend.autocast_dtype(u))
    name = backend.chosen()
    intercepted = backend.intercepted(u, coefficients)
    if name in ("reference", "compile") or intercepted:
        _check(u.shape, coefficients.shape, degree)
        if name == "reference" or (name == "compile" and intercepted) or backend.transformed():
            return rational_reference(u, coefficients, degree)
        if name == "compile":
            return backend.compiled(rational_reference, degree)(u, coefficients)
        return _rational(u, coefficients, degree, name)
    return _Rational.apply(u, coefficients, _kernel(u, coefficients, degree, name), (degree, name))


def _check(shape: Sequence[int], coefficients: Sequence[int], degree: int) -> None:
    """Raises ValueError if the groups do not divide the channels, or if Q has no coefficient."""
    groups, count = coefficients
    check_groups(groups, shape[-1])
    if not 0 < degree < count - 1:
        raise ValueError(f"{count} coefficients leave none for the denominator of a numerator of degree {degree}")


def rational_reference(u: Tensor, coefficients: Tensor, degree: int = 5) -> Tensor:
    """The same in plain PyTorch with its autograd, which keeps an array for each coefficient."""
    x = u.to(math_dtype(u.dtype))
    c = coefficients.to(x.dtype).repeat_interleave(u.shape[-1] // len(coefficients), 0).T
    return (_polynomial(c[:degree + 1], x) / (1 + _polynomial(c[degree + 1:], x.abs()) * x.abs())).to(u.dtype)


def _polynomial(c: Tensor, x: Tensor) -> Tensor:
    """sum_k c_k x^k by Horner's rule; c [K, I]."""
    value = torch.zeros_like(x) + c[-1]
    for c_k in reversed(c[:-1]):
        value = value * x + c_k
    return value


# ---------------------------------------------------------------- the op
def _kernel(u: Tensor, coefficients: Tensor, degree: int, backend_name: str) -> Any:
    """The code that computes the op: `forward(u, coefficients)` returns v, `backward(dv, u, coefficients)` their gradients
    first."""
    plan = _triton_plan(u.dtype, u.shape, u.device, coefficients.shape, degree, backend_name)
    if plan is not None:
        return plan
    _check(u.shape, coefficients.shape, degree)
    below = coefficients.shape[1] - 1 - degree
    return _ByRows(u.is_cpu and u.dtype != torch.float64 and native.rational_library(degree, below) is not None, degree)


@functools.lru_cache(maxsize=1024)
def _triton_plan(dtype: torch.dtype, shape: torch.Size, device: torch.device, coefficients: torch.Size, degree: int,
                 backend_name: str) -> Any:
    """Made once for a size and device; None if Triton does not compute the op."""
    if not backend.takes_triton(backend_name, device.type, dtype, coefficients[1]):
        return None
    from vision_kan.kernels.triton_rational import Plan
    _check(shape, coefficients, degree)
    return Plan(dtype, shape, device, coefficients, degree)


class _ByRows(NamedTuple):
    """The op in C++ or in PyTorch, with u as a matrix."""
    in_cpp: bool
    degree: int

    def forward(self, u: Tensor, coefficients: Tensor) -> Tensor:
        v = (native.rational if self.in_cpp else _chunked)(*self._prepare(u, coefficients), self.degree)
        return cast(v, u.dtype).resize_(u.shape)            # not a view: autograd restricts changing views in place

    def backward(self, dv: Tensor, u: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        flat, c = self._prepare(u, coefficients)
        du, dc = (native.rational_grad if self.in_cpp else _chunked_grad)(
            cast(as_matrix(dv), flat.dtype), flat, c, self.degree)
        return cast(du, u.dtype).view(u.shape), dc

    def _prepare(self, u: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """u [T, I] in a dtype that the path supports, and coefficients in the dtype of the computation."""
        flat = as_matrix(u)
        if self.in_cpp and u.dtype not in native.DTYPES:
            flat = flat.float()
        return flat, cast(coefficients, math_dtype(u.dtype)).contiguous()


def _gradients(kernel: Any, dv: Tensor, u: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    du, dc, *_ = kernel.backward(dv, u, coefficients)
    return du, cast(dc, coefficients.dtype)


class _Rational(torch.autograd.Function):
    """The op in eager mode, when nothing is tracing: see `backend.intercepted`."""

    @staticmethod
    def forward(ctx, u: Tensor, coefficients: Tensor, kernel: Any, constants: tuple[int, str]) -> Tensor:
        ctx.save_for_backward(u, coefficients)
        ctx.kernel, ctx.constants = kernel, constants
        return kernel.forward(u, coefficients)

    @staticmethod
    def backward(ctx, dv: Tensor):
        u, coefficients = ctx.saved_tensors
        if backend.intercepted_backward(dv, u):
            return *_visible_gradients(ctx, dv, u, coefficients), None, None
        return *_gradients(ctx.kernel, dv, u, coefficients), None, None


def _visible_gradients(ctx, dv: Tensor, u: Tensor, coefficients: Tensor) -> Sequence[Tensor | None]:
    """The gradients of u and coefficients, by operations that PyTorch can trace or differentiate."""
    if backend.differentiable_backward(dv):
        return backend.gradients(lambda u, c: rational_reference(u, c, ctx.constants[0]), (u, coefficients),
                                 ctx.needs_input_grad, dv)
    return _rational_grad(dv, u, coefficients, *ctx.constants)


@custom_op("vision_kan::rational", mutates_args=())
def _rational(u: Tensor, coefficients: Tensor, degree: int, backend_name: str) -> Tensor:
    return _kernel(u, coefficients, degree, backend_name).forward(u, coefficients)


@custom_op("vision_kan::rational_grad", mutates_args=())
def _rational_grad(dv: Tensor, u: Tensor, coefficients: Tensor, degree: int, backend_name: str) -> tuple[Tensor, Tensor]:
    return _gradients(_kernel(u, coefficients, degree, backend_name), dv, u, coefficients)


@_rational.register_fake
def _(u, coefficients, degree, backend_name):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@_rational_grad.register_fake
def _(dv, u, coefficients, degree, backend_name):
    return (torch.empty_like(u, memory_format=torch.contiguous_format),
            torch.empty_like(coefficients, memory_format=torch.contiguous_format))


def _save(ctx, inputs, output) -> None:
    u, coefficients, *ctx.constants = inputs
    ctx.save_for_backward(u, coefficients)


def _backward(ctx, dv: Tensor):
    return *_visible_gradients(ctx, dv, *ctx.saved_tensors), None, None


_rational.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------- PyTorch, some rows after the others
def _chunked(u: Tensor, c: Tensor, degree: int) -> Tensor:
    v = torch.empty_like(u)
    own = c.T.repeat_interleave(u.shape[1] // len(c), 1)
    for rows in row_chunks(u):
        v[rows] = _value_and_inverse(u[rows].to(c.dtype), own, degree)[0]
    return v


def _value_and_inverse(x: Tensor, own: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """v and 1/Q of x [t, I]; own [K, I]: the coefficients of each channel."""
    absolute = x.abs()
    inverse = _polynomial(own[degree + 1:], absolute).mul_(absolute).add_(1).reciprocal_()
    return _polynomial(own[:degree + 1], x).mul_(inverse), inverse


def _chunked_grad(dv: Tensor, u: Tensor, c: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    groups, each = len(c), u.shape[1] // max(1, len(c))
    own = c.T.repeat_interleave(each, 1)
    orders = torch.arange(1, max(degree + 1, len(own) - degree), dtype=c.dtype, device=c.device)[:, None]
    slope_p, slope_q = own[1:degree + 1] * orders[:degree], own[degree + 1:] * orders[:len(own) - degree - 1]
    du, dc = torch.empty_like(u), torch.zeros_like(own)
    for rows in row_chunks(u):
        x, g = u[rows].to(c.dtype), dv[rows].to(c.dtype)
        v, inverse = _value_and_inverse(x, own, degree)
        absolute, share = x.abs(), g * inverse
        slope = _polynomial(slope_p, x) - v * x.sign() * _polynomial(slope_q, absolute)
        du[rows] = share * slope
        power, below = share, -(share * v)
        for k in range(degree + 1):
            dc[k] += power.sum(0)
            power = power * x
        for k in range(degree + 1, len(own)):
            below = below * absolute
            dc[k] += below.sum(0)
    return du, dc.view(len(own), groups, each).sum(2).T.contiguous()
