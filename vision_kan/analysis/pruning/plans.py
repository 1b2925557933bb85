"""What can go: hidden units, groups, grid points, edges."""
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import timm
import torch
from torch import Tensor, nn

from faster_kan import FasterKAN, FasterKANLayer, RSWAFGrid
from models_kan import ModelSpec, split_name
from vision_kan.analysis.pruning.calibrate import CHUNK, Calibration
from vision_kan.analysis.pruning.fit import feed_forward_inputs, fit_edges, fit_functions, fit_norm, refit, sample
from vision_kan.analysis.pruning.halves import EdgeHalf, Model, double, halves
from vision_kan.analysis.pruning.rank import Removal, rank_edges, rank_hidden
from vision_kan.common.errors import UserError
from vision_kan.layers.group_kan import GroupActivation, GroupKAN
from vision_kan.models.cost import count_parameters
from vision_kan.models.infer import one_or_each

KINDS = ("hidden", "groups", "points", "edges")


# ---------------------------------------------------------------- plans
class Plan(ABC):
    """Ways of making a model smaller: level 0 is the model as it is, each further one has fewer parameters."""

    def __init__(self, model: Model, spec: ModelSpec, calibration: Calibration):
        self.model, self.given, self.calibration = model, spec, calibration

    @abstractmethod
    def __len__(self) -> int:
        """How many levels there are."""

    @abstractmethod
    def spec(self, level: int) -> ModelSpec:
        """The smaller model's arguments."""

    @abstractmethod
    def fill(self, level: int, number: int, old: Model, new: Model, inputs: list[Tensor],
             weights: list[Tensor]) -> None:
        """Give the feed-forward of block `number` its values; inputs x [T, D] and weights [T] of tokens in parts."""

    @abstractmethod
    def prunable(self, model: Model) -> int:
        """Parameters of which a budget is a share."""

    def size(self, level: int) -> int:
        spec = self.spec(level)
        with torch.device("meta"):
            return self.prunable(timm.create_model(spec.name, **spec.kwargs))

    @torch.no_grad()
    def build(self, level: int) -> tuple[Model, ModelSpec]:
        """The smaller model, in evaluation mode on the device of the model."""
        spec = self.spec(level)
        if level == 0:
            return self.model, spec
        device = next(self.model.parameters()).device
        model: Model = timm.create_model(spec.name, **spec.kwargs).to(device).eval().requires_grad_(False)
        model.load_state_dict({key: value for key, value in self.model.state_dict().items() if ".mlp." not in key}, strict=False)
        for block, given in zip(model.blocks, self.model.blocks):
            block.norm2.eps = given.norm2.eps
        for number, inputs in enumerate(feed_forward_inputs(model, self.calibration.inputs)):
            weights = [part for w in self.calibration.weights[number] for part in w.split(CHUNK)]
            self.fill(level, number, self.model.blocks[number].mlp, model.blocks[number].mlp, inputs, weights)
        return model, spec


