"""Use in other programs: features of the models, the layers in other nets and in timm's other architectures, docs/library.md."""
import re
from functools import partial

import pytest
import timm
import torch
from e2e import _digits as load_digits
from helpers import ROOT, every
from timm.layers import GluMlp, Mlp
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import models_kan
from faster_kan import FasterKAN
from vision_kan.layers.efficient_kan import EfficientKAN
from vision_kan.layers.group_kan import GroupActivation, GroupKAN
from vision_kan.layers.kat import KAT
from vision_kan.layers.replacement import replace_mlps

FEED_FORWARDS = list(models_kan.FEED_FORWARDS)
COVERING = dict(grid_min=-3.0, grid_max=3.0, h=None, kan_bias=True, init_as_mlp=True)
LAYERS = {"group": partial(GroupKAN, groups=4), "rational": partial(KAT, groups=4), "full-edge": partial(FasterKAN, hdim=16),
          "covering": partial(FasterKAN, hdim=16, second_norm="static", **COVERING), "efficient": partial(EfficientKAN, hdim=16)}


def real_images(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits [B, 3, S, S] and their labels."""
    images, targets = load_digits()
    images = torch.from_numpy(images[:count]).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)
    return nn.functional.interpolate(images, size=size, mode="bilinear"), torch.from_numpy(targets[:count])


def moved(model: nn.Module) -> nn.Module:
    """Moves every parameter from its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def steps(net: nn.Module, images: torch.Tensor, targets: torch.Tensor, count: int = 8) -> list[float]:
    """Losses of `count` updates; the first gives every parameter a gradient."""
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=2e-3), []
    for _ in range(count):
        loss = nn.functional.cross_entropy(net.train()(images), targets)
        optimizer.zero_grad()
        loss.backward()
        assert not losses or loss.isfinite()
        assert losses or not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- features of the models
@pytest.fixture(scope="module", params=[*((f"vit_nano_patch8_32_{suffix}", {}) for suffix in FEED_FORWARDS),
                                        ("deit_tiny_distilled_patch16_224_GKAN", {"img_size": 64, "depth": 4}),
                                        ("deit3_small_patch16_224_KAN", {"img_size": 64, "depth": 4})], ids=lambda p: p[0])
def hooked(request):
    """A model, images, and what its blocks gave for them: [B, tokens, dim] each."""
    name, kwargs = request.param
    torch.manual_seed(0)
    model = moved(timm.create_model(name, num_classes=7, **kwargs))
    images, seen = real_images(3, model.patch_embed.img_size[0])[0], []
    hooks = [block.register_forward_hook(lambda _, args, output: seen.append(output)) for block in model.blocks]
    with torch.no_grad():
        logits = model(images)
    for hook in hooks:
        hook.remove()
    return name, kwargs, model, images, seen, logits


def as_maps(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    side = model.patch_embed.grid_size[0]
    return tokens[:, model.num_prefix_tokens:].transpose(1, 2).reshape(len(tokens), -1, side, side)


@torch.no_grad()
def test_forward_features_and_head(hooked):
    _, _, model, images, seen, logits = hooked
    assert torch.equal(model.forward_features(images), model.norm(seen[-1]))
    assert torch.equal(model.forward_head(model.norm(seen[-1])), logits)
    assert model.forward_head(model.norm(seen[-1]), pre_logits=True).shape == (3, model.embed_dim)


@torch.no_grad()
def test_forward_intermediates(hooked):
    _, _, model, images, seen, _ = hooked
    final, maps = model.forward_intermediates(images, indices=[0, 2])
    assert torch.equal(final, model.norm(seen[-1]))
    assert all(torch.equal(a, as_maps(model, seen[i])) for a, i in zip(maps, (0, 2), strict=True))
    (tokens, prefix), = model.forward_intermediates(images, indices=[1], norm=True, output_fmt="NLC", return_prefix_tokens=True,
                                                    intermediates_only=True)
    assert torch.equal(torch.cat([prefix, tokens], 1), model.norm(seen[1]))
    with pytest.raises((AssertionError, IndexError)):
        model.forward_intermediates(images, indices=[9])


@torch.no_grad()
def test_get_intermediate_layers(hooked):
    _, _, model, images, seen, _ = hooked
    last, = model.get_intermediate_layers(images, n=1)
    assert torch.equal(last, seen[-1][:, model.num_prefix_tokens:])
    layers = model.get_intermediate_layers(images, n=[1, 3], reshape=True, norm=True)
    assert all(torch.equal(a, as_maps(model, model.norm(seen[i]))) for a, i in zip(layers, (1, 3), strict=True))


@torch.no_grad()
def test_features_only(hooked):
    name, kwargs, model, images, seen, _ = hooked
    backbone = timm.create_model(name, features_only=True, out_indices=[0, 3], **kwargs).eval()
    own = backbone.model.state_dict()
    backbone.model.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    assert all(torch.equal(a, as_maps(model, seen[i])) for a, i in zip(backbone(images), (0, 3), strict=True))
    assert backbone.feature_info.channels() == [model.embed_dim] * 2
    assert backbone.feature_info.reduction() == [model.patch_embed.patch_size[0]] * 2


@pytest.mark.parametrize("suffix", FEED_FORWARDS)
def test_another_head_and_gradient_checkpointing(suffix):
    torch.manual_seed(0)
    model = moved(timm.create_model(f"vit_nano_patch8_32_{suffix}", num_classes=7))
    images, targets = real_images(4, 32)
    features = model.forward_features(images)
    model.reset_classifier(10)
    assert model.num_classes == 10 and model(images).shape == (4, 10)
    assert torch.equal(model.forward_features(images), features)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        nn.functional.cross_entropy(model.train()(images), targets).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))
    model.reset_classifier(0)
    assert model.eval()(images).shape == (4, model.embed_dim)


