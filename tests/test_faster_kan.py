import copy
import math

import pytest
import torch
from paths import error, exact_linear
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import faster_kan
from faster_kan import FasterKAN, FasterKANLayer
from vision_kan.kernels import rswaf_linear

# About three times the largest error of an output that was measured against fp64; gradients have 8 times that.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Names of options, and whether one exponential serves all grid points.
LAYERS = {
    "original": (dict(), True),
    "fixed, 2 points": (dict(num_grids=2, h=0.5), True),
    "fixed, 16 points": (dict(num_grids=16, h=None), True),
    "off centre": (dict(grid_min=-0.5, grid_max=3.0, num_grids=5), True),
    "widest for one exponential": (dict(grid_min=-1.0, grid_max=1.0, num_grids=16, h=0.1), True),
    "too wide for one exponential": (dict(grid_min=-1.01, grid_max=1.01, num_grids=16, h=0.1), False),
    "very wide": (dict(grid_min=-20.0, grid_max=20.0, num_grids=9, h=0.05), False),
    "trainable grid": (dict(train_grid=True), False),
    "trainable h": (dict(train_h=True), False),
    "both trainable": (dict(num_grids=3, train_grid=True, train_h=True), False),
}


def layer_of(name="original", n_in=6, n_out=5, dtype=torch.float32):
    """A layer whose every parameter differs from its initial value."""
    options, single_exp = LAYERS[name]
    torch.manual_seed(0)
    layer = FasterKANLayer(n_in, n_out, **options)
    assert layer.rbf.single_exp is single_exp
    with torch.no_grad():
        layer.layernorm.weight.uniform_(0.5, 1.5)
        layer.layernorm.bias.normal_(0, 0.3)
        if isinstance(layer.rbf.grid, nn.Parameter):
            layer.rbf.grid.add_(torch.empty_like(layer.rbf.grid).uniform_(-0.1, 0.1))
        if isinstance(layer.rbf.h, nn.Parameter):
            layer.rbf.h.fill_(0.41)
    return layer.to(dtype)


def exact_layer(layer, x):
    norm = layer.layernorm
    u = F.layer_norm(x.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps)
    return exact_linear(u, layer.spline_linear.weight, layer.rbf.grid, layer.rbf.h)


def tolerance(name, dtype):
    """The single exponential is clamped where a bump of the widest grid has fallen to 2e-9."""
    return 1e-8 if dtype == torch.float64 and name.startswith("widest") else TOLERANCE[dtype]


# ---------------------------------------------------------------- values
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_is_the_definition(name, dtype):
    layer = layer_of(name, 21, 45, dtype)
    x = torch.randn(2, 5, 21, dtype=dtype) * 2
    y = layer(x)
    assert y.dtype == dtype
    assert error(y, exact_layer(layer, x)) < tolerance(name, dtype)


@pytest.mark.parametrize("shape, n_out", [
    ((7,), 3), ((1, 7), 3), ((1, 1, 7), 3), ((3, 1), 4), ((2, 3, 4, 7), 3), ((1, 21), 45), ((11, 45), 1), ((5, 7), 7)])
@pytest.mark.parametrize("name", ["original", "both trainable"])
def test_odd_shapes(name, shape, n_out):
    layer = layer_of(name, shape[-1], n_out, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], n_out)
    assert error(y, exact_layer(layer, x)) < 1e-13
    assert error(layer.reference_forward(x), exact_layer(layer, x)) < 1e-13


@pytest.mark.parametrize("name", ["original", "both trainable"])
@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (3, 0, 6)])
def test_empty_batch(name, shape):
    layer = layer_of(name)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.spline_linear.weight.grad.abs().max() == 0


