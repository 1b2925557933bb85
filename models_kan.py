"""Vision transformers by size and feed-forward, registered with timm.

`timm.create_model("deit_tiny_patch16_224_KAN", hdim_kan=96, img_size=64, num_classes=10)` builds one; `hdim_kan` may be a list
with the hidden width of each block. The sizes are those of DeiT (arXiv:2012.12877), DeiT-III (arXiv:2204.07118) and three small
ones for 32-pixel images. A new size is one line in `SIZES`, a new feed-forward one line in `FEED_FORWARDS` (see
`vision_kan.layers.feed_forward`).

Any other timm model with MLPs takes a feed-forward's suffix too: after `register("swin_tiny_patch4_window7_224_GKAN")`, timm's
`create_model` knows that name.

A few small models come with trained weights, under a name with a tag (`vision_kan.checkpoints.shipped`):
`timm.create_model("vit_nano_patch8_32_GKAN.digits", pretrained=True)`.
"""
from collections import deque
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, NamedTuple

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    load_pretrained,
    model_entrypoint,
    register_model,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from faster_kan import FasterKAN
from vision_kan.checkpoints.checkpoint import ModelSpec
from vision_kan.checkpoints.layouts import filter_state_dict
from vision_kan.checkpoints.shipped import checked, shipped
from vision_kan.layers.efficient_kan import EfficientKAN
from vision_kan.layers.feed_forward import MLP, FeedForward
from vision_kan.layers.group_kan import GroupKAN
from vision_kan.layers.kat import KAT
from vision_kan.layers.replacement import mlps_of, nothing_to_replace, replace_mlps


# ---------------------------------------------------------------- the tables
class Size(NamedTuple):
    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    kan_hidden: int = 192           # as in the original, for every embed_dim
    ekan_hidden: int = 192
    distilled: bool = False
    deit3: bool = False             # layer scale, no position embedding for the class token


class Tag(NamedTuple):
    """Classes, preparation of images, and arguments of the architecture besides its feed-forward's."""
    classes: tuple[str, ...]
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    kwargs: Mapping[str, Any] = {}


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
    # Hidden widths for the same number of parameters as the MLP twin: dim/2 for a full-edge KAN, which then has its matmul FLOPs
    # too, less for efficient-KAN, which has 10 parameters per edge.
    "vit_nano_patch8_32": Size(32, 8, 96, 4, 3, kan_hidden=48, ekan_hidden=39),
    "vit_nano_patch4_32": Size(32, 4, 96, 4, 3, kan_hidden=48, ekan_hidden=39),
    "vit_micro_patch4_32": Size(32, 4, 192, 6, 3, kan_hidden=96, ekan_hidden=77),
}