# ---------------------------------------------------------------- in a net of one's own
@pytest.mark.parametrize("layer", every(3, LAYERS.values()), ids=LAYERS)
def test_in_a_net_of_ones_own(layer):
    torch.manual_seed(0)
    images, targets = real_images(32, 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 32), layer(32, 48), GroupActivation(32, groups=4), nn.Linear(32, 10))
    losses = steps(net, images, targets, 30)
    assert losses[-1] < 0.7 * losses[0]
    works_compiled_exported_and_saved(net.eval(), images)


@torch.no_grad()
def works_compiled_exported_and_saved(net: nn.Module, images: torch.Tensor) -> None:
    """backend eager: the one graph that a compiler would get is made, and run as it is."""
    expected = net(images)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(images), expected, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(images[:3]), net(images[:3]), atol=1e-4, rtol=1e-4)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    moved(net)
    assert not torch.equal(net(images), expected)
    net.load_state_dict(state)
    assert torch.equal(net(images), expected)


# ---------------------------------------------------------------- in timm's other architectures
def mixer(layer):
    return MlpMixer(img_size=64, num_blocks=2, embed_dim=32, num_classes=10, mlp_layer=layer)


def sam(layer):
    return timm.create_model("samvit_base_patch16", img_size=64, depth=2, embed_dim=32, num_heads=2, num_classes=10,
                             global_attn_indexes=(1,), mlp_layer=layer)


def naflex(layer):
    return timm.create_model("naflexvit_base_patch16_gap", depth=2, embed_dim=32, num_heads=2, num_classes=10, mlp_layer=layer,
                             **({"fix_init": False} if layer is LAYERS["efficient"] else {}))


def kans_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (GroupKAN, KAT, FasterKAN, EfficientKAN))]


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [mixer, sam])
def test_as_mlp_layer(architecture, layer):
    torch.manual_seed(0)
    model = architecture(layer)
    assert len(kans_of(model)) == (4 if architecture is mixer else 2)
    images, targets = real_images(8, 64)
    losses = steps(model, images, targets, 6)
    assert losses[-1] < losses[0]
    if layer in (LAYERS["group"], LAYERS["covering"]):
        works_compiled_exported_and_saved(model.eval(), images[:4])


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_in_a_model_that_scales_with_depth(layer):
    model = naflex(layer)
    steps(model, *real_images(4, 64), count=2)
    if layer is LAYERS["full-edge"]:        # Xavier's bound, over the root of twice the block's number
        torch.manual_seed(0)
        first, second = (kan.layers[1].spline_linear.weight.abs().max() for kan in kans_of(naflex(layer)))
        bound = (6 / (16 * 8 + 32)) ** 0.5
        assert bound / 2 ** 0.5 > first > 0.99 * bound / 2 ** 0.5 and bound / 4 ** 0.5 > second > 0.99 * bound / 4 ** 0.5


@pytest.mark.parametrize("architecture", [mixer, sam])
def test_timm_leaves_their_initial_values(architecture):
    """The layers' own for the full-edge ones; for a group KAN those of the architecture's own MLP."""
    def deviations(module):
        return {name: value.std().item() for name, value in module.state_dict().items() if value.numel() > 1000}

    for layer in ("full-edge", "covering", "efficient"):
        torch.manual_seed(0)
        kan = kans_of(architecture(LAYERS[layer]))[-1]
        width = kan.layers[0].in_features
        alone = LAYERS[layer](width)
        assert deviations(kan) == pytest.approx(deviations(alone), rel=0.1) and deviations(alone)
        assert torch.equal(kan.layers[0].state_dict().get("rbf.grid", torch.empty(0)),
                           alone.layers[0].state_dict().get("rbf.grid", torch.empty(0)))
    ours = kans_of(architecture(LAYERS["group"]))[-1]
    theirs = [module for module in architecture(Mlp).modules() if isinstance(module, Mlp)][-1]
    assert not ours.phi1.coefficients.any() and not ours.phi2.coefficients.any()
    assert {"fc1.weight", "fc2.weight"} <= deviations(ours).keys()
    assert {key: value for key, value in deviations(ours).items()} == pytest.approx(deviations(theirs), rel=0.1)


