"""Parameters and FLOPs of a model, and whether two models may be compared."""
from typing import Any

from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from vision_kan.layers.feed_forward import FeedForward, mlp_flops
from vision_kan.layers.function_layer import Flops, FunctionLayer, sum_flops


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(model: Any) -> Flops:
    """FLOPs of one forward pass of one image at the model's own image size, for the models of this project.

    Matrix products: the patch embedding, every linear map, and the two products of attention. Elementwise: 5
    per value of the basis (13 per B-spline), 5 per GELU and 4 per SiLU. Norms, softmax and residuals are not counted."""
    conv = model.patch_embed.proj
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if isinstance(head, nn.Linear)]
    once = 2 * model.patch_embed.num_patches * conv.weight.numel() + sum(2 * head.weight.numel() for head in heads)
    return sum_flops([Flops(once, 0), _flops_below(model, model.patch_embed.num_patches + model.num_prefix_tokens)])


def _flops_below(module: nn.Module, tokens: int) -> Flops:
    """Of attention and feed-forwards: timm's are counted here, the others answer for themselves."""
    if isinstance(module, (FeedForward, FunctionLayer)):
        return module.flops(tokens)
    if isinstance(module, Mlp):
        return mlp_flops(module, tokens)
    matmul = 0
    if isinstance(module, Attention):
        matmul = 2 * tokens * (module.qkv.weight.numel() + module.proj.weight.numel())
        matmul += 2 * 2 * tokens * tokens * module.num_heads * module.head_dim
    return sum_flops([Flops(matmul, 0), *(_flops_below(child, tokens) for child in module.children())])


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
