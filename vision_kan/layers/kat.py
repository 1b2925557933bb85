"""The feed-forward of the Kolmogorov-Arnold transformer (Yang and Wang, arXiv:2409.10594): rationals that groups share.

    y = W2 R2(W1 R1(n) + b1) + b2,    R(u) = sum_{k=0..5} a_k u^k / (1 + sum_{k=1..4} |b_gk| |u|^k)

All groups of a layer share the numerator a, each has its own denominator b_g. R1 begins as the identity, R2 close to an
activation. Parameters have the names of the original's code, so that its checkpoints are read as they are.

Legend for shapes: T tokens (all leading dimensions flattened), I channels.
"""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vision_kan.kernels import BASES, check_groups, exporting, rational, rational_reference
from vision_kan.layers.feed_forward import ChannelMLP, base_of, widths
from vision_kan.layers.function_layer import Flops, FunctionLayer

DEGREE, BELOW = 5, 4        # of numerator and denominator
# Numerator and denominator of the smallest maximum error near the origin. On [-3, 3]: GELU 3.3e-3, SiLU 8e-7.
BEGINS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    "gelu": ((-0.00082318, 0.507695954, 0.416012508, 0.131258284, 0.024030903, 0.002610115),
             (0.066704385, 0.179139853, 0.036717303, 1e-09)),
    "silu": ((7.75e-07, 0.500000529, 0.249994954, 0.053197744, 0.005771164, 0.000270944),
             (2.538e-06, 0.106393424, 6.93e-07, 0.000541806)),
}

torch.fx.wrap("rational")       # one call in a graph of torch.fx


