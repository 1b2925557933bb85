"""`rational`: a quotient of polynomials, one for each group of channels, as the Kolmogorov-Arnold transformer has it.

    v = P(u)/Q(u),    P(u) = sum_{k=0..m} a_k u^k,    Q(u) = 1 + sum_{k=1..n} b_k |u|^k,  b_k >= 0

(Yang and Wang, arXiv:2409.10594, equation 9: the "safe" Pade unit, whose Q has no zero.) Saved for the backward pass: u and the
coefficients.
"""
import functools
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vision_kan.kernels import backend, native
from vision_kan.kernels.backend import as_matrix, cast, math_dtype

# Values of u that the PyTorch path works on at once on a CPU: the few arrays of this size stay in its L2 cache.
CHUNK_VALUES = 2 ** 17


def rational(u: Tensor, coefficients: Tensor, degree: int = 5) -> Tensor:
    """P(u)/Q(u), by the backend that `kernels.use` chose.

    Args:
        u: [..., I], any floating dtype; under autocast rounded to its dtype first. Computed in at least float32.
        coefficients: [groups, m + 1 + n], a_0 .. a_m and b_1 .. b_n; group g has the channels g * I/groups to
            (g + 1) * I/groups - 1. The b_k must not be negative (take their absolute values). degree: m.
    Returns: [..., I] in u's dtype.
    Raises: ValueError if the groups do not divide the channels, or if Q has no coefficient.
    """
    groups, count = coefficients.shape
    if u.shape[-1] % groups:
        raise ValueError(f"{groups} groups do not divide {u.shape[-1]} channels")
    if not 0 < degree < count - 1:
        raise ValueError(f"{count} coefficients leave none for the denominator of a numerator of degree {degree}")
    device = u.device.type
    if torch.is_autocast_enabled(device):
        u = cast(u, torch.get_autocast_dtype(device))
    name = backend.chosen()
    if name == "reference" or backend.transformed():
        return rational_reference(u, coefficients, degree)
    if name == "compile":
        return _compiled_reference()(u, coefficients, degree)
    if backend.traced(u, coefficients):
        return _rational(u, coefficients, degree, name)
    return _Rational.apply(u, coefficients, (degree, name))


def rational_reference(u: Tensor, coefficients: Tensor, degree: int = 5) -> Tensor:
    """The same in plain PyTorch with its autograd, which keeps an array for each coefficient."""
    x = u.to(math_dtype(u.dtype))
    c = coefficients.to(x.dtype).repeat_interleave(u.shape[-1] // len(coefficients), 0).T
    return (_polynomial(c[:degree + 1], x) / (1 + _polynomial(c[degree + 1:], x.abs()) * x.abs())).to(u.dtype)


@functools.lru_cache
def _compiled_reference():
    return torch.compile(rational_reference)


def _polynomial(c: Tensor, x: Tensor) -> Tensor:
    """sum_k c_k x^k by Horner's rule; c [K, I]."""
    value = torch.zeros_like(x) + c[-1]
    for c_k in reversed(c[:-1]):
        value = value * x + c_k
    return value


# ---------------------------------------------------------------- the op
def _value(u: Tensor, coefficients: Tensor, degree: int, backend_name: str) -> Tensor:
    how = backend.resolve_rational(backend_name, u, degree, coefficients.shape[1] - 1 - degree)
    if how == "triton":
        return _triton().forward(u.contiguous(), coefficients, degree)
    flat, c = _prepare(u, coefficients, how)
    v = (native.rational if how == "native" else _chunked)(flat, c, degree)
    return cast(v, u.dtype).resize_(u.shape)


def _gradients(dv: Tensor, u: Tensor, coefficients: Tensor, degree: int, backend_name: str) -> tuple[Tensor, Tensor]:
    how = backend.resolve_rational(backend_name, u, degree, coefficients.shape[1] - 1 - degree)
    du: Any
    dc: Any
    if how == "triton":
        du, dc = _triton().backward(cast(dv, u.dtype).contiguous(), u.contiguous(), coefficients, degree)
    else:
        flat, c = _prepare(u, coefficients, how)
        du, dc = (native.rational_grad if how == "native" else _chunked_grad)(cast(as_matrix(dv), flat.dtype), flat, c, degree)
        du = cast(du, u.dtype).view(u.shape)
    return du, cast(dc, coefficients.dtype)


def _prepare(u: Tensor, coefficients: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """u [T, I] as the path takes it, and coefficients in the dtype of the maths."""
    flat = as_matrix(u)
    if how == "native" and u.dtype not in native.DTYPES:
        flat = flat.float()
    return flat, cast(coefficients, torch.float64 if u.dtype == torch.float64 else torch.float32).contiguous()


@functools.lru_cache
def _triton():
    from vision_kan.kernels import triton_rational
    return triton_rational


def _backward(ctx, dv: Tensor):
    u, coefficients = ctx.saved_tensors
    if backend.differentiable_backward(dv):
        du, dc = backend.gradients(lambda u, c: rational_reference(u, c, ctx.constants[0]), (u, coefficients),
                                   ctx.needs_input_grad, dv)
    elif backend.traced(dv, u):
        du, dc = _rational_grad(dv, u, coefficients, *ctx.constants)
    else:
        du, dc = _gradients(dv, u, coefficients, *ctx.constants)
    return du, dc, *ctx.no_gradients


class _Rational(torch.autograd.Function):
    """The op in eager mode, where nothing traces: see `backend.traced`."""
    backward = staticmethod(_backward)

    @staticmethod
    def forward(ctx, u: Tensor, coefficients: Tensor, constants: tuple[int, str]) -> Tensor:
        ctx.save_for_backward(u, coefficients)
        ctx.constants, ctx.no_gradients = constants, (None,)
        return _value(u, coefficients, *constants)


@custom_op("vision_kan::rational", mutates_args=())
def _rational(u: Tensor, coefficients: Tensor, degree: int, backend_name: str) -> Tensor:
    return _value(u, coefficients, degree, backend_name)


@custom_op("vision_kan::rational_grad", mutates_args=())
def _rational_grad(dv: Tensor, u: Tensor, coefficients: Tensor, degree: int, backend_name: str) -> tuple[Tensor, Tensor]:
    return _gradients(dv, u, coefficients, degree, backend_name)


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
    ctx.no_gradients = (None, None)


_rational.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------- PyTorch, some rows after the others
def _chunked(u: Tensor, c: Tensor, degree: int) -> Tensor:
    v = torch.empty_like(u)
    own = c.T.repeat_interleave(u.shape[1] // len(c), 1)
    for rows in _chunks(u):
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
    for rows in _chunks(u):
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


def _chunks(u: Tensor) -> list[slice]:
    """Rows of u [T, I] to work on at once; all of them on a GPU."""
    step = max(1, CHUNK_VALUES // max(1, u.shape[1])) if u.device.type == "cpu" else max(1, len(u))
    return [slice(start, start + step) for start in range(0, len(u), step)]
