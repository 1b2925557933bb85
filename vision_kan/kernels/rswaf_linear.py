"""`rswaf_linear`: the full-edge FasterKAN layer after its normalisation, a linear map of every input's basis values.

    y_o = sum_{i,k} W[o, i*G + k] * B_k(u_i),    B_k(u) = 1 - tanh((u - g_k)/h)^2

It saves u and the parameters for the backward pass. Nothing of size [T, I, G] outlives a chunk of tokens.

Legend for shapes: T tokens (all leading dimensions flattened), I inputs, O outputs, G grid points.
"""
import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from vision_kan.kernels import backend, native
from vision_kan.kernels.backend import as_matrix, cast, chunk_values, math_dtype
from vision_kan.kernels.basis import rswaf_basis

LEAST_TOKENS = 256      # of a chunk: with fewer, loading the weight dominates the matrix product


def rswaf_linear(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool = False) -> Tensor:
    """y = W vec(B(u)), by the backend that `kernels.use` chose.

    Args:
        u: normalised input [..., I], any floating dtype; the basis is computed in at least float32.
        weight: [O, I*G], column i*G + k.
        grid: [G] grid points; may require a gradient.
        h: width of a bump, a number or a scalar tensor; may require a gradient.
        single_exp: compute one exponential for all grid points; valid only for a fixed grid with max |g - middle|/h <=
            MAX_HALF_RANGE.
    Returns: [..., O] in autocast's dtype if it is on, else in u's.
    Raises: ValueError if the weight does not have I*G columns.
    """
    if weight.shape[1] != u.shape[-1] * grid.numel():
        raise ValueError(f"a weight of {weight.shape[1]} columns does not fit {u.shape[-1]} inputs and {grid.numel()} grid "
                         "points")
    dtype = backend.autocast_dtype(u)
    name = backend.chosen()
    number, tensor = (0.0, h) if isinstance(h, Tensor) else (h, None)
    intercepted = backend.intercepted(u, weight, grid, tensor)
    if name in ("reference", "compile") or intercepted:
        if name == "reference" or (name == "compile" and intercepted) or backend.transformed():
            return rswaf_linear_reference(u, weight, grid, h)
        if name == "compile":
            given, constants = ((u, weight, grid), (h,)) if tensor is None else ((u, weight, grid, tensor), ())
            return backend.compiled(rswaf_linear_reference, *constants)(*given)
        return _linear(u, weight, grid, tensor, number, single_exp, dtype, name)
    return _Linear.apply(u, weight, grid, tensor, (number, single_exp, dtype, name))


def rswaf_linear_reference(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor) -> Tensor:
    """The same in PyTorch's operations, whose autograd keeps several arrays [..., I, G]."""
    return _product_of(u, weight, grid, h, u.dtype)


def _product_of(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, dtype: torch.dtype) -> Tensor:
    basis = rswaf_basis(u.to(math_dtype(u.dtype)), grid, h)            # [..., I, G]
    return F.linear(basis.flatten(-2).to(dtype), weight)                # [..., I*G] @ [I*G, O] -> [..., O]


# ---------------------------------------------------------------- the op
def _value(u: Tensor, weight: Tensor, grid: Tensor, h_tensor: Tensor | None, h_number: float, single_exp: bool,
           dtype: torch.dtype, backend_name: str) -> Tensor:
    h = h_number if h_tensor is None else h_tensor
    flat = as_matrix(u)
    how, points = _path(u, grid, h, single_exp, dtype, backend_name)
    with backend.without_autocast(u):                           # dtypes are decided here
        if how == "triton":
            from vision_kan.kernels import triton_linear
            y = triton_linear.forward(flat, cast(weight, dtype).contiguous(), cast(grid, torch.float32), h, single_exp)
        else:
            y = _chunked(flat, weight, grid, h, single_exp, dtype, points if how == "native" else None)
    return y.resize_(*u.shape[:-1], len(weight))    # not a view: autograd restricts changing views in place


