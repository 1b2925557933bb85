"""The FasterKAN feed-forward: LayerNorm, a basis of bumps on a grid, one linear map.

    u = LayerNorm(x)                                    # [..., I]
    B_k(u) = 1 - tanh((u - g_k) / h)^2                  # k = 1..G
    y_o = sum_{i,k} W[o, i*G + k] * B_k(u_i)            # [..., O]

Legend for shapes: T tokens (all leading dimensions flattened), I inputs, O outputs, G grid points.

The basis is the reflectional switch activation function of FasterKAN (A. Delis, 2024), an approximation of
the B-splines of Kolmogorov-Arnold networks (Liu et al., arXiv:2404.19756). Parameter names are those of the
released Vision-KAN checkpoints: `layers.N.layernorm`, `layers.N.rbf.grid`, `layers.N.spline_linear.weight`.
"""
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Values of the basis that exist at once: about 1 MiB on a CPU, which stays in its L2 cache; on a GPU only a
# bound on memory.
CHUNK_VALUES = {"cpu": 2 ** 18}
CHUNK_VALUES_OTHER = 2 ** 27
# The single-exponential form below holds where no grid point lies further than this from the grid's middle.
MAX_HALF_RANGE = 10.0


# ---------------------------------------------------------------- the reference
def rswaf_basis(u: Tensor, grid: Tensor, h: float | Tensor) -> Tensor:
    """Basis values B_k(u) = 1 - tanh((u - g_k)/h)^2, shape [..., I] -> [..., I, G].

    Written as 4e/(1+e)^2 with e = exp(-2|u - g|/h): 1 - tanh^2 loses its tails to cancellation and
    exp(+2|u - g|/h) overflows at |u| = 1e4."""
    z = (u.unsqueeze(-1) - grid) / h                    # [..., I, G]
    e = torch.exp(-2 * z.abs())                         # in (0, 1]
    return 4 * e / (1 + e) ** 2


def rswaf_linear_reference(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor) -> Tensor:
    """The whole layer after its LayerNorm in plain PyTorch: u [..., I], weight [O, I*G] -> [..., O]."""
    basis = rswaf_basis(u, grid, h)                     # [..., I, G]
    return F.linear(basis.flatten(-2), weight)          # [..., I*G] @ [I*G, O] -> [..., O]


