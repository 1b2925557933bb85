import argparse
import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
from helpers import NANO, RELEASED, every
from models import spread
from safetensors.torch import save_file
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import get_pretrained_cfg, model_entrypoint, save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models_kan
from benchmarks.timing import saved_bytes
from faster_kan import FasterKAN, FasterKANLayer
from models_kan import ModelSpec, split_name
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.layouts import rename_keys
from vision_kan.common.errors import UserError
from vision_kan.layers.efficient_kan import EfficientKAN, uniform_knots
from vision_kan.layers.group_kan import GroupKAN
from vision_kan.layers.kat import KAT
from vision_kan.models.cost import cost_mismatch, count_flops, count_parameters, twin_mismatch
from vision_kan.models.finetune import load_finetune
from vision_kan.models.infer import infer_model, load_exactly, patch_grid

SIZE_NAMES = [
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224", "deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384", "deit3_small_patch16_224", "deit3_base_patch16_224",
    "vit_nano_patch8_32", "vit_nano_patch4_32", "vit_micro_patch4_32"]
DEIT_NAMES = [name for name in SIZE_NAMES if name.startswith("deit")]
FEED_FORWARDS = {"KAN": FasterKAN, "GKAN": GroupKAN, "EKAN": EfficientKAN, "KAT": KAT, "ViT": timm.layers.Mlp}
NAMES = [f"{name}_{suffix}" for name in SIZE_NAMES for suffix in FEED_FORWARDS]


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def blank(name, **kwargs):
    """The model without values: for shapes and counts."""
    return timm.create_model(name, device="meta", weight_init="skip", **kwargs)


def patch_of(name):
    return int(name.split("patch")[1].split("_")[0])


def small(name, seed=0, **kwargs):
    """The model on images of 2 x 2 patches, with 2 blocks (a single one in the widest)."""
    depth = 1 if "base" in name else 2
    return create(name, seed, **{**dict(img_size=2 * patch_of(name), depth=depth, num_classes=7), **kwargs})


def images(model, n=2, seed=0, dtype=torch.float32):
    height, width = model.patch_embed.img_size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_state(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- registration
def test_timm_lists_every_model():
    for suffix in FEED_FORWARDS:
        assert set(timm.list_models(f"*_{suffix}")) - models_kan.ARCHITECTURES.keys() == {f"{n}_{suffix}" for n in SIZE_NAMES}
    assert models_kan.registered_models() == NAMES
    assert list(models_kan.SIZES) == SIZE_NAMES


def test_names_are_split_into_size_and_feed_forward():
    for name in SIZE_NAMES:
        for suffix in FEED_FORWARDS:
            assert split_name(f"{name}_{suffix}") == (models_kan.SIZES[name], suffix)
    assert split_name("deit_tiny_patch16_224") == (None, None)
    assert split_name("resnet18") == (None, None)


def test_timms_own_models_are_left_alone():
    for name in DEIT_NAMES:
        assert model_entrypoint(name).__module__ == "timm.models.deit"
        assert get_pretrained_cfg(name).hf_hub_id
    block = timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=0).blocks[0]
    assert not isinstance(block.mlp, FasterKAN)


def test_nothing_else_is_registered_and_nothing_overwritten():
    """Models imported from other modules would be listed as this module's."""
    assert set(timm.list_models(module="models_kan")) - models_kan.ARCHITECTURES.keys() == set(NAMES)


@pytest.mark.parametrize("name", every(4, NAMES))
def test_default_configuration(name):
    cfg, size = get_pretrained_cfg(name), split_name(name)[0]
    assert size.img_size == int(name.split("_")[-2]) and size.patch_size == patch_of(name)
    assert size.distilled == ("distilled" in name) and size.deit3 == name.startswith("deit3")
    assert cfg.architecture == name and cfg.input_size == (3, size.img_size, size.img_size)
    assert cfg.num_classes == 1000 and cfg.interpolation == "bicubic" and cfg.fixed_input_size
    assert cfg.crop_pct == (0.875 if size.img_size == 224 else 1.0)
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    assert not cfg.has_weights
    model = blank(name)
    assert model.pretrained_cfg["architecture"] == name and model.num_classes == 1000
    assert model.patch_embed.img_size == (size.img_size, size.img_size)
    parts = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier
    assert [isinstance(model.get_submodule(part), nn.Linear) for part in (*parts, cfg.first_conv)] == (
        [True] * len(parts) + [False])
    assert hasattr(model, "head_dist") == size.distilled
    assert getattr(models_kan, name) is model_entrypoint(name)


@pytest.mark.parametrize("name", [NANO, "vit_nano_patch8_32_ViT", "vit_nano_patch8_32_GKAN", "deit_tiny_patch16_224_KAN",
                                  "deit_tiny_patch16_224_EKAN"])
def test_pretrained_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no pretrained weights"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("size, suffix", [("deit_tiny_patch16_224", "GKAN"), ("deit_tiny_patch16_224", "ViT"),
                                          ("deit_tiny_distilled_patch16_224", "GKAN"), ("deit3_small_patch16_224", "GKAN"),
                                          ("deit_tiny_patch16_224", "KAT")])
