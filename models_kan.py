"""Vision transformers by size and feed-forward, registered with timm; and which keys of a checkpoint go where.

`timm.create_model("deit_tiny_patch16_224_KAN", hdim_kan=96, img_size=64, num_classes=10)` builds one; `hdim_kan` may
be a list, the hidden width of each block. The sizes
are those of DeiT (arXiv:2012.12877), DeiT-III (arXiv:2204.07118) and three small ones for 32 pixel images; a new
size is one line in `SIZES`, a new feed-forward one line in `FEED_FORWARDS` (see `vision_kan.layers.feed_forward`).
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, get_pretrained_cfg, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from faster_kan import FasterKAN
from vision_kan.checkpoints.layouts import filter_state_dict
from vision_kan.layers.efficient_kan import EfficientKAN
from vision_kan.layers.feed_forward import MLP, FeedForward
from vision_kan.layers.group_kan import GroupKAN


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


# suffix of a model's name -> its feed-forward.
FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "KAN": FasterKAN,
    "GKAN": GroupKAN,
    "EKAN": EfficientKAN,
    "ViT": MLP,
}
_OPTIONS = {suffix: list(signature(kind.with_options).parameters)[1:] for suffix, kind in FEED_FORWARDS.items()}
# Every option that some feed-forward has, each a flag of the same name.
KAN_OPTIONS = tuple(dict.fromkeys(option for options in _OPTIONS.values() for option in options))


# ---------------------------------------------------------------- registration
def _build(name: str, size: Size, suffix: str, pretrained: bool = False, *,
           block_norm_eps: float | None = None, **kwargs) -> nn.Module:
    options = {key: kwargs.pop(key) for key in KAN_OPTIONS if key in kwargs}
    without_effect = [key for key in options if key not in _OPTIONS[suffix]]
    if without_effect:
        having = [other for other in FEED_FORWARDS if set(without_effect) <= set(_OPTIONS[other])]
        raise ValueError(f"{', '.join(without_effect)}: no effect on {name}"
                         + (f", choose {name.rpartition('_')[0]}_{' or _'.join(having)}" if having else ""))
    if pretrained and not (kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")):
        kwargs["pretrained_cfg"] = _timms_weights(name, FEED_FORWARDS[suffix])
    depth = kwargs.get("depth", size.depth)
    settings: dict[str, Any] = dict(
        img_size=size.img_size, patch_size=size.patch_size, embed_dim=size.embed_dim, depth=size.depth,
        num_heads=size.num_heads, mlp_layer=_mlp_layer(name, size, FEED_FORWARDS[suffix], options, depth))
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


def _timms_weights(name: str, feed_forward: type[FeedForward]) -> dict[str, Any]:
    """The configuration of a model with the place of timm's weights for its size, which hold MLPs."""
    timms = get_pretrained_cfg(_TWINS[name])
    if not feed_forward.HOLDS_MLP or timms is None or not timms.has_weights:
        raise ValueError(f"{name} has no pretrained weights of its own: start from a checkpoint with --finetune")
    taken = {key: getattr(timms, key) for key in ("url", "hf_hub_id", "hf_hub_filename", "tag", "mean", "std", "interpolation",
                                                  "crop_pct", "num_classes")}
    return {**default_cfgs[name], "architecture": name, **{key: value for key, value in taken.items() if value is not None}}


def _mlp_layer(name: str, size: Size, feed_forward: type[FeedForward], options: dict[str, Any], depth: int) -> Callable:
    """What timm calls once for each block, in order: so a pruned model's blocks get each its own `hdim_kan`."""
    widths = options.get("hdim_kan")
    if not isinstance(widths, (list, tuple)):
        return feed_forward.with_options(size, **options)
    if len(widths) != depth or not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"hdim_kan is a whole number above 0, or a list of {depth}, one for each block of {name}, not {widths}")
    layers = iter([feed_forward.with_options(size, **{**options, "hdim_kan": width}) for width in widths])
    return lambda **kwargs: next(layers)(**kwargs)


default_cfgs: dict[str, dict[str, Any]] = {}
_TWINS: dict[str, str] = {}         # name -> size name, of every model registered here


def _register(size_name: str, size: Size, suffix: str, feed_forward: type[FeedForward]) -> None:
    name = f"{size_name}_{suffix}"

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return _build(name, size, suffix, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{size_name} with feed-forward {suffix}: {feed_forward.TITLE}. {feed_forward.with_options.__doc__ or ''}"
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
    return _OPTIONS[suffix] if suffix else []


# What the feed-forwards call an option, where they call it otherwise.
_KEYWORDS = {"hdim_kan": "hdim", "kan_grid_points": "num_grids", "kan_h": "h", "kan_groups": "groups", "kan_base": "base",
             "kan_input_phi": "input_phi", "kan_trainable_base": "trainable_base", "kan_trainable_grid": "train_grid",
             "kan_trainable_h": "train_h", "kan_base_branch": "base_branch", "kan_second_norm": "second_norm"}


def own_options(spec: "ModelSpec") -> dict[str, Any]:
    """The value of each option of `options_of` that a model of this project has, given or its own; {} for other models."""
    size, suffix = split_name(spec.name)
    if size is None or suffix is None or not _OPTIONS[suffix]:
        return {}
    told = {key: value for key, value in spec.kwargs.items() if key in _OPTIONS[suffix]}
    feed_forward = FEED_FORWARDS[suffix].with_options
    made: dict[str, Any] = getattr(feed_forward(size, **{key: told[key] for key in told if key != "hdim_kan"}), "keywords", {})
    own = {option: parameter.default for option, parameter in list(signature(feed_forward).parameters.items())[1:]} | told
    own |= {option: made[keyword] for option, keyword in _KEYWORDS.items() if option in own and keyword in made}
    if "grid_min" in made:
        own["kan_grid_range"] = [made["grid_min"], made["grid_max"]]
        if own.get("kan_h", 0) is None:
            own["kan_h"] = (made["grid_max"] - made["grid_min"]) / (made["num_grids"] - 1)
    if "hdim_kan" in own:
        own["hdim_kan"] = told.get("hdim_kan") or own["hdim_kan"] or 4 * spec.kwargs.get("embed_dim", size.embed_dim)
    return own


def models_with(option: str, name: str) -> list[str]:
    """Twins of a model that have an option which it lacks; none for models that are not of this project."""
    if name not in _TWINS:
        return []
    return [f"{_TWINS[name]}_{suffix}" for suffix in FEED_FORWARDS if option in _OPTIONS[suffix]]


def mlp_twin(spec: "ModelSpec") -> nn.Module:
    """The model of the same size and settings whose feed-forward is the MLP."""
    kwargs = {key: value for key, value in spec.kwargs.items() if key not in KAN_OPTIONS}
    return timm.create_model(f"{_TWINS[spec.name]}_ViT", **kwargs)


# ---------------------------------------------------------------- which model a checkpoint holds
@dataclass(frozen=True)
class ModelSpec:
    """Arguments of `timm.create_model` for a checkpoint."""
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