# ---------------------------------------------------------------- the op with a backward of its own
class _RSWAFLinear(torch.autograd.Function):
    """`rswaf_linear_reference` that keeps only u and the parameters for its backward and computes the basis
    again there: nothing of size [T, I, G] outlives a chunk of tokens.

    Inside, the operand's columns are ordered (k, i), so that every elementwise pass runs over contiguous
    inputs. With E = exp(2(u - c)/h), c the middle of the grid, p_k = exp(-2(g_k - c)/h)/4 and
    q_k = exp(2(g_k - c)/h)/4,

        D_k = p_k E + q_k/E + 1/2,    B_k = 1/D_k,    dB_k/du = (2/h) (q_k/E - p_k E) / D_k^2:

    one exponential for all grid points, every term positive, nothing cancels (`single_exp`). A trainable
    or very wide grid takes one exponential a grid point instead, which holds for every grid and h.
    """

    @staticmethod
    def forward(ctx, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool,
                dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(u, weight, grid, *([h] if isinstance(h, Tensor) else []))
        ctx.h, ctx.single_exp, ctx.dtype = None if isinstance(h, Tensor) else h, single_exp, dtype
        w = _columns_by_point(weight, grid.numel(), dtype)              # [O, G*I]
        y = torch.empty(u.shape[0], weight.shape[0], dtype=dtype, device=u.device)
        for rows in _chunks(u, grid.numel()):
            basis = _Basis(u[rows], grid, h, single_exp)
            torch.mm(basis.values.flatten(1).to(dtype), w.t(), out=y[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        u, weight, grid, *rest = ctx.saved_tensors
        h = rest[0] if rest else ctx.h
        need_u, need_w, need_grid, need_h = ctx.needs_input_grad[:4]
        n_out, n_in, n_grid = weight.shape[0], u.shape[1], grid.numel()
        dy = dy.to(ctx.dtype)
        w = _columns_by_point(weight, n_grid, ctx.dtype)                # [O, G*I]
        du = torch.empty_like(u) if need_u else None
        dw = torch.zeros(n_out, n_grid * n_in, dtype=_math_dtype(weight.dtype), device=u.device) if need_w else None
        dgrid = torch.zeros_like(grid) if need_grid else None
        dh = torch.zeros_like(h) if need_h else None
        for rows in _chunks(u, n_grid):
            basis = _Basis(u[rows], grid, h, ctx.single_exp)
            if need_w:
                dw += dy[rows].t() @ basis.values.flatten(1).to(ctx.dtype)
            if need_u or need_grid or need_h:
                dbasis = (dy[rows] @ w).view_as(basis.values).to(basis.values.dtype)    # [t, G, I]
                if need_grid or need_h:
                    slope = dbasis * basis.derivative()                 # dL/dB * dB/du
                    if need_u:
                        du[rows] = slope.sum(1)
                    # dB/dg = -dB/du and dB/dh = -dB/du * (u - g)/h
                    if need_grid:
                        dgrid -= slope.sum((0, 2)).to(grid.dtype)
                    if need_h:
                        dh -= (slope * basis.distance()).sum().to(h.dtype)
                else:
                    du[rows] = basis.pull_back(dbasis)
        if need_w:
            dw = dw.view(n_out, n_grid, n_in).transpose(1, 2).reshape(weight.shape).to(weight.dtype)
        return du, dw, dgrid, dh, None, None


class _Basis:
    """Basis values of a chunk of tokens, laid out [t, G, I], and what follows from them."""

    def __init__(self, u: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool):
        dtype = _math_dtype(u.dtype)
        self.u, self.grid, self.single_exp = u.to(dtype), grid.to(dtype), single_exp
        self.h = h.to(dtype) if isinstance(h, Tensor) else h
        if single_exp:
            middle = (self.grid[0] + self.grid[-1]) / 2
            offset = 2 * (self.grid - middle) / self.h
            self.p, self.q = torch.exp(-offset) / 4, torch.exp(offset) / 4          # [G]
            # 2^+-60: beyond it every B_k is below 1e-9 and E * p_k must not overflow
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
        with torch.autocast(dbasis.device.type, enabled=False):     # around a backward it would round to 16 bits
            q_sum, p_sum = (qp @ dbasis).unbind(1)                                  # [t, I] each
        return (q_sum * self.inv_e - p_sum * self.e) * (2 / self.h)


def _math_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _chunks(u: Tensor, n_grid: int):
    if torch.compiler.is_compiling():
        return [slice(None)]
    limit = CHUNK_VALUES.get(u.device.type, CHUNK_VALUES_OTHER)
    step = max(1, limit // max(1, u.shape[1] * n_grid))
    return [slice(start, min(start + step, u.shape[0])) for start in range(0, u.shape[0], step)]


def _columns_by_point(weight: Tensor, n_grid: int, dtype: torch.dtype) -> Tensor:
    """[O, I*G] -> [O, G*I]."""
    return weight.to(dtype).view(weight.shape[0], -1, n_grid).transpose(1, 2).flatten(1)


def rswaf_linear(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor,
                 single_exp: bool = False) -> Tensor:
    """y = W vec(B(u)) with a backward that recomputes the basis.

    Args:
        u: normalised input [..., I], any floating dtype; the basis is computed in at least float32.
        weight: [O, I*G], column i*G + k.
        grid: [G] grid points. h: width, a number or a scalar tensor. Both may require a gradient.
        single_exp: take the faster form; right only while max |g - middle| / h <= MAX_HALF_RANGE.
    Returns: [..., O] in autocast's dtype where autocast is on, else in u's.
    """
    dtype = torch.get_autocast_dtype(u.device.type) if torch.is_autocast_enabled(u.device.type) else u.dtype
    y = _RSWAFLinear.apply(u.reshape(-1, u.shape[-1]), weight, grid, h, single_exp, dtype)
    return y.view(*u.shape[:-1], y.shape[-1])


# ---------------------------------------------------------------- modules
class SplineLinear(nn.Module):
    """The weights of every edge function, [O, I*G]. No `nn.Linear`: timm gives each of those a ViT's
    initialisation."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def init_as_mlp(self, coefficients: Tensor) -> None:
        """W[o, i, k] = R[o, i] * a_k: a random linear map R, deviation in^-1/2, of the function sum_k a_k B_k."""
        inputs = self.weight.shape[1] // len(coefficients)
        r = torch.randn(len(self.weight), inputs, device=self.weight.device) / inputs ** 0.5
        self.weight.copy_((r[..., None] * coefficients.to(r)).flatten(1))


@torch.no_grad()
def fit_basis(function: Callable[[Tensor], Tensor], grid: Tensor, h: float | Tensor, *, mean: Tensor | float = 0.0,
              std: Tensor | float = 1.0, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Coefficients a with sum_k a_k B_k(u) ~ function(mean + std * u) for a standard normal u.

    Least squares by Gauss-Hermite quadrature in float64, with a small ridge that keeps a bounded where bumps
    overlap so much that they are nearly dependent.

    Args:
        function: elementwise. grid: [G]. h: width of a bump. mean, std: numbers, or [N] for N fits at once.
        ridge: relative to the mean of E[B_k^2].
    Returns: a [N, G] or [G], and the root mean square error relative to the function's own (N or one number).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    u, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    grid, h = grid.detach().double().cpu(), h.detach().double().cpu() if isinstance(h, Tensor) else h
    mean, std = (torch.as_tensor(value, dtype=torch.float64).cpu() for value in (mean, std))
    target = function(mean[..., None] + std[..., None] * u)             # [N, nodes]
    basis = rswaf_basis(u, grid, h)                                     # [nodes, G]
    gram = basis.T @ (w[:, None] * basis)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(grid), dtype=torch.float64)
    moments = (w * target) @ basis                                      # [N, G]
    a = torch.linalg.solve(gram, moments[..., None]).squeeze(-1)        # gram is symmetric
    error = ((a @ basis.T - target).square() * w).sum(-1).sqrt() / (target.square() * w).sum(-1).sqrt()
    return a, error


class StaticNorm(nn.Module):
    """u = scale * x + shift for each feature, learned: in place of a LayerNorm, whose statistics mix the features
    of a token. x [..., features]."""

    def __init__(self, features: int, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class RSWAFGrid(nn.Module):
    """Grid points g [G] and width h of the basis, trainable or not."""

    def __init__(self, grid_min: float, grid_max: float, num_grids: int, h: float,
                 train_grid: bool = False, train_h: bool = False, device=None, dtype=None):
        super().__init__()
        if num_grids < 2 or not grid_min < grid_max or not h > 0:
            raise ValueError(f"a grid needs at least 2 points, min < max and h > 0, got {num_grids} points on "
                             f"[{grid_min}, {grid_max}] with h = {h}")
        self.grid_min, self.grid_max, self.num_grids, self.initial_h = grid_min, grid_max, num_grids, h
        grid = torch.empty(num_grids, device=device, dtype=dtype)
        if train_grid:
            self.grid = nn.Parameter(grid)
        else:
            self.register_buffer("grid", grid)
        # Fixed, h is a plain number: in no released checkpoint, and exact in every precision.
        self.h = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if train_h else h
        self.single_exp = not (train_grid or train_h) and (grid_max - grid_min) / 2 / h <= MAX_HALF_RANGE
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.grid.copy_(torch.linspace(self.grid_min, self.grid_max, self.num_grids))
        if isinstance(self.h, Tensor):
            self.h.fill_(self.initial_h)

    def extra_repr(self) -> str:
        return f"[{self.grid_min}, {self.grid_max}], {self.num_grids} points, h={self.initial_h:g}"


class FasterKANLayer(nn.Module):
    """Normalisation, basis, one linear map: x [..., in_features] -> [..., out_features].

    Args:
        grid_min, grid_max, num_grids: the uniform initial grid (original: 8 points on [-2, 2]).
        h: width of a bump (original: 0.33); None: the spacing of the grid.
        train_grid, train_h: learn grid points, width.
        norm: "layer" (original), "static" (a learned scale and shift of each feature) or "none".
        bias: add a bias. base_branch: add a linear map of silu(u), as the KAN paper does.
        init_as: a key of `FITTED`: the layer begins as a random linear map of that function; None: Xavier's
            uniform distribution over the spline's weights (original).
        eps: of the LayerNorm.
    """

    def __init__(self, in_features: int, out_features: int, *, grid_min: float = -2.0, grid_max: float = 2.0,
                 num_grids: int = 8, h: float | None = 0.33, train_grid: bool = False, train_h: bool = False,
                 norm: str = "layer", bias: bool = False, base_branch: bool = False, init_as: str | None = None,
                 eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.init_as = in_features, out_features, init_as
        if h is None:
            h = (grid_max - grid_min) / max(1, num_grids - 1)
        if norm not in ("layer", "static", "none"):
            raise ValueError(f"norm {norm} is not one of layer, static, none")
        self.layernorm = (nn.LayerNorm(in_features, eps=eps, **dd) if norm == "layer"
                          else StaticNorm(in_features, **dd) if norm == "static" else nn.Identity())
        self.rbf = RSWAFGrid(grid_min, grid_max, num_grids, h, train_grid, train_h, **dd)
        self.spline_linear = SplineLinear(in_features * num_grids, out_features, bias, **dd)
        self.base_linear = SplineLinear(in_features, out_features, **dd) if base_branch else None
        self._init_spline()

    def reset_parameters(self) -> None:
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self._init_spline()

    def _init_spline(self) -> None:
        if self.init_as is not None and not self.rbf.grid.is_meta:
            coefficients, _ = fit_basis(FITTED[self.init_as], self.rbf.grid, self.rbf.h)
            self.spline_linear.init_as_mlp(coefficients)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():       # an exported graph is of PyTorch's own operations, any batch size
            return self.reference_forward(x)
        u = self.layernorm(x)
        y = rswaf_linear(u, self.spline_linear.weight, self.rbf.grid, self.rbf.h, self.rbf.single_exp)
        return self._add_linear(y, u)

    def reference_forward(self, x: Tensor) -> Tensor:
        """The same function through plain PyTorch and its autograd."""
        u = self.layernorm(x)
        return self._add_linear(rswaf_linear_reference(u, self.spline_linear.weight, self.rbf.grid, self.rbf.h), u)

    def _add_linear(self, y: Tensor, u: Tensor) -> Tensor:
        if self.spline_linear.bias is not None:
            y = y + self.spline_linear.bias.to(y.dtype)
        if self.base_linear is not None:
            y = y + F.linear(F.silu(u), self.base_linear.weight)
        return y


FITTED: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda u: u, "gelu": F.gelu}


class FasterKAN(nn.Module):
    """Two FasterKAN layers in place of a transformer block's MLP, called as timm calls `timm.layers.Mlp`.

    Args:
        in_features, hidden_features, out_features: widths; hidden and out default to in_features.
        hdim: the hidden width where it must differ from `hidden_features`, which timm always passes as
            mlp_ratio * dim.
        drop: dropout after each layer, one rate or a pair.
        act_layer, norm_layer, bias: parts of an MLP that a FasterKAN has no place for (the edge functions are
            the activation, each layer normalises its own input, `kan_bias` is its own); accepted because timm
            passes them.
        kan_bias: `bias` of both layers (released checkpoints have none).
        second_norm: `norm` of the second layer; the first one's is a LayerNorm.
        init_as_mlp: begin as a random MLP: the first layer linear, the second a linear map of GELUs.
        kan: keywords of `FasterKANLayer`.
    """

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
                 act_layer=None, norm_layer=None, bias: bool = True, drop: float | Sequence[float] = 0.0,
                 device=None, dtype=None, *, hdim: int | None = None, kan_bias: bool = False,
                 second_norm: str = "layer", init_as_mlp: bool = False, **kan):
        super().__init__()
        hidden = hdim or hidden_features or in_features
        drops = (drop, drop) if isinstance(drop, (int, float)) else tuple(drop)
        kan |= {"bias": kan_bias, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList([
            FasterKANLayer(in_features, hidden, init_as="identity" if init_as_mlp else None, **kan),
            FasterKANLayer(hidden, out_features or in_features, norm=second_norm,
                           init_as="gelu" if init_as_mlp else None, **kan)])
        self.drops = nn.ModuleList([nn.Dropout(p) for p in drops])

    def init_weights(self) -> None:
        """Fill every parameter and the grids anew; timm calls it last, also after `to_empty` from meta."""
        for layer in self.layers:
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        for layer, drop in zip(self.layers, self.drops):
            x = drop(layer(x))
        return x