def test_pretrained_takes_timms_weights_of_the_size(size, suffix, tmp_path, monkeypatch):
    """Out of the Hub's cache, here: its client is asked for the twin's file, once, and only by pretrained=True."""
    small = dict(img_size=32, depth=2)
    twin = spread(create(size, **small))
    if "deit3" in size:     # as timm keeps them: named after DeiT-III's own files
        save_file({key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
                   for key, value in twin.state_dict().items()}, tmp_path / "model.safetensors")
    else:
        save_file(twin.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def cached(repo_id, filename, **kwargs):
        asked.append((repo_id, filename))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", cached)
    name = f"{size}_{suffix}"
    initial = create(name, seed=9, **small)
    assert not torch.equal(initial.blocks[0].attn.qkv.weight, twin.blocks[0].attn.qkv.weight) and not asked
    model = create(name, seed=9, pretrained=True, **small)
    assert asked == [(timm.get_pretrained_cfg(size).hf_hub_id, "model.safetensors")]
    assert torch.equal(model.blocks[1].mlp.fc1.weight, twin.blocks[1].mlp.fc1.weight)
    assert suffix == "KAT" or torch.allclose(model(images(model)), twin(images(twin)), atol=1e-5)       # KAT's GELU is a fit
    assert model.pretrained_cfg["architecture"] == name
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    assert torch.equal(create(f"local-dir:{tmp_path / 'saved'}", pretrained=True)(images(model)), model(images(model)))
    other = create(name, seed=9, pretrained=True, num_classes=5, **small)
    assert other.head.weight.shape[0] == 5 and torch.equal(other.blocks[0].attn.qkv.weight, twin.blocks[0].attn.qkv.weight)


# ---------------------------------------------------------------- structure
def check_gradients(model):
    model.train()
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    logits = model(images(model))
    logits = torch.cat(logits) if isinstance(logits, tuple) else logits
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", every(4, NAMES))
def test_every_parameter_has_a_gradient(name):
    model = small(name)
    check_gradients(model)
    assert all(type(block.mlp) is FEED_FORWARDS[split_name(name)[1]] for block in model.blocks)
    assert bool([m for m in model.modules() if isinstance(m, timm.layers.Mlp)]) == name.endswith("_ViT")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_whole_model_has_a_gradient(name):
    check_gradients(small(name, depth=split_name(name)[0].depth))


@pytest.mark.parametrize("name", every(4, DEIT_NAMES))
def test_the_vit_twin_is_timms_model(name):
    ours, theirs = (blank(n).state_dict() for n in (f"{name}_ViT", name))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    ours, theirs = small(f"{name}_ViT"), spread(small(name, seed=3))
    assert not torch.equal(ours(images(ours)), theirs(images(ours)))
    load_exactly(ours, theirs.state_dict(), "timm's")
    assert torch.equal(ours(images(ours)), theirs(images(ours)))


@pytest.mark.parametrize("name", every(4, SIZE_NAMES))
def test_the_kan_differs_from_its_twin_in_the_feed_forward_only(name):
    kan, *others = ({k: v.shape for k, v in blank(f"{name}_{suffix}").state_dict().items()
                     if ".mlp." not in k} for suffix in FEED_FORWARDS)
    assert all(kan == other for other in others)
    assert "blocks.0.attn.qkv.bias" in kan and "blocks.0.attn.proj.bias" in kan


@pytest.mark.parametrize("suffix", FEED_FORWARDS)
def test_timms_options_reach_the_blocks(suffix):
    model = timm.create_model(f"vit_micro_patch4_32_{suffix}", drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3,
                              attn_drop_rate=0.4, drop_path_rate=0.5, num_classes=11)
    paths = [(b.drop_path1, b.drop_path2) for b in model.blocks]
    rates = [[path.drop_prob if isinstance(path, DropPath) else 0.0 for path in pair] for pair in paths]
    np.testing.assert_allclose(rates, [[r, r] for r in np.linspace(0, 0.5, 6)])
    for block in model.blocks:
        assert block.attn.proj_drop.p == 0.3 and block.attn.attn_drop.p == 0.4
        drops = [m.p for m in block.mlp.modules() if isinstance(m, nn.Dropout)]
        assert drops == [0.3, 0.3]
        assert block.norm1.eps == block.norm2.eps == model.norm.eps == 1e-6         # timm's, as in DeiT
        assert block.attn.qkv.bias is not None and block.attn.num_heads == 3
    assert model.head_drop.p == 0.1 and model.pos_drop.p == 0.2 and model.head.out_features == 11


def test_without_options_nothing_drops():
    model = timm.create_model(NANO)
    assert not [m for m in model.modules() if isinstance(m, DropPath)]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_norm_eps():
    model = timm.create_model(NANO, block_norm_eps=1e-5)
    assert {b.norm1.eps for b in model.blocks} | {b.norm2.eps for b in model.blocks} == {1e-5}
    assert model.norm.eps == 1e-6
    assert {m.layernorm.eps for m in model.modules() if isinstance(m, FasterKANLayer)} == {1e-5}
    assert timm.create_model(NANO, norm_layer=lambda dim, **dd: nn.LayerNorm(dim, eps=3e-4, **dd)).norm.eps == 3e-4


def shapes(model):
    return [tuple(layer.spline_linear.weight.shape) for layer in model.blocks[-1].mlp.layers]


def test_hidden_width():
    for name, width in [("deit_tiny_patch16_224", 192), ("deit_base_patch16_224", 192),
                        ("deit3_small_patch16_224", 192), ("vit_nano_patch8_32", 48),
                        ("vit_nano_patch4_32", 48), ("vit_micro_patch4_32", 96)]:
        dim = models_kan.SIZES[name].embed_dim
        assert shapes(blank(f"{name}_KAN")) == [(width, dim * 8), (dim, width * 8)]
        assert shapes(blank(f"{name}_KAN", hdim_kan=20)) == [(20, dim * 8), (dim, 160)]


def test_hidden_width_of_an_efficient_kan():
    for name, width in [("deit_tiny_patch16_224", 192), ("deit_base_patch16_224", 192), ("vit_nano_patch8_32", 39),
                        ("vit_nano_patch4_32", 39), ("vit_micro_patch4_32", 77)]:
        dim = models_kan.SIZES[name].embed_dim
        for kwargs, hidden in [({}, width), ({"hdim_kan": 20}, 20)]:
            layers = blank(f"{name}_EKAN", **kwargs).blocks[-1].mlp.layers
            assert [tuple(layer.spline_weight.shape) for layer in layers] == [(hidden, dim, 8), (dim, hidden, 8)]


def test_options_of_an_efficient_kan():
    model = timm.create_model("vit_nano_patch8_32_EKAN", kan_grid_range=(-3, 1), kan_grid_points=5, hdim_kan=10)
    for block in model.blocks:
        for layer in block.mlp.layers:
            assert layer.grid.tolist() == [-9, -7, -5, -3, -1, 1, 3, 5, 7] and layer.spline_order == 3
    for option in (dict(kan_h=0.5), dict(kan_trainable_grid=True), dict(kan_groups=4)):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: no effect on vit_nano_patch8_32_EKAN, choose"):
            timm.create_model("vit_nano_patch8_32_EKAN", **option)
    for option in (dict(kan_grid_points=3), dict(kan_grid_range=(1, 1))):
        with pytest.raises(ValueError, match="more basis functions than its order"):
            timm.create_model("vit_nano_patch8_32_EKAN", **option)


def test_kan_options():
    model = timm.create_model(NANO, kan_grid_range=(-1.0, 3.0), kan_grid_points=5, kan_h=0.7, hdim_kan=10)
    assert shapes(model) == [(10, 480), (96, 50)]
    for block in model.blocks:
        for layer in block.mlp.layers:
            assert layer.rbf.grid.tolist() == [-1, 0, 1, 2, 3] and layer.rbf.h == 0.7
    default = timm.create_model(NANO)
    rbf = default.blocks[0].mlp.layers[0].rbf
    assert rbf.h == 0.33 and torch.equal(rbf.grid, torch.linspace(-2, 2, 8))
    assert not [name for name, _ in default.named_parameters() if "rbf" in name]
    trainable = timm.create_model(NANO, kan_trainable_grid=True, kan_trainable_h=True)
    assert sum("rbf.grid" in name for name, _ in trainable.named_parameters()) == 8
    assert sum("rbf.h" in name for name, _ in trainable.named_parameters()) == 8
    check_gradients(trainable)


@pytest.mark.parametrize("option", [dict(hdim_kan=4), dict(kan_grid_range=(-1, 1)), dict(kan_grid_points=4),
                                    dict(kan_h=0.1), dict(kan_trainable_grid=True), dict(kan_trainable_h=True)],
                         ids=str)
def test_kan_options_on_a_twin_are_refused(option):
    assert set(option) <= set(models_kan.KAN_OPTIONS)
    with pytest.raises(ValueError, match=f"{next(iter(option))}: no effect on vit_nano_patch8_32_ViT.*"
                                         "choose vit_nano_patch8_32_KAN"):
        timm.create_model("vit_nano_patch8_32_ViT", **option)
    blank(NANO, **option)


def test_options_of_a_group_kan():
    name = "vit_nano_patch8_32_GKAN"
    model = timm.create_model(name, kan_grid_range=(-1.0, 3.0), kan_grid_points=5, kan_h=0.7, hdim_kan=24, kan_groups=3,
                              kan_base="relu2", kan_trainable_base=True)
    for block in model.blocks:
        assert (block.mlp.fc1.weight.shape, block.mlp.fc2.weight.shape) == ((24, 96), (96, 24))
        for phi, base in ((block.mlp.phi1, "identity"), (block.mlp.phi2, "relu2")):
            assert (phi.points, phi.h, phi.base, phi.coefficients.shape) == ((-1, 0, 1, 2, 3), 0.7, base, (3, 5))
            assert phi.scale.shape == (3,)
    check_gradients(model)
    default = timm.create_model(name).blocks[0].mlp
    for phi, base in ((default.phi1, "identity"), (default.phi2, "gelu")):
        assert phi.coefficients.shape == (8, 8) and phi.base == base and phi.scale is None
        assert (phi.points[0], phi.points[-1], phi.h) == (-3, 3, pytest.approx(6 / 7))
    assert type(timm.create_model(name, kan_input_phi=False).blocks[0].mlp.phi1) is nn.Identity
    each = timm.create_model(name, kan_groups=0).blocks[0].mlp
    assert (each.phi1.coefficients.shape, each.phi2.coefficients.shape) == ((96, 8), (384, 8))
    for options, words in ((dict(kan_groups=5), "5 groups do not divide 96"), (dict(hdim_kan=20), "8 groups do not divide 20"),
                           (dict(kan_h=0.2), "too narrow"), (dict(kan_base="tanh"), "base tanh")):
        with pytest.raises(ValueError, match=words):
            timm.create_model(name, **options)
    for option in (dict(kan_groups=2), dict(kan_base="silu"), dict(kan_input_phi=False), dict(kan_trainable_base=True)):
        for suffix in ("KAN", "EKAN", "ViT"):
            with pytest.raises(ValueError, match=f"{next(iter(option))}: no effect on vit_nano_patch8_32_{suffix}, "
                                                 "choose vit_nano_patch8_32_GKAN"):
                timm.create_model(f"vit_nano_patch8_32_{suffix}", **option)


@pytest.mark.parametrize("suffix", ["KAN", "EKAN", "GKAN", "KAT"])
def test_a_width_for_each_block(suffix):
    def second(mlp):
        return mlp.fc2.in_features if suffix in ("GKAN", "KAT") else mlp.layers[1].in_features

    name, widths = f"vit_nano_patch8_32_{suffix}", [8, 24, 16, 8]
    model = spread(create(name, hdim_kan=widths, num_classes=7))
    assert [second(block.mlp) for block in model.blocks] == widths
    assert count_parameters(create(name, hdim_kan=(8, 8, 8, 8), num_classes=7)) < count_parameters(model)
    assert [second(block.mlp) for block in copy.deepcopy(model).blocks] == widths       # as a moving average does
    features = timm.create_model(name, hdim_kan=widths, features_only=True)
    assert features(images(model, 1))[-1].shape == (1, 96, 4, 4)
    spec = infer_model(model.state_dict(), {})
    assert spec.kwargs["hdim_kan"] == widths
    other = create(spec.name, seed=5, **spec.kwargs)
    load_exactly(other, model.state_dict(), "the file")
    assert torch.equal(other(images(model)), model(images(model)))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(model, 1))
    assert count_flops(model).matmul == counter.get_total_flops()
    for wrong in ([8, 8, 8], [8, 8, 8, 8, 8], [8, 8, 0, 8], [8, 8, 8.0, 8], [8, True, 8, 8], [], [8, 8, "x", 8]):
        with pytest.raises(ValueError, match="a list of 4, one for each block"):
            timm.create_model(name, hdim_kan=wrong)


