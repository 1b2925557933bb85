"""The efficient-KAN feed-forward: a weighted SiLU and a B-spline on every edge.

    y_o = sum_i base[o, i] silu(x_i) + scaler[o, i] sum_k spline[o, i, k] B_k(x_i)

B_k are the G = intervals + order B-splines on a uniform grid that is extended by `order` intervals on both sides.
The network is that of Liu et al. (arXiv:2404.19756) in the formulation of efficient-KAN (Blealtan, 2024), the first feed-forward
of Vision-KAN. Parameter names are efficient-KAN's. The grid is fixed.

Legend for shapes: T tokens (all leading dimensions flattened), I inputs, O outputs, G basis functions, K = G +
order + 1 knots.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_kan.kernels.backend import (
    autocast_dtype,
    chunk_values,
    differentiable_backward,
    exporting,
    gradients,
    math_dtype,
    transformed,
)
from vision_kan.layers.feed_forward import TwoLayerKAN, widths
from vision_kan.layers.function_layer import BSPLINE_FLOPS, SILU_FLOPS, Flops, FunctionLayer


# ---------------------------------------------------------------- the reference
def bspline_basis(u: Tensor, knots: Tensor, order: int) -> Tensor:
    """B_k(u) by the recursion of Cox and de Boor, for any increasing knots [K]: [..., I] -> [..., I, G]."""
    u = u.unsqueeze(-1)
    basis = ((u >= knots[:-1]) & (u < knots[1:])).to(torch.promote_types(u.dtype, knots.dtype))
    for p in range(1, order + 1):
        rising = (u - knots[:-p - 1]) / (knots[p:-1] - knots[:-p - 1])
        falling = (knots[p + 1:] - u) / (knots[p + 1:] - knots[1:-p])
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


def uniform_knots(grid_min: float, grid_max: float, num_grids: int, order: int) -> Tensor:
    """K knots, of which [order] is grid_min and [G] is grid_max, in float64 on the CPU, whatever the default device."""
    margin = order * (grid_max - grid_min) / (num_grids - order)
    return torch.linspace(grid_min - margin, grid_max + margin, num_grids + order + 1, dtype=torch.float64, device="cpu")


# ---------------------------------------------------------------- the op with a backward of its own
class _EdgeLinear(torch.autograd.Function):
    """y = W vec(silu(x), B_1(x) .. B_G(x)). Only x and W are kept for the backward pass, which computes the basis again: nothing
    of size [T, I, G] outlives a chunk of tokens.

    The columns of W are ordered (function, i), so that every elementwise pass runs over contiguous inputs.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, knots: Tensor, order: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, knots)
        ctx.order, ctx.dtype = order, dtype
        w = weight.to(dtype)                                            # [O, (1 + G)*I]
        y = torch.empty(x.shape[0], w.shape[0], dtype=dtype, device=x.device)
        for rows in _chunks(x, knots):
            torch.mm(_edge_inputs(x[rows], knots, order).flatten(1).to(dtype), w.t(), out=y[rows])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, knots = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        if differentiable_backward(dy):
            with torch.autocast(dy.device.type, enabled=False):
                return *gradients(lambda x, weight: _edge_linear_reference(x, weight, knots, ctx.order, ctx.dtype),
                                  (x, weight), (need_x, need_w), dy), None, None, None
        dy, w = dy.to(ctx.dtype), weight.to(ctx.dtype)
        dx: Any = torch.empty_like(x) if need_x else None
        dw: Any = torch.zeros_like(weight, dtype=math_dtype(weight.dtype)) if need_w else None
        for rows in _chunks(x, knots):
            if need_w:
                dw += dy[rows].t() @ _edge_inputs(x[rows], knots, ctx.order).flatten(1).to(ctx.dtype)
            if need_x:
                dx[rows] = _pull_back(dy[rows] @ w, x[rows], knots, ctx.order)
        return dx, dw if dw is None else dw.to(weight.dtype), None, None, None


def _edge_linear_reference(x: Tensor, weight: Tensor, knots: Tensor, order: int, dtype: torch.dtype) -> Tensor:
    """The same in PyTorch's differentiable operations, for second derivatives."""
    u = x.to(math_dtype(x.dtype))
    functions = torch.cat([F.silu(u).unsqueeze(1), bspline_basis(u, knots, order).transpose(1, 2)], 1)
    return F.linear(functions.flatten(1).to(dtype), weight.to(dtype))


@torch.fx.wrap
def edge_linear(x: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor, knots: Tensor,
                order: int) -> Tensor:
    """sum_i base[o, i] silu(x_i) + scaler[o, i] sum_k spline[o, i, k] B_k(x_i), x [..., I] -> [..., O], in autocast's dtype if it
    is on, else in x's. One call in a graph of torch.fx."""
    spline = spline_weight * spline_scaler.unsqueeze(-1)                                    # [O, I, G]
    weight = torch.cat([base_weight.unsqueeze(1), spline.transpose(1, 2)], 1).flatten(1)    # [O, (1 + G)*I]
    y = _EdgeLinear.apply(x.reshape(-1, x.shape[-1]), weight, knots, order, autocast_dtype(x))
    return y.view(*x.shape[:-1], len(weight))


