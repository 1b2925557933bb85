"""The maps of a smaller block, fitted to what the larger one gave."""
from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from vision_kan.analysis.pruning.calibrate import CHUNK, Model, _Moments, to_float64
from vision_kan.layers.feed_forward import Half
from vision_kan.layers.function_layer import FunctionLayer
from vision_kan.layers.least_squares import ridge_solve
from vision_kan.models.hooks import caught_inputs

RIDGE = 1e-3            # of the mean of E[f^2], towards the weights as they are
FUNCTIONS_RIDGE = 1e-6  # likewise, of the coefficients of functions
SAMPLE = 4096           # tokens that functions are fitted on


@torch.no_grad()
def feed_forward_inputs(model: Model, inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """What enters each block's feed-forward, [T, D] in parts of `CHUNK` tokens, from what enters the first block. The
    feed-forward may be changed before the next one is asked for, which sees what it gives then."""
    for block in model.blocks:
        with caught_inputs([block.mlp]) as (caught,):
            for x in inputs:
                block(x)
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
    moment = (sums.rf - (torch.outer(sums.r, sums.f) / sums.total if bias is not None else 0)) / sums.total
    change = ridge_solve(gram, moment, RIDGE, left=False)       # [O, IP]
    weight = to_float64(half.weight) + change.unflatten(1, half.weight.shape[1:])
    half.set(weight, None if bias is None else to_float64(bias) + (sums.r - change @ sums.f) / sums.total)


def channel_moments(new: Tensor, old: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """E[w f' f'^T] [I, Q, Q] and E[w f' f^T] [I, Q, P] of each channel, for features f' [T, I, Q], f [T, I, P], weights [T]."""
    own, cross = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for f, g, w in zip(new.split(512), old.split(512), weights.split(512)):         # bounds the memory
        weighted, f, g = to_float64(f * w[:, None, None]), to_float64(f), to_float64(g)
        own, cross = own + torch.einsum("tiq,tir->iqr", weighted, f), cross + torch.einsum("tiq,tip->iqp", weighted, g)
    total = to_float64(weights.sum())
    return own / total, cross / total


def sample(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """At most `SAMPLE` of the tokens, the same at each call."""
    x, w = torch.cat(list(inputs)), torch.cat(list(weights))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLE].to(x.device)
    return x[chosen], w[chosen]


# ---------------------------------------------------------------- learned functions of groups
def learned_weights(phi: FunctionLayer) -> Tensor:
    """[G, P]: the learned weights of each group's function, that of the base only where it is learned."""
    return phi.function_weights()[0, :, :_learned(phi)]


def learned_basis(phi: FunctionLayer, u: Tensor) -> Tensor:
    """[T, I, P]: the basis functions that they weigh, at u [T, I]."""
    return phi.basis(u)[..., :_learned(phi)]


def _learned(phi: FunctionLayer) -> int:
    return sum(parameter.numel() for parameter in phi.function_parameters()) // phi.function_weights().shape[1]


def mean_functions(gram: Tensor, moment: Tensor, groups: Tensor, count: int) -> Tensor:
    """The function of each group that is nearest those of its channels: [count, Q].

    gram [I, Q, Q], moment [I, Q] of each channel; groups: the channels', [I]."""
    left = torch.zeros(count, *gram.shape[1:], dtype=gram.dtype, device=gram.device).index_add_(0, groups, gram)
    right = torch.zeros(count, moment.shape[1], dtype=gram.dtype, device=gram.device).index_add_(0, groups, moment)
    return ridge_solve(left, right[..., None], FUNCTIONS_RIDGE).squeeze(-1)


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
def fit_functions(new: FunctionLayer, old: FunctionLayer, u: Tensor, weights: Tensor, error_weight: Tensor,
                  sort: bool = False) -> Tensor:
    """Give `new`, of fewer groups or points, the functions of `old`, as well as it can for inputs like u [T, I].

    error_weight: how much an error of each channel counts, [I]. sort: channels may change places, so that those whose functions
    are alike come together. Returns: which of old's channels is at each place of new's, [I]."""
    channels, count, before = u.shape[1], new.function_weights().shape[1], old.function_weights().shape[1]
    own = to_float64(learned_weights(old)).repeat_interleave(channels // before, 0)         # [I, P]
    order = torch.arange(channels, device=own.device)
    features = learned_basis(old, u)
    error_weight = to_float64(error_weight)[:, None, None]
    if sort and count < before:
        gram, _ = channel_moments(features, features, weights)
        order = cluster(gram * error_weight, own, count).argsort(stable=True)
    gram, cross = channel_moments(learned_basis(new, u), features, weights)
    moment = torch.einsum("iqp,ip->iq", cross * error_weight, own)
    groups = torch.arange(channels, device=own.device) // (channels // count)
    fitted = mean_functions((gram * error_weight)[order], moment[order], groups, count)
    new.set_function_weights(fitted[None])
    return order


@torch.no_grad()
def fit_edges(new: Half, old: Half, x: Tensor, weights: Tensor) -> None:
    """Give every edge of `new`, of fewer points, the function that it has in `old`, as well as it can for inputs like x
    [T, I]: W'[o, i] = W[o, i] A_i, A_i the least-squares change of basis of input i."""
    assert new.functions is not None and old.functions is not None
    u = old.functions.arriving(x)
    features, one = new.functions.basis(u), torch.ones_like(u)[..., None]
    if new.bias is not None:
        features = torch.cat([features, one], -1)
    gram, cross = channel_moments(features, old.features(x), weights)
    change = ridge_solve(gram, cross, FUNCTIONS_RIDGE)              # [I, Q, P]
    weight = torch.einsum("oip,iqp->oiq", to_float64(old.weight), change)
    if old.bias is None:
        new.set(weight, None)
    else:
        new.set(weight[..., :-1], to_float64(old.bias) + weight[..., -1].sum(1))


@torch.no_grad()
def fit_half(new: Half, old: Half, x: Tensor, weights: Tensor, fisher: Tensor | None = None) -> Tensor | None:
    """Give `new` the functions of `old`, and all else that is not changed.

    fisher: M of the outputs [O, O]; where it is given, channels of a group KAN may change places. Returns: which of old's inputs
    is at each place of new's, [I]; None where they stay."""
    new.take_over(old)
    if new.functions is None or old.functions is None:
        return None
    if new.functions.per_edge:
        fit_edges(new, old, x, weights)
        return None
    linear = old.weight[..., 0]                                     # [O, I]
    error_weight = linear.square().sum(0) if fisher is None else ((fisher @ to_float64(linear)) * to_float64(linear)).sum(0)
    return fit_functions(new.functions, old.functions, x, weights, error_weight, sort=fisher is not None)


@torch.no_grad()
def fit_norm(new: nn.LayerNorm, old: nn.LayerNorm, inputs: list[Tensor], weights: list[Tensor], units: Tensor) -> None:
    """Scale and shift of a LayerNorm over some of the units with which each is nearest what it was in `old`."""
    n = to_float64(torch.cat([F.layer_norm(x[:, units], new.normalized_shape, eps=new.eps) for x in inputs]))
    u, w = to_float64(torch.cat([old(x)[:, units] for x in inputs])), to_float64(torch.cat(weights))[:, None]
    w = w / w.sum()
    mean, wanted = (w * n).sum(0), (w * u).sum(0)
    scale = (w * (n - mean) * (u - wanted)).sum(0) / (w * (n - mean).square()).sum(0).clamp_min(1e-12)
    new.weight.copy_(scale)
    new.bias.copy_(wanted - scale * mean)
