"""A trained MLP's function survives in a KAN: exactly in a group KAN, up to the fit in a full-edge one."""
import pytest
import timm
import torch
from helpers import GKAN, NANO, TWIN, every
from models import trained
from torch import nn

from models_kan import ModelSpec
from vision_kan.common.errors import UserError
from vision_kan.models import conversion
from vision_kan.models.finetune import load_finetune

FULL = {"kan_basis": "covering", "kan_second_norm": "static", "hdim_kan": 384}


def images(n: int = 32, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def spec(**kwargs) -> ModelSpec:
    return ModelSpec(NANO, {"num_classes": 10, **FULL, **kwargs})


def convert(source: nn.Module, target: ModelSpec, batch: torch.Tensor | None = None):
    model = timm.create_model(target.name, **target.kwargs).eval()
    batch = images() if batch is None else batch
    report, errors = conversion.load_converted(model, target, source.state_dict(), lambda: batch)
    return model, report, errors


@torch.no_grad()
def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()


@pytest.mark.parametrize("name, size", [
    ("deit_tiny_patch16_224", 224), ("deit_small_patch16_224", 224),
    pytest.param("deit_base_patch16_224", 224, marks=pytest.mark.slow), ("deit_tiny_distilled_patch16_224", 224),
    pytest.param("deit_base_patch16_384", 384, marks=pytest.mark.slow), ("deit3_small_patch16_224", 224)])
def test_a_group_kan_computes_what_the_mlp_did(name, size):
    """Every family of DeiT, two blocks of it: each block is converted alike."""
    source = trained(f"{name}_ViT", depth=2)
    model = timm.create_model(f"{name}_GKAN", num_classes=10, depth=2).eval()
    report = load_finetune(model, source.state_dict())
    assert not report.dropped and not report.initial
    assert {key for key in report.converted} == {key for key in model.state_dict() if ".mlp.phi" in key}
    batch = images(1, size)
    with torch.no_grad():
        theirs, ours = source(batch), model(batch)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("timm_name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_timms_own_deit_becomes_a_group_kan(timm_name):
    source = trained(timm_name, depth=2)
    model = timm.create_model(f"{timm_name}_GKAN", num_classes=10, depth=2).eval()
    load_finetune(model, source.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images(1, 224)), source(images(1, 224)), atol=1e-5, rtol=1e-5)


def test_deit3s_own_key_names_become_a_group_kan():
    """DeiT-III's files call layer scale gamma_1 and gamma_2."""
    source = trained("deit3_small_patch16_224_ViT", depth=2)
    theirs = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
              for key, value in source.state_dict().items()}
    model = timm.create_model("deit3_small_patch16_224_GKAN", num_classes=10, depth=2).eval()
    load_finetune(model, theirs)
    with torch.no_grad():
        torch.testing.assert_close(model(images(1, 224)), source(images(1, 224)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid, points, bound", every(3, [((-3, 3), 8, 0.05), ((-4, 4), 8, 0.02), ((-5, 5), 12, 0.01)]))
def test_a_full_edge_kan_is_fitted_block_by_block(grid, points, bound):
    """The bounds follow from how well the basis holds the identity and GELU: accuracy grows with the grid."""
    source = trained()
    model, report, errors = convert(source, spec(kan_grid_range=grid, kan_grid_points=points))
    assert [e.block for e in errors] == [0, 1, 2, 3]
    assert all(0 < e.error < bound for e in errors)
    assert not report.dropped and not report.initial and report.converted
    with torch.no_grad():
        assert relative(model(images(16)), source(images(16))) < 2 * bound


def test_the_error_is_that_of_images_it_was_not_fitted_on_too():
    source = trained()
    model, _, errors = convert(source, spec(kan_grid_range=(-4, 4)))
    other = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    arriving = []
    source.blocks[0].norm2.register_forward_pre_hook(lambda _, args: arriving.append(args[0]))
    with torch.no_grad():
        source(other)
        theirs, ours = (net.blocks[0].mlp(net.blocks[0].norm2(arriving[0])) for net in (source, model))
    assert errors[0].error < relative(ours, theirs) < 0.02


def test_a_norm_weight_of_zero_is_no_division():
    source = trained()
    with torch.no_grad():
        source.blocks[0].norm2.weight[:5] = 0
    model, _, errors = convert(source, spec(kan_grid_range=(-4, 4)))
    assert errors[0].error < 0.02
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_constant_hidden_unit_stays_constant():
    source = trained()
    with torch.no_grad():
        source.blocks[1].mlp.fc1.weight[3] = 0
    _, _, errors = convert(source, spec(kan_grid_range=(-4, 4)))
    assert errors[1].error < 0.02


def test_inputs_off_the_grid_are_counted():
    source = trained()
    narrow = convert(source, spec(kan_grid_range=(-1, 1)))[2]
    wide = convert(source, spec(kan_grid_range=(-4, 4)))[2]
    assert all(0.1 < e.outside < 0.5 for e in narrow)       # of a standard normal 32% lie beyond 1
    assert all(e.outside < 0.005 for e in wide)
    assert all(a.error > 3 * b.error for a, b in zip(narrow, wide))


@pytest.mark.parametrize("change, reason", [
    ({"hdim_kan": 48}, "--hdim_kan 384"), ({"kan_basis": "original"}, "--kan-basis covering"),
    ({"kan_second_norm": "layer"}, "--kan-second-norm static")])
def test_what_cannot_be_converted_is_dropped_with_the_reason(change, reason):
    def unused():
        raise AssertionError("no calibration batch is needed")

    target = spec(**change)
    model = timm.create_model(target.name, **target.kwargs)
    report, errors = conversion.load_converted(model, target, trained().state_dict(), unused)
    assert not errors and not report.converted
    notes = {note for key, note in report.dropped.items() if ".mlp." in key}
    assert len(notes) == 1 and reason in notes.pop()
    with pytest.raises(UserError, match=reason):
        conversion.mlp_to_full_edge(model, trained(), images())


@pytest.mark.parametrize("change", [{"depth": 2}, {"mlp_ratio": 2}], ids=str)
def test_random_weights_are_not_taken_for_an_mlp(change):
    """A source without some of the MLPs, or with others: nothing is fitted to what a new twin would have there."""
    target, source = spec(), timm.create_model(TWIN, num_classes=10, **change)
    model = timm.create_model(target.name, **target.kwargs)
    report, errors = conversion.load_converted(model, target, source.state_dict(), images)
    assert not errors and not report.converted and any(".mlp.layers." in key for key in report.initial)
    lacks = "blocks.2.norm2.weight" if "depth" in change else "blocks.0.mlp.fc1.weight"
    assert {note for key, note in report.dropped.items() if ".mlp." in key} == {
        f"no conversion: it has no {lacks} of the model's shape"}


@pytest.mark.slow
def test_the_images_are_asked_for_only_by_a_full_edge_kan():
    def unused():
        raise AssertionError("no calibration batch is needed")

    source = trained()
    for name in (GKAN, TWIN):
        model = timm.create_model(name, num_classes=10)
        _, errors = conversion.load_converted(model, ModelSpec(name, {"num_classes": 10}), source.state_dict(), unused)
        assert not errors


def test_other_sizes_are_converted_at_the_models_own():
    """Position embedding resampled, another class count: as for any fine-tuning."""
    source = trained(img_size=64)
    model, report, errors = convert(source, spec(num_classes=3, kan_grid_range=(-4, 4)))
    assert report.resampled.keys() == {"pos_embed"} and {"head.weight", "head.bias"} <= report.initial.keys()
    assert max(e.error for e in errors) < 0.02


def test_the_source_and_its_mode_are_left_alone():
    source = trained().train()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    model = timm.create_model(NANO, **spec().kwargs)
    conversion.mlp_to_full_edge(model, source, images(4))
    assert source.training and all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    assert not source.blocks[0].norm2._forward_pre_hooks


def test_table():
    lines = conversion.table([conversion.BlockError(0, 0.0123, 0.004)]).splitlines()
    assert "1.23%" in lines[1] and "0.40%" in lines[1]


@pytest.mark.parametrize("branch", [False, True])
def test_a_converted_kan_trains(branch):
    model, _, _ = convert(trained(), spec(kan_base_branch=branch), images(4))
    model.train()(images(2)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
