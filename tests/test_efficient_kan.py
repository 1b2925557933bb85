import copy
import math

import pytest
import timm
import torch
from helpers import EKAN
from paths import error
from scipy.interpolate import BSpline
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import models_kan  # noqa: F401  (registers the models)
from vision_kan.kernels import backend
from vision_kan.layers import efficient_kan
from vision_kan.layers.efficient_kan import EfficientKAN, EfficientKANLayer, bspline_basis, uniform_knots

# About three times the largest error of an output that was measured against fp64; gradients have 8 times that.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LAYERS = {
    "original": dict(),
    "one interval": dict(num_grids=4),
    "off centre": dict(grid_min=-0.5, grid_max=3.0, num_grids=6),
    "many points": dict(grid_min=-2.0, grid_max=2.0, num_grids=19),
    "linear": dict(num_grids=6, spline_order=1),
    "quadratic": dict(num_grids=6, spline_order=2),
    "quintic": dict(num_grids=9, spline_order=5),
}


def layer_of(name="original", n_in=6, n_out=5, dtype=torch.float32):
    """A layer whose splines are as strong as its base."""
    torch.manual_seed(0)
    layer = EfficientKANLayer(n_in, n_out, **LAYERS[name])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.to(dtype)


def scipy_basis(u, knots, order):
    """Each basis function one of SciPy's; 0 outside its knots. [...] -> [..., G]."""
    out = [BSpline.basis_element(knots[k:k + order + 2].numpy(), extrapolate=False)(u.numpy())
           for k in range(len(knots) - order - 1)]
    return torch.stack([torch.from_numpy(values).nan_to_num(0.0) for values in out], -1)


def exact(x, base, spline, scaler, knots, order):
    """efficient-KAN's definition in fp64: x [..., I] -> [..., O]."""
    x, base, spline, scaler, knots = (t.double() for t in (x, base, spline, scaler, knots))
    basis = bspline_basis(x, torch.linspace(float(knots[0]), float(knots[-1]), len(knots), dtype=torch.float64), order)
    y = F.linear(F.silu(x), base)
    return y + torch.einsum("...ig,oig->...o", basis, spline * scaler[..., None])


def exact_layer(layer, x):
    return exact(x, layer.base_weight, layer.spline_weight, layer.spline_scaler, layer.grid, layer.spline_order)


# ---------------------------------------------------------------- the basis
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("knots", [uniform_knots(-1, 1, 8, 3), uniform_knots(-0.3, 2.2, 7, 1),
                                   torch.tensor([-1.0, -0.9, 0.0, 0.4, 1.0, 3.0, 3.1]).double()], ids=len)
def test_reference_basis_is_scipys(order, knots):
    u = torch.linspace(float(knots[0]) - 1, float(knots[-1]) + 1, 1003, dtype=torch.float64)
    basis = bspline_basis(u, knots, order)
    assert basis.shape == (1003, len(knots) - order - 1)
    torch.testing.assert_close(basis, scipy_basis(u, knots, order), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_basis_of_the_op_is_scipys(name):
    layer = layer_of(name)
    order, knots = layer.spline_order, uniform_knots(layer.grid_min, layer.grid_max, layer.num_grids, layer.spline_order)
    u = torch.linspace(float(knots[0]) - 1, float(knots[-1]) + 1, 1003, dtype=torch.float64)
    values = efficient_kan._edge_inputs(u[:, None], knots, order)[:, :, 0]      # [N, 1 + G]
    torch.testing.assert_close(values[:, 0], F.silu(u), rtol=0, atol=1e-15)
    torch.testing.assert_close(values[:, 1:], scipy_basis(u, knots, order), rtol=0, atol=1e-13)
    single = efficient_kan._edge_inputs(u.float()[:, None], knots.float(), order)[:, :, 0]
    torch.testing.assert_close(single[:, 1:], values[:, 1:].float(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_partition_of_unity_inside_the_grid_and_nothing_far_outside(name):
    layer = layer_of(name)
    u = torch.linspace(layer.grid_min, layer.grid_max, 501)[:, None]
    basis = efficient_kan._edge_inputs(u, layer.grid, layer.spline_order)[:, 1:, 0]
    torch.testing.assert_close(basis.sum(-1), torch.ones(501), rtol=0, atol=2e-6)
    assert basis.min() >= -1e-6
    far = torch.tensor([-1e30, -1e4, float(layer.grid[0]) - 0.1, float(layer.grid[-1]) + 0.1, 1e4, 1e30])[:, None]
    assert efficient_kan._edge_inputs(far, layer.grid, layer.spline_order)[:, 1:].abs().max() == 0


def test_knots_are_efficient_kans():
    """grid[order:-order] are the ends of the intervals; 5 intervals of order 3 are the default."""
    layer = EfficientKANLayer(3, 2)
    torch.testing.assert_close(layer.grid, torch.arange(-3, 9) * 0.4 - 1)
    assert layer.grid.shape == (12,) and layer.spline_weight.shape == (2, 3, 8)
    shifted = EfficientKANLayer(3, 2, grid_min=0.0, grid_max=3.0, num_grids=5, spline_order=2)
    assert shifted.grid.tolist() == [-2, -1, 0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------- values
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_is_the_definition(name, dtype):
    layer = layer_of(name, 21, 45, dtype)
    x = torch.randn(2, 5, 21, dtype=dtype) * 2
    y = layer(x)
    assert y.dtype == dtype
    assert error(y, exact_layer(layer, x)) < TOLERANCE[dtype]
    assert error(layer.reference_forward(x), exact_layer(layer, x)) < TOLERANCE[dtype] + 1e-6


@pytest.mark.parametrize("shape, n_out", [
    ((7,), 3), ((1, 7), 3), ((1, 1, 7), 3), ((3, 1), 4), ((2, 3, 4, 7), 3), ((1, 21), 45), ((11, 45), 1), ((5, 7), 7)])
def test_odd_shapes(shape, n_out):
    layer = layer_of("original", shape[-1], n_out, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], n_out)
    assert error(y, exact_layer(layer, x)) < 1e-14


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (3, 0, 6)])
def test_empty_batch(shape):
    layer = layer_of()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad.abs().max() == 0 for parameter in layer.parameters())