# suffix of a model's name -> its feed-forward
FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "KAN": FasterKAN,
    "GKAN": GroupKAN,
    "EKAN": EfficientKAN,
    "KAT": KAT,
    "ViT": MLP,
}
# tag of the weights that come with this code -> what their models have in common
TAGS = {
    "digits": Tag(tuple("0123456789")),
    "cifar10": Tag(("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
                   (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616), {"class_token": False, "global_pool": "avg"}),
}

_OPTIONS = {suffix: list(signature(kind.with_options).parameters)[1:] for suffix, kind in FEED_FORWARDS.items()}
# Every option that some feed-forward has, each a flag of the same name.
KAN_OPTIONS = tuple(dict.fromkeys(option for options in _OPTIONS.values() for option in options))


# ---------------------------------------------------------------- registration
def _take_options(name: str, suffix: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the feed-forward's options from a model's arguments. Raises ValueError for one that it does not have."""
    options = {key: kwargs.pop(key) for key in KAN_OPTIONS if key in kwargs}
    unused = [key for key in options if key not in _OPTIONS[suffix]]
    if unused:
        others = [other for other in FEED_FORWARDS if set(unused) <= set(_OPTIONS[other])]
        raise ValueError(f"{', '.join(unused)}: no effect on {name}"
                         + (f", choose {name.rpartition('_')[0]}_{' or _'.join(others)}" if others else ""))
    return options


def _build(name: str, size: Size, suffix: str, pretrained: bool = False, *,
           block_norm_eps: float | None = None, **kwargs) -> nn.Module:
    options = _take_options(name, suffix, kwargs)
    if isinstance(tag := kwargs.get("pretrained_cfg"), str):
        if tag not in TAGS or f"{name}.{tag}" not in shipped():
            raise ValueError(f"{name}.{tag}: there are no such weights, only {', '.join(shipped()) or 'models without a tag'}")
        if pretrained:
            checked(f"{name}.{tag}")
        kwargs = {**TAGS[tag].kwargs, **kwargs}
    elif pretrained and not (tag or kwargs.get("pretrained_cfg_overlay")):
        kwargs["pretrained_cfg"] = _timm_weights_cfg(name, FEED_FORWARDS[suffix])
    depth = kwargs.get("depth", size.depth)
    settings: dict[str, Any] = dict(
        img_size=size.img_size, patch_size=size.patch_size, embed_dim=size.embed_dim, depth=size.depth,
        num_heads=size.num_heads, mlp_layer=_mlp_layer(name, size, suffix, options, depth))
    if size.deit3:
        settings.update(no_embed_class=True, init_values=1e-6)
    model: Any = build_model_with_cfg(
        VisionTransformerDistilled if size.distilled else VisionTransformer, name, pretrained,
        pretrained_filter_fn=filter_state_dict, feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **{**settings, **kwargs})
    if block_norm_eps is not None:      # the released Vision-KAN has 1e-5 in its blocks, and 1e-6 in the final norm
        for block in (model.model if kwargs.get("features_only") else model).blocks:
            block.norm1.eps = block.norm2.eps = block_norm_eps
    return model


class NoWeights(ValueError):
    """There are no pretrained weights for a model."""


def _no_weights(name: str) -> NoWeights:
    tagged = [known for known in shipped() if known.split(".")[0] == name]
    return NoWeights(f"{name} has no pretrained weights of its own: "
                     + (f"choose {' or '.join(tagged)}" if tagged else "start from a checkpoint with --finetune"))


def _timm_weights_cfg(name: str, feed_forward: type[FeedForward]) -> dict[str, Any]:
    """The model's configuration with the source of timm's weights for its size. Raises ValueError if these, which are MLPs',
    do not fit its feed-forward."""
    timms = get_pretrained_cfg(SIZE_NAMES[name])
    if not feed_forward.HOLDS_MLP or timms is None or not timms.has_weights:
        raise _no_weights(name)
    taken = {key: getattr(timms, key) for key in ("url", "hf_hub_id", "hf_hub_filename", "tag", "mean", "std", "interpolation",
                                                  "crop_pct", "num_classes")}
    return {**default_cfgs[name].cfgs[""].to_dict(), "architecture": name,
            **{key: value for key, value in taken.items() if value is not None}}


def _mlp_layer(name: str, size: Size, suffix: str, options: dict[str, Any], depth: int) -> Callable:
    """The constructor of a feed-forward. timm calls it once for each block, in order, so that each block of a pruned model gets
    its own `hdim_kan`."""
    layers = iter([FEED_FORWARDS[suffix].with_options(size, **own) for own in _options_of_each(name, options, depth)])
    return lambda **kwargs: next(layers)(**kwargs)


def _options_of_each(name: str, options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of a model's feed-forwards. Raises ValueError for impossible hidden widths."""
    widths = options.get("hdim_kan")
    if widths is None:
        return [options] * count
    each = [widths] * count if type(widths) is int else widths
    if not isinstance(each, (list, tuple)) or len(each) != count or not all(type(width) is int and width > 0 for width in each):
        raise ValueError(f"hdim_kan is a whole number above 0, or a list of {count}, one for each block of {name}, not {widths}")
    return [options | {"hdim_kan": width} for width in each]


default_cfgs: dict[str, DefaultCfg] = {}      # name -> what timm registers of it
SIZE_NAMES: dict[str, str] = {}                # name -> key of SIZES, of this project's models
ARCHITECTURES: dict[str, str] = {}             # name -> timm's architecture with MLPs, of the models that `register` has added


def _register(size_name: str, size: Size, suffix: str, feed_forward: type[FeedForward]) -> None:
    name = f"{size_name}_{suffix}"

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return _build(name, size, suffix, pretrained, **kwargs)

    SIZE_NAMES[name] = size_name
    cfg: dict[str, Any] = {
        "url": "", "num_classes": 1000, "input_size": (3, size.img_size, size.img_size), "pool_size": None,
        "crop_pct": 0.875 if size.img_size == 224 else 1.0, "interpolation": "bicubic", "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj",
        "classifier": ("head", "head_dist") if size.distilled else "head", "license": "apache-2.0"}
    cfgs = {"": PretrainedCfg(**cfg)}       # first, so that the bare name stays a model of 1000 classes without weights
    for tag, (classes, mean, std, _) in TAGS.items():
        if file := shipped().get(f"{name}.{tag}"):
            cfgs[tag] = PretrainedCfg(**{**cfg, "file": str(file), "num_classes": len(classes), "label_names": classes,
                                         "mean": mean, "std": std})
    _add_entry(name, entry, f"{size_name} with feed-forward {suffix}: {feed_forward.TITLE}. "
               f"{feed_forward.with_options.__doc__ or ''}", DefaultCfg(deque(cfgs), cfgs))


def _add_entry(name: str, entry: Callable, doc: str, cfg: DefaultCfg) -> None:
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = doc
    globals()[name] = entry
    default_cfgs[name] = cfg
    register_model(entry)


for _size_name, _size in SIZES.items():
    for _suffix, _feed_forward in FEED_FORWARDS.items():
        _register(_size_name, _size, _suffix, _feed_forward)


# ---------------------------------------------------------------- feed-forwards on timm's models
def _build_on(architecture: str, name: str, suffix: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """timm's model, and then KANs in the place of its MLPs. With group KANs it begins as that model, pretrained or not.

    Pretrained weights are timm's of the architecture, or those of a folder or the Hub, which are this model's own."""
    options = _take_options(name, suffix, kwargs)
    own = pretrained and not isinstance(kwargs.get("pretrained_cfg"), (str, type(None)))
    if pretrained and not own and not FEED_FORWARDS[suffix].HOLDS_MLP:
        raise _no_weights(name)
    model = model_entrypoint(architecture)(pretrained=pretrained and not own, **kwargs)
    mlps = mlps_of(model)
    if not mlps:
        raise ValueError(f"{architecture} has {nothing_to_replace(model)}")
    layers = iter([_layer_on(suffix, own) for own in _options_of_each(name, options, len(mlps))])
    replace_mlps(model, lambda **kwargs: next(layers)(**kwargs))
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": name}       # what timm writes into a folder for the Hub
    if own:
        load_pretrained(model, num_classes=model.num_classes, in_chans=kwargs.get("in_chans", 3))
    return model


def _layer_on(suffix: str, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """The constructor of a feed-forward in the place of an MLP of any width. By default it has as many parameters as the MLP, and
    functions that begin as the MLP's activation."""
    if "kan_base" in _OPTIONS[suffix]:
        options = {"kan_base": None} | options

    def layer(in_features: int, hidden_features: int, **kwargs) -> nn.Module:
        # 8 parameters on each edge of a full-edge KAN, 10 of an efficient-KAN
        size = Size(0, 0, in_features, 0, 0, kan_hidden=max(1, hidden_features // 8), ekan_hidden=max(1, hidden_features // 10))
        return FEED_FORWARDS[suffix].with_options(size, **options)(
            in_features=in_features, hidden_features=hidden_features, **kwargs)
    return layer


def register(name: str) -> bool:
    """Whether `timm.create_model` knows a model, with or without a tag. A timm model's name with a KAN's suffix becomes known
    by this call; whether that model has MLPs shows when it is built."""
    stem = name.split(".")[0]
    if not timm.is_model(stem) and not _register_on(stem):
        return False
    try:
        get_pretrained_cfg(name)
    except RuntimeError:        # of a tag that it does not have
        return False
    return True


def _register_on(name: str) -> bool:
    architecture, _, suffix = name.rpartition("_")
    if suffix == "ViT" or suffix not in FEED_FORWARDS or not timm.is_model(architecture) or \
            architecture in ARCHITECTURES or architecture in SIZE_NAMES:
        return False

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return _build_on(architecture, name, suffix, pretrained, **kwargs)

    ARCHITECTURES[name] = architecture
    cfgs = {cfg.tag or "": cfg for cfg in map(get_pretrained_cfg, [architecture, *timm.list_pretrained(f"{architecture}.*")])
            if cfg is not None} or {"": PretrainedCfg()}
    _add_entry(name, entry, f"{architecture} with feed-forward {suffix}: {FEED_FORWARDS[suffix].TITLE}.",
               DefaultCfg(deque(cfgs), cfgs))
    return True


# ---------------------------------------------------------------- what a name says
def registered_models() -> list[str]:
    """Names of this project's models, in the order of the tables."""
    return list(SIZE_NAMES)


def architecture_of(name: str) -> str | None:
    """timm's architecture, of a model that `register` has added; else None."""
    return ARCHITECTURES.get(name.split(".")[0])


def split_name(name: str) -> tuple[Size | None, str | None]:
    """`deit_tiny_patch16_224_KAN` -> its size and feed-forward suffix. The size is None for an architecture of timm's; both are
    None for a model of timm's as it is."""
    name = name.split(".")[0]
    if name in SIZE_NAMES:
        return SIZES[SIZE_NAMES[name]], name.removeprefix(SIZE_NAMES[name] + "_")
    architecture = architecture_of(name)
    return None, name.removeprefix(architecture + "_") if architecture else None


def with_feed_forward(name: str, suffix: str) -> str:
    """The name of the model of the same size or architecture with another feed-forward. `name` may lack a suffix; an unknown one
    stays as it is. A tag stays if there are such weights."""
    stem, dot, tag = name.partition(".")
    if not register(name) and stem not in SIZES:
        return name
    stem = SIZE_NAMES.get(stem) or ARCHITECTURES.get(stem, stem)
    if stem in SIZES:
        other = f"{stem}_{suffix}"
        return f"{other}.{tag}" if f"{other}.{tag}" in shipped() else other
    return f"{stem}{dot}{tag}" if suffix == "ViT" else f"{stem}_{suffix}{dot}{tag}"


def options_of(name: str) -> list[str]:
    """The `KAN_OPTIONS` that a model has; [] for a model of another source."""
    suffix = split_name(name)[1]
    return _OPTIONS[suffix] if suffix else []


# option -> the feed-forwards' argument, where the names differ
_KEYWORDS = {"hdim_kan": "hdim", "kan_grid_points": "num_grids", "kan_h": "h", "kan_groups": "groups", "kan_base": "base",
             "kan_input_phi": "input_phi", "kan_trainable_base": "trainable_base", "kan_trainable_grid": "train_grid",
             "kan_trainable_h": "train_h", "kan_base_branch": "base_branch", "kan_second_norm": "second_norm",
             "kan_function": "function"}


def own_options(spec: ModelSpec) -> dict[str, Any]:
    """The value of each of the model's options (`options_of`), given in `spec` or its default; {} for a model without. On an
    architecture of timm's the default of `hdim_kan` and `kan_base` is None: it depends on each MLP."""
    size, suffix = split_name(spec.name)
    if suffix is None or not _OPTIONS[suffix]:
        return {}
    given = {key: value for key, value in spec.kwargs.items() if key in _OPTIONS[suffix]}
    if size is None:
        size = Size(0, 0, 0, 0, 0, kan_hidden=0, ekan_hidden=0)
        given = ({"kan_base": None} if "kan_base" in _OPTIONS[suffix] else {}) | given
    feed_forward = FEED_FORWARDS[suffix].with_options
    arguments: dict[str, Any] = getattr(
        feed_forward(size, **{key: given[key] for key in given if key != "hdim_kan"}), "keywords", {})
    own = {option: parameter.default for option, parameter in list(signature(feed_forward).parameters.items())[1:]} | given
    own |= {option: arguments[keyword] for option, keyword in _KEYWORDS.items() if option in own and keyword in arguments}
    if "grid_min" in arguments:
        own["kan_grid_range"] = [arguments["grid_min"], arguments["grid_max"]]
        if own.get("kan_h", 0) is None:
            own["kan_h"] = (arguments["grid_max"] - arguments["grid_min"]) / (arguments["num_grids"] - 1)
    if "hdim_kan" in own:
        own["hdim_kan"] = given.get("hdim_kan") or own["hdim_kan"] or 4 * spec.kwargs.get("embed_dim", size.embed_dim) or None
    return own


def own_flags(name: str) -> Mapping[str, float]:
    """The training flags whose defaults differ for a model."""
    suffix = split_name(name)[1]
    return FEED_FORWARDS[suffix].OWN_FLAGS if suffix else {}


def models_with(option: str, name: str) -> list[str]:
    """Models of the same size or architecture that have an option; [] for a model without learned functions of timm's."""
    stem = SIZE_NAMES.get(name.split(".")[0]) or architecture_of(name)
    return [f"{stem}_{suffix}" for suffix in FEED_FORWARDS if option in _OPTIONS[suffix]] if stem else []


def mlp_twin(spec: ModelSpec) -> nn.Module:
    """The model of the same size and settings with MLPs as feed-forwards."""
    kwargs = {key: value for key, value in spec.kwargs.items() if key not in KAN_OPTIONS}
    return timm.create_model(architecture_of(spec.name) or f"{SIZE_NAMES[spec.name.split('.')[0]]}_ViT", **kwargs)