def test_options_and_twins_of_a_name():
    for name in NAMES:
        options = models_kan.options_of(name)
        assert ("kan_groups" in options) == name.endswith(("_GKAN", "_KAT")) and bool(options) != name.endswith("_ViT")
        assert models_kan.models_with("kan_groups", name) == [f"{name.rpartition('_')[0]}_{suffix}" for suffix in ("GKAN", "KAT")]
    assert models_kan.options_of("resnet18") == models_kan.models_with("kan_groups", "resnet18") == []
    assert {o for name in NAMES for o in models_kan.options_of(name)} == set(models_kan.KAN_OPTIONS)


def test_bad_options_are_refused():
    for option in (dict(kan_grid_range=(2, -2)), dict(kan_grid_points=1), dict(kan_h=0.0)):
        with pytest.raises(ValueError, match="at least 2 points"):
            timm.create_model(NANO, **option)
    with pytest.raises(TypeError, match="hdim_kann"):
        timm.create_model(NANO, hdim_kann=3)


# ---------------------------------------------------------------- parameters and FLOPs
def test_parameter_counts():
    alive = {"deit_tiny_patch16_224_ViT": 5_717_416, "deit_small_patch16_224_ViT": 22_050_664,
             "deit_base_patch16_224_ViT": 86_567_656, "deit_tiny_distilled_patch16_224_ViT": 5_910_800}
    for name, count in alive.items():               # DeiT's published models
        assert count_parameters(blank(name)) == count
    # alive parameters of the original (hidden width 192) were 9.25, 36.2 and 143M where hidden width = dim
    for name, millions in [("tiny", 9.25), ("small", 36.2), ("base", 143)]:
        dim = models_kan.SIZES[f"deit_{name}_patch16_224"].embed_dim
        model = blank(f"deit_{name}_patch16_224_KAN", hdim_kan=dim)
        assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("name", ["vit_nano_patch8_32", "vit_nano_patch4_32", "vit_micro_patch4_32"])
def test_small_models_are_twins(name):
    kan, vit = (blank(f"{name}_{suffix}", num_classes=10) for suffix in ("KAN", "ViT"))
    assert abs(count_parameters(kan) - count_parameters(vit)) <= 0.02 * count_parameters(vit)
    assert count_flops(kan).matmul == count_flops(vit).matmul
    assert twin_mismatch(kan, vit) is None and twin_mismatch(vit, kan) is None
    ekan = blank(f"{name}_EKAN", num_classes=10)          # a scale of each edge costs a parameter and no product
    assert abs(count_parameters(ekan) - count_parameters(vit)) <= 0.02 * count_parameters(vit)
    group = blank(f"{name}_GKAN", num_classes=10)
    assert count_parameters(group) - count_parameters(vit) == 2 * len(vit.blocks) * 8 * 8      # the coefficients
    assert count_flops(group).matmul == count_flops(vit).matmul and twin_mismatch(group, vit) is None
    kat = blank(f"{name}_KAT", num_classes=10)
    assert count_parameters(kat) - count_parameters(vit) == 2 * len(vit.blocks) * (6 + 8 * 4)  # numerator, 8 denominators
    assert count_flops(kat).matmul == count_flops(vit).matmul and twin_mismatch(kat, vit) is None


def test_models_of_other_sizes_are_no_twins():
    def mismatch(parameters, flops):
        return cost_mismatch({"parameters": parameters, "matmul FLOPs": flops}, {"parameters": 1000, "matmul FLOPs": 2000})

    assert mismatch(1100, 2000) == "not twins: 1,100 against 1,000 parameters, a difference of 9.1%"
    assert mismatch(900, 2000) == "not twins: 900 against 1,000 parameters, a difference of 10.0%"
    assert mismatch(981, 1901) is None and mismatch(1020, 2100) is None
    assert "parameters" in mismatch(979, 2000)
    assert mismatch(1000, 1899) == "not twins: 1,899 against 2,000 matmul FLOPs, a difference of 5.1%"
    tiny = [blank(f"deit_tiny_patch16_224_{suffix}") for suffix in ("KAN", "ViT")]
    assert "not twins: 9," in twin_mismatch(*tiny)


@pytest.mark.parametrize("name, kwargs", every(3, [
    (NANO, {}), ("vit_nano_patch4_32_ViT", {"num_classes": 0}), ("vit_micro_patch4_32_KAN", {"num_classes": 10}),
    ("deit_tiny_patch16_224_KAN", {}), ("deit_tiny_patch16_224_KAN", {"hdim_kan": 20, "img_size": 64}),
    ("deit_tiny_distilled_patch16_224_KAN", {"img_size": 96, "depth": 3, "num_classes": 10}),
    ("deit_tiny_distilled_patch16_224_ViT", {"img_size": 96, "depth": 3}),
    ("deit_small_patch16_224_ViT", {"img_size": 48, "depth": 2}), ("deit3_small_patch16_224_ViT", {"img_size": 48}),
    ("deit3_small_patch16_224_KAN", {"img_size": 48, "depth": 2, "kan_grid_points": 5}),
    ("vit_nano_patch8_32_EKAN", {}), ("deit_tiny_patch16_224_EKAN", {"img_size": 48, "kan_grid_points": 5}),
    ("vit_nano_patch8_32_GKAN", {}), ("deit3_small_patch16_224_GKAN", {"img_size": 48, "depth": 2, "hdim_kan": 64}),
    ("vit_nano_patch8_32_KAT", {}), ("deit3_small_patch16_224_KAT", {"img_size": 48, "depth": 2, "hdim_kan": 64}),
    ("deit_base_patch16_384_KAN", {"img_size": (32, 64), "depth": 1, "qkv_bias": False})]), ids=str)