def test_non_contiguous_input_and_gradient():
    layer = layer_of(dtype=torch.float64)
    base = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 4, 3, dtype=torch.float64)
    for x in (base.permute(1, 2, 0), base.permute(2, 1, 0), base.permute(2, 1, 0)[:, ::2]):
        assert not x.is_contiguous()
        dy = direction.permute([1, 2, 0] if x.shape[0] == 4 else [2, 1, 0])[:, :x.shape[1]]
        got, = torch.autograd.grad(layer(x), base, dy)
        want, = torch.autograd.grad(exact_layer(layer, x), base, dy)
        assert error(layer(x), exact_layer(layer, x)) < 1e-13
        assert error(got, want) < 1e-11


def test_a_gradient_expanded_from_one_number():
    layer = layer_of(dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    got, = torch.autograd.grad(layer(x).sum(), x)           # sum's gradient has strides 0
    want, = torch.autograd.grad(exact_layer(layer, x).sum(), x)
    assert error(got, want) < 1e-11


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_gradient_against_autograd_through_the_definition(name, dtype):
    layer = layer_of(name, 7, 9, dtype)
    x = (torch.randn(3, 11, 7) * 1.5).to(dtype).requires_grad_()
    dy = torch.randn(3, 11, 9).to(dtype)
    leaves = {"x": x, **dict(layer.named_parameters())}
    expected = {"x", "layernorm.weight", "layernorm.bias", "spline_linear.weight"}
    expected |= {"rbf.grid"} if "grid" in name or "both" in name else set()
    expected |= {"rbf.h"} if "trainable h" in name or "both" in name else set()
    assert set(leaves) == expected

    got = torch.autograd.grad(layer(x), list(leaves.values()), dy)
    exactly = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    want = torch.autograd.grad(exact_layer(exactly, x64), [x64, *exactly.parameters()], dy.double())
    for key, a, b in zip(leaves, got, want, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < 8 * tolerance(name, dtype), key


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_against_autograd_through_reference_forward(name):
    layer = layer_of(name, dtype=torch.float64)
    x = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    dy = torch.randn(13, 5, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), leaves, dy)
    want = torch.autograd.grad(layer.reference_forward(x), leaves, dy)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 8 * tolerance(name, torch.float64)


@pytest.mark.parametrize("name", ["original", "widest for one exponential", "very wide", "both trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inputs_of_1e4_stay_finite(name, dtype):
    layer = layer_of(name, dtype=dtype)
    u = torch.tensor([1e4, -1e4, 1e3, -30.0, 0.0, 2.0], dtype=dtype).repeat(3, 1).requires_grad_()
    weight, grid, h = layer.spline_linear.weight, layer.rbf.grid, layer.rbf.h
    y = rswaf_linear(u, weight, grid, h, layer.rbf.single_exp)
    leaves = [p for p in (u, weight, grid, h) if isinstance(p, nn.Parameter) or p is u]
    grads = torch.autograd.grad(y, leaves, torch.full_like(y, 100))
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert error(y, exact_linear(u, weight, grid, h)) < 8 * TOLERANCE[dtype]
    assert grads[0][:, :3].abs().max() < 1e-4       # no bump reaches there, so no slope
    with torch.no_grad():                           # and a LayerNorm that scales up to 1e4
        layer.layernorm.weight.fill_(1e4)
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# ---------------------------------------------------------------- memory and chunks
def saved_bytes(function, x):
    """(bytes saved for backward, each storage once; largest number of elements of a saved tensor that depends
    on x)."""
    storages, largest = {}, 0

    def pack(tensor):
        nonlocal largest
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        if not isinstance(tensor, nn.Parameter):
            largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return sum(storages.values()), largest


@pytest.mark.parametrize("kan", [{}, {"train_grid": True, "train_h": True}], ids=["fixed", "trainable"])
def test_backward_keeps_inputs_statistics_and_weights_only(kan):
    tokens, width, hidden, points = 600, 24, 16, 8
    model = FasterKAN(width, hidden, **kan)

    def by_reference(x):
        for layer in model.layers:
            x = layer.reference_forward(x)
        return x

    x = torch.randn(3, tokens // 3, width, requires_grad=True)
    ours, largest = saved_bytes(model, x)
    theirs, largest_theirs = saved_bytes(by_reference, x)
    parameters = sum(t.numel() for t in model.state_dict().values())
    # each layer: its input, LayerNorm's output, mean and reciprocal deviation of each token
    activations = tokens * (2 * width + 2) + tokens * (2 * hidden + 2)
    assert ours <= 4 * (activations + parameters) + 64
    assert largest == tokens * width
    assert largest_theirs == tokens * width * points
    assert theirs > 5 * ours


def test_backward_in_eval_mode_with_frozen_weights_saves_no_more():
    model = FasterKAN(24, 16).requires_grad_(False)
    x = torch.randn(600, 24, requires_grad=True)
    assert saved_bytes(model, x)[1] == 600 * 24
    with torch.no_grad():
        assert saved_bytes(model, x) == (0, 0)


def test_two_runs_are_bit_equal():
    runs = []
    for _ in range(2):
        layer = layer_of("both trainable", 24, 40)
        x = torch.randn(7, 30, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = layer(x)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---------------------------------------------------------------- autocast
@pytest.mark.parametrize("name", ["original", "both trainable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name, dtype):
    layer = layer_of(name, 24, 40)
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert layer.reference_forward(x).dtype == y.dtype == dtype
    assert error(y, exact_layer(layer, x)) < TOLERANCE[dtype]
    dy = torch.randn_like(y)
    leaves = {"x": x, **dict(layer.named_parameters())}
    got = torch.autograd.grad(y, list(leaves.values()), dy)
    want = torch.autograd.grad(exact_layer(layer, x), list(leaves.values()), dy.double())
    for key, a, b in zip(leaves, got, want, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 8 * TOLERANCE[dtype], key
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["original", "both trainable"])
def test_a_backward_inside_autocast_is_the_one_outside(name):
    layer = layer_of(name, 24, 40)
    x, dy = torch.randn(6, 24, requires_grad=True), torch.randn(6, 40, dtype=torch.bfloat16)
    leaves = [x, *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(layer(x), leaves, dy)
        y = layer(x)
    for a, b in zip(inside, torch.autograd.grad(y, leaves, dy), strict=True):
        assert torch.equal(a, b)


def test_bf16_inputs_under_autocast_and_autocast_disabled_inside():
    layer = layer_of()
    x = torch.randn(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(layer(x.bfloat16()), exact_layer(layer, x.bfloat16())) < TOLERANCE[torch.bfloat16]
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x), layer_of()(x))


# ---------------------------------------------------------------- in place of timm's Mlp
def vit(**kwargs):
    torch.manual_seed(0)
    return VisionTransformer(**{**dict(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5,
                                       mlp_layer=FasterKAN), **kwargs})


@pytest.mark.parametrize("kwargs", [{}, {"scale_mlp_norm": True}, {"proj_bias": False}, {"dtype": torch.float64}],
                         ids=str)
def test_drop_in_for_timms_mlp(kwargs):
    model = vit(**kwargs)
    mlps = [block.mlp for block in model.blocks]
    assert [type(mlp) for mlp in mlps] == [FasterKAN] * 3
    assert mlps[0].layers[0].spline_linear.weight.shape == (4 * 24, 24 * 8)
    assert mlps[0].layers[1].spline_linear.weight.shape == (24, 4 * 24 * 8)
    x = torch.randn(2, 3, 16, 16, dtype=kwargs.get("dtype"))
    logits = model(x)
    assert logits.shape == (2, 5) and logits.dtype == x.dtype
    assert all(p.dtype == x.dtype for p in model.parameters())
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_widths():
    assert [tuple(p.shape) for p in FasterKAN(3).parameters() if p.ndim == 2] == [(3, 24), (3, 24)]
    assert [tuple(p.shape) for p in FasterKAN(3, 7, 5).parameters() if p.ndim == 2] == [(7, 24), (5, 56)]
    assert [tuple(p.shape) for p in FasterKAN(3, 7, hdim=2, num_grids=4).parameters() if p.ndim == 2] == [
        (2, 12), (3, 8)]
    assert FasterKAN(3, 7, 5)(torch.randn(2, 4, 3)).shape == (2, 4, 5)


def test_dropout_acts_in_training_only():
    model = vit(proj_drop_rate=0.3, drop_path_rate=0.0)
    assert [drop.p for drop in model.blocks[0].mlp.drops] == [0.3, 0.3]
    kan, x = model.blocks[0].mlp, torch.randn(2, 50, 24)
    kan.eval()
    assert torch.equal(kan(x), kan(x))
    kan.train()
    y = kan(x)
    assert 0.2 < (y == 0).float().mean() < 0.4      # the last dropout's zeros
    assert not torch.equal(y, kan(x))


def test_a_pair_of_dropouts():
    hidden_only, last_only = FasterKAN(8, 16, drop=(1.0, 0.0)), FasterKAN(8, 16, drop=(0.0, 1.0))
    assert [drop.p for drop in hidden_only.drops] == [1.0, 0.0]
    x = torch.randn(4, 8)
    assert last_only(x).abs().max() == 0
    assert hidden_only(x).abs().max() > 0           # the second layer's basis at LayerNorm's bias
    assert torch.equal(hidden_only(x)[0], hidden_only(-2 * x)[1])


def test_drop_path_is_timms():
    model = vit(drop_path_rate=0.2)
    assert isinstance(model.blocks[2].drop_path2, DropPath)


# ---------------------------------------------------------------- initial values
def check_initial(kan, points=8, low=-2.0, high=2.0):
    for layer in kan.layers:
        n_out, columns = layer.spline_linear.weight.shape
        xavier = math.sqrt(2 / (n_out + columns))
        assert float(layer.spline_linear.weight.detach().std()) == pytest.approx(xavier, rel=0.1)
        assert layer.spline_linear.weight.abs().max() <= math.sqrt(3) * xavier + 1e-6
        assert torch.equal(layer.rbf.grid, torch.linspace(low, high, points))
        assert (layer.layernorm.weight == 1).all() and (layer.layernorm.bias == 0).all()
        assert torch.as_tensor(layer.rbf.h).item() == pytest.approx(0.33)


def test_initial_values_survive_timms():
    model = vit()
    for block in model.blocks:
        check_initial(block.mlp)                    # here Xavier's is .09 and .046, a ViT's .02
        assert float(block.attn.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    first = model.blocks[0].mlp.layers[0].spline_linear.weight.clone()
    model.init_weights()
    check_initial(model.blocks[0].mlp)
    assert not torch.equal(first, model.blocks[0].mlp.layers[0].spline_linear.weight)


@pytest.mark.parametrize("mode", ["", "jax", "moco", "reset"])
@pytest.mark.parametrize("trainable", [False, True])
def test_from_the_meta_device(mode, trainable):
    def kan(*args, **kwargs):
        return FasterKAN(*args, **kwargs, grid_min=-1.5, grid_max=1.0, num_grids=6, train_grid=trainable,
                         train_h=trainable)

    model = vit(mlp_layer=kan, device="meta", depth=1)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights(mode)
    assert not [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    check_initial(model.blocks[0].mlp, 6, -1.5, 1.0)
    assert model(torch.randn(1, 3, 16, 16)).isfinite().all()


def test_feed_forward_alone_from_the_meta_device():
    with torch.device("meta"):
        kan = FasterKAN(24, 48)
    kan.to_empty(device="cpu")
    for tensor in kan.state_dict().values():
        tensor.fill_(float("nan"))
    kan.init_weights()
    check_initial(kan)


# ---------------------------------------------------------------- names and arguments
def test_names_are_those_of_released_checkpoints():
    parts = ["layernorm.weight", "layernorm.bias", "rbf.grid", "spline_linear.weight"]
    assert list(FasterKAN(4).state_dict()) == [f"layers.{n}.{part}" for n in range(2) for part in parts]
    trainable = FasterKAN(4, train_grid=True, train_h=True)
    assert set(trainable.state_dict()) == set(FasterKAN(4).state_dict()) | {"layers.0.rbf.h", "layers.1.rbf.h"}
    assert {name for name, _ in trainable.named_parameters()} == set(trainable.state_dict())


def test_fixed_grids_have_no_gradient_and_no_parameters():
    model = FasterKAN(4)
    assert {name for name, _ in model.named_buffers()} == {"layers.0.rbf.grid", "layers.1.rbf.grid"}
    assert model.layers[0].rbf.h == 0.33 and isinstance(model.layers[0].rbf.h, float)


@pytest.mark.parametrize("kan", [
    dict(num_grids=1), dict(num_grids=0), dict(grid_min=2.0, grid_max=2.0), dict(grid_min=1.0, grid_max=-1.0),
    dict(h=0.0), dict(h=-0.1), dict(num_grids=1, h=None), dict(h=float("nan")), dict(grid_max=float("nan"))], ids=str)
def test_bad_grids_are_refused(kan):
    with pytest.raises(ValueError, match="at least 2 points"):
        FasterKAN(4, **kan)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError):
        FasterKAN(4, num_grid=9)


def test_h_defaults_to_the_spacing_when_none():
    assert FasterKANLayer(4, 4, grid_min=-1, grid_max=2, num_grids=7, h=None).rbf.h == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["original", "both trainable"])
def test_deepcopy_and_state_dict_round_trip(name):
    layer, x = layer_of(name), torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    other = FasterKANLayer(6, 5, **LAYERS[name][0])
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        twin.spline_linear.weight.zero_()
        twin.rbf.grid.zero_()
    assert torch.equal(other(x), layer(x))          # the copy shares nothing


def test_half_keeps_a_fixed_width_exact():
    assert layer_of().half().rbf.h == 0.33


# ---------------------------------------------------------------- a layer that begins as an MLP's
COVERING = dict(grid_min=-3.0, grid_max=3.0, h=None, bias=True)


def test_the_fit_is_least_squares_under_a_standard_normal():
    """Against sampling: u from a normal distribution, the same normal equations."""
    grid, h = torch.linspace(-3, 3, 8), 6 / 7
    a, rms = faster_kan.fit_basis(F.gelu, grid, h)
    u = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = 1 - torch.tanh((u[:, None] - grid.double()) / h) ** 2
    sampled = ((basis @ a - F.gelu(u)).square().mean() / F.gelu(u).square().mean()).sqrt()
    assert float(rms) == pytest.approx(float(sampled), rel=0.02)
    best = torch.linalg.lstsq(basis, F.gelu(u)).solution
    residual = ((basis @ best - F.gelu(u)).square().mean() / F.gelu(u).square().mean()).sqrt()
    assert float(residual) == pytest.approx(float(rms), rel=0.02)


@pytest.mark.parametrize("grid, h, identity, gelu", [
    ((-2, 2), 0.33, 0.36, 0.39), ((-2, 2), 4 / 7, 0.29, 0.32), ((-3, 3), 6 / 7, 0.065, 0.071), ((-4, 4), 8 / 7, 0.011, 0.016)])
def test_why_the_grid_matters(grid, h, identity, gelu):
    """Relative errors of the best fit: what the original grid cannot hold of its own input."""
    points = torch.linspace(*grid, 8)
    assert float(faster_kan.fit_basis(lambda u: u, points, h)[1]) == pytest.approx(identity, rel=0.05)
    assert float(faster_kan.fit_basis(F.gelu, points, h)[1]) == pytest.approx(gelu, rel=0.05)


def test_many_fits_at_once_are_the_single_ones():
    grid = torch.linspace(-3, 3, 8)
    mean, std = torch.tensor([0.0, -1.0, 2.0]), torch.tensor([1.0, 0.5, 2.0])
    a, rms = faster_kan.fit_basis(F.gelu, grid, 6 / 7, mean=mean, std=std)
    for i in range(3):
        one, error_of_one = faster_kan.fit_basis(F.gelu, grid, 6 / 7, mean=float(mean[i]), std=float(std[i]))
        torch.testing.assert_close(a[i], one)
        assert float(rms[i]) == pytest.approx(float(error_of_one))


@torch.no_grad()
@pytest.mark.parametrize("init_as, function", [("identity", lambda u: u), ("gelu", F.gelu)])
def test_a_layer_begins_as_a_random_linear_map_of_a_function(init_as, function):
    torch.manual_seed(0)
    layer = FasterKANLayer(96, 64, init_as=init_as, **COVERING)
    coefficients, rms = faster_kan.fit_basis(function, layer.rbf.grid, layer.rbf.h)
    w = layer.spline_linear.weight.view(64, 96, 8)
    r = w[..., 0] / coefficients[0].float()
    torch.testing.assert_close(w, r[..., None] * coefficients.float(), rtol=1e-4, atol=1e-5)
    assert float(r.std()) == pytest.approx(96 ** -0.5, rel=0.05) and abs(float(r.mean())) < 0.01
    x = torch.randn(2000, 96)
    expected = function(layer.layernorm(x)) @ r.T
    assert float((layer(x) - expected).norm() / expected.norm()) == pytest.approx(float(rms), rel=0.2)


@torch.no_grad()
def test_a_kan_begins_as_a_random_mlp():
    torch.manual_seed(0)
    kan = FasterKAN(96, hdim=48, kan_bias=True, init_as_mlp=True, grid_min=-4, grid_max=4, h=None)
    (first, a1), (second, a2) = ((layer, faster_kan.fit_basis(f, layer.rbf.grid, layer.rbf.h)[0][0].float())
                                 for layer, f in zip(kan.layers, (lambda u: u, F.gelu)))
    r1, r2 = (layer.spline_linear.weight.view(layer.out_features, -1, 8)[..., 0] / a for layer, a in ((first, a1), (second, a2)))
    n = F.layer_norm(torch.randn(500, 96), (96,))
    mlp = F.gelu(F.layer_norm(n @ r1.T, (48,))) @ r2.T
    assert float((kan(n) - mlp).norm() / mlp.norm()) < 0.03


def test_repaired_layers_agree_with_the_reference_and_give_every_gradient():
    for options in (dict(), dict(base_branch=True), dict(norm="static"), dict(norm="none", base_branch=True)):
        torch.manual_seed(0)
        layer = FasterKANLayer(6, 5, init_as="gelu", **COVERING, **options).double()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.1 * torch.randn_like(p))
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        dy = torch.randn(7, 5, dtype=torch.float64)
        inputs = [x, *layer.parameters()]
        ours = torch.autograd.grad(layer(x), inputs, dy)
        theirs = torch.autograd.grad(layer.reference_forward(x), inputs, dy)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            assert a.abs().max() > 0


def test_parts_are_what_the_options_say():
    plain = FasterKANLayer(6, 5)
    assert {name for name, _ in plain.named_parameters()} == {"layernorm.weight", "layernorm.bias", "spline_linear.weight"}
    full = FasterKANLayer(6, 5, bias=True, base_branch=True, norm="static")
    assert {name for name, _ in full.named_parameters()} == {
        "layernorm.scale", "layernorm.shift", "spline_linear.weight", "spline_linear.bias", "base_linear.weight"}
    x = torch.randn(3, 6)
    torch.testing.assert_close(faster_kan.StaticNorm(6)(x), x)
    with pytest.raises(ValueError, match="batch"):
        FasterKANLayer(6, 5, norm="batch")


def test_weights_that_begin_as_an_mlp_survive_the_meta_device():
    with torch.device("meta"):
        kan = FasterKAN(16, hdim=8, kan_bias=True, init_as_mlp=True, **{k: v for k, v in COVERING.items() if k != "bias"})
    kan.to_empty(device="cpu")
    torch.manual_seed(0)
    kan.init_weights()
    direct = FasterKAN(16, hdim=8, kan_bias=True, init_as_mlp=True, **{k: v for k, v in COVERING.items() if k != "bias"})
    torch.manual_seed(0)
    direct.init_weights()
    for key, value in direct.state_dict().items():
        torch.testing.assert_close(kan.state_dict()[key], value)