def test_non_contiguous_input_and_gradient():
    layer = layer_of(dtype=torch.float64)
    base = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    for x in (base.permute(1, 2, 0), base.permute(2, 1, 0)[:, ::2]):
        assert not x.is_contiguous()
        for dy in (torch.randn(5, *x.shape[:2], dtype=torch.float64).permute(1, 2, 0),
                   torch.ones((), dtype=torch.float64).expand(*x.shape[:2], 5)):
            got, want = (torch.autograd.grad(f(x), base, dy)[0] for f in (layer, lambda x: exact_layer(layer, x)))
            assert error(layer(x), exact_layer(layer, x)) < 1e-14
            assert error(got, want) < 1e-13


def test_chunks_change_nothing(monkeypatch):
    layer = layer_of(dtype=torch.float64)
    x, results = torch.randn(3, 11, 6, dtype=torch.float64, requires_grad=True), []
    for limit in (2 ** 18, 6 * 12 * 7, 1):                      # all rows, 7 rows, 1 row
        monkeypatch.setitem(backend.CHUNK_VALUES, "cpu", limit)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert error(a, b) < 1e-14


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name):
    layer = layer_of(name, 3, 2, torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in layer.named_parameters()]
    assert names == ["base_weight", "spline_weight", "spline_scaler"]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)
    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "linear"])     # whose slope jumps at knots
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_gradient_against_autograd_through_the_definition(name, dtype):
    layer = layer_of(name, 7, 9, dtype)
    x = (torch.randn(3, 11, 7) * 1.5).to(dtype).requires_grad_()
    dy = torch.randn(3, 11, 9).to(dtype)
    got = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    exactly, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    want = torch.autograd.grad(exact_layer(exactly, x64), [x64, *exactly.parameters()], dy.double())
    for key, a, b in zip(["x", "base", "spline", "scaler"], got, want, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < 8 * TOLERANCE[dtype], key


@pytest.mark.parametrize("frozen", ["x", "base_weight", "spline_weight", "spline_scaler"])
def test_frozen_parts(frozen):
    layer = layer_of(dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    want = dict(zip(leaves, torch.autograd.grad(layer(x).sum(), list(leaves.values())), strict=True))
    leaves.pop(frozen).requires_grad_(False)
    got = torch.autograd.grad(layer(x).sum(), list(leaves.values()))
    assert all(torch.equal(a, want[key]) for key, a in zip(leaves, got, strict=True))


def test_finite_at_any_input():
    layer = layer_of()
    x = torch.tensor([-1e30, -1e4, -100.0, 100.0, 1e4, 1e30]).expand(2, 6).clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert all(t.isfinite().all() for t in (y, *grads))


def test_nothing_of_the_basis_size_is_kept():
    """Kept are x, the weights and the grid, not [T, I, G]."""
    layer, sizes = layer_of("original", 16, 8), []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(500, 16, requires_grad=True))
    assert max(sizes) == 500 * 16


# ---------------------------------------------------------------- autocast, checkpointing, compile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer = layer_of("original", 24, 40)
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert layer.reference_forward(x).dtype == y.dtype == dtype
    assert error(y, exact_layer(layer, x)) < TOLERANCE[dtype]
    dy, leaves = torch.randn_like(y), [x, *layer.parameters()]
    want = torch.autograd.grad(exact_layer(layer, x), leaves, dy.double())
    with torch.autocast("cpu", dtype):
        inside = torch.autograd.grad(layer(x), leaves, dy)
    for a, b, c in zip(torch.autograd.grad(y, leaves, dy), want, inside, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 8 * TOLERANCE[dtype]
        assert torch.equal(a, c)
    assert layer(x).dtype == torch.float32


def test_basis_of_16_bit_inputs_is_computed_in_32():
    layer = layer_of()
    x = torch.randn(9, 6).bfloat16()
    assert efficient_kan._edge_inputs(x, layer.grid, 3).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert error(layer(x), exact_layer(layer, x)) < TOLERANCE[torch.bfloat16]
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x.float()), layer_of()(x.float()))


