"""The interface of layers of learned functions.

    phi[o, i](u) = sum_k W[o, i, k] B_k(u)

B_k are the layer's K basis functions. With `has_base` the last one is the base function (silu, gelu, ...). A layer either has a
function on every edge (`per_edge`: i is an input, o an output), or applies one function to each group of neighbouring channels (i
is a group, O = 1).

Counting, inspecting, pruning, exporting and optimising need nothing else of a layer, so a new one works with all of them.
"""
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vision_kan.kernels import FUNCTIONS


class Flops(NamedTuple):
    """Floating-point operations of a forward pass."""
    matmul: int         # matrix products, 2 per multiply-add
    elementwise: int    # basis and activation functions


def sum_flops(parts: Iterable[Flops]) -> Flops:
    parts = list(parts)
    return Flops(sum(part.matmul for part in parts), sum(part.elementwise for part in parts))


# FLOPs of one value
BASIS_FLOPS = FUNCTIONS["rswaf"].flops
BSPLINE_FLOPS = 13      # cubic: |s - k| 2, max(c - |s - k|, 0)^3 4 for both c, their weighted sum 3
GELU_FLOPS = 5          # x * 1/sqrt(2), erf, + 1, * x, * 1/2
SILU_FLOPS = 4          # x / (1 + exp(-x))
BASE_FLOPS = {"identity": 0, "gelu": GELU_FLOPS, "silu": SILU_FLOPS, "relu": 1, "relu2": 2}


class FunctionLayer(nn.Module):
    """Base class of layers with learned functions; for the symbols see the module's docstring."""
    per_edge: ClassVar[bool] = True
    has_grid: bool = True                       # the functions fade out beyond `grid_points`
    takes_weights: ClassVar[bool] = True        # `set_function_weights` can write any function in the basis

    @property
    def has_base(self) -> bool:
        """Whether the last basis function is the base."""
        return False

    def flops(self, tokens: int) -> Flops:
        """FLOPs of the forward pass of this number of tokens."""
        raise NotImplementedError

    def normalised(self, x: Tensor) -> Tensor:
        """u [..., I], the arguments of the functions, for the layer's input x [..., I]: normalised, if the layer does that."""
        return x

    @property
    def norm(self) -> nn.LayerNorm | None:
        """The LayerNorm before the functions, if any. Its statistics change when inputs are pruned."""
        return None

    def grid_points(self) -> Tensor:
        """The points [G] between which the basis is complete, in increasing order, float64 on the CPU; without a grid the two
        ends of the range that matters."""
        raise NotImplementedError

    def basis(self, u: Tensor) -> Tensor:
        """[..., K]: the basis functions at u [...], in u's dtype on its device, without gradients."""
        raise NotImplementedError

    def function_weights(self) -> Tensor:
        """W [O, I, K], in the parameters' dtype on their device."""
        raise NotImplementedError

    def set_function_weights(self, weights: Tensor, bias: Tensor | None = None) -> None:
        """Write W [O, I, K] and, if the layer has one, the bias [O] into the parameters."""
        raise NotImplementedError

    def function_parameters(self) -> list[nn.Parameter]:
        """The parameters of the functions, as tools/prune.py counts them for --what groups and points."""
        raise NotImplementedError

    def scaled_parameters(self) -> list[nn.Parameter]:
        """The parameters with --kan-lr-mult times the learning rate and --kan-weight-decay."""
        return []

    @property
    def for_kernels(self) -> tuple | None:
        """The arguments of `kernels.describe`; () if every layer of this kind has a kernel; None: --kan-backend has no effect on
        it."""
        return None

    def copy_grid(self, old: "FunctionLayer") -> None:
        """Copy the normalisation of a layer with the same number of inputs and, if learned, its grid, resampled to this layer's
        number of points."""

    @torch.no_grad()
    def exact_weights(self) -> Tensor:
        """`function_weights` in float64 on the CPU."""
        return self.function_weights().double().cpu()

    def base_weights(self) -> Tensor | None:
        """Weights [O, I, K] of the base that each function is compared with, float64 on the CPU: an edge's own base branch, a
        group's base function times 1. None without a base."""
        if not self.has_base:
            return None
        weights = self.exact_weights()
        base = torch.zeros_like(weights)
        base[..., -1] = weights[..., -1] if self.per_edge else 1.0
        return base


def function_layers(model: nn.Module) -> dict[str, FunctionLayer]:
    """name -> layer with learned functions, in the order of the blocks; empty for MLPs."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FunctionLayer)}
