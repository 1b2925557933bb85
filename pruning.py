"""A trained KAN with less in its feed-forwards: what matters least, and the smaller model that does without it.

Both feed-forwards are two linear maps of learned features,

    z = W1 f1(n) + b1,    y = W2 f2(z) + b2,

f of a group KAN the channels after phi, of a full-edge KAN the basis values (and silu(u)) of every input. Four things can
go: hidden units (`Hidden`, and by another measure `edges`), groups (`Groups`), grid points (`Points`).

What matters: a change D of W2 raises the loss, to second order, by

    tr(M D C D^T) / 2,    C = E[w f f^T],    M = E[g g^T],

where g is the gradient of the loss at y over tokens, its expectation over labels drawn from the model itself, and w = |g|^2
(mean 1) what a token weighs: the Fisher information, Kronecker-factored (Martens and Grosse, arXiv:1503.05671). A bias
makes up for a mean, so C is the covariance then, as in FLAP (An et al., arXiv:2312.11983). Units are removed one after
another, each the one without which the loss rises least when the weights of those that stay make up for it: the
optimal brain surgeon (Hassibi and Stork, 1992) for whole units, as in EigenDamage (Wang et al., arXiv:1905.05934) and ZipLM
(Kurtic et al., arXiv:2302.04089). As M puts all blocks on one scale, one order holds for the whole model.

Then the blocks are made smaller one after another, each on what the smaller ones before it give, and their linear maps
fitted to the outputs that the block had, by least squares (He et al., arXiv:1707.06168) with a ridge towards the
old weights. A LayerNorm over the hidden units has other statistics when some are gone; its scale and shift of each
unit are fitted to what the unit was before.

Legend for shapes: B images, N tokens, T tokens of all images, D channels, H hidden units, I inputs and O outputs of a map,
P features of an input, G groups.
"""
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

import models_kan
from faster_kan import FasterKAN, FasterKANLayer, RSWAFGrid
from group_kan import GroupActivation, GroupKAN
from kernels import BASES, rswaf_basis
from models_kan import ModelSpec, split_name
from utils import UserError

Model = Any             # a timm ViT of this project or a feed-forward of one, whose parts nn.Module's types do not know
KINDS = ("hidden", "groups", "points", "edges")
FLOOR = 0.05            # what a token weighs beside its gradient: one that the loss does not feel now it may feel later
RIDGE = 1e-3            # of the mean of E[f^2]
CHUNK = 4096            # tokens whose features are in memory at a time
SAMPLE = 4096           # tokens that functions are fitted on


# ---------------------------------------------------------------- the two halves of a feed-forward
class Half:
    """A linear map and the functions before it: x [T, I] -> [T, O], as sum_ip W[o, i, p] f[t, i, p] + b[o]."""

    def __init__(self, linear: Any):
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """[T, I, P]"""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """[O, I, P]"""
        return self.linear.weight[..., None]

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        self.linear.weight.copy_(weight[..., 0])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


class GroupHalf(Half):
    def __init__(self, phi: nn.Module, linear: nn.Linear):
        super().__init__(linear)
        self.phi = phi

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(self.phi(x))

    def features(self, x: Tensor) -> Tensor:
        return self.phi(x)[..., None]


class EdgeHalf(Half):
    def __init__(self, layer: FasterKANLayer):
        super().__init__(layer.spline_linear)
        self.layer: Any = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def features(self, x: Tensor) -> Tensor:
        return edge_features(self.layer, self.layer.layernorm(x))

    @property
    def weight(self) -> Tensor:
        weight = self.linear.weight.unflatten(1, (self.layer.in_features, -1))
        base = self.layer.base_linear
        return weight if base is None else torch.cat([weight, base.weight[..., None]], -1)

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        points = len(self.layer.rbf.grid)
        self.linear.weight.copy_(weight[..., :points].flatten(1))
        if self.layer.base_linear is not None:
            self.layer.base_linear.weight.copy_(weight[..., points])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


