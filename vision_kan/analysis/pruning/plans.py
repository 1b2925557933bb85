"""Pruning plans: the smaller models without hidden units, groups or grid points."""
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable

import timm
import torch
from torch import Tensor

from models_kan import FEED_FORWARDS, ModelSpec, own_options, split_name
from vision_kan.analysis.pruning.calibrate import CHUNK, Calibration, Model
from vision_kan.analysis.pruning.fit import feed_forward_inputs, fit_half, fit_norm, refit, sample
from vision_kan.analysis.pruning.rank import Removal, rank_edges, rank_hidden
from vision_kan.common.errors import UserError
from vision_kan.layers.feed_forward import one_or_each
from vision_kan.layers.function_layer import function_layers
from vision_kan.models.cost import count_parameters

KINDS = ("hidden", "groups", "points", "edges")


# ---------------------------------------------------------------- plans
class Plan(ABC):
    """A series of smaller models: level 0 is the given model, and each further level has fewer parameters."""

    def __init__(self, model: Model, spec: ModelSpec, calibration: Calibration):
        self.model, self.given, self.calibration = model, spec, calibration

    @abstractmethod
    def __len__(self) -> int:
        """The number of levels."""

    @abstractmethod
    def spec(self, level: int) -> ModelSpec:
        """The smaller model's arguments."""

    @abstractmethod
    def fill(self, level: int, number: int, old: Model, new: Model, inputs: list[Tensor],
             weights: list[Tensor]) -> None:
        """Set the parameters of the feed-forward of block `number`. inputs x [T, D] and weights [T]: of tokens, in chunks."""

    @abstractmethod
    def prunable(self, model: Model) -> int:
        """The number of prunable parameters, of which a budget is a share."""

    def size(self, level: int) -> int:
        """`prunable` of a level's model, without building it."""
        spec = self.spec(level)
        with torch.device("meta"):
            return self.prunable(timm.create_model(spec.name, **spec.kwargs))

    @torch.no_grad()
    def build(self, level: int) -> tuple[Model, ModelSpec]:
        """The level's model, in evaluation mode on the device of the given one, and its spec."""
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
        """The remaining hidden units of each block."""
        stay = [set(range(block.mlp.halves()[1].weight.shape[1])) for block in self.model.blocks]
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
        (before, second_before), (first, second) = old.halves(), new.halves()
        hidden = second.weight.shape[1]
        for key, value in new.state_dict().items():         # the tensors themselves
            given = old.state_dict()[key]
            for axis, (full, size) in enumerate(zip(given.shape, value.shape)):
                if size != full:        # an axis of hidden units, or of hidden units times points
                    given = given.unflatten(axis, (-1, size // hidden)).index_select(axis, units).flatten(axis, axis + 1)
            value.copy_(given)
        if self.kept(0)[number] == units.tolist():
            return
        if second.functions is not None and (norm := second.functions.norm):
            fit_norm(norm, second_before.functions.norm, [before(x) for x in inputs], weights, units)
        refit(second, [first(x) for x in inputs], [old(x) for x in inputs], weights)


class Functions(Plan):
    """Fewer groups or grid points: first the functions are fitted, weighted by their inputs, then the linear maps."""

    def fill(self, level: int, number: int, old: Model, new: Model, inputs: list[Tensor],
             weights: list[Tensor]) -> None:
        (old_first, old_second), (first, second) = old.halves(), new.halves()
        between, out = [old_first(x) for x in inputs], [old(x) for x in inputs]
        fit_half(first, old_first, *sample(inputs, weights))
        order = fit_half(second, old_second, *sample(between, weights), self.calibration.fisher[number])
        if order is not None:
            first.set(first.weight[order], None if first.bias is None else first.bias[order])
            second.set(second.weight[:, order], second.bias)
            between = [z[:, order] for z in between]
        if first.functions is not None:
            refit(first, inputs, between, weights)
        refit(second, [first(x) for x in inputs], out, weights)


class Groups(Functions):
    """Fewer groups of a group KAN: groups with similar functions are merged. Channels of the residual stream keep their order, so
    before the first map only neighbours are merged; hidden units are reordered."""

    def __init__(self, model: Model, spec: ModelSpec, calibration: Calibration):
        super().__init__(model, spec, calibration)
        layers = [(half.functions.function_weights().shape[1], half.weight.shape[1])          # groups, channels
                  for block in model.blocks for half in block.mlp.halves() if half.functions is not None]
        max_groups = max(groups for groups, _ in layers)
        self.counts = [spec.kwargs.get("kan_groups"), *(count for count in range(max_groups - 1, 0, -1)
                       if all(channels % count == 0 and groups >= count for groups, channels in layers))]

    def __len__(self) -> int:
        return len(self.counts)

    def spec(self, level: int) -> ModelSpec:
        return self.given if level == 0 else ModelSpec(
            self.given.name, {**self.given.kwargs, "kan_groups": self.counts[level]})

    def prunable(self, model: Model) -> int:
        return coefficients_of(model)


class Points(Functions):
    """Fewer grid points over the same range; h grows with their spacing."""

    def __init__(self, model: Model, spec: ModelSpec, calibration: Calibration):
        super().__init__(model, spec, calibration)
        own = own_options(spec)
        self.points: int = own["kan_grid_points"]
        self.h: float | None = own.get("kan_h")

    def __len__(self) -> int:
        return self.points - 1

    def spec(self, level: int) -> ModelSpec:
        if level == 0:
            return self.given
        points = self.points - level
        kwargs = {**self.given.kwargs, "kan_grid_points": points}
        if self.h is not None:
            wider = self.h * (self.points - 1) / (points - 1)
            if not math.isclose(own_options(ModelSpec(self.given.name, kwargs))["kan_h"], wider):   # close if h is the spacing
                kwargs["kan_h"] = wider
        return ModelSpec(self.given.name, kwargs)

    def prunable(self, model: Model) -> int:
        return coefficients_of(model)


def coefficients_of(model: Model) -> int:
    """The number of parameters of the learned functions."""
    return sum(parameter.numel() for layer in function_layers(model).values() for parameter in layer.function_parameters())


# ---------------------------------------------------------------- choosing
def check(spec: ModelSpec, what: str) -> None:
    """Raises UserError if the model has nothing of this kind to prune."""
    size, suffix = split_name(spec.name)
    feed_forward = FEED_FORWARDS[suffix] if size and suffix else None
    if feed_forward is None or not feed_forward.PRUNES:
        able = sorted(f"_{suffix}" for suffix, kind in FEED_FORWARDS.items() if kind.PRUNES)
        raise UserError(f"{spec.name} has no feed-forward that can be pruned: choose a checkpoint of a {' or '.join(able)} model "
                        "of --list-models")
    if what not in feed_forward.PRUNES:
        *others, last = feed_forward.PRUNES
        raise UserError(f"--what {what} means nothing for {spec.name}, where {feed_forward.FUNCTIONS}: choose "
                        + (f"{', '.join(others)} or {last}" if others else last))


def make_plan(model: Model, spec: ModelSpec, what: str, calibration: Calibration) -> Plan:
    """The plan that removes the least important parts first. what: one of `KINDS`. Raises UserError as `check` does."""
    check(spec, what)
    if what == "groups":
        return Groups(model, spec, calibration)
    if what == "points":
        return Points(model, spec, calibration)
    if what == "edges":
        return Hidden(model, spec, calibration, rank_edges(model, calibration))
    shared = own_options(spec).get("kan_groups")        # 0 or None: hidden units can be removed one by one
    groups = model.blocks[0].mlp.halves()[1].functions.function_weights().shape[1] if shared else 1
    return Hidden(model, spec, calibration, rank_hidden(model, calibration, groups))


def first_level(plan: Plan, holds: Callable[[int], bool]) -> int:
    """The first level for which `holds` is true, by bisection: it must be true for all further levels. len(plan) if for none."""
    return bisect_left(range(len(plan)), True, key=holds)
