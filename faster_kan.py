"""The FasterKAN feed-forward: LayerNorm, a basis of bumps on a grid, one linear map.

    u = LayerNorm(x)                                    # [..., I]
    B_k(u) = 1 - tanh((u - g_k) / h)^2                  # k = 1..G
    y_o = sum_{i,k} W[o, i*G + k] * B_k(u_i)            # [..., O]

Legend for shapes: T tokens (all leading dimensions flattened), I inputs, O outputs, G grid points.

The basis is the reflectional switch activation function of FasterKAN (A. Delis, 2024), an approximation of
the B-splines of Kolmogorov-Arnold networks (Liu et al., arXiv:2404.19756). Parameter names are those of the
released Vision-KAN checkpoints: `layers.N.layernorm`, `layers.N.rbf.grid`, `layers.N.spline_linear.weight`.
"""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from vision_kan.kernels import MAX_HALF_RANGE, check_grid, exporting, rswaf_basis, rswaf_linear, rswaf_linear_reference
from vision_kan.layers.feed_forward import EdgeHalf, Half, TwoLayerKAN, grid_range_of, widths
from vision_kan.layers.function_layer import BASIS_FLOPS, SILU_FLOPS, Flops, FunctionLayer
from vision_kan.layers.least_squares import ridge_solve

torch.fx.wrap("rswaf_linear")      # one call in a graph of torch.fx


# ---------------------------------------------------------------- modules
class SplineLinear(nn.Module):
    """The weights of every edge function, [O, I*G]. Not an `nn.Linear`, which timm would initialise as a ViT's."""

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

    Least squares by Gauss-Hermite quadrature in float64. A small ridge keeps `a` bounded if bumps overlap so much that they are
    nearly dependent.

    Args:
        function: elementwise.
        grid: [G].
        h: width of a bump.
        mean, std: numbers, or [N] for N fits at once.
        ridge: relative to the mean of E[B_k^2].
    Returns: a [N, G] or [G], and the root mean square error relative to that of the function, [N] or a scalar.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    u, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    grid, h = grid.detach().double().cpu(), h.detach().double().cpu() if isinstance(h, Tensor) else h
    mean, std = (torch.as_tensor(value, dtype=torch.float64).cpu() for value in (mean, std))
    target = function(mean[..., None] + std[..., None] * u)             # [N, nodes]
    basis = rswaf_basis(u, grid, h)                                     # [nodes, G]
    moments = (w * target) @ basis                                      # [N, G]
    a = ridge_solve(basis.T @ (w[:, None] * basis), moments[..., None], ridge).squeeze(-1)
    error = ((a @ basis.T - target).square() * w).sum(-1).sqrt() / (target.square() * w).sum(-1).sqrt()
    return a, error


class StaticNorm(nn.Module):
    """u = scale * x + shift with a learned scale and shift for each feature, x [..., features]. It replaces a LayerNorm, whose
    statistics mix the features of a token."""

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
    grid: Tensor
    h: float | Tensor

    def __init__(self, grid_min: float, grid_max: float, num_grids: int, h: float,
                 train_grid: bool = False, train_h: bool = False, device=None, dtype=None):
        super().__init__()
        check_grid(grid_min, grid_max, num_grids, h)
        self.grid_min, self.grid_max, self.num_grids, self.initial_h = grid_min, grid_max, num_grids, h
        grid = torch.empty(num_grids, device=device, dtype=dtype)
        if train_grid:
            self.grid = nn.Parameter(grid)
        else:
            self.register_buffer("grid", grid)
        # A fixed h is a Python number: released checkpoints don't contain it, and it is exact in every precision.
        self.h = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if train_h else h
        self.single_exp = not (train_grid or train_h) and (grid_max - grid_min) / 2 / h <= MAX_HALF_RANGE
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.grid.copy_(torch.linspace(self.grid_min, self.grid_max, self.num_grids))
        if isinstance(self.h, Tensor):
            self.h.fill_(self.initial_h)

    def basis(self, u: Tensor) -> Tensor:
        """[..., G]: B_k(u) in u's dtype."""
        return rswaf_basis(u, self.grid.to(u), self.h.to(u) if isinstance(self.h, Tensor) else self.h)

    @torch.no_grad()
    def resample_from(self, old: "RSWAFGrid") -> None:
        """Interpolate learned points of another grid to this grid's number of points, and scale a learned width."""
        if isinstance(self.grid, nn.Parameter):
            positions = np.linspace(0, len(old.grid) - 1, len(self.grid))
            self.grid.copy_(torch.from_numpy(np.interp(positions, np.arange(len(old.grid)), old.grid.double().cpu().numpy())))
        if isinstance(self.h, nn.Parameter) and isinstance(old.h, Tensor):
            self.h.copy_(old.h * (len(old.grid) - 1) / (len(self.grid) - 1))

    def extra_repr(self) -> str:
        return f"[{self.grid_min}, {self.grid_max}], {self.num_grids} points, h={self.initial_h:g}"


