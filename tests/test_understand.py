"""What models have learned and attend to: functions, histograms of their inputs, measures, attention, pictures."""
import math

import pytest
import timm
import torch
from helpers import sentence
from matplotlib.figure import Figure
from models import learned
from torch import nn
from torch.nn import functional as F

import models_kan  # noqa: F401  (registers the models)
from faster_kan import FasterKANLayer
from tools.common import png
from vision_kan.analysis.attention import (
    attention_maps,
    attention_panels,
    attention_rollout,
    draw_attention,
    token_maps,
)
from vision_kan.analysis.drawing import draw_functions, draw_groups, functions_figure
from vision_kan.analysis.functions import chosen_layers, group_functions
from vision_kan.analysis.inputs import InputHistogram, collect_inputs
from vision_kan.analysis.measures import drawn_range, edge_deviations, edge_functions, measure
from vision_kan.analysis.training_log import (
    off_grid_warning,
    wide_grid_note,
)
from vision_kan.kernels import BASES, rswaf_basis
from vision_kan.layers.efficient_kan import EfficientKANLayer
from vision_kan.layers.function_layer import function_layers
from vision_kan.layers.group_kan import GroupActivation

U = torch.linspace(-4, 4, 50)


def activation(channels: int = 12, groups: int = 4, **kwargs) -> GroupActivation:
    torch.manual_seed(0)
    phi = GroupActivation(channels, groups=groups, **kwargs)
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_()
    return phi


def edge_layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"original": FasterKANLayer(3, 2), "width": FasterKANLayer(3, 2, h=0.5, train_h=True),
            "grid": FasterKANLayer(3, 2, train_grid=True, num_grids=5), "base": FasterKANLayer(3, 2, base_branch=True),
            "efficient": EfficientKANLayer(3, 2), "quadratic": EfficientKANLayer(3, 2, num_grids=6, spline_order=2, grid_max=2)}


def filled(layer: nn.Module, u: torch.Tensor) -> InputHistogram:
    inputs = InputHistogram(u.shape[-1], layer.grid_points())
    inputs.add(u)
    return inputs


# ---------------------------------------------------------------- the functions
@pytest.mark.parametrize("kwargs", [{}, dict(h=0.5, base="silu"), dict(trainable_base=True, num_grids=5, grid_min=-1.0),
                                    dict(base="identity", groups=12)], ids=str)