def test_recomputed_under_checkpointing():
    kan, x = EfficientKAN(6, 5), torch.randn(7, 6, requires_grad=True)
    want = torch.autograd.grad(kan(x).square().sum(), [x, *kan.parameters()])
    got = torch.autograd.grad(checkpoint(kan, x, use_reentrant=False).square().sum(), [x, *kan.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
def test_traced_whole_by_torch_compile():
    """Captured without a break in the graph, forwards and backwards."""
    layer = layer_of()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(3, 4, 6, requires_grad=True)
    y, z = compiled(x), layer(x)
    assert error(y, z) < 1e-6
    leaves = [x, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z.sum(), leaves), strict=True):
        assert error(a, b) < 1e-5


# ---------------------------------------------------------------- initial values
def check_initial(kan, num_grids=8, grid_min=-1.0, grid_max=1.0):
    for layer in kan.layers:
        bound = 1 / math.sqrt(layer.in_features)        # of kaiming_uniform_ with a = sqrt(5)
        for weight in (layer.base_weight, layer.spline_scaler):
            assert 0.9 * bound < weight.abs().max() <= bound
            assert abs(float(weight.detach().mean())) < 4 * bound / math.sqrt(3 * weight.numel())
        intervals = num_grids - 3
        torch.testing.assert_close(layer.grid, uniform_knots(grid_min, grid_max, num_grids, 3).float())
        # at the grid points a spline is noise, uniform within half of 0.1/intervals
        points = torch.linspace(grid_min, grid_max, intervals + 1)
        basis = bspline_basis(points.double(), layer.grid.double(), 3)
        values = torch.einsum("pg,oig->poi", basis, layer.spline_weight.detach().double())
        limit = 0.1 / intervals / 2
        assert 0.95 * limit < values.abs().max() < limit * 1.001
        assert float(values.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_initial_values():
    kan = EfficientKAN(24, 40)
    check_initial(kan)
    before = {key: value.clone() for key, value in kan.state_dict().items()}
    kan.init_weights()
    check_initial(kan)
    changed = {key for key, value in kan.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key, _ in kan.named_parameters()}
    torch.manual_seed(3)
    wide = EfficientKANLayer(24, 40, scale_base=0.0, scale_noise=0.2)
    assert wide.base_weight.abs().max() <= math.sqrt(6 / 24) and wide.base_weight.abs().max() > 0.45
    torch.manual_seed(3)
    narrow = EfficientKANLayer(24, 40, scale_base=0.0)
    torch.testing.assert_close(wide.spline_weight, 2 * narrow.spline_weight)


def test_the_same_seed_gives_the_same_values():
    layers = []
    for _ in range(2):
        torch.manual_seed(4)
        layers.append(EfficientKANLayer(5, 7).state_dict())
    assert all(torch.equal(layers[0][key], layers[1][key]) for key in layers[0])


@pytest.mark.parametrize("how", ["argument", "default device"])
def test_from_the_meta_device(how):
    if how == "argument":
        kan = EfficientKAN(24, hdim=30, num_grids=6, grid_min=-1.5, device="meta")
    else:
        with torch.device("meta"):
            kan = EfficientKAN(24, hdim=30, num_grids=6, grid_min=-1.5)
    assert all(tensor.is_meta for tensor in kan.state_dict().values())
    kan.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in kan.state_dict().values():
            tensor.fill_(float("nan"))
    kan.init_weights()
    check_initial(kan, 6, -1.5, 1.0)
    assert kan(torch.randn(3, 24)).isfinite().all()


@pytest.mark.parametrize("mode", ["", "reset"])
def test_timm_initialises_a_model_from_the_meta_device(mode):
    model = timm.create_model(EKAN, device="meta", depth=1)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights(mode)
    assert not [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    check_initial(model.blocks[0].mlp)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


# ---------------------------------------------------------------- in place of timm's Mlp
@pytest.mark.parametrize("kwargs", [{}, {"scale_mlp_norm": True}, {"proj_bias": False}, {"dtype": torch.float64}],
                         ids=str)
def test_drop_in_for_timms_mlp(kwargs):
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5,
                              mlp_layer=EfficientKAN, **kwargs)
    dtype = kwargs.get("dtype", torch.float32)
    assert model(torch.randn(2, 3, 16, 16, dtype=dtype)).shape == (2, 5)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [layer.out_features for layer in model.blocks[0].mlp.layers] == [96, 24]


def test_widths():
    def widths(kan):
        return [(layer.in_features, layer.out_features) for layer in kan.layers]
    assert widths(EfficientKAN(6)) == [(6, 6), (6, 6)]
    assert widths(EfficientKAN(6, 24)) == [(6, 24), (24, 6)]
    assert widths(EfficientKAN(6, 24, 3, hdim=5)) == [(6, 5), (5, 3)]
    assert [drop.p for drop in EfficientKAN(6, drop=(0.1, 0.2)).drops] == [0.1, 0.2]
    kan = EfficientKAN(6, num_grids=5, spline_order=2, grid_min=0.0, grid_max=2.0)
    assert all((layer.num_grids, layer.spline_order, layer.grid_max) == (5, 2, 2.0) for layer in kan.layers)


def test_forward_is_two_layers_with_dropout_after_each():
    kan, x = EfficientKAN(6, 400, drop=(0.5, 0.25)), torch.randn(50, 6)
    kan.eval()
    assert torch.equal(kan(x), kan.layers[1](kan.layers[0](x)))
    kan.train()
    seen = []
    kan.layers[1].register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
    out = kan(x)
    (hidden, before), = seen
    assert float((hidden == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.1)
    kept = out != 0
    torch.testing.assert_close(out[kept], before[kept] / 0.75)


def test_names_of_the_parts():
    parts = ["base_weight", "spline_weight", "spline_scaler", "grid"]
    assert list(EfficientKAN(4).state_dict()) == [f"layers.{n}.{part}" for n in range(2) for part in parts]
    assert "8 splines of order 3 on [-1.0, 1.0]" in repr(EfficientKAN(4))


@pytest.mark.parametrize("options", [dict(num_grids=3), dict(num_grids=5, spline_order=5), dict(spline_order=0),
                                     dict(grid_min=1.0), dict(grid_min=float("nan"))], ids=str)
def test_impossible_grids(options):
    with pytest.raises(ValueError, match="a spline needs"):
        EfficientKANLayer(3, 2, **options)


def test_deepcopy_and_state_dict_round_trip():
    layer, x = layer_of("off centre"), torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    other = EfficientKANLayer(6, 5, num_grids=6)            # takes over the grid too
    assert torch.equal(twin(x), layer(x)) and not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(other(x), layer(x))                  # the copy shares nothing


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_model_trains(drop):
    torch.manual_seed(0)
    model = timm.create_model(EKAN, num_classes=10, proj_drop_rate=drop)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, classes = torch.randn(8, 3, 32, 32), torch.arange(8)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    losses = []
    for _ in range(1 if drop else 8):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert not [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    assert drop or losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("size", ["vit_nano_patch8_32", "vit_nano_patch4_32", "vit_micro_patch4_32"])
def test_as_many_parameters_as_the_mlp(size):
    kan, vit = (timm.create_model(f"{size}_{suffix}", num_classes=10, device="meta") for suffix in ("EKAN", "ViT"))
    for part in (lambda model: model, lambda model: model.blocks[0].mlp):
        n, m = (sum(p.numel() for p in part(model).parameters()) for model in (kan, vit))
        assert abs(n - m) <= 0.02 * m
    assert not [module for module in kan.blocks[0].mlp.modules() if isinstance(module, nn.Linear)]


def test_shapes_without_numbers():
    with torch.device("meta"):
        assert EfficientKAN(8, 16)(torch.empty(2, 3, 8)).shape == (2, 3, 8)
