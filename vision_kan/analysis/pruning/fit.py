"""The maps of a smaller block, fitted to what the larger one gave."""
from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from vision_kan.analysis.pruning.calibrate import CHUNK, _Moments
from vision_kan.analysis.pruning.halves import EdgeHalf, Half, Model, double, edge_features
from vision_kan.kernels import BASES, rswaf_basis
from vision_kan.layers.group_kan import GroupActivation

RIDGE = 1e-3            # of the mean of E[f^2]
SAMPLE = 4096           # tokens that functions are fitted on


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