class GroupRational(FunctionLayer):
    """R(u), elementwise: [..., channels] -> the same shape.

    Args:
        groups: how many denominators, each shared by channels / groups neighbouring channels; 0: one per channel.
        base: what it begins as, a key of `BEGINS`.
    Raises: ValueError if the groups do not divide the channels, or for another beginning.
    """
    per_edge = False
    has_grid = False
    takes_weights = False       # the groups share their numerator

    def __init__(self, channels: int, *, groups: int = 8, base: str = "identity", device=None, dtype=None):
        super().__init__()
        groups = groups or channels
        check_groups(groups, channels)
        if base not in BEGINS:
            raise ValueError(f"base {base} is not one of {', '.join(BEGINS)}, to which rationals are fitted")
        self.channels, self.groups, self.base = channels, groups, base
        self.weight_numerator = nn.Parameter(torch.empty(1, DEGREE + 1, device=device, dtype=dtype))
        self.weight_denominator = nn.Parameter(torch.empty(groups, BELOW, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The beginning; timm calls it, also after `to_empty` from meta."""
        for parameter, values in zip((self.weight_numerator, self.weight_denominator), BEGINS[self.base]):
            parameter.copy_(torch.tensor(values))

    def coefficients(self) -> Tensor:
        """[groups, DEGREE + 1 + BELOW], as the op takes them. |b| has the slope 1 at 0, where the identity begins."""
        sign = torch.where(self.weight_denominator < 0, -1.0, 1.0).to(self.weight_denominator)
        return torch.cat([self.weight_numerator.expand(self.groups, -1), self.weight_denominator * sign], 1)

    def forward(self, u: Tensor) -> Tensor:
        return (rational_reference if exporting() else rational)(u, self.coefficients(), DEGREE)

    def extra_repr(self) -> str:
        return f"{self.channels} channels, {self.groups} groups, base={self.base}"

    # ------------------------------------------------------------ what it answers about itself
    # u^k/Q_g(u), of all groups one after the other: linear in the numerator as the other layers are in their weights.
    @property
    def has_base(self) -> bool:
        return True

    def flops(self, tokens: int) -> Flops:
        """Two Horner schemes, |u| and a division."""
        return Flops(0, (2 * DEGREE + 2 * BELOW + 2) * tokens * self.channels)

    def grid_points(self) -> Tensor:
        """The range on which the initial rationals approximate the activation."""
        return torch.tensor([-3.0, 3.0], dtype=torch.float64)

    @torch.no_grad()
    def basis(self, u: Tensor) -> Tensor:
        below = self.weight_denominator.abs().to(u)                                             # [groups, BELOW]
        powers = torch.stack([u ** k for k in range(DEGREE + 1)], -1)                           # [..., DEGREE + 1]
        q = 1 + torch.stack([u.abs() ** k for k in range(1, BELOW + 1)], -1) @ below.T          # [..., groups]
        values = (powers.unsqueeze(-2) / q.unsqueeze(-1)).flatten(-2)
        return torch.cat([values, BASES[self.base](u).unsqueeze(-1)], -1)

    def function_weights(self) -> Tensor:
        weights = torch.block_diag(*[self.weight_numerator] * self.groups)
        return torch.cat([weights, weights.new_zeros(self.groups, 1)], 1).unsqueeze(0)

    def function_parameters(self) -> list[nn.Parameter]:
        return [self.weight_numerator, self.weight_denominator]

    def scaled_parameters(self) -> list[nn.Parameter]:
        return self.function_parameters()

    @property
    def for_kernels(self) -> tuple:
        return ()


def _nearest(numerator: Tensor, denominator: Tensor) -> str:
    """The key of `BEGINS` that learned rationals [1, DEGREE + 1], [groups, BELOW] are nearest to."""
    u = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None].expand(-1, len(denominator))
    coefficients = torch.cat([numerator.expand(len(denominator), -1), denominator.abs()], 1)
    values = rational_reference(u, coefficients.cpu().double(), DEGREE)
    return min(BEGINS, key=lambda base: float((values - BASES[base](u)).square().sum()))


class KAT(ChannelMLP):
    """KAT in the place of a block's MLP, called as timm calls `timm.layers.Mlp`.

    Args:
        in_features, hidden_features, out_features: widths; hidden and out default to in_features.
        hdim: the hidden width where it must differ from `hidden_features`, which timm always passes as mlp_ratio * dim.
        groups: of `GroupRational`.
        act_layer: the activation that R2 begins as, if `base` is None; None: GELU.
        base: what R2 begins as, a key of `BEGINS`.
        bias: of W1 and W2, one choice or a pair. drop: dropout after R2 and after W2, one rate or a pair.
        norm_layer: ignored; accepted because timm passes it.
    Raises: ValueError as `GroupRational`, and for an `act_layer` whose function is not one of `kernels.BASES`.
    """
    TITLE = "KAT (an MLP with learned rationals before both linear maps, shared by groups of channels)"
    PRUNES = ("hidden",)
    NAMES = ("act1", "act2")
    AS_MLP = "begins as the MLP's activation to within 3.3e-3 on [-3, 3]"
    OWN_FLAGS = {"kan_lr_mult": 1.0, "kan_weight_decay": 0.05}      # as published

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
                 act_layer: Callable[[], nn.Module] | None = None, norm_layer=None, bias: bool | Sequence[bool] = True,
                 drop: float | Sequence[float] = 0.0, device=None, dtype=None, *, hdim: int | None = None, groups: int = 8,
                 base: str | None = None):
        hidden = hdim or hidden_features or in_features
        if base is None:
            base = "gelu" if act_layer is None else base_of(act_layer)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(GroupRational(in_features, groups=groups, **dd), GroupRational(hidden, groups=groups, base=base, **dd),
                         in_features, hidden, out_features or in_features, bias, drop, **dd)

    @classmethod
    def with_options(cls, size: Any, *, hdim_kan: int | None = None, kan_groups: int = 8,
                     kan_base: str = "gelu") -> Callable[..., nn.Module]:
        """Close to the MLP at first, hidden width 4 x dim."""
        return partial(cls, hdim=hdim_kan, groups=kan_groups, base=kan_base)

    @classmethod
    def read_options(cls, blocks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Any] | None:
        first = blocks[0]
        if "act2.weight_denominator" not in first:
            return None
        hidden = widths(blocks, "fc1.weight")
        groups = widths(blocks, "act2.weight_denominator")
        options: dict[str, Any] = {"kan_groups": 0 if groups == hidden else groups,
                                   "kan_base": _nearest(first["act2.weight_numerator"], first["act2.weight_denominator"])}
        return options if hidden == 4 * dim else options | {"hdim_kan": hidden}
