"""Covariances of features and Fisher information on calibration images."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Any             # a timm ViT of this project or one of its feed-forwards; nn.Module's type has none of their attributes
FLOOR = 0.05            # added to the weight of each token: one without gradient now may have one later
CHUNK = 4096            # tokens whose features are in memory at a time


def to_float64(x: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if its device is an Apple GPU, which lacks float64."""
    return x.double() if x.device.type != "mps" else x.cpu().double()


@dataclass
class Calibration:
    inputs: list[Tensor]                # of the first block, [B, N, D] for each batch
    weights: list[list[Tensor]]         # of the tokens, [B * N] for each block and batch
    fisher: list[Tensor]                # M of each block, float64 [D, D]
    covariance: list[Tensor]            # C of each block's second half, float64 [HP, HP]


class _Moments:
    """Weighted sums over tokens, in float64: of features f [T, P], of residuals r [T, O], and of their products."""

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
    """Run `model`, in evaluation mode, forward and backward on batches of images [B, 3, H, W]. seed: of the drawn labels."""
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
                    for x, weight in zip(seen[number][0].flatten(0, 1).split(CHUNK), weights.split(CHUNK)):
                        moments[number].add(second.features(first(x)).flatten(1), weight)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    found.fisher = [matrix / tokens for matrix in fisher]
    found.covariance = [m.covariance(block.mlp.halves()[1].bias is not None) for m, block in zip(moments, blocks)]
    return found
