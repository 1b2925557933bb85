"""The order in which hidden units are removed."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vision_kan.analysis.functions import deviations
from vision_kan.analysis.pruning import fit
from vision_kan.analysis.pruning.calibrate import Calibration, Model, to_float64
from vision_kan.analysis.pruning.fit import feed_forward_inputs
from vision_kan.layers.feed_forward import Half
from vision_kan.layers.least_squares import add_ridge


class Removal(NamedTuple):
    """Hidden units of a block that are removed together, one of each group, and the rise of the loss, up to a factor."""
    block: int
    units: list[int]
    rise: float


def removal_order(covariance: Tensor, weight: Tensor, fisher: Tensor, groups: int) -> list[tuple[list[int], float]]:
    """The order of removal of a block's hidden units, the least important first, without the last unit of each group.

    Args:
        covariance: float64 [HP, HP].
        weight: [O, H, P].
        fisher: float64 [O, O].
        groups: number of groups, which are runs of neighbouring units; each step removes one unit of each group.
    Returns: the units of each step, and the rise of tr(M D C D^T) when they are removed and the other weights compensate.
    """
    outputs, units, features = weight.shape
    values, vectors = torch.linalg.eigh(fisher)
    rows = (vectors * values.clamp_min(0).sqrt()).T @ to_float64(weight).flatten(1)             # M^1/2 W, [O, HP]
    inverse = torch.linalg.inv(add_ridge(covariance, fit.RIDGE))
    gone = torch.zeros(units, dtype=torch.bool, device=rows.device)
    offsets = torch.arange(features, device=rows.device)
    first = torch.arange(groups, device=rows.device) * (units // groups)
    order = []
    for _ in range(units // groups - 1):
        own = inverse.view(units, features, units, features).diagonal(dim1=0, dim2=2).permute(2, 0, 1)     # [H, P, P]
        own = torch.where(gone[:, None, None], torch.eye(features, dtype=own.dtype, device=own.device), own)
        each = rows.view(outputs, units, features).permute(1, 0, 2)                         # [H, O, P]
        rise = (torch.linalg.solve(own, each, left=False) * each).sum((1, 2)).masked_fill(gone, torch.inf)
        chosen = rise.view(groups, -1).argmin(1) + first
        index = (chosen[:, None] * features + offsets).flatten()
        removed = torch.linalg.solve(inverse[index][:, index], rows[:, index], left=False)  # [O, GP]
        order.append((chosen.tolist(), (removed * rows[:, index]).sum().item()))
        rows -= removed @ inverse[index]
        inverse -= inverse[:, index] @ torch.linalg.solve(inverse[index][:, index], inverse[index])
        rows[:, index] = 0
        inverse[index] = 0
        inverse[:, index] = 0
        gone[chosen] = True
    return order


def rank_hidden(model: Model, calibration: Calibration, groups: int) -> list[Removal]:
    """Removals of hidden units in all blocks, by the rise of the loss, the smallest first; one unit of each group stays."""
    removals = []
    for number, block in enumerate(model.blocks):
        order = removal_order(calibration.covariance[number], block.mlp.halves()[1].weight, calibration.fisher[number], groups)
        # keep the order within a block: a rise counts as at least those before it
        highest = np.maximum.accumulate([rise for _, rise in order] or [0.0])
        removals += [Removal(number, units, float(rise)) for (units, _), rise in zip(order, highest)]
    return sorted(removals, key=lambda removal: removal.rise)


def edge_deviations(half: Half, inputs: Sequence[Tensor]) -> Tensor:
    """[O, I]: the standard deviation of every edge function phi_oi over the inputs x [T, I], in chunks."""
    total, first, second = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in inputs:
        f = to_float64(half.features(x))
        total, first = total + len(f), first + f.sum(0)
        second = second + torch.einsum("tip,tiq->ipq", f, f)
    mean = first / total
    covariance = second / total - mean[:, :, None] * mean[:, None]
    return deviations(to_float64(half.weight), covariance)


@torch.no_grad()
def rank_edges(model: Model, calibration: Calibration) -> list[Removal]:
    """Removals of hidden units in all blocks, those with weak edges first. A unit's strength is the smaller of its strongest
    incoming and its strongest outgoing edge, each relative to its layer (Liu et al., arXiv:2404.19756, section 2.5)."""
    removals = []
    for number, inputs in enumerate(feed_forward_inputs(model, calibration.inputs)):
        first, second = model.blocks[number].mlp.halves()
        into, out = (d / d.square().mean().sqrt() for d in (
            edge_deviations(first, inputs), edge_deviations(second, [first(x) for x in inputs])))
        strength = torch.minimum(into.amax(1), out.amax(0))
        order = strength.argsort(stable=True)[:-1].tolist()
        removals += [Removal(number, [unit], strength[unit].item()) for unit in order]
    return sorted(removals, key=lambda removal: removal.rise)


def random_order(removals: list[Removal], seed: int) -> list[Removal]:
    """The same number of units in random order, as a baseline."""
    random = np.random.default_rng(seed)
    groups: dict[int, list[list[int]]] = {}
    for removal in removals:
        groups.setdefault(removal.block, []).append(removal.units)
    shuffled = []
    for number, units in groups.items():
        columns = [random.permutation(column) for column in zip(*units)]
        shuffled += [Removal(number, [int(unit) for unit in row], 0.0) for row in zip(*columns)]
    return [shuffled[i] for i in random.permutation(len(shuffled))]
