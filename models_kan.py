"""Vision transformers by size and feed-forward, registered with timm; and which keys of a checkpoint go where.

`timm.create_model("deit_tiny_patch16_224_KAN", hdim_kan=96, img_size=64, num_classes=10)` builds one; `hdim_kan` may
be a list, the hidden width of each block. The sizes
are those of DeiT (arXiv:2012.12877), DeiT-III (arXiv:2204.07118) and three small ones for 32 pixel images; a new
size is one line in `SIZES`, a new feed-forward one line in `FEED_FORWARDS`.
"""
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, resample_abs_pos_embed
from timm.models import build_model_with_cfg, get_pretrained_cfg, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

import checkpoints
from efficient_kan import EfficientKAN, EfficientKANLayer
from faster_kan import FasterKAN, FasterKANLayer
from group_kan import GroupActivation, GroupKAN
from utils import UserError, one_or_two


# ---------------------------------------------------------------- the two tables
class Size(NamedTuple):
    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    kan_hidden: int = 192           # the original's, whatever the width
    ekan_hidden: int = 192
    distilled: bool = False
    deit3: bool = False             # layer scale, no position embedding for the class token


SIZES = {
    "deit_tiny_patch16_224": Size(224, 16, 192, 12, 3),
    "deit_small_patch16_224": Size(224, 16, 384, 12, 6),
    "deit_base_patch16_224": Size(224, 16, 768, 12, 12),
    "deit_base_patch16_384": Size(384, 16, 768, 12, 12),
    "deit_tiny_distilled_patch16_224": Size(224, 16, 192, 12, 3, distilled=True),
    "deit_small_distilled_patch16_224": Size(224, 16, 384, 12, 6, distilled=True),
    "deit_base_distilled_patch16_224": Size(224, 16, 768, 12, 12, distilled=True),
    "deit_base_distilled_patch16_384": Size(384, 16, 768, 12, 12, distilled=True),
    "deit3_small_patch16_224": Size(224, 16, 384, 12, 6, deit3=True),
    "deit3_base_patch16_224": Size(224, 16, 768, 12, 12, deit3=True),
    # hidden width dim/2: the parameters and matrix-product FLOPs of the MLP twin; the parameters, too, at the 10
    # numbers per edge of an efficient-KAN
    "vit_nano_patch8_32": Size(32, 8, 96, 4, 3, kan_hidden=48, ekan_hidden=39),
    "vit_nano_patch4_32": Size(32, 4, 96, 4, 3, kan_hidden=48, ekan_hidden=39),
    "vit_micro_patch4_32": Size(32, 4, 192, 6, 3, kan_hidden=96, ekan_hidden=77),
}


def _kan(size: Size, *, hdim_kan: int | None = None, kan_basis: str = "original", kan_grid_range=None,
         kan_grid_points: int = 8, kan_h: float | None = None, kan_trainable_grid: bool = False,
         kan_trainable_h: bool = False, kan_base_branch: bool = False, kan_second_norm: str = "layer") -> Callable:
    """FasterKAN, a function on every edge. Basis "original": the released Vision-KAN's, on [-2, 2] with h 0.33;
    "covering": on [-3, 3] with h the spacing of the points, a bias, and weights that begin as a random MLP's."""
    covering = {"original": False, "covering": True}[kan_basis]
    low, high = kan_grid_range or ((-3.0, 3.0) if covering else (-2.0, 2.0))
    return partial(FasterKAN, hdim=hdim_kan or size.kan_hidden, grid_min=low, grid_max=high, num_grids=kan_grid_points,
                   h=(None if covering else 0.33) if kan_h is None else kan_h,
                   train_grid=kan_trainable_grid, train_h=kan_trainable_h, kan_bias=covering, init_as_mlp=covering,
                   base_branch=kan_base_branch, second_norm=kan_second_norm)


