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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faster_kan import FasterKANLayer
from vision_kan.kernels import rswaf_basis
from vision_kan.layers.group_kan import GroupKAN

Model = Any             # a timm ViT of this project or a feed-forward of one, whose parts nn.Module's types do not know


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