def _gradients(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h_tensor: Tensor | None, h_number: float,
               single_exp: bool, dtype: torch.dtype, backend_name: str, need_u: bool, need_weight: bool, need_grid: bool,
               need_h: bool) -> list[Tensor | None]:
    """The gradients of u, weight, grid and h; None for those that are not needed."""
    h = h_number if h_tensor is None else h_tensor
    flat = as_matrix(u)
    dy = cast(as_matrix(dy), dtype)
    how, points = _path(u, grid, h, single_exp, dtype, backend_name)
    with backend.without_autocast(u):                           # else an autocast around backward() would round to 16 bits
        if how == "triton":
            from vision_kan.kernels import triton_linear
            w, g = cast(weight, dtype).contiguous(), cast(grid, torch.float32)
            du, dw = triton_linear.backward(dy, flat, w, g, h, single_exp, need_u, need_weight)
            dgrid, dh = (triton_linear.backward_grid(dy, flat, w, g, h, need_grid, need_h)
                         if need_grid or need_h else (None, None))
        else:
            du, dw, dgrid, dh = _chunked_grad(dy, flat, weight, grid, h, single_exp, dtype,
                                              (need_u, need_weight, need_grid, need_h), points if how == "native" else None)
    return [None if gradient is None or like is None else cast(gradient, like.dtype).view(like.shape)
            for gradient, like in ((du, u), (dw, weight), (dgrid, grid), (dh, h_tensor))]


def _path(u: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool, dtype: torch.dtype,
          backend_name: str) -> tuple[str, tuple[float, ...] | None]:
    """"native", "triton" or "chunked" (`backend.resolve`), and for native the grid points as numbers."""
    device, count, points = backend.device_type(u), grid.numel(), None
    if backend.takes_triton(backend_name, device, u.dtype, count):      # asked first: reading the points takes time
        return "triton", None
    if single_exp and device == "cpu" and not isinstance(h, Tensor) and count <= native.MAX_POINTS \
            and u.dtype in native.DTYPES and dtype in native.DTYPES:
        points = tuple(grid.tolist())
    return backend.resolve(backend_name, u, count, points, float(h) if points else None), points


def _backward(ctx, dy: Tensor):
    needs = ctx.needs_input_grad[:4]
    tensors = ctx.saved_tensors
    if not backend.intercepted_backward(dy, tensors[0]):
        found = _gradients(dy, *tensors, *ctx.constants, *needs)
    elif backend.differentiable_backward(dy):
        number, _, dtype, _ = ctx.constants
        with torch.autocast(dy.device.type, enabled=False):
            found = backend.gradients(lambda u, weight, grid, h: _product_of(
                u, weight.to(dtype), grid, number if h is None else h, dtype), tensors, needs, dy)
    else:
        found = [gradient if need else None for gradient, need in zip(
            _linear_grad(dy, *tensors, *ctx.constants, *needs), needs)]
    return *found, *ctx.no_gradients


class _Linear(torch.autograd.Function):
    """The op in eager mode, when nothing is tracing: see `backend.intercepted`."""
    backward = staticmethod(_backward)

    @staticmethod
    def forward(ctx, u: Tensor, weight: Tensor, grid: Tensor, h_tensor: Tensor | None, constants: tuple) -> Tensor:
        ctx.save_for_backward(u, weight, grid, h_tensor)
        ctx.constants, ctx.no_gradients = constants, (None,)
        return _value(u, weight, grid, h_tensor, *constants)


@custom_op("vision_kan::rswaf_linear", mutates_args=())
def _linear(u: Tensor, weight: Tensor, grid: Tensor, h_tensor: Tensor | None, h_number: float, single_exp: bool,
            dtype: torch.dtype, backend_name: str) -> Tensor:
    return _value(u, weight, grid, h_tensor, h_number, single_exp, dtype, backend_name)