def _gkan(size: Size, *, hdim_kan: int | None = None, kan_groups: int = 8, kan_base: str = "gelu",
          kan_input_phi: bool = True, kan_trainable_base: bool = False, kan_grid_range=(-3.0, 3.0),
          kan_grid_points: int = 8, kan_h: float | None = None) -> Callable:
    """Group KAN: an MLP with learned activations, equal to the MLP at first, hidden width 4 x dim."""
    return partial(GroupKAN, hdim=hdim_kan, groups=kan_groups, base=kan_base, input_phi=kan_input_phi,
                   trainable_base=kan_trainable_base, grid_min=kan_grid_range[0], grid_max=kan_grid_range[1],
                   num_grids=kan_grid_points, h=kan_h)


def _ekan(size: Size, *, hdim_kan: int | None = None, kan_grid_range=(-1.0, 1.0), kan_grid_points: int = 8) -> Callable:
    """Efficient-KAN, the first feed-forward of Vision-KAN: SiLU and cubic B-splines on [-1, 1], two layers."""
    return partial(EfficientKAN, hdim=hdim_kan or size.ekan_hidden, grid_min=kan_grid_range[0],
                   grid_max=kan_grid_range[1], num_grids=kan_grid_points)


def _mlp(size: Size) -> Callable:
    """The twin: DeiT's own MLP, hidden width 4 x dim."""
    return Mlp


FEED_FORWARDS: dict[str, Callable] = {"KAN": _kan, "GKAN": _gkan, "EKAN": _ekan, "ViT": _mlp}
_OPTIONS = {function: list(signature(function).parameters)[1:] for function in FEED_FORWARDS.values()}
# What the feed-forwards' learned functions are in.
FunctionLayer = GroupActivation | FasterKANLayer | EfficientKANLayer
# Every option that some feed-forward has, each a flag of the same name.
KAN_OPTIONS = tuple(dict.fromkeys(option for options in _OPTIONS.values() for option in options))


# ---------------------------------------------------------------- registration
def _build(name: str, size: Size, feed_forward: Callable, pretrained: bool = False, *,
           block_norm_eps: float | None = None, **kwargs) -> nn.Module:
    options = {key: kwargs.pop(key) for key in KAN_OPTIONS if key in kwargs}
    without_effect = [key for key in options if key not in _OPTIONS[feed_forward]]
    if without_effect:
        having = [suffix for suffix, function in FEED_FORWARDS.items() if set(without_effect) <= set(_OPTIONS[function])]
        raise ValueError(f"{', '.join(without_effect)}: no effect on {name}"
                         + (f", choose {name.rpartition('_')[0]}_{' or _'.join(having)}" if having else ""))
    if pretrained and not (kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")):
        kwargs["pretrained_cfg"] = _timms_weights(name, feed_forward)
    settings: dict[str, Any] = dict(
        img_size=size.img_size, patch_size=size.patch_size, embed_dim=size.embed_dim, depth=size.depth,
        num_heads=size.num_heads, mlp_layer=_mlp_layer(name, size, feed_forward, options, kwargs.get("depth", size.depth)))
    if size.deit3:
        settings.update(no_embed_class=True, init_values=1e-6)
    model: Any = build_model_with_cfg(
        VisionTransformerDistilled if size.distilled else VisionTransformer, name, pretrained,
        pretrained_filter_fn=filter_state_dict, feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **{**settings, **kwargs})
    if block_norm_eps is not None:      # released Vision-KAN blocks: 1e-5 beside a final norm of 1e-6
        for block in (model.model if kwargs.get("features_only") else model).blocks:
            block.norm1.eps = block.norm2.eps = block_norm_eps
    return model


def _timms_weights(name: str, feed_forward: Callable) -> dict[str, Any]:
    """The configuration of a model with the place of timm's weights for its size, which hold MLPs: a group KAN begins as one."""
    timms = get_pretrained_cfg(_TWINS[name])
    if feed_forward not in (_gkan, _mlp) or timms is None or not timms.has_weights:
        raise ValueError(f"{name} has no pretrained weights of its own: start from a checkpoint with --finetune")
    taken = {key: getattr(timms, key) for key in ("url", "hf_hub_id", "hf_hub_filename", "tag", "mean", "std", "interpolation",
                                                  "crop_pct", "num_classes")}
    return {**default_cfgs[name], "architecture": name, **{key: value for key, value in taken.items() if value is not None}}


def _mlp_layer(name: str, size: Size, feed_forward: Callable, options: dict[str, Any], depth: int) -> Callable:
    """What timm calls once for each block, in order: so a pruned model's blocks get each its own `hdim_kan`."""
    widths = options.get("hdim_kan")
    if not isinstance(widths, (list, tuple)):
        return feed_forward(size, **options)
    if len(widths) != depth or not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"hdim_kan is a whole number above 0, or a list of {depth}, one for each block of {name}, not {widths}")
    layers = iter([feed_forward(size, **{**options, "hdim_kan": width}) for width in widths])
    return lambda **kwargs: next(layers)(**kwargs)


