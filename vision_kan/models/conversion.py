"""From a trained MLP to a KAN that computes the same function.

A group KAN holds the MLP's weights under the same names and begins as the MLP: there is nothing to convert
(`finetune.load_finetune`). A full-edge KAN of the MLP's hidden width represents it up to a least-squares fit:

    MLP                         y = W2 gelu(W1 n + b1) + b2,    n = LayerNorm(x)
    first layer                 n_i = m_i + s_i u_i  ~  sum_k a_ik B_k(u_i) + a_i,      weight W1[o, i] a_ik
    second layer                gelu(z_j)  ~  sum_k c_jk B_k(u_j) + c_j,  u_j = (z_j - m_j)/s_j,  weight W2[o, j] c_jk

Mean m and deviation s of every input and hidden unit, and the weights of the fits, come from a calibration batch. Constants and
biases go into the layers' biases, the block norm's affine into W1 and b1.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

import models_kan
from faster_kan import FasterKAN, FasterKANLayer
from models_kan import ModelSpec
from vision_kan.common.errors import UserError
from vision_kan.layers.least_squares import ridge_solve
from vision_kan.models.finetune import LoadReport, load_finetune
from vision_kan.models.hooks import caught_inputs

# A standard normal has this share of a fit's weight, so that the function is right where the batch has no sample, too.
GAUSSIAN_SHARE = 0.05
RIDGE = 1e-7            # relative to the mean of E[B_k^2]
MAX_TOKENS = 4096       # of the calibration batch


@dataclass(frozen=True)
class BlockError:
    """The error of a converted block's feed-forward on the calibration batch."""
    block: int
    error: float        # root mean square of the deviation, relative to that of the MLP's output
    outside: float      # share of the inputs of both layers that lie off the grid


def load_converted(model: nn.Module, spec: ModelSpec, state: dict[str, Tensor], images: Callable[[], Tensor],
                   grid: tuple[int, int] | None = None) -> tuple[LoadReport, list[BlockError]]:
    """Load another model's weights into `model`, converting MLPs to KANs where possible.

    Args:
        spec: how `model` was built.
        state: the other model's parameters.
        images: returns a calibration batch [B, 3, H, W]; called only if one is needed.
        grid: (rows, columns) of the other model's patches (`infer.patch_grid`); None: a square.
    Returns: a report on each tensor, and the error of each block whose KAN was fitted to an MLP.
    Raises: UserError as `finetune.load_finetune`.
    """
    report = load_finetune(model, state, grid)
    blocks = getattr(model, "blocks", [])
    mlps = [key for key in report.dropped if re.search(r"\.mlp\.fc[12]\.", key)]
    if not mlps or not any(getattr(getattr(block, "mlp", None), "FITS_MLP", False) for block in blocks):
        return report, []
    twin = models_kan.mlp_twin(spec)
    missing = load_finetune(twin, state, grid).initial
    reason = next((f"it has no {key} of the model's shape" for key in missing if re.search(r"\.(mlp|norm2)\.", key)),
                  None) or why_not(model, twin)
    if reason:
        report.dropped |= dict.fromkeys(mlps, f"no conversion: {reason}")
        return report, []
    errors = mlp_to_full_edge(model, twin, images())
    for key in [key for key in report.initial if ".mlp.layers." in key]:
        del report.initial[key]
        report.converted[key] = "fitted to the MLP"
    for key in [key for key in report.loaded if ".norm2." in key]:
        del report.loaded[key]
        report.converted[key] = "its affine is in the KAN's first layer"
    for key in mlps:
        del report.dropped[key]
    return report, errors


def why_not(model: Any, source: Any) -> str | None:
    """The reason why `mlp_to_full_edge` cannot convert `source` into `model`, as a clause; None if it can."""
    pairs = list(zip(getattr(model, "blocks", []), getattr(source, "blocks", [])))
    if not pairs or len(model.blocks) != len(source.blocks):
        return f"it has {len(getattr(source, 'blocks', []))} blocks, the model {len(getattr(model, 'blocks', []))}"
    for kan, mlp in ((a.mlp, b.mlp) for a, b in pairs):
        if not getattr(kan, "FITS_MLP", False) or not isinstance(mlp, Mlp):
            return "only an MLP can become a full-edge KAN"
        if reason := kan.mlp_misfit(mlp):
            return reason
    return None