def edge_features(layer: Any, u: Tensor) -> Tensor:
    """Basis values of normalised inputs u [T, I], with silu(u) where the layer has a base branch: [T, I, P]."""
    basis = rswaf_basis(u, layer.rbf.grid, layer.rbf.h)
    return basis if layer.base_linear is None else torch.cat([basis, F.silu(u)[..., None]], -1)


def halves(mlp: Model) -> tuple[Half, Half]:
    if isinstance(mlp, GroupKAN):
        return GroupHalf(mlp.phi1, mlp.fc1), GroupHalf(mlp.phi2, mlp.fc2)
    return EdgeHalf(mlp.layers[0]), EdgeHalf(mlp.layers[1])


def double(x: Tensor) -> Tensor:
    """As float64, which Apple's GPUs do not have."""
    return x.double() if x.device.type != "mps" else x.cpu().double()


# ---------------------------------------------------------------- what the calibration images say
@dataclass
class Calibration:
    """inputs: what enters the first block, [B, N, D] for each batch. weights: for each block and batch, what its tokens
    weigh, [B * N]. fisher: M of each block, float64 [D, D]. covariance: C of each block's second half, float64 [HP, HP]."""
    inputs: list[Tensor]
    weights: list[list[Tensor]]
    fisher: list[Tensor]
    covariance: list[Tensor]


class _Moments:
    """Weighted sums over tokens, in float64: of features f [T, P], and of residuals r [T, O] with them."""

    def __init__(self):
        self.total, self.f, self.ff, self.r, self.rf = (torch.zeros((), dtype=torch.float64) for _ in range(5))

    def add(self, features: Tensor, weights: Tensor, residual: Tensor | None = None) -> None:
        weighted = features * weights[:, None]
        self.total = self.total + weights.sum().cpu()
        self.f = self.f + double(weighted.sum(0))
        self.ff = self.ff + double(weighted.T @ features)
        if residual is not None:
            self.r = self.r + double((residual * weights[:, None]).sum(0))
            self.rf = self.rf + double(residual.T @ weighted)

    def covariance(self, centred: bool) -> Tensor:
        return (self.ff - (torch.outer(self.f, self.f) / self.total if centred else 0)) / self.total


def calibrate(model: Model, batches: Iterator[Tensor], seed: int = 0) -> Calibration:
    """What `model`, in evaluation mode, does on images [B, 3, S, S]: see `Calibration`."""
    blocks = list(model.blocks)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    found = Calibration([], [[] for _ in blocks], [], [])
    hooks = [block.mlp.register_forward_hook(lambda _, args, out, number=number: seen.update({number: (args[0], out)}))
             for number, block in enumerate(blocks)]
    hooks.append(blocks[0].register_forward_pre_hook(lambda _, args: found.inputs.append(args[0].detach())))
    generator = torch.Generator().manual_seed(seed)
    moments, tokens = [_Moments() for _ in blocks], 0
    fisher: list[Any] = [0.0] * len(blocks)
    try:
        for images in batches:
            logits = model(images.requires_grad_())
            labels = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, [seen[number][1] for number in range(len(blocks))])
            tokens += gradients[0].shape[:2].numel()
            with torch.no_grad():
                for number, (block, gradient) in enumerate(zip(blocks, gradients)):
                    gradient = gradient.flatten(0, 1).float()
                    fisher[number] += double(gradient.T @ gradient)
                    weights = gradient.square().sum(1)
                    weights = FLOOR + weights / weights.mean().clamp_min(1e-30)
                    found.weights[number].append(weights)
                    first, second = halves(block.mlp)
                    for some, weight in zip(seen[number][0].flatten(0, 1).split(CHUNK), weights.split(CHUNK)):
                        moments[number].add(second.features(first(some)).flatten(1), weight)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    found.fisher = [matrix / tokens for matrix in fisher]
    found.covariance = [m.covariance(halves(block.mlp)[1].bias is not None) for m, block in zip(moments, blocks)]
    return found