# ---------------------------------------------------------------- in the place of MLPs that are there
ARCHITECTURES = {
    "swin_tiny_patch4_window7_224": (dict(img_size=56, depths=(1, 1), num_heads=(2, 4), embed_dim=32), 56, 2),
    "beit_base_patch16_224": (dict(img_size=64, depth=2, embed_dim=48, num_heads=3), 64, 2),
    "convnext_tiny": (dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)), 64, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_a_group_kan_goes_on_from_a_trained_model(name):
    kwargs, size, count = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    images, targets = real_images(8, size)
    before_training = steps(model, images, targets, 4)
    with torch.no_grad():
        before = model.eval()(images)
    state = model.state_dict()
    assert replace_mlps(model, GroupKAN) == count == len(kans_of(model))
    assert not [module for module in model.modules() if isinstance(module, Mlp)] and not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)
    assert state.keys() < model.state_dict().keys()         # an MLP's weights are a group KAN's
    assert steps(model, images, targets, 4)[-1] < before_training[0]
    works_compiled_exported_and_saved(model.eval(), images[:4])


def test_full_edge_kans_in_a_swin():
    kwargs, size, count = ARCHITECTURES["swin_tiny_patch4_window7_224"]
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, drop_rate=0.1, proj_drop_rate=0.2, **kwargs)
    assert replace_mlps(model, LAYERS["full-edge"]) == count
    kan = kans_of(model)[0]
    assert kan.layers[0].out_features == 16 and [drop.p for drop in kan.drops] == [0.2, 0.2] and kan.training
    images, targets = real_images(16, size)
    losses = steps(model, images, targets, 10)
    assert losses[-1] < losses[0]


class Shared(nn.Module):
    """One MLP in two places, as in CoaT, and others that are left as they are."""

    def __init__(self):
        super().__init__()
        self.a = self.b = Mlp(8, 16, bias=(True, False), drop=(0.1, 0.3), act_layer=nn.SiLU)
        self.conv, self.normed = Mlp(8, 16, use_conv=True), Mlp(8, 16, norm_layer=nn.LayerNorm)


def test_what_is_replaced():
    model = Shared().double().eval()
    mlp, u = model.a, torch.randn(3, 8, dtype=torch.float64)
    expected = mlp(u)
    assert replace_mlps(model, GroupKAN) == 1
    kan = model.a
    assert kan is model.b and isinstance(kan, GroupKAN) and type(model.conv) is type(model.normed) is Mlp
    assert kan.phi2.base == "silu" and kan.fc2.bias is None and (kan.drop1.p, kan.drop2.p) == (0.1, 0.3)
    assert kan.phi1.coefficients.dtype == torch.float64
    torch.testing.assert_close(kan(u), expected)
    other = nn.Sequential(Mlp(8, 8), Mlp(8, 8, act_layer=nn.Hardswish))
    with pytest.raises(ValueError, match=r"^1 \(8 x 8\): .*Hardswish.*base="):       # the module that it is
        replace_mlps(other, GroupKAN)
    assert all(type(module) is Mlp for module in other)
    with pytest.raises(ValueError, match=r"^the model itself \(6 x 8\): 8 groups do not divide 6"):
        replace_mlps(Mlp(6, 8), GroupKAN)
    with pytest.warns(UserWarning, match="nothing was replaced: Linear has no MLP of timm.layers with linear maps$"):
        assert replace_mlps(nn.Linear(2, 2), GroupKAN) == 0
    with pytest.warns(UserWarning, match=r"Sequential has no .* \(GluMlp, Mlp are left as they are\)"):
        assert replace_mlps(nn.Sequential(GluMlp(8, 8, use_conv=True), Mlp(8, 8, use_conv=True)), GroupKAN) == 0


# ---------------------------------------------------------------- docs/library.md
def test_the_document():
    """Its Python, block after block, and that what the comments say of shapes is so."""
    text = (ROOT / "docs" / "library.md").read_text()
    blocks, names = re.findall(r"```python\n(.*?)```", text, re.DOTALL), {}
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)
    shape = {key: tuple(names[key].shape) for key in ("logits", "tokens", "embedding", "last", "final")}
    assert shape == {"logits": (2, 10), "tokens": (2, 17, 96), "embedding": (2, 96), "last": (2, 16, 96), "final": (2, 17, 96)}
    assert [tuple(m.shape) for m in names["maps"]] == names["shapes"] == [(2, 96, 4, 4)] * 2
    assert tuple(names["outputs"]["blocks.1.mlp"].shape) == (2, 17, 96)
    assert names["channels"] == [96, 96] and names["replaced"] == 4 and len(kans_of(names["mixer"])) == 4
