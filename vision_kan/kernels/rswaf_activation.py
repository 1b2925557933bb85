"""`rswaf_activation`: a learned elementwise function for each group of channels.

    v = s_g * base(u) + sum_k C[g, k] * B_k(u),    B_k(u) = 1 - tanh((u - g_k)/h)^2

It saves u and the parameters for the backward pass, which computes the basis again and all gradients in one pass.
"""
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from vision_kan.kernels import backend, native
from vision_kan.kernels.activation import activation_reference, compiled
from vision_kan.kernels.backend import as_matrix, cast, check_groups, math_dtype, row_chunks
from vision_kan.kernels.basis import BASES, MAX_HALF_RANGE


def rswaf_activation(u: Tensor, coefficients: Tensor, points: Sequence[float], h: float, base: str = "none",
                     scale: Tensor | None = None) -> Tensor:
    """s * base(u) + sum_k C[g, k] B_k(u), by the backend that `kernels.use` chose.

    Args:
        u: [..., I], any floating dtype; autocast rounds it to its dtype first. The op computes in at least float32.
        coefficients: [groups, G]; group g has the channels g * I/groups to (g + 1) * I/groups - 1.
        points: the G grid points, with max |g_k - middle|/h <= MAX_HALF_RANGE.
        h: width of a bump.
        base: "none" or a key of `BASES`.
        scale: s [groups]; None: 1.
    Returns: [..., I] in u's dtype.
    Raises: ValueError if the groups do not divide the channels, or for another base or an impossible grid.
    """
    u = cast(u, backend.autocast_dtype(u))
    name = backend.chosen()
    intercepted = backend.intercepted(u, coefficients, scale)
    if name in ("reference", "compile") or intercepted:
        _check(u.shape, coefficients.shape, points, h, base)
        if name == "reference" or (name == "compile" and intercepted) or backend.transformed():
            return rswaf_activation_reference(u, coefficients, points, h, base, scale)
        if name == "compile":
            return compiled(u, coefficients, scale, tuple(points), h, base, "rswaf")
        return _activation(u, coefficients, scale, list(points), h, base, name)
    constants = tuple(points), h, base, name
    return _Activation.apply(u, coefficients, scale, _kernel(u, coefficients, scale, *constants), constants)


def _check(shape: Sequence[int], coefficients: Sequence[int], points: Sequence[float], h: float, base: str) -> None:
    """Raises ValueError if the shapes of u and of the coefficients and the constants don't fit together."""
    groups, num_points = coefficients
    check_groups(groups, shape[-1])
    if base != "none" and base not in BASES:
        raise ValueError(f"base {base} is not one of none, {', '.join(BASES)}")
    if len(points) != num_points or (points[-1] - points[0]) / 2 > MAX_HALF_RANGE * h * (1 + 1e-9):
        raise ValueError(f"{num_points} coefficients per group need the same number of grid points, at most "
                         f"{MAX_HALF_RANGE:g} h from their middle; got {len(points)} and h = {h:g}")


def rswaf_activation_reference(u: Tensor, coefficients: Tensor, points: Sequence[float], h: float, base: str = "none",
                               scale: Tensor | None = None) -> Tensor:
    """The same in PyTorch's operations, whose autograd keeps several arrays [..., I, G]."""
    return activation_reference(u, coefficients, points, h, base, scale, "rswaf")


# ---------------------------------------------------------------- the op
def _kernel(u: Tensor, coefficients: Tensor, scale: Tensor | None, points: tuple[float, ...], h: float, base: str,
            backend_name: str) -> Any:
    """The code that computes the op: `forward(u, coefficients, scale)` returns v, `backward(dv, u, coefficients, scale)` their
    gradients."""
    plan = _triton_plan(u.dtype, u.shape, u.device, coefficients.shape, scale is not None, points, h, base, backend_name)
    if plan is not None:
        return plan
    _check(u.shape, coefficients.shape, points, h, base)
    return _ByRows(backend.resolve(backend_name, u, len(points), points, h, base) == "native", points, h, base)


@functools.lru_cache(maxsize=1024)
def _triton_plan(dtype: torch.dtype, shape: torch.Size, device: torch.device, coefficients: torch.Size, scaled: bool,
                 points: tuple[float, ...], h: float, base: str, backend_name: str) -> Any:
    """Made once for a size, device and grid; None if Triton does not compute the op."""
    if not backend.takes_triton(backend_name, device.type, dtype, len(points)):
        return None
    from vision_kan.kernels.triton_activation import Plan
    _check(shape, coefficients, points, h, base)
    return Plan(dtype, shape, device, coefficients, scaled, points, h, base)