default_cfgs: dict[str, dict[str, Any]] = {}
_TWINS: dict[str, str] = {}         # name -> size name, of every model registered here


def _register(size_name: str, size: Size, suffix: str, feed_forward: Callable) -> None:
    name = f"{size_name}_{suffix}"

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return _build(name, size, feed_forward, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{size_name} with feed-forward {suffix}: {feed_forward.__doc__}"
    globals()[name] = entry
    default_cfgs[name] = {
        "url": "", "num_classes": 1000, "input_size": (3, size.img_size, size.img_size), "pool_size": None,
        "crop_pct": 0.875 if size.img_size == 224 else 1.0, "interpolation": "bicubic", "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj",
        "classifier": ("head", "head_dist") if size.distilled else "head", "license": "apache-2.0"}
    _TWINS[name] = size_name
    register_model(entry)


for _size_name, _size in SIZES.items():
    for _suffix, _feed_forward in FEED_FORWARDS.items():
        _register(_size_name, _size, _suffix, _feed_forward)


def registered_models() -> list[str]:
    """Names of all models of this project, in the order of the tables."""
    return list(_TWINS)


def split_name(name: str) -> tuple[Size | None, str | None]:
    """`deit_tiny_patch16_224_KAN` -> its size and feed-forward suffix; (None, None) for any other model."""
    if name not in _TWINS:
        return None, None
    return SIZES[_TWINS[name]], name.removeprefix(_TWINS[name] + "_")


def options_of(name: str) -> list[str]:
    """Those of `KAN_OPTIONS` that a model has; none for models that are not of this project."""
    suffix = split_name(name)[1]
    return _OPTIONS[FEED_FORWARDS[suffix]] if suffix else []


# What the feed-forwards call an option, where they call it otherwise.
_KEYWORDS = {"hdim_kan": "hdim", "kan_grid_points": "num_grids", "kan_h": "h", "kan_groups": "groups", "kan_base": "base",
             "kan_input_phi": "input_phi", "kan_trainable_base": "trainable_base", "kan_trainable_grid": "train_grid",
             "kan_trainable_h": "train_h", "kan_base_branch": "base_branch", "kan_second_norm": "second_norm"}


def own_options(spec: "ModelSpec") -> dict[str, Any]:
    """The value of each option of `options_of` that a model of this project has, given or its own; {} for other models."""
    size, suffix = split_name(spec.name)
    if size is None or suffix in (None, "ViT"):
        return {}
    told = {key: value for key, value in spec.kwargs.items() if key in _OPTIONS[FEED_FORWARDS[suffix]]}
    layer = FEED_FORWARDS[suffix](size, **{key: value for key, value in told.items() if key != "hdim_kan"})
    made = layer.keywords
    low, high, points = made["grid_min"], made["grid_max"], made["num_grids"]
    own = {"kan_grid_range": [low, high], "kan_basis": told.get("kan_basis", "original"),
           **{option: made[keyword] for option, keyword in _KEYWORDS.items() if keyword in made}}
    own["hdim_kan"] = told.get("hdim_kan") or own["hdim_kan"] or 4 * spec.kwargs.get("embed_dim", size.embed_dim)
    if own.get("kan_h", 0) is None:
        own["kan_h"] = (high - low) / (points - 1)
    return {option: own[option] for option in _OPTIONS[FEED_FORWARDS[suffix]]}


def models_with(option: str, name: str) -> list[str]:
    """Twins of a model that have an option which it lacks; none for models that are not of this project."""
    if name not in _TWINS:
        return []
    return [f"{_TWINS[name]}_{suffix}" for suffix, function in FEED_FORWARDS.items() if option in _OPTIONS[function]]


def mlp_twin(spec: "ModelSpec") -> nn.Module:
    """The model of the same size and settings whose feed-forward is the MLP."""
    kwargs = {key: value for key, value in spec.kwargs.items() if key not in KAN_OPTIONS}
    return timm.create_model(f"{_TWINS[spec.name]}_ViT", **kwargs)


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


# ---------------------------------------------------------------- which model a checkpoint holds
@dataclass(frozen=True)
class ModelSpec:
    """Arguments of `timm.create_model` for a checkpoint."""
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def rename_keys(state: dict[str, Tensor], own: Collection[str] = ()) -> dict[str, Tensor]:
    """Keys of released Vision-KAN, DeiT and DeiT-III files, or of a wrapped model -> ours.

    The original kept an unused MLP beside each KAN: it is left behind.

    Args:
        own: the keys of the model that takes the weights, where it is known. One that it has is right as it is: CaiT and BEiT,
            for instance, call `gamma_1` what DeiT-III's own files call so and timm's DeiT-III `ls1.gamma`."""
    inside, outside = checkpoints.unwrapped(state)
    state = outside | inside
    released = any(".kan.layers." in key for key in state)
    out = {}
    for key, value in state.items():
        if released and ".mlp." in key:
            continue
        if key not in own:
            key = re.sub(r"gamma_([12])$", r"ls\1.gamma", key.replace(".kan.layers.", ".mlp.layers."))
        out[key] = value
    return out


def filter_state_dict(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for loading weights into a model of this project; an MLP's, too, into a group KAN."""
    own = model.state_dict()
    state = rename_keys(state, own)
    if not any(".mlp.phi" in key for key in state):
        state |= {key: value for key, value in own.items()
                  if ".mlp.phi" in key and key.rpartition(".mlp.phi")[0] + ".mlp.fc1.weight" in state}
    return checkpoint_filter_fn(state, model)       # type: ignore[arg-type]  # VisionTransformer's kin


_HEADS = {1280: 16, 1408: 16, 1664: 16}     # of ViT-H, -g and -G, whose heads are wider than 64


def infer_model(state: dict[str, Tensor], args: dict[str, Any]) -> ModelSpec:
    """The model that a ViT checkpoint without a model description holds, from its shapes.

    Args:
        state: parameters under any known key layout. args: the checkpoint's own flags; names the size, and tells that of its
            images, which oblong ones need.
    Raises: UserError if the keys are not those of a DeiT-like vision transformer.
    """
    released = any(".kan.layers." in key for key in state)
    state = rename_keys(state)
    missing = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
                               "blocks.0.norm1.weight") if key not in state]
    if missing:
        raise UserError(f"the checkpoint holds no vision transformer of a known layout (its weights: {_sample(state)}; no key "
                        f"{missing[0]!r}): if it is another model of timm's, name its architecture with --model")
    dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    distilled, deit3 = "dist_token" in state, "blocks.0.ls1.gamma" in state
    prefix = 0 if deit3 else 2 if distilled else 1
    tokens = state["pos_embed"].shape[1]
    side = round((tokens - prefix) ** 0.5)
    rows, columns = (told // patch for told in _two_sides(args.get("input_size")) or (side * patch, side * patch))
    if rows == columns or rows * columns != tokens - prefix:
        rows = columns = side
    if rows * columns != tokens - prefix:
        raise UserError(f"pos_embed of the checkpoint has {tokens} positions, which is no square image: if it is of oblong ones, "
                        "give their --input-size, height and width")
    kan = "blocks.0.mlp.layers.0.spline_linear.weight" in state
    group = "blocks.0.mlp.phi2.coefficients" in state
    suffix = "KAN" if kan else "GKAN" if group else "ViT"

    size_name = _TWINS.get(args.get("model") or "")
    if size_name is None:
        shape = (dim, patch, depth, side * patch)      # the width first: it settles the number of heads
        alike = {n: (s.embed_dim, s.patch_size, s.depth, s.img_size) for n, s in SIZES.items()
                 if (s.distilled, s.deit3) == (distilled, deit3)}
        size_name = min(alike, key=lambda n: [a != b for a, b in zip(alike[n], shape)])
    size = SIZES[size_name]
    kwargs: dict[str, Any] = {"img_size": one_or_two([rows * patch, columns * patch]), "num_classes": _num_classes(state)}
    for key, value, own in (("embed_dim", dim, size.embed_dim), ("depth", depth, size.depth),
                            ("patch_size", patch, size.patch_size)):
        if value != own:
            kwargs[key] = value
    if dim != size.embed_dim:
        kwargs["num_heads"] = _HEADS.get(dim) or max(1, dim // 64)
    if "fc_norm.weight" in state:       # MAE's fine-tuned models: the mean of the patches, normalised after it is taken
        kwargs["global_pool"] = "avg"
    if "blocks.0.attn.qkv.bias" not in state:
        kwargs["qkv_bias"] = False
    if released:
        kwargs["block_norm_eps"] = 1e-5
    if kan:
        kwargs["hdim_kan"] = _widths(state, depth, "layers.0.spline_linear.weight")
        grid = state["blocks.0.mlp.layers.0.rbf.grid"]
        kwargs["kan_grid_points"] = grid.numel()
        kwargs["kan_grid_range"] = (round(float(grid[0]), 6), round(float(grid[-1]), 6))
        if "blocks.0.mlp.layers.0.rbf.h" in state:
            kwargs["kan_trainable_h"] = True
        if "blocks.0.mlp.layers.0.spline_linear.bias" in state:
            kwargs["kan_basis"] = "covering"
        if "blocks.0.mlp.layers.0.base_linear.weight" in state:
            kwargs["kan_base_branch"] = True
        if "blocks.0.mlp.layers.1.layernorm.weight" not in state:
            static = "blocks.0.mlp.layers.1.layernorm.scale" in state
            kwargs["kan_second_norm"] = "static" if static else "none"
    if suffix == "ViT" and (hidden := _widths(state, depth, "fc1.weight")) != 4 * dim and isinstance(hidden, int):
        kwargs["mlp_ratio"] = hidden / dim
    if group:
        groups, points = state["blocks.0.mlp.phi2.coefficients"].shape
        grid, hidden = state["blocks.0.mlp.phi2.grid"], _widths(state, depth, "fc1.weight")
        one_each = _widths(state, depth, "phi2.coefficients") == hidden         # a function for each channel
        kwargs |= {"kan_groups": 0 if one_each else groups, "kan_grid_points": points,
                   "kan_grid_range": (round(float(grid[0]), 6), round(float(grid[-1]), 6)),
                   "kan_input_phi": "blocks.0.mlp.phi1.coefficients" in state,
                   "kan_trainable_base": "blocks.0.mlp.phi2.scale" in state}
        if hidden != 4 * dim:
            kwargs["hdim_kan"] = hidden
    if "blocks.0.mlp.layers.0.spline_scaler" in state:
        suffix = "EKAN"
        kwargs["hdim_kan"] = _widths(state, depth, "layers.0.spline_weight")
        points = state["blocks.0.mlp.layers.0.spline_weight"].shape[2]
        knots = state["blocks.0.mlp.layers.0.grid"]
        kwargs["kan_grid_points"] = points
        kwargs["kan_grid_range"] = (round(float(knots[-1 - points]), 6), round(float(knots[points]), 6))
    return ModelSpec(f"{size_name}_{suffix}", kwargs)


def _widths(state: dict[str, Tensor], depth: int, first_map: str) -> int | list[int]:
    """The hidden width of the feed-forwards, whose first linear map has it as its outputs; a list where blocks differ."""
    keys = [f"blocks.{block}.mlp.{first_map}" for block in range(depth)]
    return one_or_each([state[key].shape[0] for key in keys if key in state])


def one_or_each(widths: list[int]) -> int | list[int]:
    """Widths of the blocks as `hdim_kan`: one number where they are all the same."""
    return widths[0] if len(set(widths)) == 1 else widths


def _sample(state: Mapping[str, Tensor]) -> str:
    """Some names of its tensors, for a message: what they are called tells whose they are."""
    return ", ".join(map(ascii, list(state)[:3])) + (f" and {len(state) - 3} more" if len(state) > 3 else "")


def _num_classes(state: dict[str, Tensor]) -> int:
    return state["head.weight"].shape[0] if "head.weight" in state else 0


def load_exactly(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Every parameter of `model` from `state`, or a UserError that names the first that does not fit."""
    own = model.state_dict()
    state = rename_keys(state, own)
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    if missing or extra or wrong:
        key = (wrong or missing or extra)[0]
        reason = (f"has shape {tuple(state[key].shape)} where the model has {tuple(own[key].shape)}" if wrong
                  else "is missing" if missing else "has no place in the model")
        raise UserError(f"{what} does not fit the model: {key} {reason} "
                        f"({len(missing)} keys missing, {len(extra)} unknown, {len(wrong)} of another shape)")
    _load(model, state, what)


def _load(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """What a module itself refuses, such as a learned function on another grid, is the user's matter too."""
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{what} does not fit the model: {str(error).splitlines()[-1].strip()}: check --kan-grid-range "
                        "and --kan-grid-points") from error


# ---------------------------------------------------------------- fine-tuning
@dataclass
class LoadReport:
    """What became of each tensor when a model took over another's weights: {key: note}."""
    loaded: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """One line per kind of tensor; the numbers of blocks are folded into `*`."""
        lines = []
        for title, entries in (("loaded", self.loaded), ("converted", self.converted), ("resampled", self.resampled),
                               ("dropped", self.dropped), ("left as initialised", self.initial)):
            groups = Counter((re.sub(r"\.\d+\.", ".*.", key, count=1), note) for key, note in entries.items())
            lines.append(f"  {title}: {len(entries)} tensors")
            lines += [f"    {key}{f'  x{n}' if n > 1 else ''}{f'  ({note})' if note else ''}"
                      for (key, note), n in groups.items()]
        return "\n".join(lines)


def patch_grid(checkpoint: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of the patches that a checkpoint's `pos_embed` is for, where its description tells the image's size; else
    None. state: its weights."""
    told, kernel = checkpoint.get("model_args"), state.get("patch_embed.proj.weight")
    sizes = [(told.get("kwargs") or {}).get("img_size") if isinstance(told, Mapping) else None,
             checkpoints.checkpoint_args(checkpoint).get("input_size")]
    size = _two_sides(next((size for size in sizes if size), None))
    if kernel is None or kernel.ndim != 4 or size is None:
        return None
    rows, columns = (side // patch for side, patch in zip(size, kernel.shape[2:]))
    return rows, columns


def _two_sides(size: Any) -> tuple[int, int] | None:
    """Height and width that a checkpoint tells of its images; None where that is neither one whole number nor two."""
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    return (sides[0], sides[1]) if len(sides) == 2 and all(type(side) is int for side in sides) else None


def _adapt_pos_embed(state: dict[str, Tensor], model: Any, old: tuple[int, int] | None) -> None:
    """Bring `pos_embed` to the model's grid and prefix tokens, in place. old: the grid that it is for; None: a square.

    Positions of the class and distillation tokens are kept. A DeiT-III model has none: there the class token's
    is added to the token itself, which is the same function; from DeiT-III they become zero, the same again."""
    pos = state["pos_embed"]
    if not hasattr(model, "patch_embed") or getattr(model, "pos_embed", None) is None:
        return
    tokens = ["cls_token"] + (["dist_token"] if "dist_token" in state else [])

    def fits(patches: int) -> bool:
        return patches > 0 and (patches == old[0] * old[1] if old else math.isqrt(patches) ** 2 == patches)

    n_prefix = next((n for n in (len(tokens), 0) if fits(pos.shape[1] - n)), None)
    if n_prefix is None:
        del state["pos_embed"]          # of oblong images, or of further tokens: which position is whose is unknown
        return
    prefix, grid = pos[:, :n_prefix], pos[:, n_prefix:]
    grid = resample_abs_pos_embed(grid, new_size=list(model.patch_embed.grid_size), old_size=list(old) if old else None,
                                  num_prefix_tokens=0)
    if getattr(model, "no_embed_class", False):
        for i, token in enumerate(tokens[:n_prefix]):
            state[token] = state[token] + prefix[:, i:i + 1]
        prefix = prefix[:, :0]
    else:
        wanted = model.num_prefix_tokens
        if n_prefix == 0:
            prefix = pos.new_zeros(1, wanted, pos.shape[-1])
        prefix = torch.cat([prefix[:, :wanted]] + [prefix[:, :1]] * (wanted - prefix.shape[1]), dim=1)
    state["pos_embed"] = torch.cat([prefix, grid], dim=1)


def load_finetune(model: nn.Module, source: dict[str, Tensor], grid: tuple[int, int] | None = None) -> LoadReport:
    """Take over all of another model's weights that fit, and tell what became of each tensor.

    Position and patch embeddings are resampled to the model's image and patch size. The head is dropped when
    the class count differs. An MLP becomes a group KAN as it is; in a block of another KAN it has no place and is
    dropped (`conversion.load_converted` fits one to it). grid: of the source's patches (`patch_grid`); None: a square.
    Raises: UserError if nothing fits, or nothing of the attention."""
    own, report = model.state_dict(), LoadReport()
    if any(".kan.layers." in key for key in source):
        report.dropped = {key: "never used by the original" for key in source if ".mlp." in key}
    source = rename_keys(source, own)
    state = dict(source)
    if "pos_embed" in own and "pos_embed" in state and "cls_token" in state:
        _adapt_pos_embed(state, model, grid)
    if isinstance(model, VisionTransformer):
        pos = state.pop("pos_embed", None)
        state = checkpoint_filter_fn(state, model)
        if pos is not None:
            state["pos_embed"] = pos
    taken = {}
    for key, value in own.items():
        if key in state and state[key].shape == value.shape:
            taken[key] = state[key]
            before = source[key].shape if key in source else None
            if before is not None and before != value.shape:
                report.resampled[key] = f"{tuple(before)} -> {tuple(value.shape)}"
            else:
                report.loaded[key] = ""
        elif ".mlp.phi" in key and key.rpartition(".mlp.phi")[0] + ".mlp.fc1.weight" in state:
            report.converted[key] = "begins as the MLP's activation"
        else:
            report.initial[key] = ""
    for key, value in source.items():
        if key not in taken:
            report.dropped[key] = (f"{tuple(value.shape)} against {tuple(own[key].shape)}" if key in own
                                   else "no such part in this model")
    attention = [key for key in own if ".attn." in key]
    if source and not own.keys() & source.keys():
        raise UserError(f"the checkpoint's weights ({_sample(source)}) have no name in common with those of the model "
                        f"({_sample(own)}): it is of another program or architecture: choose weights of a "
                        "vision transformer of the model's width and depth")
    if not taken or (attention and not any(key in taken for key in attention)):
        theirs = next((f" ({key}: {tuple(source[key].shape)} against {tuple(own[key].shape)})"
                       for key in attention if key in source), "")
        raise UserError(f"nothing of the checkpoint's attention fits this model{theirs}, so it would train from "
                        "random weights: choose the --model of the same width and depth")
    _load(model, taken, "the checkpoint")
    return report