@custom_op("vision_kan::rswaf_linear_grad", mutates_args=())
def _linear_grad(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h_tensor: Tensor | None, h_number: float,
                 single_exp: bool, dtype: torch.dtype, backend_name: str, need_u: bool, need_weight: bool,
                 need_grid: bool, need_h: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, weight, grid and h; empty tensors for those that are not needed."""
    du, dw, dgrid, dh = (u.new_empty(0) if gradient is None else gradient for gradient in _gradients(
        dy, u, weight, grid, h_tensor, h_number, single_exp, dtype, backend_name, need_u, need_weight, need_grid, need_h))
    return du, dw, dgrid, dh


@_linear.register_fake
def _(u, weight, grid, h_tensor, h_number, single_exp, dtype, backend_name):
    return u.new_empty((*u.shape[:-1], weight.shape[0]), dtype=dtype)


@_linear_grad.register_fake
def _(dy, u, weight, grid, h_tensor, h_number, single_exp, dtype, backend_name, need_u, need_weight, need_grid, need_h):
    return tuple(torch.empty_like(like, memory_format=torch.contiguous_format) if need else u.new_empty(0)
                 for need, like in ((need_u, u), (need_weight, weight), (need_grid, grid), (need_h, h_tensor)))


def _save(ctx, inputs, output) -> None:
    u, weight, grid, h_tensor, *ctx.constants = inputs
    ctx.save_for_backward(u, weight, grid, h_tensor)
    ctx.no_gradients = (None,) * 4


_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.vision_kan.rswaf_linear)
def _flops(u_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of the matrix product, for PyTorch's counter."""
    return 2 * math.prod(u_shape[:-1]) * math.prod(weight_shape)


@register_flop_formula(torch.ops.vision_kan.rswaf_linear_grad)
def _grad_flops(dy_shape, u_shape, weight_shape, grid_shape, h_shape, h_number, single_exp, dtype, backend_name,
                need_u, need_weight, need_grid, need_h, out_shape=None, **kwargs) -> int:
    return ((need_u or need_grid or need_h) + need_weight) * _flops(u_shape, weight_shape)


# ---------------------------------------------------------------- one chunk of tokens at a time
# The C++ kernels (`points` given) write the basis in the order of the weight's columns, (i, k). PyTorch's path orders it (k, i),
# so that every elementwise pass runs over contiguous inputs, and copies the weight in that order.
def _chunked(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool, dtype: torch.dtype,
             points: tuple[float, ...] | None) -> Tensor:
    n_in, n_grid = u.shape[1], grid.numel()
    w = (weight.to(dtype) if points is not None else _columns_by_point(weight, n_grid, dtype)).t()      # [G*I, O]
    y = torch.empty(len(u), len(weight), dtype=dtype, device=u.device)
    for rows in _chunks(u, n_grid):
        if points is not None:
            basis = torch.empty(len(u[rows]), n_grid * n_in, dtype=dtype)
            native.basis(u[rows], points, float(h), basis)
        else:
            basis = _Basis(u[rows], grid, h, single_exp).values.flatten(1).to(dtype)
        torch.mm(basis, w, out=y[rows])
    return y


def _chunked_grad(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool,
                  dtype: torch.dtype, needs: tuple[bool, ...], points: tuple[float, ...] | None
                  ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_u, need_w, need_grid, need_h = needs
    du: Any
    dgrid: Any
    dh: Any         # each is None if it is not needed
    n_out, n_in, n_grid = len(weight), u.shape[1], grid.numel()
    w = weight.to(dtype) if points is not None else _columns_by_point(weight, n_grid, dtype)            # [O, G*I]
    du = torch.empty_like(u) if need_u else None
    dw = None
    dgrid = torch.zeros_like(grid) if need_grid else None
    dh = torch.zeros_like(h) if isinstance(h, Tensor) and need_h else None
    for rows in _chunks(u, n_grid):
        if points is not None:
            if need_u:                                                  # one pass: dL/dB out, B in, and du
                values = dy[rows] @ w
                native.basis_grad(values, u[rows], points, float(h), du[rows])
            else:
                values = torch.empty(len(u[rows]), n_grid * n_in, dtype=dtype)
                native.basis(u[rows], points, float(h), values)
            if need_w:
                dw = _add_product(dw, dy[rows].t(), values, weight)
            continue
        basis = _Basis(u[rows], grid, h, single_exp)
        if need_w:
            dw = _add_product(dw, dy[rows].t(), basis.values.flatten(1).to(dtype), weight)
        if need_u or need_grid or need_h:
            dbasis = (dy[rows] @ w).view_as(basis.values).to(basis.values.dtype)        # [t, G, I]
            if need_grid or need_h:
                slope = dbasis * basis.derivative()                     # dL/dB * dB/du
                if need_u:
                    du[rows] = slope.sum(1)
                # dB/dg = -dB/du and dB/dh = -dB/du * (u - g)/h
                if need_grid:
                    dgrid -= slope.sum((0, 2)).to(grid.dtype)
                if need_h:
                    dh -= (slope * basis.distance()).sum().to(dh.dtype)
            else:
                du[rows] = basis.pull_back(dbasis)
    if need_w:
        if dw is None:                                                  # no tokens
            dw = torch.zeros_like(weight)
        elif points is None:
            dw = dw.view(n_out, n_grid, n_in).transpose(1, 2).reshape(weight.shape)
    return du, dw, dgrid, dh


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """total + a @ b, accumulated in at least float32. total: None at the start."""
    if total is None:
        return (a @ b).to(math_dtype(weight.dtype))
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


class _Basis:
    """Basis values of a chunk of tokens in PyTorch, [t, G, I], and their derivatives.

    With E = exp(2(u - c)/h), c the middle of the grid, p_k = exp(-2(g_k - c)/h)/4 and q_k = exp(2(g_k - c)/h)/4,

        D_k = p_k E + q_k/E + 1/2,    B_k = 1/D_k,    dB_k/du = (2/h) (q_k/E - p_k E) / D_k^2:

    with one exponential for all grid points; every term is positive, so nothing cancels (`single_exp`). A trainable or very wide
    grid uses one exponential per grid point instead, which is valid for every grid and h.
    """

    def __init__(self, u: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool):
        dtype = math_dtype(u.dtype)
        self.u, self.grid, self.single_exp = u.to(dtype), grid.to(dtype), single_exp
        self.h = h.to(dtype) if isinstance(h, Tensor) else h
        if single_exp:
            middle = (self.grid[0] + self.grid[-1]) / 2
            offset = 2 * (self.grid - middle) / self.h
            self.p, self.q = torch.exp(-offset) / 4, torch.exp(offset) / 4          # [G]
            # beyond 2^+-60 every B_k is below 1e-9, and E * p_k could overflow
            self.e = torch.exp2(((self.u - middle) * (2 * math.log2(math.e) / self.h)).clamp_(-60, 60))
            self.inv_e = self.e.reciprocal()                                        # [t, I]
            values = self.p[:, None] * self.e[:, None]                              # [t, G, I]
            values.addcmul_(self.q[:, None], self.inv_e[:, None])
            self.values = values.add_(0.5).reciprocal_()
        else:
            self.e = torch.exp(-2 * self.distance().abs())                          # [t, G, I]
            self.values = 4 * self.e / (1 + self.e) ** 2

    def distance(self) -> Tensor:
        """(u - g)/h, [t, G, I]."""
        return (self.u[:, None] - self.grid[:, None]) / self.h

    def derivative(self) -> Tensor:
        """dB/du, [t, G, I]."""
        if self.single_exp:
            slope = self.q[:, None] * self.inv_e[:, None] - self.p[:, None] * self.e[:, None]
            return slope * self.values * self.values * (2 / self.h)
        return -self.distance().sign() * self.values * (1 - self.e) / (1 + self.e) * (2 / self.h)

    def pull_back(self, dbasis: Tensor) -> Tensor:
        """sum_k dL/dB_k * dB_k/du, [t, G, I] -> [t, I]; overwrites its argument."""
        if not self.single_exp:
            return (dbasis * self.derivative()).sum(1)
        dbasis.mul_(self.values).mul_(self.values)
        qp = torch.stack([self.q, self.p])                                          # [2, G]
        q_sum, p_sum = (qp @ dbasis).unbind(1)                                      # [t, I] each
        return (q_sum * self.inv_e - p_sum * self.e) * (2 / self.h)


def _chunks(u: Tensor, n_grid: int) -> list[slice]:
    step = max(LEAST_TOKENS, chunk_values(u.device.type) // max(1, u.shape[1] * n_grid))
    return [slice(start, min(start + step, len(u))) for start in range(0, len(u), step)]


def _columns_by_point(weight: Tensor, n_grid: int, dtype: torch.dtype) -> Tensor:
    """[O, I*G] -> [O, G*I]."""
    return weight.to(dtype).view(len(weight), -1, n_grid).transpose(1, 2).flatten(1)
