"""The group KAN: its op against the definition, its modules against the MLP that it starts as."""
import copy
import math

import pytest
import timm
import torch
from paths import BASES_BY_HAND, error, exact_activation, gradients, saved
from timm.layers import Mlp
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import models_kan  # noqa: F401  (registers the models)
from vision_kan.kernels import BASES
from vision_kan.layers.group_kan import GroupActivation, GroupKAN


def phi_of(channels=16, seed=0, dtype=torch.float32, **kwargs):
    """An activation whose every parameter differs from its initial value."""
    phi = GroupActivation(channels, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        phi.coefficients.normal_(0, 0.5, generator=generator)
        if phi.scale is not None:
            phi.scale.uniform_(0.5, 1.5, generator=generator)
    return phi.to(dtype)


def kan_of(seed=0, dtype=torch.float32, **kwargs):
    """A feed-forward of 16 channels whose activations differ from their bases."""
    torch.manual_seed(seed)
    kan = GroupKAN(16, 32, **{"groups": 4, **kwargs})
    with torch.no_grad():
        for phi in kan.modules():
            if isinstance(phi, GroupActivation):
                phi.coefficients.normal_(0, 0.5)
                if phi.scale is not None:
                    phi.scale.uniform_(0.5, 1.5)
    return kan.to(dtype)


# ---------------------------------------------------------------- the activation
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_every_base(base, trainable):
    assert BASES_BY_HAND.keys() == {"none", *BASES}
    phi = phi_of(base=base, groups=4, trainable_base=trainable, dtype=torch.float64)
    u, dy = (torch.randn(40, 16, dtype=torch.float64) * 2 for _ in range(2))
    u.requires_grad_()

    def by_hand():
        s = phi.scale[torch.arange(16) // 4] if trainable else 1.0
        return s * BASES_BY_HAND[base](u) + exact_activation(u, phi.coefficients, phi.points, phi.h)

    leaves = [u, *phi.parameters()]
    assert len(leaves) == 3 if trainable else len(leaves) == 2
    want = gradients(by_hand, leaves, dy)
    for forward in (phi, phi.reference_forward):
        got = gradients(lambda forward=forward: forward(u), leaves, dy)
        assert all(error(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_it_begins_as_its_base(base):
    phi, u = GroupActivation(16, base=base), torch.randn(9, 16)
    assert error(phi(u), BASES[base](u)) < 2e-7
    assert error(GroupActivation(16, base=base, trainable_base=True)(u), BASES[base](u)) < 2e-7


@pytest.mark.parametrize("groups, functions", [(1, 1), (8, 8), (0, 24), (24, 24)])
def test_groups(groups, functions):
    phi = phi_of(24, groups=groups, trainable_base=True)
    assert phi.coefficients.shape == (functions, 8) and phi.scale.shape == (functions,)
    y = phi(torch.linspace(-3, 3, 24).reshape(24, 1).expand(-1, 24))        # the same input to every channel
    alike = [{j for j in range(24) if torch.allclose(y[:, i], y[:, j])} for i in range(24)]
    each = 24 // functions
    assert alike == [set(range(i // each * each, (i // each + 1) * each)) for i in range(24)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_autocast_and_low_precision_modules(dtype, tolerance):
    phi, u = phi_of(trainable_base=True), torch.randn(50, 16)
    want = phi(u.to(dtype).float())
    with torch.autocast("cpu", dtype):
        y = phi(u.to(dtype))
        assert y.dtype == dtype and torch.equal(phi(u), y)          # rounded first, as a linear map's input is
    assert error(y, want) < tolerance
    low = copy.deepcopy(phi).to(dtype)
    assert low(u.to(dtype)).dtype == dtype and error(low(u.to(dtype)), want) < 2 * tolerance


@pytest.mark.parametrize("kwargs, words", [
    (dict(groups=5), "5 groups do not divide 16 channels"), (dict(groups=32), "32 groups do not divide 16"),
    (dict(groups=-1), "-1 groups"), (dict(base="tanh"), "base tanh is not one of identity, gelu"),
    (dict(num_grids=1), "at least 2 points"), (dict(grid_min=3.0), "min < max"), (dict(h=0.0), "h > 0"),
    (dict(h=-1.0), "h > 0"), (dict(h=math.nan), "h > 0"), (dict(grid_max=math.nan), "min < max"),
    (dict(h=0.29), r"h = 0.29 is too narrow for the grid \[-3.0, 3.0\]: take at least 0.3"),
    (dict(num_grids=30), "too narrow")], ids=str)
def test_what_cannot_be_built(kwargs, words):
    with pytest.raises(ValueError, match=words):
        GroupActivation(16, **kwargs)
    with pytest.raises(ValueError, match=words):
        GroupKAN(16, **kwargs)


def test_the_narrowest_width_that_is_allowed_is_exact():
    phi = phi_of(16, h=0.3, groups=2, dtype=torch.float64)
    u = torch.linspace(-8, 8, 160, dtype=torch.float64).reshape(10, 16)
    want = F.gelu(u) + exact_activation(u, phi.coefficients, phi.points, 0.3)
    assert (phi(u) - want).abs().max() < 1e-7


def test_the_grid_and_its_width():
    phi = GroupActivation(16, grid_min=-1, grid_max=2, num_grids=7)
    assert phi.h == pytest.approx(0.5) and phi.points == pytest.approx([-1, -0.5, 0, 0.5, 1, 1.5, 2])
    assert torch.equal(phi.grid, torch.tensor(phi.points))
    assert GroupActivation(16, h=0.7).h == 0.7
    assert GroupActivation(16).h == pytest.approx(6 / 7)
    assert {name for name, _ in phi.named_parameters()} == {"coefficients"}


# ---------------------------------------------------------------- the feed-forward
@pytest.mark.parametrize("kwargs", [{}, {"input_phi": False}, {"trainable_base": True}, {"groups": 1}, {"groups": 0}], ids=str)
def test_it_begins_as_timms_mlp(kwargs):
    kan, mlp = GroupKAN(16, 32, **kwargs), Mlp(16, 32)
    mlp.load_state_dict({key: value for key, value in kan.state_dict().items() if key.startswith("fc")})
    x = torch.randn(3, 20, 16, requires_grad=True)
    dy = torch.randn(3, 20, 16)
    assert error(kan(x), mlp(x)) < 1e-6
    weights = "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"
    got, want = (gradients(lambda m=m: m(x), [x, *map(m.get_parameter, weights)], dy) for m in (kan, mlp))
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    assert type(kan.phi1) is (nn.Identity if kwargs.get("input_phi") is False else GroupActivation)


def test_another_base_takes_the_place_of_gelu():
    kan, mlp = GroupKAN(16, 32, base="silu"), Mlp(16, 32, act_layer=nn.SiLU)
    mlp.load_state_dict({key: value for key, value in kan.state_dict().items() if key.startswith("fc")})
    x = torch.randn(5, 16)
    assert error(kan(x), mlp(x)) < 1e-6 and kan.phi1.base == "identity"


def test_the_formula():
    """y = W2 phi2(W1 phi1(n) + b1) + b2."""
    kan, n = kan_of(dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    z = n + exact_activation(n, kan.phi1.coefficients, kan.phi1.points, kan.phi1.h)
    v = z @ kan.fc1.weight.T + kan.fc1.bias
    z = BASES_BY_HAND["gelu"](v) + exact_activation(v, kan.phi2.coefficients, kan.phi2.points, kan.phi2.h)
    assert error(kan(n), z @ kan.fc2.weight.T + kan.fc2.bias) < 1e-12


def test_widths_names_and_dropout():
    assert list(GroupKAN(16).state_dict()) == [
        "phi1.coefficients", "phi1.grid", "fc1.weight", "fc1.bias", "phi2.coefficients", "phi2.grid", "fc2.weight", "fc2.bias"]
    kan = GroupKAN(16, 32, 8, drop=(0.25, 0.5), hdim=24, bias=False, groups=4, num_grids=5)
    assert (kan.fc1.weight.shape, kan.fc2.weight.shape, kan.fc1.bias, kan.fc2.bias) == ((24, 16), (8, 24), None, None)
    assert (kan.drop1.p, kan.drop2.p) == (0.25, 0.5)
    assert (kan.phi1.channels, kan.phi2.channels, kan.phi2.coefficients.shape) == (16, 24, (4, 5))
    x = torch.randn(4, 16)
    hidden_only, last_only = kan_of(drop=(1.0, 0.0)), kan_of(drop=(0.0, 1.0))
    assert last_only(x).abs().max() == 0
    torch.testing.assert_close(hidden_only(x), hidden_only.fc2.bias.expand(4, -1))
    assert torch.equal(hidden_only.eval()(x), kan_of()(x))
    with pytest.raises(TypeError):
        GroupKAN(16, kan_groups=3)


@pytest.mark.parametrize("size", ["vit_nano_patch8_32", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_a_model_begins_as_its_twin(size):
    settings = dict(img_size=32, depth=2, num_classes=5)
    twins = []
    for suffix in ("GKAN", "ViT"):
        torch.manual_seed(7)
        twins.append(timm.create_model(f"{size}_{suffix}", **settings).eval())
    kan, vit = (model.state_dict() for model in twins)
    assert vit.keys() == {key for key in kan if ".phi" not in key}
    assert all(torch.equal(kan[key], vit[key]) for key in vit)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twins[0](x), twins[1](x), rtol=0, atol=1e-5)


def test_the_function_leaves_the_mlps_once_it_is_trained():
    """Each coefficient has a gradient at the start, though it is zero itself."""
    torch.manual_seed(0)
    model = timm.create_model("vit_nano_patch8_32_GKAN", depth=2, num_classes=5, kan_trainable_base=True)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".phi" in name:
            assert parameter.grad.ne(0).float().mean() > 0.9, name


@pytest.mark.parametrize("mode", ["", "jax", "moco", "reset"])
def test_from_the_meta_device(mode):
    model = timm.create_model("vit_nano_patch8_32_GKAN", device="meta", depth=1, kan_grid_range=(-1.5, 1.0),
                              kan_grid_points=6, kan_trainable_base=True)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights(mode)
    assert not [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    for phi in (model.blocks[0].mlp.phi1, model.blocks[0].mlp.phi2):
        assert torch.equal(phi.grid, torch.linspace(-1.5, 1.0, 6))
        assert phi.coefficients.abs().max() == 0 and (phi.scale == 1).all()
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_in_a_device_context():
    with torch.device("meta"):
        kan = GroupKAN(16, 32)
    assert kan.phi2.points == GroupKAN(16, 32).phi2.points and kan.phi2.grid.is_meta
    kan.to_empty(device="cpu")
    for phi in (kan.phi1, kan.phi2):
        phi.reset_parameters()
    assert torch.equal(kan.phi1.grid, GroupKAN(16).phi1.grid) and kan.phi2.coefficients.abs().max() == 0


def test_deepcopy_state_dict_and_moving_average():
    kan, x = kan_of(trainable_base=True), torch.randn(5, 16)
    twin, other = copy.deepcopy(kan), kan_of(1, trainable_base=True)
    assert torch.equal(twin(x), kan(x)) and not torch.equal(other(x), kan(x))
    other.load_state_dict(kan.state_dict())
    assert torch.equal(other(x), kan(x))
    average = ModelEmaV3(kan, decay=0.5)
    with torch.no_grad():
        for parameter in kan.parameters():
            parameter.add_(1)
    average.update(kan)
    assert torch.equal(twin(x), other(x))               # the copies share nothing
    for (name, mean), before, after in zip(average.module.named_parameters(), twin.parameters(), kan.parameters()):
        torch.testing.assert_close(mean, (before + after) / 2, msg=name)
    assert torch.equal(average.module.phi1.grid, kan.phi1.grid)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_another_precision_can_be_loaded(dtype):
    kan = kan_of(num_grids=16)
    low = copy.deepcopy(kan).to(dtype)
    low.load_state_dict(copy.deepcopy(low).state_dict())
    kan.load_state_dict(low.state_dict())
    assert torch.equal(kan.phi1.coefficients, low.phi1.coefficients.float())


@pytest.mark.parametrize("grid", [dict(grid_min=-2.0), dict(grid_max=2.9), dict(num_grids=7)], ids=str)
def test_coefficients_of_another_grid_are_refused(grid):
    """They would be other functions, even where their shapes fit."""
    source, model = kan_of(**grid), kan_of(1)
    before = model.phi1.coefficients.clone()
    low, high, count = (source.phi1.grid[0].item(), source.phi1.grid[-1].item(), len(source.phi1.grid))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"phi1.grid has {count} points from {low:g} to {high:g} where the "
                                               "model has 8 from -3 to 3"):
            model.load_state_dict(source.state_dict(), strict=strict)
    if "num_grids" in grid:
        assert torch.equal(model.phi1.coefficients, before)
    without = {key: value for key, value in kan_of(2).state_dict().items() if "grid" not in key}
    model.load_state_dict(without, strict=False)        # an MLP's, or what says nothing of a grid


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"input_phi": False, "trainable_base": True}], ids=str)
def test_compiled_without_a_graph_break(kwargs):
    kan, x = kan_of(**kwargs), torch.randn(2, 9, 16, requires_grad=True)
    dy, leaves = torch.randn(2, 9, 16), [x, *kan.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(kan, fullgraph=True, backend="aot_eager")
    got, want = (gradients(lambda f=f: f(x), leaves, dy) for f in (compiled, kan))
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    kan, x, dy = kan_of(), torch.randn(30, 16, requires_grad=True), torch.randn(30, 16)
    results = []
    for forward in (kan, lambda x: checkpoint(kan, x, use_reentrant=reentrant)):
        kan.zero_grad()
        x.grad = None
        y = forward(x)
        y.backward(dy)
        results.append([y, x.grad, *(p.grad.clone() for p in kan.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_says_what_it_is():
    text = repr(GroupKAN(16, 32, groups=4, h=0.5))
    assert "16 channels, 4 groups, base=identity, 8 points on [-3, 3], h=0.5" in text
    assert "32 channels, 4 groups, base=gelu" in text


def test_infinities_and_nan_of_the_input_are_not_hidden():
    phi = phi_of(4, groups=2)
    y = phi(torch.tensor([[math.inf, math.nan, 0.0, 1.0]]))
    assert y.isfinite().tolist() == [[False, False, True, True]]


def test_a_feed_forward_keeps_no_more_than_an_mlp_but_its_input_and_hidden_values():
    kan, mlp, x = kan_of(), Mlp(16, 32), torch.randn(500, 16, requires_grad=True)
    ours, _ = saved(lambda: kan(x))
    theirs, _ = saved(lambda: mlp(x))
    # phi1's result beside its input; the channels' coefficients
    assert sum(ours.values()) <= sum(theirs.values()) + 4 * (500 * 16 + 8 * (16 + 32))


def test_two_runs_are_bit_equal():
    runs = []
    for _ in range(2):
        kan = kan_of(trainable_base=True)
        x = torch.randn(7, 30, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = kan(x)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *kan.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