class Hidden(Plan):
    """Fewer hidden units: each level has one `Removal` more than the one before."""

    def __init__(self, model: Model, spec: ModelSpec, calibration: Calibration, removals: list[Removal]):
        super().__init__(model, spec, calibration)
        self.removals = removals

    def __len__(self) -> int:
        return len(self.removals) + 1

    def kept(self, level: int) -> list[list[int]]:
        """The hidden units of each block that stay."""
        stay = [set(range(halves(block.mlp)[1].weight.shape[1])) for block in self.model.blocks]
        for removal in self.removals[:level]:
            stay[removal.block] -= set(removal.units)
        return list(map(sorted, stay))

    def spec(self, level: int) -> ModelSpec:
        if level == 0:
            return self.given
        widths = [len(units) for units in self.kept(level)]
        return ModelSpec(self.given.name, {**self.given.kwargs, "hdim_kan": one_or_each(widths)})

    def prunable(self, model: Model) -> int:
        return sum(count_parameters(block.mlp) for block in model.blocks)

    def fill(self, level: int, number: int, old: Model, new: Model, inputs: list[Tensor],
             weights: list[Tensor]) -> None:
        units = torch.tensor(self.kept(level)[number], device=inputs[0].device)
        (before, _), (first, second) = halves(old), halves(new)
        hidden = second.weight.shape[1]
        for key, value in new.state_dict().items():         # the tensors themselves
            given = old.state_dict()[key]
            for axis, (full, size) in enumerate(zip(given.shape, value.shape)):
                if size != full:        # the hidden units, or these times the points
                    given = given.unflatten(axis, (-1, size // hidden)).index_select(axis, units).flatten(axis, axis + 1)
            value.copy_(given)
        if self.kept(0)[number] == units.tolist():
            return
        if isinstance(new, FasterKAN) and isinstance(new.layers[1].layernorm, nn.LayerNorm):
            fit_norm(new.layers[1].layernorm, old.layers[1].layernorm, [before(x) for x in inputs], weights, units)
        refit(second, [first(x) for x in inputs], [old(x) for x in inputs], weights)


class Functions(Plan):
    """Fewer groups or fewer grid points, their functions fitted where inputs arrive, and the linear maps after that."""

    def fill(self, level: int, number: int, old: Model, new: Model, inputs: list[Tensor],
             weights: list[Tensor]) -> None:
        between, out = [halves(old)[0](x) for x in inputs], [old(x) for x in inputs]
        first, second = halves(new)
        if isinstance(new, GroupKAN):
            new.load_state_dict({key: value for key, value in old.state_dict().items() if key.startswith("fc")}, strict=False)
            if isinstance(new.phi1, GroupActivation):
                fit_functions(new.phi1, old.phi1, *sample(inputs, weights), old.fc1.weight.square().sum(0))
            strength = ((self.calibration.fisher[number] @ double(old.fc2.weight)) * double(old.fc2.weight)).sum(0)
            order = fit_functions(new.phi2, old.phi2, *sample(between, weights), strength, sort=True)
            new.fc1.weight.copy_(old.fc1.weight[order])
            new.fc1.bias.copy_(old.fc1.bias[order])
            new.fc2.weight.copy_(old.fc2.weight[:, order])
            between = [z[:, order] for z in between]
        else:
            for now, before, arriving in zip(new.layers, old.layers, (inputs, between)):
                now.layernorm.load_state_dict(before.layernorm.state_dict())
                place_grid(now.rbf, before.rbf)
                fit_edges(EdgeHalf(now), EdgeHalf(before), *sample(arriving, weights))
        if not isinstance(new, GroupKAN) or isinstance(new.phi1, GroupActivation):
            refit(first, inputs, between, weights)
        refit(second, [first(x) for x in inputs], out, weights)


class Groups(Functions):
    """Fewer groups of a group KAN: those whose functions are alike become one. Channels of the residual stream stay where
    they are, so that neighbours come together before the first map; hidden units are sorted anew."""

    def __init__(self, model: Model, spec: ModelSpec, calibration: Calibration):
        super().__init__(model, spec, calibration)
        phis = [phi for block in model.blocks for phi in (block.mlp.phi1, block.mlp.phi2) if isinstance(phi, GroupActivation)]
        most = max(len(phi.coefficients) for phi in phis)
        self.counts = [spec.kwargs.get("kan_groups"), *(count for count in range(most - 1, 0, -1)
                       if all(phi.channels % count == 0 and len(phi.coefficients) >= count for phi in phis))]

    def __len__(self) -> int:
        return len(self.counts)

    def spec(self, level: int) -> ModelSpec:
        return self.given if level == 0 else ModelSpec(
            self.given.name, {**self.given.kwargs, "kan_groups": self.counts[level]})

    def prunable(self, model: Model) -> int:
        return coefficients_of(model)


class Points(Functions):
    """Fewer grid points over the same range, h growing with their spacing."""

    def __init__(self, model: Model, spec: ModelSpec, calibration: Calibration):
        super().__init__(model, spec, calibration)
        mlp = model.blocks[0].mlp
        of_groups = isinstance(mlp, GroupKAN)
        self.points: int = len(mlp.phi2.points) if of_groups else mlp.layers[0].rbf.num_grids
        self.h: float = mlp.phi2.h if of_groups else mlp.layers[0].rbf.initial_h

    def __len__(self) -> int:
        return self.points - 1

    def spec(self, level: int) -> ModelSpec:
        if level == 0:
            return self.given
        points = self.points - level
        kwargs = {**self.given.kwargs, "kan_grid_points": points}
        if kwargs.get("kan_h") is not None or split_name(self.given.name)[1] == "KAN" and kwargs.get("kan_basis") != "covering":
            kwargs["kan_h"] = self.h * (self.points - 1) / (points - 1)     # else it is the spacing anyhow
        return ModelSpec(self.given.name, kwargs)

    def prunable(self, model: Model) -> int:
        return coefficients_of(model)


def coefficients_of(model: Model) -> int:
    """Numbers that say what the learned functions are."""
    found = [parameter for module in model.modules() for parameter in (
        [module.coefficients, module.scale] if isinstance(module, GroupActivation)
        else [module.spline_linear.weight] if isinstance(module, FasterKANLayer) else [])]
    return sum(parameter.numel() for parameter in found if parameter is not None)


@torch.no_grad()
def place_grid(new: RSWAFGrid, old: RSWAFGrid) -> None:
    """Where the grid's points or width were learned: as many points as `new` has, spread as `old`'s were."""
    if isinstance(new.grid, nn.Parameter):
        places = np.linspace(0, len(old.grid) - 1, len(new.grid))
        new.grid.copy_(torch.from_numpy(np.interp(places, np.arange(len(old.grid)), old.grid.double().cpu().numpy())))
    if isinstance(new.h, nn.Parameter) and isinstance(old.h, Tensor):
        new.h.copy_(old.h * (len(old.grid) - 1) / (len(new.grid) - 1))


# ---------------------------------------------------------------- choosing
def check(spec: ModelSpec, what: str) -> None:
    """Raises UserError where the model has nothing of that kind."""
    suffix = split_name(spec.name)[1]
    if suffix not in ("GKAN", "KAN"):
        raise UserError(f"{spec.name} has neither a group KAN nor a full-edge KAN: choose a checkpoint of a _GKAN or _KAN model")
    if (what, suffix) in (("edges", "GKAN"), ("groups", "KAN")):
        has = "groups of channels share their functions" if suffix == "GKAN" else "every edge has a function of its own"
        raise UserError(f"--what {what} means nothing for {spec.name}, where {has}: choose "
                        f"{', '.join(kind for kind in KINDS if kind not in ('edges', 'groups'))}"
                        f" or {'groups' if suffix == 'GKAN' else 'edges'}")


def make_plan(model: Model, spec: ModelSpec, what: str, calibration: Calibration) -> Plan:
    """The plan that removes what matters least. what: one of `KINDS`. Raises UserError as `check` does."""
    check(spec, what)
    if what == "groups":
        return Groups(model, spec, calibration)
    if what == "points":
        return Points(model, spec, calibration)
    if what == "edges":
        return Hidden(model, spec, calibration, rank_edges(model, calibration))
    groups = 1
    if split_name(spec.name)[1] == "GKAN" and spec.kwargs.get("kan_groups") != 0:
        groups = len(model.blocks[0].mlp.phi2.coefficients)
    return Hidden(model, spec, calibration, rank_hidden(model, calibration, groups))


def weakest(plan: Plan, enough: Callable[[int], bool]) -> int:
    """The first level for which `enough` holds, where it holds for all after that; len(plan) where for none."""
    return bisect_left(range(len(plan)), True, key=enough)
