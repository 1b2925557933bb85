"""Formulas of a KAN's learned functions, and models whose functions are such formulas."""
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_kan.analysis.formulas import Formula, fit_symbolic
from vision_kan.analysis.functions import deviations
from vision_kan.analysis.inputs import hook_inputs
from vision_kan.common.errors import UserError
from vision_kan.layers.function_layer import FunctionLayer, function_layers
from vision_kan.layers.least_squares import ridge_solve
from vision_kan.run.trained import Trained

POINTS = 400            # at which a function is fitted
EVEN_SHARE = 0.05       # share of the weight spread evenly from the smallest to the largest input, so that rare inputs count too
SAMPLES = 4096          # inputs kept for each function
RIDGE = 1e-6            # of the fit by the grid's basis, relative to the mean of E[B_k^2]


@dataclass(frozen=True)
class Learned:
    """A learned function of a model, and its formula."""
    part: str           # name of the module
    function: str       # "3", a group, or "12 -> 40", an edge
    u: Tensor           # [N]: quantiles of the inputs, and even steps from the smallest to the largest
    weight: Tensor      # [N], of the points in the fit
    y: Tensor           # [N]: the function at u
    formula: Formula    # of y

    @property
    def block(self) -> str:
        found = re.search(r"blocks\.(\d+)\.", self.part)
        return found[1] if found else ""

    @property
    def layer(self) -> str:
        return self.part.rpartition("mlp.")[2]


