"""The group KAN feed-forward: an MLP whose activations are learned functions, shared by groups of channels.

    y = W2 phi2(W1 phi1(n) + b1) + b2,    phi(u) = s * base(u) + sum_k C[g, k] * B_k(u)

n is the block's LayerNorm output, g the group of u's channel, B_k FasterKAN's basis on a fixed grid or another one; the base of
phi1 is the identity, that of phi2 GELU. Every edge function is w_oi * phi_g(u_i): a Kolmogorov-Arnold network (arXiv:2404.19756,
with its residual base function) whose edges share their shape within a group, as the rationals of the Kolmogorov-Arnold
transformer do (arXiv:2409.10594). C begins at 0, so the network begins as the MLP and can use an MLP's weights: `fc1` and `fc2`
are named as in `timm.layers.Mlp`.

Legend for shapes: T tokens (all leading dimensions flattened), I channels, G grid points.
"""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vision_kan.kernels import (
    BASES,
    FUNCTIONS,
    MAX_HALF_RANGE,
    activation,
    activation_reference,
    check_grid,
    check_groups,
    exporting,
    rswaf_activation,
)
from vision_kan.layers.feed_forward import ChannelMLP, base_of, grid_range_of, widths
from vision_kan.layers.function_layer import (
    BASE_FLOPS,
    Flops,
    FunctionLayer,
)

# basis -> the buffer of the grid; the first is that of weights from before there were others
GRID_NAMES = {function: "grid" if function == "rswaf" else f"{function}_grid" for function in FUNCTIONS}
torch.fx.wrap("rswaf_activation")      # one call in a graph of torch.fx
torch.fx.wrap("activation")


class GroupActivation(FunctionLayer):
    """phi(u) = s * base(u) + sum_k C[g, k] B_k(u), elementwise: [..., channels] -> the same shape.

    Args:
        groups: number of functions, each shared by channels / groups neighbouring channels; 0: one per channel.
        base: a key of `BASES`.
        grid_min, grid_max, num_grids: the uniform grid.
        h: width of a bump; None: the grid's spacing.
        trainable_base: learn s (one per group, 1 at the start), else it is 1.
        function: the basis, a key of `FUNCTIONS`.
    Raises: ValueError if the groups do not divide the channels, or for an impossible grid, base or basis.
    """
    per_edge = False

    def __init__(self, channels: int, *, groups: int = 8, base: str = "gelu", grid_min: float = -3.0,
                 grid_max: float = 3.0, num_grids: int = 8, h: float | None = None, trainable_base: bool = False,
                 function: str = "rswaf", device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        groups = groups or channels
        check_groups(groups, channels)
        if base not in BASES:
            raise ValueError(f"base {base} is not one of {', '.join(BASES)}")
        if function not in list(FUNCTIONS):
            raise ValueError(f"function {function} is not one of {', '.join(FUNCTIONS)}")
        check_grid(grid_min, grid_max, num_grids, 1.0 if h is None else h)
        self.h = (grid_max - grid_min) / (num_grids - 1) if h is None else h
        # other bases than rswaf need a limit only against functions that are 0 nearly everywhere
        least = (grid_max - grid_min) / 2 / (MAX_HALF_RANGE if function == "rswaf" else 50 * num_grids)
        if self.h < least * (1 - 1e-9):
            raise ValueError(f"h = {self.h:g} is too narrow for the grid [{grid_min}, {grid_max}]: take at least {least:g}")
        self.channels, self.base, self.function = channels, base, function
        self.has_grid = FUNCTIONS[function].fades
        # The layer computes with these numbers; the buffer only records them in checkpoints, and the basis by its name.
        self.points = tuple(torch.linspace(grid_min, grid_max, num_grids, dtype=torch.float64, device="cpu").tolist())
        self.register_buffer(GRID_NAMES[function], torch.empty(num_grids, **dd))
        self.coefficients = nn.Parameter(torch.empty(groups, num_grids, **dd))
        self.scale = nn.Parameter(torch.empty(groups, **dd)) if trainable_base else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin as the base function. timm calls it, also after `to_empty` from meta."""
        self.get_buffer(GRID_NAMES[self.function]).copy_(torch.tensor(self.points))
        nn.init.zeros_(self.coefficients)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(self, u: Tensor) -> Tensor:
        if exporting():
            return self.reference_forward(u)
        if self.function == "rswaf":
            return rswaf_activation(u, self.coefficients, self.points, self.h, self.base, self.scale)
        return activation(u, self.coefficients, self.points, self.h, self.base, self.scale, self.function)

    @property
    def for_kernels(self) -> tuple:
        return len(self.points), self.points, self.h, self.base, self.function

    def reference_forward(self, u: Tensor) -> Tensor:
        """The same function in PyTorch's own operations."""
        return activation_reference(u, self.coefficients, self.points, self.h, self.base, self.scale, self.function)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs) -> None:
        own = GRID_NAMES[self.function]
        theirs = [function for function, name in GRID_NAMES.items() if f"{prefix}{name}" in state_dict]
        if f"{prefix}coefficients" in state_dict and (theirs or ["rswaf"]) != [self.function]:
            what = f"are of the basis {' and '.join(theirs)}" if theirs else "come without a grid"
            error_msgs.append(f"{prefix}coefficients {what} where the model has {self.function}")
        grid = state_dict.get(f"{prefix}{own}")
        points = torch.tensor(self.points, device="cpu")
        if isinstance(grid, Tensor) and grid.layout is torch.strided and not grid.is_meta and (
                grid.shape != points.shape or not torch.allclose(
                    grid.float().cpu(), points.to(grid.dtype if grid.is_floating_point() else torch.float32).float(), atol=1e-4)):
            what = f"{len(grid)} points from {grid[0]:g} to {grid[-1]:g}" if grid.ndim == 1 and len(grid) else \
                f"the shape {tuple(grid.shape)}"
            error_msgs.append(f"{prefix}{own} has {what} where the model has {len(self.points)} from {self.points[0]:g} to "
                              f"{self.points[-1]:g}, evenly spaced")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        what = "points" if self.function == "rswaf" else f"{self.function} functions"
        return (f"{self.channels} channels, {len(self.coefficients)} groups, base={self.base}, {len(self.points)} {what} "
                f"on [{self.points[0]:g}, {self.points[-1]:g}], h={self.h:.3g}")

    # ------------------------------------------------------------ what it answers about itself
    @property
    def has_base(self) -> bool:
        return True

    def flops(self, tokens: int) -> Flops:
        basis = FUNCTIONS[self.function].flops + 2       # of a value, times its coefficient, added
        per_channel = basis * len(self.points) + BASE_FLOPS[self.base]
        return Flops(0, per_channel * tokens * self.channels)

    def grid_points(self) -> Tensor:
        return torch.tensor(self.points, dtype=torch.float32, device="cpu").double()      # the layer computes in float32

    @torch.no_grad()
    def basis(self, u: Tensor) -> Tensor:
        return torch.stack([*FUNCTIONS[self.function].values(u, self.points, self.h), BASES[self.base](u)], -1)

    def function_weights(self) -> Tensor:
        scale = torch.ones_like(self.coefficients[:, 0]) if self.scale is None else self.scale
        return torch.cat([self.coefficients, scale[:, None]], 1).unsqueeze(0)

    @torch.no_grad()
    def set_function_weights(self, weights: Tensor, bias: Tensor | None = None) -> None:
        """Without a learned scale the base's weight stays 1."""
        self.coefficients.copy_(weights[0, :, :len(self.points)])
        if self.scale is not None:
            self.scale.copy_(weights[0, :, -1])

    def function_parameters(self) -> list[nn.Parameter]:
        return [self.coefficients] if self.scale is None else [self.coefficients, self.scale]

    def scaled_parameters(self) -> list[nn.Parameter]:
        return [self.coefficients]


