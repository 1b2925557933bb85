"""Fits of a smaller block's maps and functions to the outputs of the larger block."""
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

RIDGE = 1e-3            # towards the old weights, relative to the mean of E[f^2]
FUNCTIONS_RIDGE = 1e-6  # of the coefficients of functions, relative to the same
SAMPLE = 4096           # tokens on which functions are fitted


@torch.no_grad()
def feed_forward_inputs(model: Model, inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the inputs of each block's feed-forward, [T, D] in chunks of `CHUNK` tokens. inputs: those of the first block. The
    caller may change a feed-forward before it takes the next item, which then has the changed outputs."""
    for block in model.blocks:
        with caught_inputs([block.mlp]) as (caught,):
            for x in inputs:
                block(x)
        yield [part for x in caught for part in x.flatten(0, -2).split(CHUNK)]
        inputs = [block(x) for x in inputs]


# ---------------------------------------------------------------- fits
@torch.no_grad()
def refit(half: Half, inputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Fit the linear map so that half(x) ~ target, for x [T, I], target [T, O] and weights [T], each in chunks: least squares
    with a ridge towards the current weights."""
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
    """At most `SAMPLE` random tokens, the same at each call."""
    x, w = torch.cat(list(inputs)), torch.cat(list(weights))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLE].to(x.device)
    return x[chosen], w[chosen]


# ---------------------------------------------------------------- learned functions of groups
def learned_weights(phi: FunctionLayer) -> Tensor:
    """[G, P]: the learned weights of each group's function, including that of the base if it is learned."""
    return phi.function_weights()[0, :, :_learned(phi)]


def learned_basis(phi: FunctionLayer, u: Tensor) -> Tensor:
    """[T, I, P]: the basis functions of `learned_weights` at u [T, I]."""
    return phi.basis(u)[..., :_learned(phi)]


def _learned(phi: FunctionLayer) -> int:
    return sum(parameter.numel() for parameter in phi.function_parameters()) // phi.function_weights().shape[1]


def mean_functions(gram: Tensor, moment: Tensor, groups: Tensor, count: int) -> Tensor:
    """[count, Q]: for each group the function nearest to those of its channels.

    gram [I, Q, Q], moment [I, Q]: of each channel. groups: of each channel, [I]."""
    left = torch.zeros(count, *gram.shape[1:], dtype=gram.dtype, device=gram.device).index_add_(0, groups, gram)
    right = torch.zeros(count, moment.shape[1], dtype=gram.dtype, device=gram.device).index_add_(0, groups, moment)
    return ridge_solve(left, right[..., None], FUNCTIONS_RIDGE).squeeze(-1)


def cluster(gram: Tensor, coefficients: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Groups of equal size of channels with similar functions over their inputs: the group of each channel, [I].

    This is k-means with clusters of equal size (an assignment problem in each round), started along the direction in which the
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
    """Fit the functions of `new`, which has fewer groups or points, to those of `old` for inputs like u [T, I].

    error_weight: of an error in each channel, [I].
    sort: channels may be reordered, so that those with similar functions become neighbours.
    Returns: for each channel of `new` the index of its channel in `old`, [I]."""
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
    """Fit the edge functions of `new`, which has fewer points, to those of `old` for inputs like x [T, I]: W'[o, i] =
    W[o, i] A_i with A_i the least-squares change of basis of input i."""
    assert new.functions is not None and old.functions is not None
    u = old.functions.normalised(x)
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
    """Copy to `new` what it shares with `old`, and fit its functions to those of `old`.

    fisher: M of the outputs [O, O]. If given, channels of a group KAN may be reordered.
    Returns: for each input of `new` the index of its input in `old`, [I]; None if the order stays."""
    new.copy_from(old)
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
    """Fit scale and shift of a LayerNorm over the remaining `units` to their outputs in `old`."""
    n = to_float64(torch.cat([F.layer_norm(x[:, units], new.normalized_shape, eps=new.eps) for x in inputs]))
    u, w = to_float64(torch.cat([old(x)[:, units] for x in inputs])), to_float64(torch.cat(weights))[:, None]
    w = w / w.sum()
    mean, target_mean = (w * n).sum(0), (w * u).sum(0)
    scale = (w * (n - mean) * (u - target_mean)).sum(0) / (w * (n - mean).square()).sum(0).clamp_min(1e-12)
    new.weight.copy_(scale)
    new.bias.copy_(target_mean - scale * mean)