# ---------------------------------------------------------------- which units matter least
class Removal(NamedTuple):
    """Hidden units of a block that go together, one of each group, and what the loss rises by, up to a factor."""
    block: int
    units: list[int]
    rise: float


def removal_order(covariance: Tensor, weight: Tensor, fisher: Tensor, groups: int) -> list[tuple[list[int], float]]:
    """Hidden units of a block in the order in which they are missed least, all but the last of each group.

    Args:
        covariance: float64 [HP, HP]. weight: [O, H, P]. fisher: float64 [O, O].
        groups: so many runs of neighbouring units of which one goes at a time.
    Returns: units, and by what tr(M D C D^T) rises when they go and the others' weights make up for them.
    """
    outputs, units, features = weight.shape
    values, vectors = torch.linalg.eigh(fisher)
    rows = (vectors * values.clamp_min(0).sqrt()).T @ double(weight).flatten(1)             # M^1/2 W, [O, HP]
    inverse = torch.linalg.inv(covariance + RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), device=rows.device))
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
    """Hidden units of all blocks, those first without which the loss rises least; one unit of each group stays."""
    removals = []
    for number, block in enumerate(model.blocks):
        order = removal_order(calibration.covariance[number], halves(block.mlp)[1].weight, calibration.fisher[number], groups)
        # what goes first in its block must come first: a rise counts as no less than those before it
        highest = np.maximum.accumulate([rise for _, rise in order] or [0.0])
        removals += [Removal(number, units, float(rise)) for (units, _), rise in zip(order, highest)]
    return sorted(removals, key=lambda removal: removal.rise)


def edge_deviations(half: Half, inputs: Sequence[Tensor]) -> Tensor:
    """Standard deviation of every edge function phi_oi over what arrives, x [T, I] in parts: [O, I]."""
    total, first, second = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in inputs:
        f = double(half.features(x))
        total, first = total + len(f), first + f.sum(0)
        second = second + torch.einsum("tip,tiq->ipq", f, f)
    mean = first / total
    covariance = second / total - mean[:, :, None] * mean[:, None]
    weight = double(half.weight)
    return torch.einsum("oip,ipq,oiq->oi", weight, covariance, weight).clamp_min(0).sqrt()


@torch.no_grad()
def rank_edges(model: Model, calibration: Calibration) -> list[Removal]:
    """Hidden units of all blocks, those first whose edges are weak: the smaller of the strongest edge that comes in and the
    strongest that goes out, each relative to its layer's (Liu et al., arXiv:2404.19756, section 2.5: a unit stays that has
    a strong edge on both sides)."""
    removals = []
    for number, inputs in enumerate(feed_forward_inputs(model, calibration.inputs)):
        first, second = halves(model.blocks[number].mlp)
        into, out = (d / d.square().mean().sqrt() for d in (
            edge_deviations(first, inputs), edge_deviations(second, [first(x) for x in inputs])))
        strength = torch.minimum(into.amax(1), out.amax(0))
        weakest = strength.argsort(stable=True)[:-1].tolist()
        removals += [Removal(number, [unit], strength[unit].item()) for unit in weakest]
    return sorted(removals, key=lambda removal: removal.rise)


def by_chance(removals: list[Removal], seed: int) -> list[Removal]:
    """The same number of units in a random order: what a ranking has to beat."""
    random = np.random.default_rng(seed)
    groups: dict[int, list[list[int]]] = {}
    for removal in removals:
        groups.setdefault(removal.block, []).append(removal.units)
    shuffled = []
    for number, units in groups.items():
        columns = [random.permutation(column) for column in zip(*units)]
        shuffled += [Removal(number, [int(unit) for unit in row], 0.0) for row in zip(*columns)]
    return [shuffled[i] for i in random.permutation(len(shuffled))]


