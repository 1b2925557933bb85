"""Measures of learned functions, from their weights and the histograms of their inputs."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_kan.analysis.functions import deviations, group_functions
from vision_kan.analysis.inputs import FAR_WIDER, InputHistogram, used_width
from vision_kan.layers.function_layer import FunctionLayer

EDGES = 6               # drawn of each layer
DEAD_GAIN = 0.01        # a group or an input with a smaller gain is dead, see `LayerStats`


# ---------------------------------------------------------------- measured
@dataclass(frozen=True)
class LayerStats:
    """Measures of a layer's functions over their inputs.

    functions: number of functions.
    low, high, points: the grid; 0 points without one.
    mean, std, smallest, largest, p5, p95: of the inputs; p5 and p95 are percentiles.
    off_grid: share of the inputs beyond the grid; 0 without one.
    distance: root mean square, over its inputs, of a function minus its base (in a full-edge KAN: of the spline without the base
        branch), the mean over the functions; furthest: the maximum. None without a base.
    units: "groups", or in a full-edge KAN "inputs".
    gain: for each unit, the standard deviation of its outputs (of an input: over all its edges) relative to that of its inputs.
    dead: number of units with a gain below `DEAD_GAIN`."""
    functions: int
    low: float
    high: float
    points: int
    mean: float
    std: float
    smallest: float
    largest: float
    p5: float
    p95: float
    off_grid: float
    distance: float | None
    furthest: float | None
    units: str
    gain: Tensor

    @property
    def used_width(self) -> float:
        """The share of the grid's width that holds nine in ten inputs."""
        return used_width(self.low, self.high, self.p5, self.p95)

    @property
    def too_wide(self) -> bool:
        return self.points > 0 and self.used_width < 1 / FAR_WIDER

    @property
    def dead(self) -> int:
        return int((self.gain < DEAD_GAIN).sum())


def measure(layer: FunctionLayer, inputs: InputHistogram) -> LayerStats:
    """Measure a layer with learned functions over its inputs."""
    u, grid, weights = inputs.centres, layer.grid_points(), layer.exact_weights()
    shares = inputs.shares(weights.shape[1])                                        # [I, BINS]
    gain = edge_deviations(layer, shares, u).square().sum(0).sqrt() / _deviation(shares, u)
    distance = base_distances(layer, inputs)
    (mean, square), (smallest, largest) = _moments(inputs.shares(), u), inputs.extremes.tolist()
    return LayerStats(weights.shape[:2].numel(), inputs.low, inputs.high, len(grid) if layer.has_grid else 0, float(mean),
                      math.sqrt(max(0.0, float(square - mean ** 2))), smallest, largest, inputs.quantile(0.05),
                      inputs.quantile(0.95), inputs.off_grid if layer.has_grid else 0.0,
                      None if distance is None else float(distance.mean()),
                      None if distance is None else float(distance.max()), "inputs" if layer.per_edge else "groups",
                      gain.nan_to_num(0.0, posinf=0.0))


def _moments(shares: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of values [N] with shares [P, N], [P] each."""
    return (shares * values).sum(1), (shares * values.square()).sum(1)


def _deviation(shares: Tensor, values: Tensor) -> Tensor:
    mean, square = _moments(shares, values)
    return (square - mean.square()).clamp(min=0).sqrt()


def _basis_moments(layer: FunctionLayer, shares: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """E[B_k] [I, K] and E[B_k B_l] [I, K, K], for inputs i that take the values u [N] with shares [I, N]."""
    basis = layer.basis(u.double())                                                     # [N, K]
    products = (basis.unsqueeze(2) * basis.unsqueeze(1)).flatten(1)                     # [N, K*K]
    return shares @ basis, (shares @ products).unflatten(1, (basis.shape[1], -1))


def edge_deviations(layer: FunctionLayer, shares: Tensor, u: Tensor) -> Tensor:
    """[O, I]: the standard deviation of each function, for inputs i that take the values u [N] with shares [I, N]."""
    if not layer.per_edge:
        return _deviation(shares, group_functions(layer, u)[1])[None]
    mean, second = _basis_moments(layer, shares, u)
    return deviations(layer.exact_weights(), second - mean.unsqueeze(2) * mean.unsqueeze(1))


def base_distances(layer: FunctionLayer, inputs: InputHistogram) -> Tensor | None:
    """[O, I]: the root mean square, over the inputs, of each function minus its base; None without a base."""
    base = layer.base_weights()
    if base is None:
        return None
    if not layer.per_edge:
        base, values = group_functions(layer, inputs.centres)
        return _moments(inputs.shares(len(values)), values - base)[1].sqrt()[None]
    weights = layer.exact_weights()
    _, second = _basis_moments(layer, inputs.shares(weights.shape[1]), inputs.centres)
    return deviations(weights - base, second)


# ---------------------------------------------------------------- drawn
def drawn_range(layer: FunctionLayer, inputs: InputHistogram | None = None) -> Tensor:
    """[401]: the range of the inputs without a thousandth on either side; without `inputs` the grid and one unit beyond it."""
    if inputs is None:
        grid = layer.grid_points()
        return torch.linspace(float(grid[0]) - 1, float(grid[-1]) + 1, 401)
    low, high = inputs.quantile(0.001), inputs.quantile(0.999)
    middle, half = (low + high) / 2, max((high - low) / 2, inputs.width)        # not empty for a constant input
    return torch.linspace(middle - half, middle + half, 401)


def edge_functions(layer: FunctionLayer, u: Tensor, inputs: InputHistogram | None = None,
                   count: int = EDGES) -> dict[str, Tensor]:
    """The `count` strongest edges of a layer, "input → output" -> phi(u) [N].

    An edge's strength is the standard deviation of its function over its inputs; without `inputs` over `u`."""
    weight, basis = layer.exact_weights(), layer.basis(u.double())
    if inputs is None:
        strength = edge_deviations(layer, torch.full((weight.shape[1], len(u)), 1 / len(u), dtype=torch.float64), u)
    else:
        strength = edge_deviations(layer, inputs.shares(len(inputs.counts)), inputs.centres)
    chosen = strength.flatten().topk(min(count, strength.numel())).indices
    edges = [divmod(int(index), weight.shape[1]) for index in chosen]
    return {f"{i} → {o}": (basis @ weight[o, i]).to(u.dtype) for o, i in edges}
