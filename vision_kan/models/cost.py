"""Parameters and FLOPs of a model, and whether two models may be compared."""
from typing import Any, NamedTuple

from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from faster_kan import FasterKANLayer
from vision_kan.layers.efficient_kan import EfficientKANLayer
from vision_kan.layers.group_kan import GroupActivation, GroupKAN


# ---------------------------------------------------------------- cost
class Flops(NamedTuple):
    """Floating-point operations of one image's forward pass."""
    matmul: int         # matrix products, 2 per multiply-add
    elementwise: int    # basis and activation functions


BASIS_FLOPS = 5         # a basis value: subtract, divide, tanh, square, subtract from 1
BSPLINE_FLOPS = 13      # a cubic one: |s - k| 2, max(c - |s - k|, 0)^3 4 for both c, their weighted sum 3
GELU_FLOPS = 5          # x * 1/sqrt(2), erf, + 1, * x, * 1/2
SILU_FLOPS = 4          # x / (1 + exp(-x))
BASE_FLOPS = {"identity": 0, "gelu": GELU_FLOPS, "silu": SILU_FLOPS, "relu": 1, "relu2": 2}


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(model: Any) -> Flops:
    """FLOPs of one forward pass of one image at the model's own image size, for the models of this project.

    Matrix products: the patch embedding, every linear map, and the two products of attention. Elementwise: 5
    per value of the basis (13 per B-spline), 5 per GELU and 4 per SiLU. Norms, softmax and residuals are not counted."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    conv = model.patch_embed.proj
    matmul = 2 * model.patch_embed.num_patches * conv.weight.numel()
    elementwise = 0
    for module in model.modules():
        if isinstance(module, Attention):
            width = module.num_heads * module.head_dim
            matmul += 2 * tokens * (module.qkv.weight.numel() + module.proj.weight.numel())
            matmul += 2 * 2 * tokens * tokens * width
        elif isinstance(module, FasterKANLayer):
            matmul += 2 * tokens * module.spline_linear.weight.numel()
            elementwise += BASIS_FLOPS * tokens * module.spline_linear.weight.shape[1]
            if module.base_linear is not None:
                matmul += 2 * tokens * module.base_linear.weight.numel()
                elementwise += SILU_FLOPS * tokens * module.in_features
        elif isinstance(module, EfficientKANLayer):
            matmul += 2 * tokens * (module.base_weight.numel() + module.spline_weight.numel())
            elementwise += (BSPLINE_FLOPS * module.num_grids + SILU_FLOPS) * tokens * module.in_features
        elif isinstance(module, (Mlp, GroupKAN)):
            matmul += 2 * tokens * (module.fc1.weight.numel() + module.fc2.weight.numel())
            if isinstance(module, Mlp):
                elementwise += GELU_FLOPS * tokens * module.fc1.out_features
        elif isinstance(module, GroupActivation):       # 7 a point: the basis value, times its coefficient, added
            elementwise += ((BASIS_FLOPS + 2) * len(module.points) + BASE_FLOPS[module.base]) * tokens * module.channels
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Linear):
            matmul += 2 * head.weight.numel()
    return Flops(matmul, elementwise)


TWINS_MAY_DIFFER = {"parameters": 0.02, "matmul FLOPs": 0.05}


def twin_mismatch(a: nn.Module, b: nn.Module) -> str | None:
    """A sentence where two models that are compared differ by more than `TWINS_MAY_DIFFER`, else None."""
    costs: list[dict[str, float]] = [{"parameters": count_parameters(model), "matmul FLOPs": count_flops(model).matmul}
                                     for model in (a, b)]
    return cost_mismatch(*costs)


def cost_mismatch(a: dict[str, float], b: dict[str, float]) -> str | None:
    """The same for costs that are known already, under the keys of `TWINS_MAY_DIFFER`."""
    for key, limit in TWINS_MAY_DIFFER.items():
        if abs(a[key] - b[key]) > limit * max(a[key], b[key]):
            return (f"not twins: {a[key]:,} against {b[key]:,} {key}, a difference of "
                    f"{abs(a[key] - b[key]) / max(a[key], b[key]):.1%}")
    return None