def test_flops_are_those_that_pytorch_counts(name, kwargs):
    model = create(name, **kwargs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(model, 1))
    assert count_flops(model).matmul == counter.get_total_flops()


def test_elementwise_flops():
    tokens = 17                                     # 4 x 4 patches and the class token
    kan = blank(NANO, hdim_kan=20, kan_grid_points=6)
    assert count_flops(kan).elementwise == 4 * tokens * 5 * 6 * (96 + 20)           # 4 blocks, 5 a basis value
    ekan = blank("vit_nano_patch8_32_EKAN", hdim_kan=20, kan_grid_points=6)
    assert count_flops(ekan).elementwise == 4 * tokens * (13 * 6 + 4) * (96 + 20)   # 13 a B-spline, 4 a SiLU
    # both activations: 7 a point, and 5 the GELU of the second
    group = blank("vit_nano_patch8_32_GKAN", kan_grid_points=6, kan_groups=4)
    assert count_flops(group).elementwise == 4 * tokens * (7 * 6 * 96 + (7 * 6 + 5) * 384)
    group = blank("vit_nano_patch8_32_GKAN", kan_input_phi=False)
    assert count_flops(group).elementwise == 4 * tokens * (7 * 8 + 5) * 384
    kat = blank("vit_nano_patch8_32_KAT")       # two Horner schemes of degrees 5 and 4, |u|, a division
    assert count_flops(kat).elementwise == 4 * tokens * 20 * (96 + 384)
    vit = blank("vit_nano_patch8_32_ViT")
    assert count_flops(vit).elementwise == 4 * tokens * 5 * 384                     # 5 a GELU
    distilled = blank("deit_tiny_distilled_patch16_224_ViT")
    assert count_flops(distilled).elementwise == 12 * 198 * 5 * 768


def test_flops_of_deit_tiny():
    assert count_flops(blank("deit_tiny_patch16_224")).matmul / 1e9 == pytest.approx(
        2 * 1.26, rel=0.01)                          # DeiT's 1.26 G multiply-adds


# ---------------------------------------------------------------- released checkpoints
def original_forward(state, x, heads):
    """Logits of the original Vision-KAN from a released state dict, written from its definition."""
    def norm(key, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], eps)

    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    batch, tokens, dim = x.shape
    for n in range(len([key for key in state if key.endswith("attn.qkv.weight")])):
        block = f"blocks.{n}"
        qkv = norm(f"{block}.norm1", x, 1e-5) @ state[f"{block}.attn.qkv.weight"].T
        q, k, v = qkv.reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(dim // heads)).softmax(-1) @ v
        attention = attention.transpose(1, 2).reshape(batch, tokens, dim)
        x = x + F.linear(attention, state[f"{block}.attn.proj.weight"], state[f"{block}.attn.proj.bias"])
        y = norm(f"{block}.norm2", x, 1e-5)
        for layer in (f"{block}.kan.layers.0", f"{block}.kan.layers.1"):
            u = norm(f"{layer}.layernorm", y, 1e-5)
            basis = 1 - torch.tanh((u[..., None] - state[f"{layer}.rbf.grid"]) / 0.33) ** 2
            y = F.linear(basis.flatten(-2), state[f"{layer}.spline_linear.weight"])
        x = x + y
    return F.linear(norm("norm", x, 1e-6)[:, 0], state["head.weight"], state["head.bias"])


def released_layout(model):
    """A KAN's state dict under the names of a released file, its dead MLPs included."""
    state = {}
    for key, value in model.state_dict().items():
        state[key.replace(".mlp.layers.", ".kan.layers.")] = value
    for n, block in enumerate(model.blocks):
        dim = block.norm1.weight.numel()
        for part, shape in [("fc1.weight", (4 * dim, dim)), ("fc1.bias", (4 * dim,)), ("fc2.weight", (dim, 4 * dim)),
                            ("fc2.bias", (dim,))]:
            state[f"blocks.{n}.mlp.{part}"] = torch.randn(shape)
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name, kwargs, heads", [
    (NANO, dict(hdim_kan=20, num_classes=7), 3),
    ("deit_tiny_patch16_224_KAN", dict(img_size=48, depth=2, num_classes=5), 3),
    ("deit_small_patch16_224_KAN",
     dict(img_size=32, depth=1, num_classes=5, kan_grid_points=6, kan_grid_range=(-1.2, 2)), 6)])