class InputSamples:
    """Inputs of a layer's functions: about `SAMPLES` values of each, drawn at random, and the smallest and largest."""

    def __init__(self, functions: int, rounds: int, generator: torch.Generator):
        self.functions, self.each, self.generator = functions, -(-SAMPLES // rounds), generator
        self.samples: list[Tensor] = []
        self.smallest, self.largest = torch.full((functions,), math.inf), torch.full((functions,), -math.inf)

    def add(self, u: Tensor) -> None:
        """Add a batch's inputs u [..., channels], split into equal groups of neighbouring channels, one for each function."""
        u = u.detach().float().cpu().unflatten(-1, (self.functions, -1)).movedim(-2, 0).flatten(1)      # [functions, n]
        self.smallest = torch.minimum(self.smallest, u.amin(1))
        self.largest = torch.maximum(self.largest, u.amax(1))
        self.samples.append(u[:, torch.randint(u.shape[1], (min(self.each, u.shape[1]),), generator=self.generator)])

    def points(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`Learned.u` [len(which), N] and `Learned.weight` [N] of the functions `which`."""
        even = POINTS // 4
        shares = (torch.arange(POINTS - even) + 0.5) / (POINTS - even)
        quantiles = torch.cat([values[which] for values in self.samples], 1).quantile(shares, dim=1).T
        smallest, largest = self.smallest[which, None], self.largest[which, None]
        weight = torch.cat([torch.full((POINTS - even,), (1 - EVEN_SHARE) / (POINTS - even)),
                            torch.full((even,), EVEN_SHARE / even)])
        steps = smallest + torch.linspace(0, 1, even) * (largest - smallest)
        return torch.cat([quantiles, steps], 1).double(), weight.double()


def _evenly(layer: FunctionLayer, functions: int) -> tuple[Tensor, Tensor]:
    """As `InputSamples.points` without inputs: points spread evenly over the grid."""
    grid = layer.grid_points()
    u = torch.linspace(float(grid[0]), float(grid[-1]), POINTS, dtype=torch.float64)
    return u.expand(functions, -1), torch.full((POINTS,), 1 / POINTS, dtype=torch.float64)


def _strongest(layer: FunctionLayer, inputs: InputSamples | None, count: int) -> list[tuple[int, int]]:
    """(input, output) of the `count` edges whose functions deviate most over their inputs, the strongest first."""
    weights = layer.exact_weights()
    if inputs is None:
        parts: Iterable[Tensor] = [layer.basis(_evenly(layer, 1)[0]).expand(weights.shape[1], -1, -1)]
    else:
        parts = (layer.basis(part.double()) for part in torch.cat(inputs.samples, 1).split(64))
    covariance = torch.cat([torch.einsum("ink,inl->ikl", part - part.mean(1, True), part - part.mean(1, True)) / part.shape[1]
                            for part in parts])
    strength = deviations(weights, covariance)
    chosen = strength.flatten().topk(min(count, strength.numel())).indices.tolist()
    return [(index % strength.shape[1], index // strength.shape[1]) for index in chosen]


def _samples(trained: Trained, images: Iterable[Tensor], rounds: int,
             layers: Mapping[str, FunctionLayer]) -> dict[str, InputSamples]:
    """Samples of the inputs of the layers' functions, for these batches of images. rounds: number of batches."""
    generator = torch.Generator().manual_seed(0)
    found = {name: InputSamples(layer.function_weights().shape[1], rounds, generator) for name, layer in layers.items()}
    with hook_inputs(layers, lambda name, _, u: found[name].add(u)), torch.inference_mode():
        for batch in images:
            trained.model(batch.to(trained.device))
    return found


def find_formulas(trained: Trained, images: Iterable[Tensor] | None = None, rounds: int = 1, edges: int = 6,
                  parsimony: float = 2.0) -> list[Learned]:
    """Formulas of the functions of a group KAN, or of the strongest edges of each layer of a full-edge KAN.

    Args:
        images: batches [B, 3, H, W]; the inputs that they give the functions weight the fits. None: the grid, evenly.
        rounds: number of batches.
        edges: number of edges in each layer.
        parsimony: of `fit_symbolic`.
    Raises: UserError for a model without learned functions, and if no image can be read.
    """
    layers = function_layers(trained.model)
    if not layers:
        raise UserError(f"{trained.path} holds no KAN ({trained.spec.name}): there are no learned functions to find formulas of")
    inputs = _samples(trained, images, rounds, layers) if images is not None else {}
    if any(not found.samples for found in inputs.values()):
        raise UserError("no image could be read, so the functions have no inputs: check the folder")
    found = []
    for name, layer in layers.items():
        weights = layer.exact_weights()                                             # [O, I, K]
        chosen = _strongest(layer, inputs.get(name), edges) if layer.per_edge else [(i, 0) for i in range(weights.shape[1])]
        which = [i for i, _ in chosen]
        u, weight = inputs[name].points(which) if name in inputs else _evenly(layer, len(which))
        for n, (i, o) in enumerate(chosen):
            at, how = u[n], weight
            if at.min() == at.max():        # always the same input says nothing of the function
                (at,), how = _evenly(layer, 1)
            y = layer.basis(at) @ weights[o, i]
            found.append(Learned(name, f"{i} -> {o}" if layer.per_edge else str(i), at, how, y,
                                 fit_symbolic(at, y, how, parsimony=parsimony)))
    return found


# ---------------------------------------------------------------- models of formulas
class SymbolicActivation(nn.Module):
    """A formula for each group of neighbouring channels, elementwise: [..., channels] -> the same shape."""

    def __init__(self, formulas: Sequence[Formula]):
        super().__init__()
        self.formulas = list(formulas)

    def forward(self, u: Tensor) -> Tensor:
        groups = u.unflatten(-1, (len(self.formulas), -1)).unbind(-2)
        return torch.stack([formula(group) for formula, group in zip(self.formulas, groups)], -2).flatten(-2)


def with_formulas(model: nn.Module, found: Sequence[Learned]) -> nn.Module:
    """A copy of a group KAN whose functions are their formulas."""
    model = deepcopy(model)
    for name in dict.fromkeys(each.part for each in found):
        model.set_submodule(name, SymbolicActivation([each.formula for each in found if each.part == name]))
    return model


@torch.no_grad()
def with_fitted_basis(model: nn.Module, found: Sequence[Learned]) -> tuple[nn.Module, list[float]]:
    """A copy of a group KAN whose coefficients are fitted to the formulas by weighted least squares, and the R^2 of each fit."""
    model, fits = deepcopy(model), []
    for each in found:
        phi: Any = model.get_submodule(each.part)
        group, weights = int(each.function), phi.function_weights()
        basis = phi.basis(each.u)                                               # [N, K], the base last
        basis, base = basis[:, :-1], basis[:, -1] * weights[0, group, -1].cpu().double()
        y = each.formula(each.u)
        weighted = basis.T * each.weight
        coefficients = ridge_solve(weighted @ basis, (weighted @ (y - base))[:, None], RIDGE).squeeze(1)
        weights[0, group, :-1] = coefficients.to(weights)
        phi.set_function_weights(weights)
        error = each.weight @ (base + basis @ coefficients - y).square()
        variance = each.weight @ (y - each.weight @ y).square()
        fits.append(float(1 - error / variance) if variance > 0 else 1.0)
    return model, fits