class GroupKAN(ChannelMLP):
    """The group KAN in place of a transformer block's MLP, called as timm calls `timm.layers.Mlp`.

    Args:
        in_features, hidden_features, out_features: widths; hidden and out default to in_features.
        hdim: the hidden width, if it must differ from `hidden_features`, which timm always passes as mlp_ratio * dim.
        act_layer: the activation whose function is phi2's base, if `base` is None; None: GELU.
        base: base function of phi2, a key of `BASES`.
        input_phi: False leaves out phi1.
        bias: of W1 and W2, one choice or a pair.
        drop: dropout after phi2 and after W2, one rate or a pair.
        norm_layer: ignored; accepted because timm passes it.
        phi: keywords of `GroupActivation`.
    Raises: ValueError as `GroupActivation`, and for an `act_layer` whose function is not one of `BASES`.
    """
    TITLE = "group KAN (an MLP whose activations are learned functions, shared by groups of channels)"
    PRUNES = ("hidden", "points", "groups")
    NAMES = ("phi1", "phi2")

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
                 act_layer: Callable[[], nn.Module] | None = None, norm_layer=None, bias: bool | Sequence[bool] = True,
                 drop: float | Sequence[float] = 0.0, device=None, dtype=None, *, hdim: int | None = None,
                 base: str | None = None, input_phi: bool = True, **phi):
        hidden = hdim or hidden_features or in_features
        if base is None:
            base = "gelu" if act_layer is None else base_of(act_layer)
        dd = {"device": device, "dtype": dtype}
        super().__init__(GroupActivation(in_features, base="identity", **phi, **dd) if input_phi else nn.Identity(),
                         GroupActivation(hidden, base=base, **phi, **dd),
                         in_features, hidden, out_features or in_features, bias, drop, **dd)

    @classmethod
    def with_options(cls, size: Any, *, hdim_kan: int | None = None, kan_groups: int = 8, kan_base: str = "gelu",
                     kan_input_phi: bool = True, kan_trainable_base: bool = False, kan_grid_range=(-3.0, 3.0),
                     kan_grid_points: int = 8, kan_h: float | None = None,
                     kan_function: str = "rswaf") -> Callable[..., nn.Module]:
        """Begins as the MLP, hidden width 4 x dim."""
        return partial(cls, hdim=hdim_kan, groups=kan_groups, base=kan_base, input_phi=kan_input_phi,
                       trainable_base=kan_trainable_base, grid_min=kan_grid_range[0], grid_max=kan_grid_range[1],
                       num_grids=kan_grid_points, h=kan_h, function=kan_function)

    @classmethod
    def read_options(cls, blocks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Any] | None:
        first = blocks[0]
        if "phi2.coefficients" not in first:
            return None
        function = next((function for function, name in GRID_NAMES.items() if f"phi2.{name}" in first), None)
        grid = first[f"phi2.{GRID_NAMES[function]}"] if function else None
        if grid is None or grid.ndim != 1 or not len(grid):
            raise ValueError("the learned functions have no grid")
        groups, points = first["phi2.coefficients"].shape
        hidden = widths(blocks, "fc1.weight")
        per_channel = widths(blocks, "phi2.coefficients") == hidden     # each channel has its own function
        options = {"kan_groups": 0 if per_channel else groups, "kan_grid_points": points,
                   "kan_grid_range": grid_range_of(grid),
                   "kan_input_phi": "phi1.coefficients" in first, "kan_trainable_base": "phi2.scale" in first,
                   "kan_function": function}
        return options if hidden == 4 * dim else options | {"hdim_kan": hidden}