def test_a_released_layout(name, kwargs, heads, prefix):
    model = spread(create(name, qkv_bias=False, block_norm_eps=1e-5, **kwargs)).double()
    released = released_layout(model)
    assert "blocks.0.attn.qkv.bias" not in released and "blocks.0.mlp.fc1.weight" in released
    spec = infer_model({prefix + key: value for key, value in released.items()}, {"model": name})
    assert spec.name == name
    size = models_kan.SIZES[name.removesuffix("_KAN")]
    assert spec.kwargs == {"img_size": size.img_size, "hdim_kan": size.kan_hidden, "kan_grid_points": 8,
                           "kan_grid_range": (-2.0, 2.0), "qkv_bias": False, "block_norm_eps": 1e-5, **kwargs}
    assert spec == infer_model(released, {})        # the shapes alone say it too
    ours = create(spec.name, seed=5, **spec.kwargs).double()
    load_exactly(ours, {prefix + key: value for key, value in released.items()}, "the file")
    x = images(ours, dtype=torch.float64)
    assert torch.equal(ours(x), model(x))
    torch.testing.assert_close(ours(x), original_forward(released, x, heads), rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def released():
    if not RELEASED.exists():
        pytest.skip(f"{RELEASED.name} is not beside this checkout")
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(RELEASED, weights_only=True)
    return checkpoint, np.load(RELEASED.with_suffix(".npz"))


RELEASED_KWARGS = {"img_size": 64, "num_classes": 100, "hdim_kan": 20, "qkv_bias": False, "block_norm_eps": 1e-5,
                   "kan_grid_points": 8, "kan_grid_range": (-2.0, 2.0)}


def test_the_released_checkpoint_is_recognised(released):
    checkpoint, _ = released
    spec = infer_model(checkpoint["model"], vars(checkpoint["args"]))
    assert spec == ModelSpec("deit_tiny_patch16_224_KAN", RELEASED_KWARGS)
    assert infer_model(checkpoint["model"], {}) == spec
    assert infer_model(checkpoint["model_ema"], {"model": None}) == spec


@pytest.mark.parametrize("key, logits", [("model", "logits_fp64"), ("model_ema", "logits_ema_fp64")])
def test_logits_of_the_released_checkpoint(released, key, logits):
    checkpoint, arrays = released
    model = create("deit_tiny_patch16_224_KAN", **RELEASED_KWARGS).double()
    load_exactly(model, checkpoint[key], "the released file")
    with torch.no_grad():
        ours = model(torch.from_numpy(arrays["images"]).double()).numpy()
    assert np.abs(ours - arrays[logits]).max() < 1e-9


def test_every_block_of_the_released_checkpoint(released):
    checkpoint, arrays = released
    model = create("deit_tiny_patch16_224_KAN", **RELEASED_KWARGS)
    load_exactly(model, checkpoint["model"], "the released file")
    tokens = torch.from_numpy(arrays["tokens_fp32"])
    assert len(tokens) == len(model.blocks) + 1
    with torch.no_grad():
        entering = model._pos_embed(model.patch_embed(torch.from_numpy(arrays["images"])))
        assert (entering - tokens[0]).abs().max() < 1e-4
        for n, block in enumerate(model.blocks):
            assert (block(tokens[n]) - tokens[n + 1]).abs().max() < 1e-4, n


# ---------------------------------------------------------------- which model a checkpoint holds
@pytest.mark.parametrize("source, kwargs, name, inferred", [
    ("deit_tiny_patch16_224", {}, "deit_tiny_patch16_224_ViT", {}),
    ("deit_small_patch16_224", {"num_classes": 10}, "deit_small_patch16_224_ViT", {}),
    ("deit_base_patch16_224", {}, "deit_base_patch16_224_ViT", {}),
    ("deit_base_patch16_384", {}, "deit_base_patch16_384_ViT", {}),
    ("deit_tiny_distilled_patch16_224", {}, "deit_tiny_distilled_patch16_224_ViT", {}),
    ("deit_base_distilled_patch16_384", {}, "deit_base_distilled_patch16_384_ViT", {}),
    ("deit3_small_patch16_224", {}, "deit3_small_patch16_224_ViT", {}),
    ("deit3_base_patch16_384", {}, "deit3_base_patch16_224_ViT", {}),
    ("deit_tiny_patch16_224", {"img_size": 96, "num_classes": 3}, "deit_tiny_patch16_224_ViT", {}),
    ("deit_tiny_patch16_224", {"depth": 7}, "deit_tiny_patch16_224_ViT", {"depth": 7}),
    ("deit_tiny_patch16_224", {"depth": 12, "patch_size": 32}, "deit_tiny_patch16_224_ViT", {"patch_size": 32}),
    ("deit3_small_patch16_224", {"depth": 2, "img_size": 64}, "deit3_small_patch16_224_ViT", {"depth": 2}),
    ("deit3_medium_patch16_224", {}, "deit3_small_patch16_224_ViT", {"embed_dim": 512, "num_heads": 8}),
    ("deit_small_patch16_224", {"depth": 7}, "deit_small_patch16_224_ViT", {"depth": 7}),
    ("vit_nano_patch8_32_ViT", {"depth": 2}, "vit_nano_patch8_32_ViT", {"depth": 2}),
    ("vit_nano_patch4_32_ViT", {"patch_size": 2}, "vit_nano_patch8_32_ViT", {"patch_size": 2}),
    ("deit_tiny_patch16_224", {"qkv_bias": False}, "deit_tiny_patch16_224_ViT", {"qkv_bias": False}),
    ("deit_tiny_patch16_224", {"num_classes": 0}, "deit_tiny_patch16_224_ViT", {}),
    ("vit_nano_patch4_32_ViT", {}, "vit_nano_patch4_32_ViT", {}),
    ("vit_nano_patch8_32_KAN", {"img_size": 64, "hdim_kan": 10}, "vit_nano_patch8_32_KAN",
     {"hdim_kan": 10, "kan_grid_points": 8, "kan_grid_range": (-2.0, 2.0)}),
    (NANO, {"kan_trainable_h": True}, NANO, {"hdim_kan": 48, "kan_grid_points": 8, "kan_grid_range": (-2.0, 2.0),
                                             "kan_trainable_h": True}),
    ("vit_micro_patch4_32_KAN", {"kan_grid_points": 3, "kan_grid_range": (-1.5, 0.7)}, "vit_micro_patch4_32_KAN",
     {"hdim_kan": 96, "kan_grid_points": 3, "kan_grid_range": (-1.5, 0.7)})], ids=str)
def test_a_state_dict_tells_its_model(source, kwargs, name, inferred):
    model = blank(source, **kwargs)
    state = {key: torch.linspace(*kwargs.get("kan_grid_range", (-2, 2)), len(value)) if "grid" in key else value
             for key, value in model.state_dict().items()}
    spec = infer_model(state, {})
    assert spec == ModelSpec(name, {"img_size": model.patch_embed.img_size[0], "num_classes": model.num_classes,
                                    **inferred})
    rebuilt = blank(spec.name, **spec.kwargs)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert rebuilt.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


@pytest.mark.parametrize("name, kwargs", [
    ("vit_nano_patch8_32_EKAN", {}), ("vit_nano_patch4_32_EKAN", {"hdim_kan": 10, "kan_grid_points": 4}),
    ("deit_tiny_patch16_224_EKAN", {"depth": 2, "kan_grid_range": (-1.5, 0.7), "kan_grid_points": 11})], ids=str)
def test_an_efficient_kan_tells_its_grid(name, kwargs):
    model = spread(create(name, num_classes=7, **kwargs))
    spec = infer_model(model.state_dict(), {})
    size = split_name(name)[0]
    assert spec == ModelSpec(name, {"img_size": size.img_size, "num_classes": 7, "hdim_kan": size.ekan_hidden,
                                    "kan_grid_points": 8, "kan_grid_range": (-1.0, 1.0), **kwargs})
    other = create(spec.name, seed=5, **spec.kwargs)
    knots = uniform_knots(*spec.kwargs["kan_grid_range"], spec.kwargs["kan_grid_points"], 3).float()
    assert torch.equal(other.blocks[0].mlp.layers[1].grid, knots)
    load_exactly(other, model.state_dict(), "the file")
    assert torch.equal(other(images(model)), model(images(model)))


@pytest.mark.parametrize("name, kwargs", [
    ("vit_nano_patch8_32_GKAN", {}), ("vit_nano_patch4_32_GKAN", {"hdim_kan": 48, "kan_grid_points": 4, "kan_groups": 2}),
    ("vit_nano_patch8_32_GKAN", {"kan_groups": 0, "kan_input_phi": False}),
    ("vit_nano_patch8_32_GKAN", {"kan_function": "fourier"}),
    ("deit_tiny_patch16_224_GKAN", {"depth": 2, "kan_grid_range": (-1.5, 0.7), "kan_trainable_base": True})], ids=str)
def test_a_group_kan_tells_its_activations(name, kwargs):
    model = spread(create(name, num_classes=7, **kwargs))
    spec = infer_model(model.state_dict(), {})
    assert spec == ModelSpec(name, {"img_size": split_name(name)[0].img_size, "num_classes": 7, "kan_groups": 8,
                                    "kan_grid_points": 8, "kan_grid_range": (-3.0, 3.0), "kan_input_phi": True,
                                    "kan_trainable_base": False, "kan_function": "rswaf", **kwargs})
    other = create(spec.name, seed=5, **spec.kwargs)
    load_exactly(other, model.state_dict(), "the file")
    assert torch.equal(other(images(model)), model(images(model)))


def test_a_function_on_another_grid_is_refused_in_a_sentence():
    source, model = (spread(create("vit_nano_patch8_32_GKAN", kan_grid_range=(-low, 3))) for low in (2, 3))
    for load in (lambda state: load_exactly(model, state, "FILE.pth"), lambda state: load_finetune(model, state)):
        with pytest.raises(UserError, match="grid has 8 points from -2 to 3 where the model has 8 from -3 to 3") as caught:
            load(source.state_dict())
        assert "--kan-grid-range" in str(caught.value) and "\n" not in str(caught.value)


def test_the_checkpoints_flags_name_the_size():
    state = blank("deit_base_patch16_384_ViT", img_size=224).state_dict()
    kwargs = {"img_size": 224, "num_classes": 1000}
    assert infer_model(state, {"model": "deit_base_patch16_384_ViT"}) == ModelSpec("deit_base_patch16_384_ViT", kwargs)
    assert infer_model(state, {"model": "deit_base_patch16_384_KAN"}).name == "deit_base_patch16_384_ViT"
    for unknown in ("deit_base_patch16_224", "resnet18", "", None):
        assert infer_model(state, {"model": unknown}) == ModelSpec("deit_base_patch16_224_ViT", kwargs)


def test_deit3_names_of_the_original_files():
    model = small("deit3_small_patch16_224_ViT")
    state = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
             for key, value in model.state_dict().items()}
    assert "blocks.0.gamma_1" in state and "blocks.1.ls2.gamma" not in state
    spec = infer_model(state, {})
    assert spec == ModelSpec("deit3_small_patch16_224_ViT", {"img_size": 32, "num_classes": 7, "depth": 2})
    other = create(spec.name, seed=4, **spec.kwargs)
    load_exactly(other, state, "the file")
    assert same_state(other.state_dict(), model.state_dict())