class FasterKANLayer(FunctionLayer):
    """Normalisation, basis, one linear map: x [..., in_features] -> [..., out_features].

    Args:
        grid_min, grid_max, num_grids: the uniform initial grid (original: 8 points on [-2, 2]).
        h: width of a bump (original: 0.33); None: the spacing of the grid.
        train_grid, train_h: learn grid points, width.
        norm: "layer" (original), "static" (a learned scale and shift of each feature) or "none".
        bias: add a bias.
        base_branch: add a linear map of silu(u), as the KAN paper does.
        init_as: a key of `INIT_FUNCTIONS`: the layer begins as a random linear map of that function; None: the spline's weights
            are Xavier-uniform (original).
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
            getattr(module, "reset_parameters", lambda: None)()
        self._init_spline()

    def _init_spline(self) -> None:
        if self.init_as is not None and not self.rbf.grid.is_meta:
            coefficients, _ = fit_basis(INIT_FUNCTIONS[self.init_as], self.rbf.grid, self.rbf.h)
            self.spline_linear.init_as_mlp(coefficients)

    def forward(self, x: Tensor) -> Tensor:
        if exporting():
            return self.reference_forward(x)
        u = self.layernorm(x)
        y = rswaf_linear(u, self.spline_linear.weight, self.rbf.grid, self.rbf.h, self.rbf.single_exp)
        return self._add_linear(y, u)

    @property
    def for_kernels(self) -> tuple:
        rbf = self.rbf
        if not rbf.single_exp:
            return rbf.num_grids, None
        return rbf.num_grids, tuple(torch.linspace(rbf.grid_min, rbf.grid_max, rbf.num_grids, device="cpu").tolist()), rbf.h

    def reference_forward(self, x: Tensor) -> Tensor:
        """The same function in PyTorch's own operations."""
        u = self.layernorm(x)
        return self._add_linear(rswaf_linear_reference(u, self.spline_linear.weight, self.rbf.grid, self.rbf.h), u)

    def _add_linear(self, y: Tensor, u: Tensor) -> Tensor:
        if self.spline_linear.bias is not None:
            y = y + self.spline_linear.bias.to(y.dtype)
        if self.base_linear is not None:
            y = y + F.linear(F.silu(u), self.base_linear.weight)
        return y

    # ------------------------------------------------------------ what it answers about itself
    @property
    def has_base(self) -> bool:
        return self.base_linear is not None

    def flops(self, tokens: int) -> Flops:
        matmul, elementwise = self.spline_linear.weight.numel(), BASIS_FLOPS * self.spline_linear.weight.shape[1]
        if self.base_linear is not None:
            matmul, elementwise = matmul + self.base_linear.weight.numel(), elementwise + SILU_FLOPS * self.in_features
        return Flops(2 * tokens * matmul, tokens * elementwise)

    def normalised(self, x: Tensor) -> Tensor:
        return self.layernorm(x)

    @property
    def norm(self) -> nn.LayerNorm | None:
        return self.layernorm if isinstance(self.layernorm, nn.LayerNorm) else None

    def grid_points(self) -> Tensor:
        return self.rbf.grid.detach().double().cpu().sort().values      # learned ones may have passed each other

    @torch.no_grad()
    def basis(self, u: Tensor) -> Tensor:
        basis = self.rbf.basis(u)
        return basis if self.base_linear is None else torch.cat([basis, F.silu(u).unsqueeze(-1)], -1)

    def function_weights(self) -> Tensor:
        weight = self.spline_linear.weight.unflatten(1, (self.in_features, -1))
        return weight if self.base_linear is None else torch.cat([weight, self.base_linear.weight.unsqueeze(-1)], -1)

    @torch.no_grad()
    def set_function_weights(self, weights: Tensor, bias: Tensor | None = None) -> None:
        points = len(self.rbf.grid)
        self.spline_linear.weight.copy_(weights[..., :points].flatten(1))
        if self.base_linear is not None:
            self.base_linear.weight.copy_(weights[..., points])
        if self.spline_linear.bias is not None and bias is not None:
            self.spline_linear.bias.copy_(bias)

    def function_parameters(self) -> list[nn.Parameter]:
        return [self.spline_linear.weight]

    def copy_grid(self, old: FunctionLayer) -> None:
        assert isinstance(old, FasterKANLayer)
        self.layernorm.load_state_dict(old.layernorm.state_dict())
        self.rbf.resample_from(old.rbf)

    @torch.no_grad()
    def normalise_by(self, mean: Tensor, std: Tensor) -> None:
        """Set the normalisation to u = (x - mean)/std, [I] each. With a LayerNorm this holds for normalised inputs x only."""
        norm: Any = self.layernorm
        scale, shift = (norm.scale, norm.shift) if isinstance(norm, StaticNorm) else (norm.weight, norm.bias)
        scale.copy_(1 / std)
        shift.copy_(-mean / std)