def test_group_functions_are_the_activation(kwargs):
    phi = activation(**kwargs)
    base, values = group_functions(phi, U)
    torch.testing.assert_close(base, BASES[phi.base](U))
    with torch.no_grad():
        each = phi(U[:, None].expand(-1, 12))
    assert len(values) == len(phi.coefficients)
    for group, function in enumerate(values):
        torch.testing.assert_close(function, each[:, group * 12 // len(values)])


@pytest.mark.parametrize("name", edge_layers())
def test_edge_functions_add_up_to_the_layer(name):
    layer = edge_layers()[name]
    edges = edge_functions(layer, U, count=6)
    layer.layernorm = nn.Identity()
    with torch.no_grad():
        for output in range(2):
            total = sum(edges[f"{i} → {output}"] for i in range(3))
            torch.testing.assert_close(total, layer(U[:, None].expand(-1, 3))[:, output], atol=1e-5, rtol=1e-5)


def test_the_strongest_edges_come_first():
    torch.manual_seed(0)
    layer = FasterKANLayer(6, 4)
    with torch.no_grad():
        layer.spline_linear.weight[2, 3 * 8:4 * 8] *= 50
        layer.spline_linear.weight[1, :8] *= 20
    assert list(edge_functions(layer, torch.linspace(-3, 3, 50), count=2)) == ["3 → 2", "0 → 1"]
    # but what arrives at input 3 never changes, and at the others does
    u = torch.randn(1000, 6)
    u[:, 3] = 0.5
    assert next(iter(edge_functions(layer, U, filled(layer, u)))) == "0 → 1"


@pytest.mark.parametrize("name", edge_layers())
def test_strengths_are_deviations_under_the_data(name):
    """Against the deviation of the computed values themselves."""
    layer = edge_layers()[name]
    u = torch.randn(20_000, 3) * torch.tensor([0.3, 0.8, 1.0]) + torch.tensor([0.0, 0.5, -0.1])
    inputs = filled(layer, u)
    found = edge_deviations(layer, inputs.shares(3), inputs.centres)
    weight = layer.exact_weights()
    for i in range(3):
        values = layer.basis(u[:, i].double()) @ weight[:, i].T
        torch.testing.assert_close(found[:, i], values.std(0, correction=0), rtol=5e-3, atol=1e-4)


def test_layers_by_name():
    assert list(function_layers(learned("GKAN"))) == [f"blocks.{b}.mlp.phi{p}" for b in range(4) for p in (1, 2)]
    assert list(function_layers(learned("KAN", depth=1))) == ["blocks.0.mlp.layers.0", "blocks.0.mlp.layers.1"]
    assert function_layers(learned("ViT")) == {}
    model = learned("GKAN")
    assert list(chosen_layers(model, ["blocks.1.mlp.phi2", "blocks.3"])) == [
        "blocks.1.mlp.phi2", "blocks.3.mlp.phi1", "blocks.3.mlp.phi2"]
    assert "--layer blocks.9" in sentence(chosen_layers, model, ["blocks.9"])
    assert "no learned functions" in sentence(chosen_layers, learned("ViT"), ["blocks.1"])


# ---------------------------------------------------------------- what arrives
def test_histogram():
    inputs = InputHistogram(2, torch.tensor([-2.0, 0.0, 2.0]))
    inputs.add(torch.tensor([[-2.0, 0.0], [1.999, 2.001], [100.0, -100.0]]))
    inputs.add(torch.tensor([[[math.nan, -2.01]]], dtype=torch.bfloat16))
    assert inputs.counts.sum(1).tolist() == [4, 4] and (inputs.start, inputs.width) == (-8, 16 / 512)
    assert inputs.off_grid == pytest.approx(5 / 8)
    assert inputs.counts[1, 0] == 1 and inputs.counts[0, -1] == 2       # nowhere: beyond
    assert inputs.counts[1, 256] == 1 and inputs.edges[256] == 0
    assert inputs.extremes.tolist() == [-100, math.inf]


def test_histogram_of_many_values_is_numpys():
    u = torch.randn(3000, 5) * 2
    inputs = filled(FasterKANLayer(5, 2), u)
    for channel in range(5):
        expected = torch.histogram(u[:, channel].double(), inputs.edges)[0]
        torch.testing.assert_close(inputs.counts[channel, 1:-1].double(), expected[1:-1])
        assert inputs.counts[channel].sum() == 3000     # no value is lost
    assert inputs.off_grid == pytest.approx((u.abs() > 2).double().mean().item())
    torch.testing.assert_close(inputs.shares(5).sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("suffix, kwargs", [("KAN", {}), ("KAN", dict(kan_second_norm="none")), ("GKAN", {}), ("EKAN", {}),
                                            ("KAT", {})], ids=str)
def test_collected_is_what_arrives(suffix, kwargs):
    """Against activations that are computed block by block."""
    model, images = learned(suffix, depth=2, **kwargs), torch.randn(6, 3, 32, 32)
    model.train()
    found = collect_inputs(model, images.split(4))
    assert model.training and found.images == 6 and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    expected, outputs = {}, {}
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for number, block in enumerate(model.blocks):
            attention = block.attn(block.norm1(x))
            x = x + attention
            n, mlp = block.norm2(x), block.mlp
            if suffix == "GKAN":
                expected |= {f"blocks.{number}.mlp.phi1": n, f"blocks.{number}.mlp.phi2": mlp.fc1(mlp.phi1(n))}
            elif suffix == "KAT":
                expected |= {f"blocks.{number}.mlp.act1": n, f"blocks.{number}.mlp.act2": mlp.fc1(mlp.act1(n))}
            else:
                first, second = mlp.layers
                norms = [getattr(layer, "layernorm", nn.Identity()) for layer in mlp.layers]
                expected |= {f"blocks.{number}.mlp.layers.0": norms[0](n),
                             f"blocks.{number}.mlp.layers.1": norms[1](first(n))}
            y = mlp(n)
            x = x + y
            outputs |= {f"blocks.{number}.attn": attention, f"blocks.{number}.mlp": y, f"blocks.{number}": x}
    assert found.inputs.keys() == expected.keys() == function_layers(model).keys()
    for name, u in expected.items():
        inputs = found.inputs[name]
        reference = filled(function_layers(model)[name], u)
        assert (inputs.counts - reference.counts).abs().sum() <= 1e-3 * u.numel()      # rounding moves a few over an edge
        torch.testing.assert_close(inputs.extremes, reference.extremes, atol=1e-4, rtol=1e-4)
    assert found.outputs.keys() == outputs.keys()
    for name, y in outputs.items():
        assert found.outputs[name] == pytest.approx(y.square().mean().sqrt().item(), rel=1e-4)


def test_an_mlp_has_blocks_and_no_functions():
    found = collect_inputs(learned("ViT"), [torch.randn(2, 3, 32, 32)])
    assert found.inputs == {} and len(found.outputs) == 12 and all(value > 0 for value in found.outputs.values())


def test_hooks_see_through_torch_compile():
    model, images = learned("GKAN"), torch.randn(2, 3, 32, 32)
    plain = collect_inputs(model, [images])
    model.compile(backend="eager")
    model(images)
    found = collect_inputs(model, [images])
    assert all(torch.equal(found.inputs[name].counts, inputs.counts) for name, inputs in plain.inputs.items())


# ---------------------------------------------------------------- measures
def test_measures_of_a_group_kan_by_hand():
    phi = activation(base="identity", groups=2)
    with torch.no_grad():
        phi.coefficients.zero_()
        phi.coefficients[1, 3] = 2.0
    u = torch.randn(40_000, 12) * 0.8
    found = measure(phi, filled(phi, u))
    bump = 2 * rswaf_basis(u[:, 6:], torch.tensor(phi.points), phi.h)[..., 3]
    assert (found.functions, found.units, found.dead, found.points) == (2, "groups", 0, 8)
    assert found.furthest == pytest.approx(bump.square().mean().sqrt().item(), rel=1e-3)
    assert found.distance == pytest.approx(found.furthest / 2)
    assert found.gain[0].item() == pytest.approx(1) and found.gain[1].item() == pytest.approx(
        ((u[:, 6:] + bump).std() / u[:, 6:].std()).item(), rel=1e-3)
    assert (found.mean, found.std) == (pytest.approx(u.mean().item(), abs=1e-3), pytest.approx(u.std().item(), rel=1e-3))
    assert (found.smallest, found.largest) == (u.min().item(), u.max().item())
    assert found.off_grid == pytest.approx((u.abs() > 3).double().mean().item(), abs=1e-6)


def test_dead_groups_and_inputs():
    phi = GroupActivation(6, groups=3, base="relu")
    u = torch.randn(1000, 6)
    u[:, 2:4] -= 9          # nothing comes through the second
    u[:, 4:] = 0.7          # and nothing ever changes in the third
    assert measure(phi, filled(phi, u)).dead == 2
    layer = FasterKANLayer(4, 3)
    with torch.no_grad():
        layer.spline_linear.weight[:, 8:16] *= 1e-4
    found = measure(layer, filled(layer, torch.randn(1000, 4)))
    assert (found.units, found.functions, found.dead, found.distance) == ("inputs", 12, 1, None)


def test_the_distance_of_splines_from_their_base_branch():
    torch.manual_seed(0)
    layer, u = FasterKANLayer(1, 1, base_branch=True), torch.randn(20_000, 1)
    found = measure(layer, filled(layer, u))
    layer.layernorm = nn.Identity()
    with torch.no_grad():
        spline = layer(u) - layer.base_linear.weight * F.silu(u)
    assert found.distance == pytest.approx(spline.square().mean().sqrt().item(), rel=5e-3)


# ---------------------------------------------------------------- attention
@pytest.mark.parametrize("name", ["vit_nano_patch8_32_KAN", "deit_tiny_distilled_patch16_224_ViT", "deit_small_patch16_224",
                                  "eva02_tiny_patch14_224"])
def test_attention_maps_are_what_the_model_computes(name):
    torch.manual_seed(0)
    kwargs = {"img_size": 56} if "eva" in name else {"img_size": 32}
    model, images = timm.create_model(name, num_classes=3, **kwargs).eval(), torch.randn(2, 3, *2 * [kwargs["img_size"]])
    maps = attention_maps(model, images)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    assert maps.shape == (12 if "nano" not in name else 4, 2, 6 if "small" in name else 3, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert not any(m._forward_hooks for m in model.modules())
    if "eva" in name:
        return
    attn, seen = model.blocks[-1].attn, []
    hook = attn.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    with torch.no_grad():
        model(images)
        hook.remove()
        assert attn.fused_attn      # the model is as it was
        (x, y), = seen
        v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)[2]
        torch.testing.assert_close(attn.proj((maps[-1] @ v).transpose(1, 2).flatten(2)), y, atol=1e-5, rtol=1e-4)


def test_models_without_one_sequence_of_tokens_are_told():
    for name, size in (("resnet10t", 32), ("swin_tiny_patch4_window7_224", 224)):
        assert "no attention" in sentence(attention_maps, timm.create_model(name), torch.randn(1, 3, size, size))


def test_rollout_by_hand():
    a = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])          # two heads
    b = torch.tensor([[[0.2, 0.8], [1.0, 0.0]], [[0.6, 0.4], [0.0, 1.0]]])
    maps = torch.stack([a, b])[:, None]
    first, second = ([[0.75, 0.25], [0.25, 0.75]], [[0.7, 0.3], [0.25, 0.75]])
    expected = torch.tensor(second) @ torch.tensor(first)
    torch.testing.assert_close(attention_rollout(maps), expected[None])


def test_rollout_follows_a_chain():
    """Each token takes from the next one: after two blocks a quarter comes from the one after that."""
    shift = torch.eye(4).roll(1, 1).expand(2, 1, 3, 4, 4)
    rollout = attention_rollout(shift)[0]
    torch.testing.assert_close(rollout[0], torch.tensor([0.25, 0.5, 0.25, 0.0]))


def test_token_maps():
    model = timm.create_model("deit_tiny_distilled_patch16_224_KAN", img_size=32, hdim_kan=8)
    attention = torch.arange(36.0).view(1, 6, 6)
    maps = token_maps(model, attention)
    assert {name: value.tolist() for name, value in maps.items()} == {
        "class token": [[[2, 3], [4, 5]]], "distillation token": [[[8, 9], [10, 11]]]}
    pooled = timm.create_model("vit_nano_patch8_32_ViT", img_size=16, class_token=False, global_pool="avg")
    assert token_maps(pooled, torch.eye(4)[None])["mean over patches"].tolist() == [[[0.25, 0.25], [0.25, 0.25]]]


def test_panels():
    panels = attention_panels(learned("GKAN"), torch.randn(3, 32, 32))
    assert list(panels) == ["rollout\nclass token", *(f"block {n}\nclass token" for n in range(4)),
                            *(f"block 3\nhead {n}" for n in range(3))]
    torch.testing.assert_close(panels["block 3\nclass token"], sum(panels[f"block 3\nhead {n}"] for n in range(3)) / 3)
    figure = draw_attention(torch.rand(3, 32, 32), panels, "the $image\\$ of <a> class")
    rollout = panels["rollout\nclass token"]
    assert len(figure.axes) == 9
    assert figure.axes[1].get_title() == f"rollout\nclass token\n{rollout.min():.1%} – {rollout.max():.1%}"
    assert torch.equal(torch.tensor(figure.axes[1].images[1].get_array()), rollout)
    assert len(png(figure)) > 1000


# ---------------------------------------------------------------- pictures
def test_the_groups_that_left_the_base_are_drawn():
    phi = GroupActivation(24, groups=12)
    with torch.no_grad():
        phi.coefficients[2:10, 0] = torch.arange(8.0) + 1
    axes = Figure().subplots()
    draw_functions(axes, "it.phi2", phi)
    drawn = axes.lines[:9]
    assert [line.get_label() for line in drawn] == [*map(str, range(2, 10)), "base"]
    u = torch.tensor(drawn[-1].get_xdata())
    torch.testing.assert_close(torch.tensor(drawn[-1].get_ydata()), F.gelu(u))
    bump = torch.tensor(drawn[0].get_ydata()) - F.gelu(u)
    assert (float(u[0]), float(u[-1]), float(u[bump.argmax()])) == (-4, 4, pytest.approx(-3, abs=0.03))
    assert "8 of 12" in axes.get_title() and len(axes.lines) == 9 + 8       # and a line for each grid point


def test_which_groups_are_furthest_depends_on_what_arrives():
    phi = GroupActivation(24, groups=12)
    with torch.no_grad():
        phi.coefficients[:, -1] = torch.arange(12.0) + 1        # all of it at the upper end
        phi.coefficients[:4, 0] = 1.0
    axes = Figure().subplots()
    draw_groups(axes, "it", phi, filled(phi, torch.randn(1000, 24) * 0.1 - 3))       # where nothing arrives
    assert [line.get_label() for line in axes.lines[:9]][:4] == list("0123")


@pytest.mark.parametrize("name", edge_layers())
def test_drawn_edges_are_the_functions(name):
    layer, u = edge_layers()[name], torch.randn(500, 3)
    inputs = filled(layer, u)
    figure = functions_figure({"blocks.0": layer}, {"blocks.0": inputs})
    axes, below = figure.axes
    expected = edge_functions(layer, drawn_range(layer, inputs), inputs)
    for line, (label, values) in zip(axes.lines, expected.items()):
        assert line.get_label() == label
        torch.testing.assert_close(torch.tensor(line.get_ydata()), values)
    steps, = below.patches
    torch.testing.assert_close(torch.tensor(steps.get_data().values), inputs.shares()[0])
    assert f"{inputs.off_grid:.1%} of the inputs off the grid" in axes.get_title()


@pytest.mark.parametrize("scale, wide", [(1.0, False), (0.1, True)])
def test_functions_are_drawn_over_what_arrives(scale, wide):
    """Not over the grid, its 5th and 95th percentile marked, with a word where the grid is far wider."""
    torch.manual_seed(0)
    phi, u = activation(), torch.randn(2000, 12) * scale + 0.2
    axes = Figure().subplots()
    draw_functions(axes, "it", phi, filled(phi, u))
    low, p5, p95, high = u.flatten().quantile(torch.tensor([0.001, 0.05, 0.95, 0.999])).tolist()
    bin = InputHistogram(12, phi.grid_points()).width
    assert axes.get_xlim() == pytest.approx((low, high), abs=bin)
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 5
    assert all((line.get_xdata()[0], line.get_xdata()[-1]) == pytest.approx(axes.get_xlim()) for line in curves)
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert marks == pytest.approx([p5, p95], abs=bin) and "5th and 95th percentile" in axes.get_xlabel()
    assert (f"nine in ten within {(marks[1] - marks[0]) / 6:.0%} of its width" in axes.get_title()) is wide


def test_quantiles():
    u = torch.randn(4000, 5) * 0.7
    inputs = filled(FasterKANLayer(5, 2), u)
    for share in (0.001, 0.05, 0.5, 0.95, 0.999):
        assert inputs.quantile(share) == pytest.approx(u.flatten().quantile(share).item(), abs=inputs.width)
    inputs = filled(FasterKANLayer(5, 2), torch.full((10, 5), 0.3))       # nothing varies
    assert inputs.quantile(0.05) == inputs.quantile(0.95) == pytest.approx(0.3)
    inputs = filled(FasterKANLayer(5, 2), torch.tensor([[-1e6, -1, 0, 1, 1e6]]))
    assert inputs.quantile(0.05) >= inputs.start and inputs.quantile(0.99) <= float(inputs.edges[-1])


def test_what_the_note_on_wide_grids_says():
    phi = activation()
    narrow, fitting = (measure(phi, filled(phi, torch.randn(500, 12) * scale)) for scale in (0.1, 1))
    assert narrow.too_wide and not fitting.too_wide and wide_grid_note({"a": fitting}) == ""
    assert narrow.p5 == pytest.approx(-0.164, abs=0.03) and narrow.p95 == pytest.approx(0.164, abs=0.03)
    text = wide_grid_note({"a": fitting, "b": narrow, "c": narrow})
    assert f"inputs of b lie within [{narrow.p5:.2g}, {narrow.p95:.2g}], its grid is [-3, 3]" in text
    assert "1 of the other 2 layers" in text and "8 points" in text and "--kan-grid-range" in text and "\n" not in text


def test_what_a_warning_says():
    layer = FasterKANLayer(3, 2)
    near, far = (measure(layer, filled(layer, torch.randn(500, 3) * scale)) for scale in (0.5, 3))
    assert off_grid_warning({"a": near}) == ""
    text = off_grid_warning({"a": near, "b": far, "c": near, "d": far})
    assert "of b fall off its grid [-2, 2]" in text and "1 of the other 3 layers" in text and "\n" not in text