def test_keys_that_the_model_itself_has_stay():
    """What DeiT-III's files call gamma_1 is so called in CaiT, BEiT and EVA too."""
    for name in ("cait_xxs24_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"):
        model = timm.create_model(name, device="meta")
        state = model.state_dict()
        assert rename_keys(state, state).keys() == state.keys()
        load_exactly(model, state, "it")
        wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
        assert rename_keys(wrapped, state).keys() == state.keys()


@pytest.mark.parametrize("name, kwargs, inferred", [
    ("vit_base_patch16_224", {"embed_dim": 768, "num_heads": 12}, "deit_base_patch16_224_ViT"),
    ("vit_huge_patch14_224", {"embed_dim": 1280, "num_heads": 16, "patch_size": 14}, None)])
def test_a_model_fine_tuned_by_mae(name, kwargs, inferred):
    """Keys and output of its models_vit.py: the mean over the patches, and fc_norm in the place of norm."""
    torch.manual_seed(0)
    mae = spread(VisionTransformer(img_size=kwargs.get("patch_size", 16) * 2, depth=1, num_classes=5, global_pool="avg",
                                   **{"patch_size": 16, **kwargs})).eval()
    state = mae.state_dict()
    assert "fc_norm.weight" in state and "norm.weight" not in state
    spec = infer_model(state, {"model": name.removesuffix("_224")})
    assert spec.kwargs["global_pool"] == "avg" and inferred in (spec.name, None)
    model = timm.create_model(spec.name, **spec.kwargs).eval()
    load_exactly(model, state, "it")
    assert torch.equal(model(images(model)), mae(images(model)))


def test_a_width_of_the_mlp_that_is_not_four_times_the_dimension():
    model = spread(small("deit_tiny_patch16_224_ViT", mlp_ratio=3))
    spec = infer_model(model.state_dict(), {})
    assert spec.kwargs["mlp_ratio"] == 3
    load_exactly(timm.create_model(spec.name, **spec.kwargs), model.state_dict(), "it")


@pytest.mark.parametrize("name", [NANO, "vit_nano_patch8_32_EKAN", "vit_nano_patch8_32_GKAN"])
def test_a_models_own_options_are_what_it_has(name):
    """Given, they change nothing."""
    own = models_kan.own_options(ModelSpec(name))
    assert own.keys() == set(models_kan.options_of(name))
    assert repr(create(name, depth=1, **own)) == repr(create(name, depth=1))
    assert own | {"hdim_kan": 5} == models_kan.own_options(ModelSpec(name, {"hdim_kan": 5}))
    assert models_kan.own_options(ModelSpec("vit_nano_patch8_32_ViT")) == models_kan.own_options(ModelSpec("resnet18")) == {}


@pytest.mark.parametrize("drop", ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
                                  "blocks.0.norm1.weight"])
def test_no_vision_transformer(drop):
    state = small(NANO).state_dict()
    del state[drop]
    with pytest.raises(UserError, match=f"no vision transformer of a known layout.*{drop}.*--model"):
        infer_model(state, {})


def test_foreign_checkpoints_are_no_vision_transformer():
    for state in ({}, nn.Linear(3, 3).state_dict(), timm.create_model("resnet18", device="meta").state_dict()):
        with pytest.raises(UserError, match="name its architecture with --model"):
            infer_model(state, {})
    state = blank("deit_tiny_patch16_224", img_size=(224, 192)).state_dict()
    with pytest.raises(UserError, match="169 positions.*--input-size"):
        infer_model(state, {})
    assert infer_model(state, {"input_size": [224, 192]}).kwargs["img_size"] == [224, 192]
    for wrong in ([192, 192], [224], 224, "x", [224, "x"]):
        with pytest.raises(UserError, match="169 positions"):
            infer_model(state, {"input_size": wrong})


# ---------------------------------------------------------------- loading the same model
def test_load_exactly_names_the_key():
    model = small(NANO)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = small(NANO, seed=1).state_dict()

    def sentence(state):
        with pytest.raises(UserError) as caught:
            load_exactly(model, state, "FILE.pth")
        return str(caught.value)

    without = {key: value for key, value in other.items() if key != "blocks.1.attn.proj.bias"}
    assert sentence(without) == ("FILE.pth does not fit the model: blocks.1.attn.proj.bias is missing "
                                 "(1 keys missing, 0 unknown, 0 of another shape)")
    assert sentence({**other, "neck.weight": torch.zeros(3)}) == (
        "FILE.pth does not fit the model: neck.weight has no place in the model "
        "(0 keys missing, 1 unknown, 0 of another shape)")
    assert sentence({**other, "head.weight": torch.zeros(3, 96)}) == (
        "FILE.pth does not fit the model: head.weight has shape (3, 96) where the model has (7, 96) "
        "(0 keys missing, 0 unknown, 1 of another shape)")
    assert f"cls_token is missing ({len(before)} keys missing" in sentence({})
    assert same_state(model.state_dict(), before)               # a refused file changes nothing
    load_exactly(model, {f"module.{key}": value for key, value in other.items()}, "FILE.pth")
    assert same_state(model.state_dict(), other)


# ---------------------------------------------------------------- fine-tuning
def check_complete(report, model, source):
    """Each key of the model once in loaded, resampled or initial; each of the source once in loaded, resampled or
    dropped; and the table tells all of it."""
    own, parts = list(model.state_dict()), (report.loaded, report.resampled)
    assert sorted([*report.loaded, *report.resampled, *report.initial]) == sorted(own)
    assert sorted([*report.loaded, *report.resampled, *report.dropped]) == sorted(source)
    assert not set(report.initial) & set().union(*parts)
    lines = report.table().splitlines()
    for title, entries in [("loaded", report.loaded), ("resampled", report.resampled), ("dropped", report.dropped),
                           ("left as initialised", report.initial)]:
        assert f"  {title}: {len(entries)} tensors" in lines


