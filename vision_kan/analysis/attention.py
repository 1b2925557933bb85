"""Attention maps of a vision transformer, and their rollout."""
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.utils import AttentionExtract
from torch import Tensor, nn

from vision_kan.common.errors import UserError


@torch.inference_mode()
def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """[L, B, H, T, T], on the CPU: the attention of each token (row) to each other (column), by block and head.

    It works for timm's vision transformers whose blocks all get one sequence of prefix tokens and patches. Raises UserError for a
    model without such attention."""
    tokens = _tokens(model)
    copy: Any = deepcopy(model)     # timm's hooks stay
    for module in copy.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False       # the fused kernel never materialises the map
    maps = []
    if any(name.endswith("attn_drop") for name, _ in copy.named_modules()):
        seen = AttentionExtract(copy, method="hook")(images.to(next(copy.parameters()).device))
        maps = [map.float().cpu() for map in seen.values() if map.ndim == 4 and map.shape[-2:] == (tokens, tokens)]
    if not maps or any(map.shape != maps[0].shape for map in maps):
        raise UserError(f"{type(model).__name__} has no attention over one sequence of patches: only vision transformers have")
    return torch.stack(maps)


def _tokens(model: nn.Module) -> int:
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    return patches + getattr(model, "num_prefix_tokens", 0)


def attention_rollout(maps: Tensor) -> Tensor:
    """[B, T, T]: the share of each input token (column) in each token of the last block (row). maps: [L, B, H, T, T].

    It is the product of (A + 1)/2 over the blocks, with A the mean over heads and 1 the residual connection (arXiv:2005.00928,
    equation 1)."""
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    rollout = identity.expand(maps.shape[1], -1, -1)
    for attention in maps.mean(2):
        rollout = (attention + identity) / 2 @ rollout
    return rollout


def token_maps(model: nn.Module, attention: Tensor) -> dict[str, Tensor]:
    """Rows of attention [..., T, T] as pictures [..., h, w] over the patches, by token: the class token's, the distillation
    token's if there is one; in a model without a class token the mean over the patches."""
    vit: Any = model
    prefix, grid = vit.num_prefix_tokens, vit.patch_embed.grid_size
    names = [name for name, key in (("class token", "cls_token"), ("distillation token", "dist_token"))
             if getattr(model, key, None) is not None]
    rows = {name: attention[..., index, prefix:] for index, name in enumerate(names)} or {
        "mean over patches": attention[..., prefix:, prefix:].mean(-2)}
    return {name: row.unflatten(-1, grid) for name, row in rows.items()}


def attention_panels(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """title -> [h, w] for one image [3, H, W]: the rollout for each token, the first token's attention in each block (mean over
    heads), and in each head of the last block. Raises UserError as `attention_maps`."""
    maps = attention_maps(model, image[None])
    panels = {f"rollout\n{name}": picture[0] for name, picture in token_maps(model, attention_rollout(maps)).items()}
    token, blocks = next(iter(token_maps(model, maps.mean(2)[:, 0]).items()))
    _, heads = next(iter(token_maps(model, maps[-1, 0]).items()))
    panels |= {f"block {number}\n{token}": picture for number, picture in enumerate(blocks)}
    return panels | {f"block {len(blocks) - 1}\nhead {number}": picture for number, picture in enumerate(heads)}


def draw_attention(image: Tensor, panels: Mapping[str, Tensor], title: str = "", columns: int = 9) -> Figure:
    """The image [3, H, W] (0 to 1), then each panel over it, from its smallest share (dark) to its largest (bright); the title
    of the panel gives both."""
    rows = -(-(len(panels) + 1) // columns)
    figure = Figure((1.45 * columns, 2.15 * rows), layout="constrained")
    picture = image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
    height, width = picture.shape[:2]
    for place, (name, values) in enumerate([(title, None), *panels.items()], 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_axis_off()
        axes.set(xticks=[], yticks=[])      # the layout reserves room for ticks even if they are off
        span = "" if values is None else f"\n{values.min():.1%} – {values.max():.1%}"
        axes.set_title(name + span, fontsize=7.5, parse_math=False)
        if values is None:
            axes.imshow(picture)
            continue
        axes.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
        axes.imshow(values.numpy(), cmap="inferno", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                    interpolation="bilinear")
    return figure