@torch.no_grad()
def mlp_to_full_edge(model: Any, source: Any, images: Tensor) -> list[BlockError]:
    """Fit every KAN of `model` to the MLP in the same block of `source`.

    Args:
        model: a timm ViT whose feed-forwards are `FasterKAN`s with biases, a static second normalisation and the hidden width
            of the MLPs. Changes only its block norms (norm2) and feed-forwards.
        source: the trained timm ViT with GELU MLPs.
        images: [B, 3, H, W], normalised; a few dozen are enough.
    Returns: the error of each block on the inputs of the source's block.
    Raises: UserError if `why_not` has a reason.
    """
    reason = why_not(model, source)
    if reason:
        raise UserError(f"the checkpoint's MLPs cannot be converted: {reason}")
    inputs = _feed_forward_inputs(source, images)
    errors = []
    for number, (kan_block, mlp_block) in enumerate(zip(model.blocks, source.blocks)):
        norm, mlp, kan = mlp_block.norm2, mlp_block.mlp, kan_block.mlp
        n = F.layer_norm(inputs[number], norm.normalized_shape, eps=norm.eps)
        # The KAN has a LayerNorm of its own. The block's keeps no affine: it goes into the first map.
        nn.init.ones_(kan_block.norm2.weight), nn.init.zeros_(kan_block.norm2.bias)
        kan_block.norm2.eps = norm.eps
        w1 = mlp.fc1.weight.double() * norm.weight.double()
        b1 = mlp.fc1.bias.double() + mlp.fc1.weight.double() @ norm.bias.double()
        _fit_layer(kan.layers[0], n, w1, b1, _identity)
        hidden = n.double() @ w1.T + b1
        _fit_layer(kan.layers[1], hidden.float(), mlp.fc2.weight.double(), mlp.fc2.bias.double(), F.gelu)
        target = mlp.fc2(F.gelu(mlp.fc1(norm(inputs[number]))))
        got = kan(kan_block.norm2(n))           # n is normalised already: norm2 changes nothing
        errors.append(BlockError(number, ((got - target).square().mean() / target.square().mean()).sqrt().item(),
                                 _share_outside(kan, n)))
    return errors


def _feed_forward_inputs(source: Any, images: Tensor) -> list[Tensor]:
    """The inputs of each block's norm2, [tokens, dim], at most `MAX_TOKENS` of them."""
    training = source.training
    with caught_inputs([block.norm2 for block in source.blocks]) as caught:
        try:
            source.eval()(images)
        finally:
            source.train(training)
    inputs = [tokens.flatten(0, -2) for tokens, in caught]
    step = max(1, -(-len(inputs[0]) // MAX_TOKENS))
    return [tokens[::step] for tokens in inputs]


def _identity(x: Tensor) -> Tensor:
    return x


def _fit_layer(layer: FasterKANLayer, x: Tensor, weight: Tensor, bias: Tensor,
               function: Callable[[Tensor], Tensor]) -> None:
    """Set the layer's parameters so that layer(x) ~ weight function(x) + bias for inputs like x [T, I].

    weight: [O, I], bias: [O], both float64."""
    mean, std = x.double().mean(0), x.double().std(0).clamp_min(1e-6)
    layer.normalise_by(mean, std)
    coefficients, constant = _fit(layer, x, mean, std, function)                    # [I, G], [I]
    layer.spline_linear.weight.copy_((weight[..., None] * coefficients).flatten(1))
    assert layer.spline_linear.bias is not None
    layer.spline_linear.bias.copy_(bias + weight @ constant)
    if layer.base_linear is not None:
        nn.init.zeros_(layer.base_linear.weight)


def _fit(layer: FasterKANLayer, x: Tensor, mean: Tensor, std: Tensor,
         function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficients c [I, G] and constants c [I] with sum_k c_ik B_k(u) + c_i ~ function(m_i + s_i u) for each input i.

    Least squares with a small ridge, in float64, over the samples u = (x_i - m_i)/s_i and, with `GAUSSIAN_SHARE` of the weight, a
    standard normal."""
    normal = torch.linspace(-5, 5, 201, dtype=torch.float64, device=x.device)
    density = torch.exp(-normal ** 2 / 2)
    weights = torch.cat([torch.full((len(x),), (1 - GAUSSIAN_SHARE) / len(x), dtype=torch.float64, device=x.device),
                         density * (GAUSSIAN_SHARE / density.sum())])[:, None]      # [T, 1]
    coefficients = []
    for chunk in torch.arange(x.shape[1], device=x.device).split(32):               # bounds the memory
        m, s = mean[chunk], std[chunk]
        u = torch.cat([(x[:, chunk].double() - m) / s, normal[:, None].expand(-1, len(chunk))]).T.contiguous()  # [i, T]
        columns = F.pad(layer.rbf.basis(u), (0, 1), value=1.0)                      # [i, T, G + 1]
        weighted = (columns * weights).mT                                           # [i, G + 1, T]
        target = function(m[:, None] + s[:, None] * u)
        coefficients.append(ridge_solve(weighted @ columns, weighted @ target[..., None], RIDGE, free=1).squeeze(-1))
    solved = torch.cat(coefficients)
    return solved[:, :-1], solved[:, -1]


def _share_outside(kan: FasterKAN, n: Tensor) -> float:
    """The share of the inputs of both layers' bases that lie off their grids."""
    outside = []
    x = n
    for layer in kan.layers:
        u = layer.normalised(x)
        outside.append((u < layer.rbf.grid.min()) | (u > layer.rbf.grid.max()))
        x = layer(x)
    return (sum(mask.sum() for mask in outside) / sum(mask.numel() for mask in outside)).item()


def table(errors: list[BlockError]) -> str:
    """The errors as text, a line for each block."""
    return "\n".join(["  block  error of the feed-forward  inputs off the grid"]
                     + [f"  {e.block:5}  {e.error:24.2%}  {e.outside:19.2%}" for e in errors])