@torch.no_grad()
def feed_forward_inputs(model: Model, inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """What enters each block's feed-forward, [T, D] in parts of `CHUNK` tokens, from what enters the first block. The
    feed-forward may be changed before the next one is asked for, which sees what it gives then."""
    for block in model.blocks:
        caught: list[Tensor] = []
        hook = block.mlp.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
        for x in inputs:
            block(x)
        hook.remove()
        yield [part for x in caught for part in x.flatten(0, -2).split(CHUNK)]
        inputs = [block(x) for x in inputs]


# ---------------------------------------------------------------- fits
@torch.no_grad()
def refit(half: Half, inputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Fit the linear map: half(x) ~ target for x [T, I], target [T, O], weights [T], each in parts; by least squares with a
    ridge towards what it is."""
    sums = _Moments()
    for x, target, weight in zip(inputs, targets, weights):
        sums.add(half.features(x).flatten(1), weight, target - half(x))
    bias = half.bias
    gram = sums.covariance(bias is not None)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    moment = (sums.rf - (torch.outer(sums.r, sums.f) / sums.total if bias is not None else 0)) / sums.total
    change = torch.linalg.solve(gram, moment, left=False)       # [O, IP]
    weight = double(half.weight) + change.unflatten(1, half.weight.shape[1:])
    half.set(weight, None if bias is None else double(bias) + (sums.r - change @ sums.f) / sums.total)


def channel_moments(new: Tensor, old: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """E[w f' f'^T] [I, Q, Q] and E[w f' f^T] [I, Q, P] of each channel, for features f' [T, I, Q], f [T, I, P], weights [T]."""
    own, cross = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for f, g, w in zip(new.split(512), old.split(512), weights.split(512)):         # bounds the memory
        weighted, f, g = double(f * w[:, None, None]), double(f), double(g)
        own, cross = own + torch.einsum("tiq,tir->iqr", weighted, f), cross + torch.einsum("tiq,tip->iqp", weighted, g)
    total = double(weights.sum())
    return own / total, cross / total


def ridged(gram: Tensor) -> Tensor:
    """A batch of Gram matrices [..., P, P] with a ridge that keeps coefficients bounded where nothing arrives."""
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    return gram + 1e-6 * size[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def sample(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """At most `SAMPLE` of the tokens, the same at each call."""
    x, w = torch.cat(list(inputs)), torch.cat(list(weights))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLE].to(x.device)
    return x[chosen], w[chosen]


# ---------------------------------------------------------------- learned functions of groups
def group_features(phi: GroupActivation, u: Tensor) -> Tensor:
    """What phi adds up for inputs u [T, I], its base only where that has a learned scale: [T, I, P]."""
    basis = rswaf_basis(u, phi.grid, phi.h)
    return basis if phi.scale is None else torch.cat([basis, BASES[phi.base](u)[..., None]], -1)


def group_coefficients(phi: GroupActivation) -> Tensor:
    """Their coefficients, [G, P]."""
    return phi.coefficients if phi.scale is None else torch.cat([phi.coefficients, phi.scale[:, None]], 1)


def mean_functions(gram: Tensor, moment: Tensor, groups: Tensor, count: int) -> Tensor:
    """The function of each group that is nearest those of its channels: [count, Q].

    gram [I, Q, Q], moment [I, Q] of each channel; groups: the channels', [I]."""
    left = torch.zeros(count, *gram.shape[1:], dtype=gram.dtype, device=gram.device).index_add_(0, groups, gram)
    right = torch.zeros(count, moment.shape[1], dtype=gram.dtype, device=gram.device).index_add_(0, groups, moment)
    return torch.linalg.solve(ridged(left), right[..., None]).squeeze(-1)


def cluster(gram: Tensor, coefficients: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Groups of equally many channels whose functions are alike where their inputs arrive: the group of each channel, [I].

    k-means with clusters of one size (the assignment problem in each round), begun along the direction in which the
    functions differ most. gram [I, P, P], coefficients [I, P], both float64."""
    channels = len(gram)
    values, vectors = torch.linalg.eigh(gram.mean(0))
    functions = coefficients @ vectors * values.clamp_min(0).sqrt()
    functions -= functions.mean(0)
    ranks = (functions @ torch.linalg.svd(functions, full_matrices=False).Vh[0]).argsort(stable=True).argsort()
    groups = ranks // (channels // count)
    moment = torch.einsum("ipq,iq->ip", gram, coefficients)
    for _ in range(rounds):
        centres = mean_functions(gram, moment, groups, count)
        apart = coefficients[:, None] - centres                                             # [I, count, P]
        cost = torch.einsum("icp,ipq,icq->ic", apart, gram, apart).repeat_interleave(channels // count, 1)
        slots = torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1]).to(groups.device)
        if torch.equal(groups, slots // (channels // count)):
            break
        groups = slots // (channels // count)
    return groups


@torch.no_grad()
def fit_functions(new: GroupActivation, old: GroupActivation, u: Tensor, weights: Tensor, matters: Tensor,
                  sort: bool = False) -> Tensor:
    """Give `new`, of fewer groups or points, the functions of `old`, as well as it can for inputs like u [T, I].

    matters: what an error of each channel counts, [I]. sort: channels may change places, so that those whose functions are
    alike come together. Returns: which of old's channels is at each place of new's, [I]."""
    channels, count = new.channels, len(new.coefficients)
    own = double(group_coefficients(old)).repeat_interleave(channels // len(old.coefficients), 0)        # [I, P]
    order = torch.arange(channels, device=own.device)
    features = group_features(old, u)
    matters = double(matters)[:, None, None]
    if sort and count < len(old.coefficients):
        gram, _ = channel_moments(features, features, weights)
        order = cluster(gram * matters, own, count).argsort(stable=True)
    gram, cross = channel_moments(group_features(new, u), features, weights)
    moment = torch.einsum("iqp,ip->iq", cross * matters, own)
    groups = torch.arange(channels, device=own.device) // (channels // count)
    fitted = mean_functions((gram * matters)[order], moment[order], groups, count)
    new.coefficients.copy_(fitted[:, :len(new.points)])
    if new.scale is not None:
        new.scale.copy_(fitted[:, -1])
    return order


@torch.no_grad()
def fit_edges(new: EdgeHalf, old: EdgeHalf, x: Tensor, weights: Tensor) -> None:
    """Give every edge of `new`, of fewer points, the function that it has in `old`, as well as it can for inputs like x
    [T, I]: W'[o, i] = W[o, i] A_i, A_i the least-squares change of basis of input i."""
    u = old.layer.layernorm(x)
    features, one = edge_features(new.layer, u), torch.ones_like(u)[..., None]
    if new.bias is not None:
        features = torch.cat([features, one], -1)
    gram, cross = channel_moments(features, old.features(x), weights)
    change = torch.linalg.solve(ridged(gram), cross)                # [I, Q, P]
    weight = torch.einsum("oip,iqp->oiq", double(old.weight), change)
    if old.bias is None:
        new.set(weight, None)
    else:
        new.set(weight[..., :-1], double(old.bias) + weight[..., -1].sum(1))


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
        return ModelSpec(self.given.name, {**self.given.kwargs, "hdim_kan": models_kan.one_or_each(widths)})

    def prunable(self, model: Model) -> int:
        return sum(models_kan.count_parameters(block.mlp) for block in model.blocks)

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


@torch.no_grad()
def fit_norm(new: nn.LayerNorm, old: nn.LayerNorm, inputs: list[Tensor], weights: list[Tensor], units: Tensor) -> None:
    """Scale and shift of a LayerNorm over some of the units with which each is nearest what it was in `old`."""
    n = double(torch.cat([F.layer_norm(x[:, units], new.normalized_shape, eps=new.eps) for x in inputs]))
    u, w = double(torch.cat([old(x)[:, units] for x in inputs])), double(torch.cat(weights))[:, None]
    w = w / w.sum()
    mean, wanted = (w * n).sum(0), (w * u).sum(0)
    scale = (w * (n - mean) * (u - wanted)).sum(0) / (w * (n - mean).square()).sum(0).clamp_min(1e-12)
    new.weight.copy_(scale)
    new.bias.copy_(wanted - scale * mean)


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
