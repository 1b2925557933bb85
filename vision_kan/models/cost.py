"""Parameters and FLOPs of a model, and whether two models may be compared."""
from typing import Any

import torch
from timm.layers import Mlp, SwiGLU
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vision_kan.layers.feed_forward import FeedForward, mlp_flops
from vision_kan.layers.function_layer import SILU_FLOPS, Flops, FunctionLayer, function_layers, sum_flops


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(model: Any) -> Flops:
    """FLOPs of the forward pass of one image at the model's image size, for models of this project.

    Matmul: the patch embedding, every linear map, and the two products of attention. Elementwise: 5 per value of the basis (13
    per B-spline), 5 per GELU and 4 per SiLU. Norms, softmax and residuals are not counted."""
    conv = model.patch_embed.proj
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if isinstance(head, nn.Linear)]
    embed_and_head = 2 * model.patch_embed.num_patches * conv.weight.numel() + sum(2 * head.weight.numel() for head in heads)
    return sum_flops([Flops(embed_and_head, 0), _block_flops(model, model.patch_embed.num_patches + model.num_prefix_tokens)])


def _block_flops(module: nn.Module, tokens: int) -> Flops:
    """FLOPs of the attention and feed-forwards in a module. timm's are counted here, this project's by themselves."""
    if isinstance(module, (FeedForward, FunctionLayer)):
        return module.flops(tokens)
    if isinstance(module, Mlp):
        return mlp_flops(module, tokens)
    if isinstance(module, SwiGLU):      # its gate: SiLU and a product
        hidden, maps = module.fc1_g.out_features, (module.fc1_g, module.fc1_x, module.fc2)
        return Flops(2 * tokens * sum(linear.weight.numel() for linear in maps), (SILU_FLOPS + 1) * tokens * hidden)
    matmul = 0
    if isinstance(module, Attention):
        matmul = 2 * tokens * (module.qkv.weight.numel() + module.proj.weight.numel())
        matmul += 2 * 2 * tokens * tokens * module.num_heads * module.head_dim
    return sum_flops([Flops(matmul, 0), *(_block_flops(child, tokens) for child in module.children())])


@torch.no_grad()
def measure_flops(model: nn.Module, size: tuple[int, int]) -> Flops:
    """As `count_flops`, for a model of any architecture, by a forward pass of one image of this size. Elementwise: the learned
    functions alone."""
    elementwise = []

    def add(layer: FunctionLayer, args: tuple[Tensor], _) -> None:
        elementwise.append(layer.flops(args[0].numel() // args[0].shape[-1]).elementwise)

    hooks = [layer.register_forward_hook(add) for layer in function_layers(model).values()]
    parameter, training = next(model.parameters()), model.training
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:      # it counts no fused attention
            model.eval()(torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return Flops(counter.get_total_flops(), sum(elementwise))


MAX_TWIN_DIFFERENCE = {"parameters": 0.02, "matmul FLOPs": 0.05}        # relative


def twin_mismatch(a: nn.Module, b: nn.Module) -> str | None:
    """A sentence if the costs of two models that are compared differ by more than `MAX_TWIN_DIFFERENCE`, else None."""
    costs: list[dict[str, float]] = [{"parameters": count_parameters(model), "matmul FLOPs": count_flops(model).matmul}
                                     for model in (a, b)]
    return cost_mismatch(*costs)


def cost_mismatch(a: dict[str, float], b: dict[str, float]) -> str | None:
    """As `twin_mismatch`, for known costs under the keys of `MAX_TWIN_DIFFERENCE`."""
    for key, limit in MAX_TWIN_DIFFERENCE.items():
        if abs(a[key] - b[key]) > limit * max(a[key], b[key]):
            return (f"not twins: {a[key]:,} against {b[key]:,} {key}, a difference of "
                    f"{abs(a[key] - b[key]) / max(a[key], b[key]):.1%}")
    return None