def _edge_inputs(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """silu(x), B_1(x) .. B_G(x): [t, I] -> [t, 1 + G, I].

    With s the distance of x from the middle of B_k in intervals and c = (order + 1)/2 half the width of B_k,
    B_k = sum_j (-1)^j binomial(order + 1, j) max(c - j - |s|, 0)^order / order!; as |s| is symmetric, only j < c
    count, and the few terms cancel little."""
    s, _ = _distances(x, knots, order)
    return torch.cat([F.silu(x.to(s.dtype)).unsqueeze(1), _sum_of_powers(s.abs_(), order, order)], 1)


def _pull_back(grad: Tensor, x: Tensor, knots: Tensor, order: int) -> Tensor:
    """dL/dx [t, I] from the gradient [t, (1 + G)*I] of `_edge_inputs`."""
    s, interval = _distances(x, knots, order)
    grad = grad.view(len(x), -1, x.shape[1]).to(s.dtype)
    slope = _sum_of_powers(s.abs(), order, order - 1).mul_(s.sign_()).mul_(grad[:, 1:]).sum(1)     # -dB/ds
    x = x.to(s.dtype)
    gate = x.sigmoid()
    return grad[:, 0] * gate * (1 + x * (1 - gate)) - slope / interval


def _distances(x: Tensor, knots: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """(x - middle of B_k) / interval [t, G, I] in at least float32, and the interval."""
    x, knots = x.to(math_dtype(x.dtype)), knots.to(math_dtype(x.dtype))
    n_basis = len(knots) - order - 1
    interval = (knots[-1] - knots[0]) / (len(knots) - 1)
    s = (x - (knots[0] + knots[-1]) / 2) / interval
    middles = torch.arange(n_basis, dtype=s.dtype, device=s.device) - (n_basis - 1) / 2
    return s.unsqueeze(1) - middles.unsqueeze(1), interval


def _sum_of_powers(distance: Tensor, order: int, power: int) -> Tensor:
    """The sum in `_edge_inputs` with this power: B_k for the order, -dB_k/d|s| for one less."""
    total: Any = None
    for j in range((order + 2) // 2):
        term = ((order + 1) / 2 - j - distance).clamp_(min=0)
        term = term.pow(power) if power else term.sign_()
        term.mul_((-1) ** j * math.comb(order + 1, j) / math.factorial(power))
        total = term if total is None else total.add_(term)
    return total


def _chunks(x: Tensor, knots: Tensor) -> list[slice]:
    """Slices of the rows of x [T, I] to work on at once: all of them if a compiler fuses the passes anyway."""
    step = max(1, len(x))
    if not torch.compiler.is_compiling():
        step = max(1, chunk_values(x.device.type) // max(1, x.shape[1] * len(knots)))
    return [slice(start, start + step) for start in range(0, len(x), step)]


# ---------------------------------------------------------------- modules
class EfficientKANLayer(FunctionLayer):
    """SiLU and B-splines, one linear map of all: x [..., in_features] -> [..., out_features].

    Args:
        grid_min, grid_max: the range on which the splines are complete; beyond it they fade out over `spline_order` intervals.
        num_grids: basis functions per input, intervals + order (efficient-KAN: 5 + 3).
        scale_base, scale_noise: of the initial base weights, and of the noise to which the initial splines are fitted.
    Raises: ValueError for an impossible grid.

    The basis is computed in at least float32, the matrix product in autocast's dtype if it is on. Of the buffer `grid` only the
    ends count, because the knots are uniform.
    """
    grid: Tensor

    def __init__(self, in_features: int, out_features: int, *, grid_min: float = -1.0, grid_max: float = 1.0,
                 num_grids: int = 8, spline_order: int = 3, scale_base: float = 1.0, scale_noise: float = 0.1,
                 device=None, dtype=None):
        super().__init__()
        if spline_order < 1 or num_grids <= spline_order or not grid_min < grid_max:
            raise ValueError(f"a spline needs order >= 1, more basis functions than its order and min < max, got order "
                             f"{spline_order} and {num_grids} functions on [{grid_min}, {grid_max}]")
        dd = {"device": device, "dtype": dtype}
        self.in_features, self.out_features = in_features, out_features
        self.grid_min, self.grid_max, self.num_grids, self.spline_order = grid_min, grid_max, num_grids, spline_order
        self.scale_base, self.scale_noise = scale_base, scale_noise
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features, **dd))
        self.spline_weight = nn.Parameter(torch.empty(out_features, in_features, num_grids, **dd))
        self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features, **dd))
        self.register_buffer("grid", torch.empty(num_grids + spline_order + 1, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """efficient-KAN's initialisation: the splines are a least-squares fit to noise at the grid points."""
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5) * self.scale_base)
        nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5))
        intervals = self.num_grids - self.spline_order
        knots = uniform_knots(self.grid_min, self.grid_max, self.num_grids, self.spline_order)
        self.grid.copy_(knots)
        # There are fewer points than functions: of all exact fits this is the one with the smallest norm.
        fit = torch.linalg.pinv(bspline_basis(knots[self.spline_order:self.num_grids + 1], knots, self.spline_order))
        weight = self.spline_weight
        dtype = math_dtype(weight.dtype)
        noise = torch.rand(self.out_features, self.in_features, intervals + 1, dtype=dtype, device=weight.device)
        weight.copy_((noise - 0.5) * (self.scale_noise / intervals) @ fit.t().to(weight.device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        if exporting() or transformed():
            return self.reference_forward(x)
        return edge_linear(x, self.base_weight, self.spline_weight, self.spline_scaler, self.grid, self.spline_order)

    def reference_forward(self, x: Tensor) -> Tensor:
        """The same function in PyTorch's own operations."""
        basis = bspline_basis(x.to(math_dtype(x.dtype)), self.grid, self.spline_order)             # [..., I, G]
        spline = self.spline_weight * self.spline_scaler.unsqueeze(-1)
        return F.linear(F.silu(x), self.base_weight) + F.linear(basis.flatten(-2).to(x.dtype), spline.flatten(1))

    def extra_repr(self) -> str:
        return (f"{self.in_features} -> {self.out_features}, {self.num_grids} splines of order {self.spline_order} on "
                f"[{self.grid_min}, {self.grid_max}]")

    # ------------------------------------------------------------ what it answers about itself
    @property
    def has_base(self) -> bool:
        return True

    def flops(self, tokens: int) -> Flops:
        return Flops(2 * tokens * (self.base_weight.numel() + self.spline_weight.numel()),
                     (BSPLINE_FLOPS * self.num_grids + SILU_FLOPS) * tokens * self.in_features)

    def grid_points(self) -> Tensor:
        return self.grid[self.spline_order:self.num_grids + 1].detach().double().cpu().sort().values

    @torch.no_grad()
    def basis(self, u: Tensor) -> Tensor:
        return torch.cat([bspline_basis(u, self.grid.to(u), self.spline_order), F.silu(u).unsqueeze(-1)], -1)

    def function_weights(self) -> Tensor:
        return torch.cat([self.spline_weight * self.spline_scaler.unsqueeze(-1), self.base_weight.unsqueeze(-1)], -1)

    @torch.no_grad()
    def set_function_weights(self, weights: Tensor, bias: Tensor | None = None) -> None:
        self.spline_weight.copy_(weights[..., :-1])
        self.base_weight.copy_(weights[..., -1])
        nn.init.ones_(self.spline_scaler)

    def function_parameters(self) -> list[nn.Parameter]:
        return [self.spline_weight, self.spline_scaler]


class EfficientKAN(TwoLayerKAN):
    """Two efficient-KAN layers in place of a transformer block's MLP, called as timm calls `timm.layers.Mlp`.

    Args:
        in_features, hidden_features, out_features: widths; hidden and out default to in_features.
        hdim: the hidden width, if it must differ from `hidden_features`, which timm always passes as mlp_ratio * dim.
        drop: dropout after each layer, one rate or a pair.
        act_layer, norm_layer, bias: ignored; accepted because timm passes them.
        kan: keywords of `EfficientKANLayer`.
    """
    TITLE = "efficient-KAN (SiLU and a B-spline on every edge)"

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
                 act_layer=None, norm_layer=None, bias: bool = True, drop: float | Sequence[float] = 0.0,
                 device=None, dtype=None, *, hdim: int | None = None, **kan):
        hidden = hdim or hidden_features or in_features
        dd = {"device": device, "dtype": dtype}
        super().__init__(EfficientKANLayer(in_features, hidden, **kan, **dd),
                         EfficientKANLayer(hidden, out_features or in_features, **kan, **dd), drop)

    @classmethod
    def with_options(cls, size: Any, *, hdim_kan: int | None = None, kan_grid_range=(-1.0, 1.0),
                     kan_grid_points: int = 8) -> Callable[..., nn.Module]:
        """Cubic B-splines on [-1, 1]."""
        return partial(cls, hdim=hdim_kan or size.ekan_hidden, grid_min=kan_grid_range[0], grid_max=kan_grid_range[1],
                       num_grids=kan_grid_points)

    @classmethod
    def read_options(cls, blocks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Any] | None:
        first = blocks[0]
        if "layers.0.spline_scaler" not in first:
            return None
        points, knots = first["layers.0.spline_weight"].shape[2], first["layers.0.grid"]
        return {"hdim_kan": widths(blocks, "layers.0.spline_weight"), "kan_grid_points": points,
                "kan_grid_range": (round(float(knots[-1 - points]), 6), round(float(knots[points]), 6))}
