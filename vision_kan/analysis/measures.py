"""Numbers about learned functions, from their weights and the inputs that arrive."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models_kan import FunctionLayer
from vision_kan.analysis.arriving import FAR_WIDER, Inputs, used_width
from vision_kan.analysis.functions import EdgeLayer, edge_basis, edge_weights, grid_of, group_functions
from vision_kan.layers.efficient_kan import EfficientKANLayer
from vision_kan.layers.group_kan import GroupActivation

EDGES = 6               # of a layer that are drawn
DEAD_GAIN = 0.01        # below it a group or an input is dead, see `Measured`


# ---------------------------------------------------------------- measured
@dataclass(frozen=True)
class Measured:
    """What a layer's functions do with what arrives.

    functions: how many. low, high, points: the grid. mean, std, smallest, largest: of the inputs; p5, p95: percentiles.
    off_grid: share of them beyond the grid.
    distance: root mean square, under the inputs of each, of function minus base (a full-edge KAN's: of the spline beside its
    base branch), the mean over the functions; furthest: the largest; None where there is no base.
    gain: of each unit, the standard deviation of what it passes on (an input of a full-edge KAN: over all its edges) relative
    to that of what arrives; units: "groups" or "inputs". dead: how many with a gain below `DEAD_GAIN`."""
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
        """`used_width` of the grid."""
        return used_width(self.low, self.high, self.p5, self.p95)

    @property
    def too_wide(self) -> bool:
        return self.used_width < 1 / FAR_WIDER

    @property
    def dead(self) -> int:
        return int((self.gain < DEAD_GAIN).sum())


def measure(layer: FunctionLayer, inputs: Inputs) -> Measured:
    """A layer with learned functions under what arrived at it."""
    u, grid = inputs.centres, grid_of(layer)
    if isinstance(layer, GroupActivation):
        shares = inputs.shares(len(layer.coefficients))                             # [groups, BINS]
        base, values = group_functions(layer, u.float())
        distance: Tensor | None = group_distances(layer, inputs)
        gain = _deviation(shares, values.double()) / _deviation(shares, u)
        functions, units = len(values), "groups"
    else:
        shares = inputs.shares(len(inputs.counts))
        deviations, distance = _edge_moments(layer, shares, u)
        gain = deviations.square().sum(0).sqrt() / _deviation(shares, u)
        functions, units = deviations.numel(), "inputs"
    (mean, square), (smallest, largest) = _moments(inputs.shares(), u), inputs.extremes.tolist()
    return Measured(functions, inputs.low, inputs.high, len(grid), float(mean), math.sqrt(max(0.0, float(square - mean ** 2))),
                    smallest, largest, inputs.quantile(0.05), inputs.quantile(0.95), inputs.off_grid,
                    None if distance is None else float(distance.mean()),
                    None if distance is None else float(distance.max()), units, gain.nan_to_num(0.0, posinf=0.0))


def group_distances(phi: GroupActivation, inputs: Inputs) -> Tensor:
    """[groups]: the root mean square of phi_g - base under what arrives at the group."""
    base, values = group_functions(phi, inputs.centres.float())
    return (inputs.shares(len(values)) * (values - base).double().square()).sum(1).sqrt()


def _moments(shares: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of values [N] or [P, N] under shares [P, N]."""
    return (shares * values).sum(1), (shares * values.square()).sum(1)


def _deviation(shares: Tensor, values: Tensor) -> Tensor:
    mean, square = _moments(shares, values)
    return (square - mean.square()).clamp(min=0).sqrt()


def edge_deviations(layer: EdgeLayer, shares: Tensor, u: Tensor) -> Tensor:
    """[O, I]: the standard deviation of each edge's function where input i is u [N] with the shares [I, N]."""
    return _edge_moments(layer, shares, u)[0]


def _edge_moments(layer: EdgeLayer, shares: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
    """`edge_deviations`, and the root mean square of each edge's spline beside its base branch, where there is one."""
    basis, weight = edge_basis(layer, u.double()), edge_weights(layer)
    products = (basis.unsqueeze(2) * basis.unsqueeze(1)).flatten(1)                     # [N, K*K]
    second = (shares @ products).unflatten(1, (basis.shape[1], -1))                     # [I, K, K]: E[B_k B_l]
    mean = shares @ basis                                                               # [I, K]
    covariance = second - mean.unsqueeze(2) * mean.unsqueeze(1)

    def root(weight: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("oik,ikl,oil->oi", weight, matrix, weight).clamp(min=0).sqrt()

    splines = basis.shape[1] - 1
    has_base = isinstance(layer, EfficientKANLayer) or layer.base_linear is not None
    return root(weight, covariance), root(weight[..., :splines], second[:, :splines, :splines]) if has_base else None


# ---------------------------------------------------------------- drawn
def drawn_range(layer: FunctionLayer, inputs: Inputs | None = None) -> Tensor:
    """[401]: where all but a thousandth of what arrives lies on either side; without `inputs` the grid and one unit beyond."""
    if inputs is None:
        grid = grid_of(layer)
        return torch.linspace(float(grid[0]) - 1, float(grid[-1]) + 1, 401)
    low, high = inputs.quantile(0.001), inputs.quantile(0.999)
    middle, half = (low + high) / 2, max((high - low) / 2, inputs.width)        # of a constant, something
    return torch.linspace(middle - half, middle + half, 401)


def edge_functions(layer: EdgeLayer, u: Tensor, inputs: Inputs | None = None, count: int = EDGES) -> dict[str, Tensor]:
    """The strongest edges of a layer, {"input → output": phi(u) [N]}.

    Strength is the deviation under what arrives at each input, without `inputs` as if that were spread like `u`."""
    if inputs is None:
        strength = edge_deviations(layer, torch.full((layer.in_features, len(u)), 1 / len(u), dtype=torch.float64), u)
    else:
        strength = edge_deviations(layer, inputs.shares(len(inputs.counts)), inputs.centres)
    weight, basis = edge_weights(layer), edge_basis(layer, u.double())
    chosen = strength.flatten().topk(min(count, strength.numel())).indices
    edges = [divmod(int(index), weight.shape[1]) for index in chosen]
    return {f"{i} → {o}": (basis @ weight[o, i]).to(u.dtype) for o, i in edges}