def finetune(model, source):
    """Loads, checks the report's completeness and that what it calls initial is untouched; the report."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    original = {key: value.clone() for key, value in source.items()}
    report = load_finetune(model, source)
    check_complete(report, model, {key.removeprefix("module."): None for key in source})
    after = model.state_dict()
    assert same_state({k: after[k] for k in report.initial}, {k: before[k] for k in report.initial})
    assert same_state(source, original)                         # the source is left as it was
    return report


@pytest.mark.parametrize("theirs, ours", [(False, False), (False, True), (True, False)])
def test_positions_are_resampled_with_and_without_a_class_token(theirs, ours):
    source = spread(create("vit_nano_patch8_32_ViT", class_token=theirs, global_pool="avg"))
    model = create("vit_nano_patch8_32_ViT", class_token=ours, global_pool="avg", img_size=64)
    report = finetune(model, source.state_dict())
    assert "pos_embed" in report.resampled and "pos_embed" not in report.dropped
    old, new = source.pos_embed[:, theirs:], model.pos_embed[:, ours:]
    want = resample_abs_pos_embed(old, [8, 8], [4, 4], num_prefix_tokens=0)
    assert new.shape == (1, 64, 96) and torch.equal(new, want)


def test_an_mlp_checkpoint_meets_a_kan():
    source = spread(create("deit_tiny_patch16_224"))
    model = create("deit_tiny_patch16_224_KAN", seed=1, num_classes=10)
    report = finetune(model, source.state_dict())
    state, own = source.state_dict(), model.state_dict()
    taken = [key for key in own if ".mlp." not in key and not key.startswith("head")]
    assert sorted(report.loaded) == sorted(taken) and not report.resampled
    assert all(torch.equal(own[key], state[key]) for key in taken)
    assert sum("attn.qkv.bias" in key for key in report.loaded) == 12
    assert set(report.initial) == {key for key in own if ".mlp." in key or key.startswith("head")}
    assert sum(".mlp.fc" in key for key in report.dropped) == 48
    assert report.dropped["blocks.0.mlp.fc1.weight"] == "no such part in this model"
    assert report.dropped["head.weight"] == "(1000, 192) against (10, 192)"
    table = report.table()
    for line in ("    blocks.*.attn.qkv.bias  x12", "    blocks.*.mlp.fc1.weight  x12  (no such part in this model)",
                 "    head.weight  ((1000, 192) against (10, 192))", "    blocks.*.mlp.layers.0.rbf.grid  x12"):
        assert line in table.splitlines()


def test_the_head_is_kept_where_the_class_count_is_equal():
    source = spread(small("deit_tiny_patch16_224"))
    model = small("deit_tiny_patch16_224_KAN", seed=1)
    report = finetune(model, source.state_dict())
    assert {"head.weight", "head.bias"} <= set(report.loaded)
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224_KAN", "deit_tiny_distilled_patch16_224_ViT",
                                  "deit3_small_patch16_224_KAN", NANO, "vit_nano_patch8_32_EKAN"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_same_model_is_taken_whole(name, prefix):
    source, model = spread(small(name)), small(name, seed=1)
    report = finetune(model, {prefix + key: value for key, value in source.state_dict().items()})
    assert not (report.resampled or report.dropped or report.initial)
    assert same_state(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224_ViT", "deit_tiny_distilled_patch16_224_ViT",
                                  "deit3_small_patch16_224_ViT"])
@pytest.mark.parametrize("old, new", [(64, 96), (96, 32), (96, 80), (64, (96, 48))])
def test_position_embedding_of_another_image_size(name, old, new):
    source, model = spread(small(name, img_size=old)), small(name, seed=1, img_size=new)
    report = finetune(model, source.state_dict())
    assert list(report.resampled) == ["pos_embed"] and not report.initial and not report.dropped
    prefix = 0 if source.no_embed_class else source.num_prefix_tokens
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])       # class tokens kept
    side, dim = old // 16, source.embed_dim
    grid = source.pos_embed[:, prefix:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, model.patch_embed.grid_size, mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed[:, prefix:], grid.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)
    assert report.resampled["pos_embed"] == f"{tuple(source.pos_embed.shape)} -> {tuple(model.pos_embed.shape)}"


def test_distilled_to_plain():
    source = spread(small("deit_tiny_distilled_patch16_224"))
    model = small("deit_tiny_patch16_224_KAN", seed=1)
    report = finetune(model, source.state_dict())
    assert set(report.resampled) == {"pos_embed"}
    assert {"dist_token", "head_dist.weight", "head_dist.bias"} <= set(report.dropped)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(model.pos_embed[:, 1:], source.pos_embed[:, 2:])
    assert torch.equal(model.head.weight, source.head.weight)


def test_plain_to_distilled():
    source = spread(small("deit_tiny_patch16_224"))
    model = small("deit_tiny_distilled_patch16_224_KAN", seed=1)
    report = finetune(model, source.state_dict())
    assert {"dist_token", "head_dist.weight", "head_dist.bias"} <= set(report.initial)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(model.pos_embed[:, 1:2], source.pos_embed[:, :1])        # the class token's, twice
    assert torch.equal(model.pos_embed[:, 2:], source.pos_embed[:, 1:])


@pytest.mark.parametrize("size", [32, 48])
def test_deit_and_deit3_are_the_same_function(size):
    """DeiT-III has no position of the class token: it is folded into the token, and comes back as zero."""
    one = dict(init_values=1.0, img_size=size)                  # a layer scale of 1 has no effect
    deit = spread(small("deit_small_patch16_224_ViT", img_size=size))
    deit3 = small("deit3_small_patch16_224_ViT", 1, **one)
    report = finetune(deit3, deit.state_dict())
    assert set(report.resampled) == {"pos_embed"}
    assert set(report.initial) == {f"blocks.{n}.ls{i}.gamma" for n in range(2) for i in (1, 2)}
    assert torch.equal(deit3.cls_token, deit.cls_token + deit.pos_embed[:, :1])
    x = images(deit)
    torch.testing.assert_close(deit3(x), deit(x), rtol=1e-5, atol=1e-5)

    deit3 = spread(small("deit3_small_patch16_224_ViT", 2, **one))
    with torch.no_grad():
        for block in deit3.blocks:
            block.ls1.gamma.fill_(1)
            block.ls2.gamma.fill_(1)
    back = small("deit_small_patch16_224_ViT", 3, img_size=size)
    report = finetune(back, deit3.state_dict())
    assert not report.initial and len(report.dropped) == 4
    assert back.pos_embed[:, 0].abs().max() == 0
    torch.testing.assert_close(back(x), deit3(x), rtol=1e-5, atol=1e-5)


def test_deit_to_deit3_of_another_image_size_keeps_the_folded_position():
    source = spread(small("deit_small_patch16_224_ViT", img_size=64))
    model = small("deit3_small_patch16_224_KAN", 1, img_size=96)
    report = finetune(model, source.state_dict())
    assert report.resampled == {"pos_embed": "(1, 17, 384) -> (1, 36, 384)"}
    assert torch.equal(model.cls_token, source.cls_token + source.pos_embed[:, :1])


def test_another_patch_size():
    source = spread(small("deit_tiny_patch16_224_ViT", img_size=32, patch_size=8))      # 4 x 4 patches of 8
    model = small("deit_tiny_patch16_224_KAN", 1, img_size=64)                          # 4 x 4 patches of 16
    report = finetune(model, source.state_dict())
    assert report.resampled == {"patch_embed.proj.weight": "(192, 3, 8, 8) -> (192, 3, 16, 16)"}
    assert torch.equal(model.pos_embed, source.pos_embed)
    # an enlarged patch is embedded as the patch was: here patches of one colour, which are enlarged exactly
    colours = torch.randn(1, 3, 4, 4)
    ours, theirs = (m.patch_embed(F.interpolate(colours, scale_factor=p)) for m, p in ((model, 16), (source, 8)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    model = small("deit_tiny_patch16_224_KAN", 1, img_size=64, patch_size=8)
    report = finetune(model, spread(small("deit_tiny_patch16_224_ViT", img_size=64)).state_dict())
    assert set(report.resampled) == {"pos_embed", "patch_embed.proj.weight"}


def test_less_depth_takes_the_first_blocks():
    source = spread(small("deit_tiny_patch16_224_ViT", depth=3))
    model = small("deit_tiny_patch16_224_ViT", 1, depth=2)
    report = finetune(model, source.state_dict())
    assert not report.initial and all(key.startswith("blocks.2.") for key in report.dropped)


def test_a_released_kan_is_a_source_too():
    source = spread(small("deit_tiny_patch16_224_KAN", qkv_bias=False, block_norm_eps=1e-5))
    model = small("deit_tiny_patch16_224_KAN", 1, num_classes=3)
    report = load_finetune(model, released_layout(source))
    unused = {key for key in released_layout(source) if ".mlp." in key}
    assert unused and {report.dropped.pop(key) for key in unused} == {"never used by the original"}
    check_complete(report, model, rename_keys(released_layout(source)))
    assert torch.equal(model.blocks[1].mlp.layers[0].spline_linear.weight,
                       source.blocks[1].mlp.layers[0].spline_linear.weight)
    assert set(report.initial) == {"head.weight", "head.bias", "blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}


@pytest.mark.parametrize("source", ["deit_small_patch16_224", "resnet18", NANO])
def test_a_checkpoint_that_fits_nowhere_is_an_error(source):
    source = small(source).state_dict() if "patch" in source else timm.create_model(source).state_dict()
    model = small("deit_tiny_patch16_224_KAN")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for state in (source, {}, {"head.weight": torch.zeros(7, 192), "head.bias": torch.zeros(7)}):
        with pytest.raises(UserError, match="nothing of the checkpoint's attention fits.*--model|'conv1.weight', 'bn1.weight'.* "
                                            "no name in common with those of the model .*'cls_token'"):
            load_finetune(model, state)
        assert same_state(model.state_dict(), before)


@pytest.mark.parametrize("positions, img_size", [(1 + 6, 32), (1 + 6, 48), (2 + 6, 96), (197 + 4, 224)])
def test_positions_that_are_no_square_are_dropped(positions, img_size):
    """Those of oblong images, or of a transformer with further tokens."""
    source = {**spread(small("deit_tiny_patch16_224_ViT")).state_dict(), "pos_embed": torch.ones(1, positions, 192)}
    model = small("deit_tiny_patch16_224_ViT", 1, img_size=img_size)
    report = finetune(model, source)
    assert report.dropped == {"pos_embed": f"(1, {positions}, 192) against {tuple(model.pos_embed.shape)}"}
    assert report.initial == {"pos_embed": ""}


@pytest.mark.parametrize("distilled", ["", "_distilled"])
def test_positions_of_an_oblong_image_with_a_square_number_of_patches(distilled):
    """4 x 9 patches are not 6 x 6: a ramp over the columns stays a ramp."""
    name = f"deit_tiny{distilled}_patch16_224_ViT"
    source = spread(small(name, img_size=(64, 144)))
    prefix = source.num_prefix_tokens
    with torch.no_grad():
        source.pos_embed[:, prefix:] = torch.arange(9.).repeat(4)[None, :, None]
    told = {"model_args": {"name": name, "kwargs": {"img_size": [64, 144]}}}
    for said, grid in ((told, (4, 9)), ({"args": {"input_size": 96}}, (6, 6)), ({}, None)):
        assert patch_grid(Checkpoint("c.pth", {"model": source.state_dict(), **said})) == grid
    same = small(name, 1, img_size=(64, 144))
    load_finetune(same, source.state_dict(), (4, 9))
    assert torch.equal(same.pos_embed, source.pos_embed)
    square = small(name, 1, img_size=96)
    report = load_finetune(square, source.state_dict(), (4, 9))
    columns = square.pos_embed[0, prefix:, 0].detach().view(6, 6)
    assert "pos_embed" in {**report.loaded, **report.resampled}
    assert (columns.diff(dim=1) > 0).all() and torch.allclose(columns, columns[:1].expand(6, 6), atol=1e-5)
    assert torch.equal(square.pos_embed[:, :prefix], source.pos_embed[:, :prefix])


def test_a_timm_model_of_another_kind_can_be_the_target():
    source, model = timm.create_model("resnet18", num_classes=7), timm.create_model("resnet18", num_classes=3)
    report = finetune(model, source.state_dict())
    assert set(report.initial) == {"fc.weight", "fc.bias"} == set(report.dropped)


# ---------------------------------------------------------------- Hugging Face, features
@pytest.mark.parametrize("name, kwargs", [
    (NANO, dict(hdim_kan=20, num_classes=7)),
    (NANO, dict(img_size=16, kan_grid_range=(-1.0, 2.5), kan_grid_points=5, kan_h=0.4, kan_trainable_h=True)),
    (NANO, dict(qkv_bias=False, block_norm_eps=1e-5, num_classes=3)),
    ("deit_tiny_distilled_patch16_224_KAN", dict(img_size=32, depth=2, num_classes=7)),
    ("vit_nano_patch8_32_EKAN", dict(kan_grid_range=(-1.0, 2.5), kan_grid_points=5, num_classes=7)),
    ("vit_nano_patch8_32_GKAN", dict(kan_groups=4, kan_base="silu", kan_h=1.1, kan_grid_range=(-2.0, 2.5), num_classes=7)),
    ("vit_nano_patch8_32_KAT", dict(kan_groups=4, kan_base="silu", num_classes=7)),
    ("vit_nano_patch8_32_ViT", dict(num_classes=7))], ids=str)
@pytest.mark.parametrize("safe", every(2, [True, False]))
def test_saved_for_hugging_face(name, kwargs, safe, tmp_path):
    model = spread(create(name, **kwargs))
    save_for_hf(model, tmp_path, safe_serialization=safe)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name
    other = create(f"local-dir:{tmp_path}", seed=9, pretrained=True)
    assert torch.equal(other(images(model)), model(images(model)))
    assert {b.norm1.eps for b in other.blocks} == {b.norm1.eps for b in model.blocks}
    initial = create(f"local-dir:{tmp_path}", seed=9)           # not asked for weights
    assert not torch.equal(initial(images(model)), model(images(model)))


def test_a_saved_model_with_another_class_count_and_image_size(tmp_path):
    model = spread(create(NANO, hdim_kan=20, num_classes=7))
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = create(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=64)
    assert other(images(other)).shape == (2, 3) and other.pos_embed.shape == (1, 65, 96)
    assert torch.equal(other.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)


def test_weights_in_a_released_layout_through_timms_loader(tmp_path):
    model = spread(create(NANO, qkv_bias=False, block_norm_eps=1e-5, num_classes=1000))
    torch.save(released_layout(model), tmp_path / "weights.pth")
    other = create(NANO, seed=9, pretrained=True, qkv_bias=False, block_norm_eps=1e-5,
                   pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))
    assert torch.equal(other(images(model)), model(images(model)))


@pytest.mark.parametrize("name", [NANO, "deit_tiny_distilled_patch16_224_KAN", "deit3_small_patch16_224_KAN",
                                  "vit_nano_patch8_32_GKAN"])
def test_features(name):
    model = small(name, depth=4).eval()
    x = images(model)
    final, maps = model.forward_intermediates(x, indices=[0, 3])
    assert [m.shape for m in maps] == [(2, model.embed_dim, 2, 2)] * 2
    assert torch.equal(final, model.forward_features(x))
    assert model.forward_head(final).shape == (2, 7)
    backbone = small(name, depth=4, features_only=True, block_norm_eps=1e-5)
    assert [m.shape for m in backbone(x)] == [(2, model.embed_dim, 2, 2)] * 3       # of the last three blocks
    assert backbone.feature_info.channels() == [model.embed_dim] * 3
    assert {block.norm1.eps for block in backbone.model.blocks} == {1e-5}
    assert small(name, num_classes=0)(x).shape == (2, model.embed_dim)


@pytest.mark.parametrize("name", [NANO, "vit_nano_patch8_32_EKAN", "vit_nano_patch8_32_GKAN", "vit_nano_patch8_32_KAT"])
def test_gradient_checkpointing_changes_nothing(name):
    grads = []
    for checkpointing in (False, True):
        model = small(name)
        model.set_grad_checkpointing(checkpointing)
        model.train()
        model(images(model)).square().sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters()})
    assert same_state(*grads)


@pytest.mark.parametrize("suffix, options", [
    ("GKAN", {}), ("KAT", {}), pytest.param("KAN", {}, marks=pytest.mark.slow), pytest.param("EKAN", {}, marks=pytest.mark.slow),
    ("KAN", {"kan_basis": "covering", "kan_second_norm": "static", "kan_base_branch": True})])
def test_export(suffix, options):
    """Exported with a free batch size, PyTorch's own operations alone."""
    model = create(f"vit_nano_patch8_32_{suffix}", num_classes=10, depth=1, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
        images = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(exported.module()(images), model(images), atol=1e-4, rtol=1e-4)
    assert all(str(node.target).startswith(("aten.", "<built-in function getitem")) for node in exported.graph.nodes
               if node.op == "call_function" and "_guards" not in str(node.target))


# ---------------------------------------------------------------- what a training step keeps
@pytest.mark.parametrize("suffix, options, most", [("GKAN", {}, 1.07), ("KAT", {}, 1.07), ("KAN", {"hdim_kan": 96}, 1.0),
                                                   ("KAN", {"hdim_kan": 192}, 1.0)])
def test_bytes_kept_for_the_backward_pass_are_at_most_the_twins(suffix, options, most):
    """DeiT-tiny at 224 px; more for the group KAN, whose first learned function has an output beside its input."""
    kept = {}
    for name, kwargs in (("ViT", {}), (suffix, options)):
        model = timm.create_model(f"deit_tiny_patch16_224_{name}", depth=2, **kwargs)
        kept[name] = saved_bytes(model, lambda model=model: model(torch.randn(1, 3, 224, 224)))
    assert 0.4 * kept["ViT"] < kept[suffix] <= most * kept["ViT"]
