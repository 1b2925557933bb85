"""What a unit matters, from images: covariances of features, Fisher information."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Any             # a timm ViT of this project or a feed-forward of one, whose parts nn.Module's types do not know
FLOOR = 0.05            # what a token weighs beside its gradient: one that the loss does not feel now it may feel later
CHUNK = 4096            # tokens whose features are in memory at a time


def to_float64(x: Tensor) -> Tensor:
    """As float64, which Apple's GPUs do not have: on the CPU then."""
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
        self.f = self.f + to_float64(weighted.sum(0))
        self.ff = self.ff + to_float64(weighted.T @ features)
        if residual is not None:
            self.r = self.r + to_float64((residual * weights[:, None]).sum(0))
            self.rf = self.rf + to_float64(residual.T @ weighted)

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
                    fisher[number] += to_float64(gradient.T @ gradient)
                    weights = gradient.square().sum(1)
                    weights = FLOOR + weights / weights.mean().clamp_min(1e-30)
                    found.weights[number].append(weights)
                    first, second = block.mlp.halves()
                    for some, weight in zip(seen[number][0].flatten(0, 1).split(CHUNK), weights.split(CHUNK)):
                        moments[number].add(second.features(first(some)).flatten(1), weight)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    found.fisher = [matrix / tokens for matrix in fisher]
    found.covariance = [m.covariance(block.mlp.halves()[1].bias is not None) for m, block in zip(moments, blocks)]
    return found