class _ByRows(NamedTuple):
    """The op in C++ or in PyTorch, with u as a matrix."""
    in_cpp: bool
    points: tuple[float, ...]
    h: float
    base: str

    def forward(self, u: Tensor, coefficients: Tensor, scale: Tensor | None) -> Tensor:
        v = (native.activation if self.in_cpp else _chunked)(
            *self._prepare(u, coefficients, scale), self.points, self.h, self.base)
        return cast(v, u.dtype).resize_(u.shape)            # not a view: autograd restricts changing views in place

    def backward(self, dv: Tensor, u: Tensor, coefficients: Tensor, scale: Tensor | None
                 ) -> tuple[Tensor, Tensor, Tensor | None]:
        flat, c, s = self._prepare(u, coefficients, scale)
        du, dc, ds = (native.activation_grad if self.in_cpp else _chunked_grad)(
            cast(as_matrix(dv), flat.dtype), flat, c, s, self.points, self.h, self.base)
        return cast(du, u.dtype).view(u.shape), dc, ds

    def _prepare(self, u: Tensor, coefficients: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """u [T, I] in a dtype that the path supports, and parameters in the dtype of the computation."""
        flat = as_matrix(u)
        if self.in_cpp and u.dtype not in native.DTYPES:
            flat = flat.float()
        dtype = math_dtype(u.dtype)
        return flat, cast(coefficients, dtype).contiguous(), None if scale is None else cast(scale, dtype).contiguous()


def _gradients(kernel: Any, dv: Tensor, u: Tensor, coefficients: Tensor, scale: Tensor | None
               ) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of u, coefficients and scale (None without one)."""
    du, dc, ds = kernel.backward(dv, u, coefficients, scale)
    return du, cast(dc, coefficients.dtype), None if scale is None else cast(ds, scale.dtype)


class _Activation(torch.autograd.Function):
    """The op in eager mode, when nothing is tracing: see `backend.intercepted`."""

    @staticmethod
    def forward(ctx, u: Tensor, coefficients: Tensor, scale: Tensor | None, kernel: Any, constants: tuple) -> Tensor:
        ctx.save_for_backward(u, coefficients, scale)
        ctx.kernel, ctx.constants = kernel, constants
        return kernel.forward(u, coefficients, scale)

    @staticmethod
    def backward(ctx, dv: Tensor):
        u, coefficients, scale = ctx.saved_tensors
        if backend.intercepted_backward(dv, u):
            return *_visible_gradients(ctx, dv, u, coefficients, scale), None, None
        return *_gradients(ctx.kernel, dv, u, coefficients, scale), None, None


def _visible_gradients(ctx, dv: Tensor, u: Tensor, coefficients: Tensor, scale: Tensor | None) -> tuple:
    """The gradients of u, coefficients and scale, by operations that PyTorch can trace or differentiate."""
    if backend.differentiable_backward(dv):
        points, h, base, _ = ctx.constants
        du, dc, ds = backend.gradients(lambda u, c, s: rswaf_activation_reference(u, c, points, h, base, s),
                                       (u, coefficients, scale), ctx.needs_input_grad, dv)
    else:
        du, dc, ds = _activation_grad(dv, u, coefficients, scale, *ctx.constants)
    return du, dc, None if scale is None else ds


@custom_op("vision_kan::rswaf_activation", mutates_args=())
def _activation(u: Tensor, coefficients: Tensor, scale: Tensor | None, points: Sequence[float], h: float, base: str,
                backend_name: str) -> Tensor:
    return _kernel(u, coefficients, scale, tuple(points), h, base, backend_name).forward(u, coefficients, scale)


@custom_op("vision_kan::rswaf_activation_grad", mutates_args=())
def _activation_grad(dv: Tensor, u: Tensor, coefficients: Tensor, scale: Tensor | None, points: Sequence[float],
                     h: float, base: str, backend_name: str) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(u, coefficients, scale, tuple(points), h, base, backend_name)
    du, dc, ds = _gradients(kernel, dv, u, coefficients, scale)
    return du, dc, u.new_empty(0) if ds is None else ds


@_activation.register_fake
def _(u, coefficients, scale, points, h, base, backend_name):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@_activation_grad.register_fake
def _(dv, u, coefficients, scale, points, h, base, backend_name):
    return (torch.empty_like(u, memory_format=torch.contiguous_format),
            torch.empty_like(coefficients, memory_format=torch.contiguous_format),
            u.new_empty(0) if scale is None else torch.empty_like(scale, memory_format=torch.contiguous_format))


def _save(ctx, inputs, output) -> None:
    u, coefficients, scale, *ctx.constants = inputs
    ctx.save_for_backward(u, coefficients, scale)


def _backward(ctx, dv: Tensor):
    return *_visible_gradients(ctx, dv, *ctx.saved_tensors), None, None, None, None


_activation.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------- PyTorch, one grid point at a time
# With E = exp(2(u - m)/h), m the middle of the grid, p_k = exp(-2(g_k - m)/h)/4, q_k = exp(2(g_k - m)/h)/4:
#     B_k = 1/D_k,    D_k = p_k E + q_k/E + 1/2,    dB_k/du = (2/h) (q_k/E - p_k E) / D_k^2
def _chunked(u: Tensor, c: Tensor, scale: Tensor | None, points: tuple[float, ...], h: float, base: str) -> Tensor:
    v = torch.empty_like(u)
    c, scale = _by_channel(u, c, scale)
    for rows in row_chunks(u):
        x, e, inv_e = _exponentials(u[rows], points, h)
        part = torch.zeros_like(e)
        if base != "none":
            part = BASES[base](x) if scale is None else BASES[base](x) * scale
            part = part.clone() if part is x else part
        for c_k, (p, q) in zip(c, _weights(points, h)):
            part.addcdiv_(c_k, _denominator(e, inv_e, p, q))
        v[rows] = part
    return v


def _chunked_grad(dv: Tensor, u: Tensor, c: Tensor, scale: Tensor | None, points: tuple[float, ...], h: float,
                  base: str) -> tuple[Tensor, Tensor, Tensor | None]:
    groups, each = len(c), u.shape[1] // max(1, len(c))
    c, s = _by_channel(u, c, scale)
    du, dc = torch.empty_like(u), torch.zeros_like(c)
    ds = torch.zeros_like(c[0]) if scale is not None else None
    weights = [(p, q, c_k * p, c_k * q, dc_k) for c_k, dc_k, (p, q) in zip(c, dc, _weights(points, h))]
    for rows in row_chunks(u):
        x, e, inv_e = _exponentials(u[rows], points, h)
        g = dv[rows].to(e.dtype)
        p_sum, q_sum = torch.zeros_like(e), torch.zeros_like(e)
        for p, q, c_p, c_q, dc_k in weights:
            basis = _denominator(e, inv_e, p, q).reciprocal_()
            g_basis = g * basis
            dc_k += g_basis.sum(0)
            g_basis.mul_(basis)
            p_sum.addcmul_(g_basis, c_p)
            q_sum.addcmul_(g_basis, c_q)
        slope = (q_sum.mul_(inv_e) - p_sum.mul_(e)).mul_(2 / h)
        if base != "none":
            slope += _base_grad(base, g if s is None else g * s, x)
            if ds is not None:
                ds += (g * BASES[base](x)).sum(0)
        du[rows] = slope
    dc = dc.view(len(c), groups, each).sum(2).t().contiguous()
    return du, dc, None if ds is None else ds.view(groups, each).sum(1)


def _base_grad(base: str, g: Tensor, x: Tensor) -> Tensor:
    if base == "gelu":
        return torch.ops.aten.gelu_backward(g, x)
    if base == "silu":
        return torch.ops.aten.silu_backward(g, x)
    return {"identity": lambda: g, "relu": lambda: g * (x > 0), "relu2": lambda: 2 * g * F.relu(x)}[base]()


def _by_channel(u: Tensor, c: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Coefficients [G, I] and scales [I] of every channel."""
    each = u.shape[1] // max(1, len(c))
    return c.t().repeat_interleave(each, 1), None if scale is None else scale.repeat_interleave(each)


def _weights(points: tuple[float, ...], h: float) -> list[tuple[float, float]]:
    offsets = [2 * (g - (points[0] + points[-1]) / 2) / h for g in points]
    return [(math.exp(-offset) / 4, math.exp(offset) / 4) for offset in offsets]


def _exponentials(u: Tensor, points: tuple[float, ...], h: float) -> tuple[Tensor, Tensor, Tensor]:
    """u, E and 1/E [t, I] in at least float32."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    # beyond e^40 every B_k is below 1e-8, and E * p_k could overflow
    e = torch.exp(((u - (points[0] + points[-1]) / 2) * (2 / h)).clamp_(-40, 40))
    return u, e, e.reciprocal()


def _denominator(e: Tensor, inv_e: Tensor, p: float, q: float) -> Tensor:
    return (e * p).add_(inv_e, alpha=q).add_(0.5)