INIT_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda u: u, "gelu": F.gelu}


class FasterKAN(TwoLayerKAN):
    """Two FasterKAN layers in place of a transformer block's MLP, called as timm calls `timm.layers.Mlp`.

    Args:
        in_features, hidden_features, out_features: widths; hidden and out default to in_features.
        hdim: the hidden width, if it must differ from `hidden_features`, which timm always passes as mlp_ratio * dim.
        drop: dropout after each layer, one rate or a pair.
        act_layer, norm_layer, bias: ignored; accepted because timm passes them. The edge functions are the activation, each layer
            normalises its own input, and the biases are `kan_bias`.
        kan_bias: `bias` of both layers (released checkpoints have none).
        second_norm: `norm` of the second layer; the first one's is a LayerNorm.
        init_as_mlp: begin as a random MLP: the first layer linear, the second a linear map of GELUs.
        kan: keywords of `FasterKANLayer`.
    """
    TITLE = "FasterKAN (a learned function on every edge)"
    PRUNES = ("hidden", "points", "edges")
    FITS_MLP = True

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
                 act_layer=None, norm_layer=None, bias: bool = True, drop: float | Sequence[float] = 0.0,
                 device=None, dtype=None, *, hdim: int | None = None, kan_bias: bool = False,
                 second_norm: str = "layer", init_as_mlp: bool = False, **kan):
        hidden = hdim or hidden_features or in_features
        kan |= {"bias": kan_bias, "device": device, "dtype": dtype}
        super().__init__(FasterKANLayer(in_features, hidden, init_as="identity" if init_as_mlp else None, **kan),
                         FasterKANLayer(hidden, out_features or in_features, norm=second_norm,
                                        init_as="gelu" if init_as_mlp else None, **kan), drop)

    @property
    def fc2(self) -> SplineLinear:
        """The last linear map. Some of timm's models scale `mlp.fc2` by the depth of the block."""
        return self.layers[-1].spline_linear

    @classmethod
    def with_options(cls, size: Any, *, hdim_kan: int | None = None, kan_basis: str = "original", kan_grid_range=None,
                     kan_grid_points: int = 8, kan_h: float | None = None, kan_trainable_grid: bool = False,
                     kan_trainable_h: bool = False, kan_base_branch: bool = False,
                     kan_second_norm: str = "layer") -> Callable[..., nn.Module]:
        """Basis "original": the released Vision-KAN's, on [-2, 2] with h 0.33; "covering": on [-3, 3] with h the spacing of the
        points, a bias, and weights that begin as a random MLP's."""
        covering = {"original": False, "covering": True}[kan_basis]
        low, high = kan_grid_range or ((-3.0, 3.0) if covering else (-2.0, 2.0))
        return partial(cls, hdim=hdim_kan or size.kan_hidden, grid_min=low, grid_max=high, num_grids=kan_grid_points,
                       h=(None if covering else 0.33) if kan_h is None else kan_h,
                       train_grid=kan_trainable_grid, train_h=kan_trainable_h, kan_bias=covering, init_as_mlp=covering,
                       base_branch=kan_base_branch, second_norm=kan_second_norm)

    @classmethod
    def read_options(cls, blocks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Any] | None:
        first = blocks[0]
        if "layers.0.spline_linear.weight" not in first:
            return None
        grid = first["layers.0.rbf.grid"]
        options: dict[str, Any] = {"hdim_kan": widths(blocks, "layers.0.spline_linear.weight"),
                                   "kan_grid_points": grid.numel(), "kan_grid_range": grid_range_of(grid)}
        if "layers.0.rbf.h" in first:
            options["kan_trainable_h"] = True
        if "layers.0.spline_linear.bias" in first:
            options["kan_basis"] = "covering"
        if "layers.0.base_linear.weight" in first:
            options["kan_base_branch"] = True
        if "layers.1.layernorm.weight" not in first:
            options["kan_second_norm"] = "static" if "layers.1.layernorm.scale" in first else "none"
        return options

    def halves(self) -> tuple[Half, Half]:
        first, second = (EdgeHalf(layer, layer.spline_linear.bias) for layer in self.layers)
        return first, second

    def mlp_misfit(self, mlp: Mlp) -> str | None:
        """The reason why it cannot be fitted to this MLP, as a clause; None if it can."""
        first, second = self.layers
        if (mlp.fc1.in_features, mlp.fc1.out_features) != (first.in_features, first.out_features):
            return (f"its MLP is {mlp.fc1.in_features} x {mlp.fc1.out_features}, the KAN {first.in_features} x "
                    f"{first.out_features}: give --hdim_kan {mlp.fc1.out_features}")
        if first.spline_linear.bias is None:
            return "the original basis has no bias and does not cover its inputs: give --kan-basis covering"
        if not isinstance(second.layernorm, StaticNorm):
            return "a LayerNorm over the hidden units changes what they are: give --kan-second-norm static"
        return None
