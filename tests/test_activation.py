"""Activations in any basis, against the bases' definitions, and in everything that a user does with a model."""
import sys

import numpy as np
import pytest
import timm
import torch
from e2e import QUICK, checkpoint, refusal, run, write_digits
from helpers import GKAN, every, sentence
from numpy.polynomial import chebyshev
from paths import saved
from scipy.interpolate import BSpline

import models_kan
from tools import export, inspect_kan, predict, prune, symbolic
from vision_kan import kernels
from vision_kan.kernels import (
    FUNCTIONS,
    activation,
    activation_reference,
    backend,
    rational,
    rational_reference,
    rswaf_activation,
    rswaf_linear,
    rswaf_linear_reference,
)
from vision_kan.layers.function_layer import function_layers
from vision_kan.layers.group_kan import GroupActivation, GroupKAN
from vision_kan.models.finetune import load_finetune
from vision_kan.run.trained import load_trained

POINTS, H = tuple(np.linspace(-3, 3, 8).tolist()), 6 / 7
OTHERS = [name for name in FUNCTIONS if name != "rswaf"]


@pytest.fixture(autouse=True)
def again():
    before = kernels.chosen()
    yield
    kernels.use(before)


def problem(dtype=torch.float64, shape=(5, 12), groups=3):
    torch.manual_seed(0)
    u, dv = 2 * torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    c, s = torch.randn(groups, 8, dtype=torch.float64), torch.randn(groups, dtype=torch.float64)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(d).requires_grad_() for t, d in ((u, dtype), (c, parameters), (s, parameters))], dv.to(dtype)


def call(function):
    return lambda u, c, s: activation(u, c, POINTS, H, "gelu", s, function)


def reference(function):
    return lambda u, c, s: activation_reference(u, c, POINTS, H, "gelu", s, function)


def definition(function: str, u: np.ndarray) -> np.ndarray:
    """[..., G] by numpy and scipy."""
    grid, last = np.array(POINTS), len(POINTS) - 1
    z = (u[..., None] - grid) / H
    if function == "bspline":
        knots = H * np.arange(-2, 3)
        return np.nan_to_num(np.stack([BSpline.basis_element(knots + g, extrapolate=False)(u) for g in grid], -1))
    if function == "chebyshev":
        return chebyshev.chebvander(np.tanh(u / 3), last)
    if function == "fourier":
        k = np.arange(1, 5) * np.pi * u[..., None] / 6
        return np.stack([np.sin(k), np.cos(k)], -1).reshape(*u.shape, 8)
    bumps = {"rswaf": 1 - np.tanh(z) ** 2, "gaussian": np.exp(-z ** 2), "sech": 1 / np.cosh(z), "rational": 1 / (1 + z ** 2)}
    return bumps[function]


# ---------------------------------------------------------------- the op
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_bases_are_their_definitions(function):
    u = torch.linspace(-7, 7, 301, dtype=torch.float64)
    ours = torch.stack(list(FUNCTIONS[function].values(u, POINTS, H)), -1)
    np.testing.assert_allclose(ours, definition(function, u.numpy()), atol=1e-14)
    assert FUNCTIONS[function].fades == bool((ours[[0, -1]].abs() < 0.1).all() and (ours.argmax(0) != 0).all())
    odd = torch.stack(list(FUNCTIONS[function].values(u, POINTS[:5], H)), -1)
    assert odd.shape == (301, 5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_value_and_derivatives(function):
    inputs, dv = problem()
    ours, theirs = call(function)(*inputs), reference(function)(*inputs)
    basis = torch.from_numpy(definition(function, inputs[0].detach().numpy()))
    u, c, s = (t.detach() for t in inputs)
    exact = torch.nn.functional.gelu(u) * s.repeat_interleave(4) + (basis * c.repeat_interleave(4, 0)).sum(-1)
    for value in (ours, theirs):
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(ours, inputs, dv), torch.autograd.grad(theirs, inputs, dv)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    at_points = torch.tensor(POINTS, dtype=torch.float64)[None, [0, 3, 4, 7]].requires_grad_()
    for plain in (lambda x: activation(x, c[:1], POINTS, H, "none", None, function),
                  lambda x: activation_reference(x, c[:1], POINTS, H, "none", None, function)):
        assert torch.autograd.gradgradcheck(plain, at_points)
    small = [t.detach()[:1, :6].clone().requires_grad_() if t is inputs[0] else t for t in inputs]
    assert torch.autograd.gradcheck(call(function), small) and torch.autograd.gradgradcheck(call(function), small)
    slope = torch.func.grad(lambda x: call(function)(x, c, s).sum())(u)
    torch.testing.assert_close(slope, torch.autograd.grad(call(function)(*inputs).sum(), inputs[0])[0])


@pytest.mark.parametrize("function", OTHERS)
def test_far_inputs_give_finite_numbers_and_nan_stays_in_its_place(function):
    u = torch.tensor([[0.5, 1e4, -1e4, 88.0, -120.0, 1e18, float("nan"), -0.5]], requires_grad=True)
    v = activation(u, torch.randn(2, 8), POINTS, H, "none", None, function)
    slope, = torch.autograd.grad(v.sum(), u)
    for values in (v, slope):
        assert values.isnan().nonzero().tolist() == [[0, 6]] and values[:, :6].isfinite().all()


@pytest.mark.parametrize("function", OTHERS)
def test_only_u_and_the_parameters_are_kept_whatever_the_size(function, monkeypatch):
    monkeypatch.setattr(backend, "CHUNK_INPUTS", 2 ** 12)
    inputs, dv = problem(torch.float32, (3, 200, 48), groups=4)
    storages, _ = saved(lambda: call(function)(*inputs))
    assert storages == {t.untyped_storage().data_ptr(): 4 * t.numel() for t in inputs}
    parts = len(backend.row_chunks(inputs[0].detach().view(-1, 48)))
    assert parts > 1
    for one, other in zip(torch.autograd.grad(call(function)(*inputs), inputs, dv),
                          torch.autograd.grad(reference(function)(*inputs), inputs, dv)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_that_are_no_matrix_in_memory(frozen):
    (u, c, s), _ = problem(torch.float32, (12, 10), groups=5)
    c, s = (c.detach(), s.detach()) if frozen else (c, s)
    for form in (lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1).chunk(2, 1)[1],
                 lambda x: x[:, None].expand(-1, 3, -1)):
        wanted = [t for t in (u, c, s) if t.requires_grad]
        ours, theirs = (torch.autograd.grad(f(form(u), c, s).sin().sum(), wanted) for f in (call("sech"), reference("sech")))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other)


def test_gradients_of_small_parameters_are_rounded_once(monkeypatch):
    """However many pieces they are summed from."""
    monkeypatch.setattr(backend, "CHUNK_INPUTS", 2 ** 10)
    (u, c, s), dv = problem(torch.float32, (3000, 48), groups=1)
    small = [c.detach().bfloat16().requires_grad_(), s.detach().bfloat16().requires_grad_()]
    assert len(backend.row_chunks(u)) > 10
    ours = torch.autograd.grad(call("gaussian")(u, *small), small, dv)
    wide = [p.detach().float().requires_grad_() for p in small]
    exact = torch.autograd.grad(reference("gaussian")(u, *wide), wide, dv)
    for one, other in zip(ours, exact):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.005, atol=0.005 * float(other.abs().max()))


def test_a_gated_model_of_timm_learns():
    """Its gate is a part of a larger tensor."""
    models_kan.register("eva02_tiny_patch14_224_GKAN")
    model = timm.create_model("eva02_tiny_patch14_224_GKAN", img_size=28, kan_function="sech", num_classes=3)
    model(torch.randn(2, 3, 28, 28)).sum().backward()
    assert all(layer.coefficients.grad.any() for layer in function_layers(model).values())


@pytest.mark.parametrize("function", ["rswaf", "sech"])
def test_on_meta(function):
    layer = GroupKAN(12, 24, groups=2, function=function, device="meta")
    assert layer(torch.empty(5, 12, device="meta")).shape == (5, 12)


def test_many_variants_are_compiled(monkeypatch):
    """Dynamo gives up on a function after eight."""
    seen = []
    real = torch.compile

    def counted(graph, inputs):
        seen.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend=counted, **how))
    backend._compiled.cache_clear()
    kernels.use("compile")
    for function in FUNCTIONS:
        for base in ("gelu", "identity"):
            for width in (12, 24):
                u, c = torch.randn(4, width), torch.randn(3, 8)
                before = len(seen)
                found = (rswaf_activation(u, c, POINTS, H, base) if function == "rswaf" else
                         activation(u, c, POINTS, H, base, None, function))
                torch.testing.assert_close(found, activation_reference(u, c, POINTS, H, base, None, function))
                assert len(seen) > before or width == 24
    x, w, grid, c = torch.randn(4, 6), torch.randn(5, 6 * 8), torch.tensor(POINTS), torch.rand(2, 12)
    for number in range(1, 11):
        before = len(seen)
        torch.testing.assert_close(rswaf_linear(x, w, grid, number / 3), rswaf_linear_reference(x, w, grid, number / 3))
        torch.testing.assert_close(rational(x, c, number), rational_reference(x, c, number))
        assert len(seen) == before + 2
    backend._compiled.cache_clear()
    torch._dynamo.reset()


def test_no_rows_frozen_parameters_and_autocast():
    (u, c, s), _ = problem(torch.float32, (0, 12))
    grads = torch.autograd.grad(call("sech")(u, c, s).sum(), (u, c, s))
    assert [tuple(g.shape) for g in grads] == [(0, 12), (3, 8), (3,)] and not any(g.any() for g in grads)
    (u, c, s), dv = problem(torch.float32)
    frozen = torch.autograd.grad(call("sech")(u, c.detach(), s.detach()), u, dv)[0]
    assert torch.equal(frozen, torch.autograd.grad(call("sech")(u, c, s), u, dv)[0])
    with torch.autocast("cpu", torch.bfloat16):
        v = call("sech")(u, c, s)
    assert v.dtype == torch.bfloat16 and torch.equal(v, call("sech")(u.bfloat16(), c, s))
    torch.testing.assert_close(v.float(), call("sech")(u, c, s), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("function", OTHERS)
def test_compiled_is_one_graph(function):
    inputs, dv = problem()
    compiled = torch.compile(call(function), fullgraph=True, backend="aot_eager")
    for one, other in zip(*(torch.autograd.grad(f(*inputs), inputs, dv) for f in (compiled, call(function)))):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_backend_chooses_the_way(monkeypatch):
    inputs, _ = problem()
    ways = []
    module = sys.modules[activation.__module__]
    monkeypatch.setattr(backend, "compiled", lambda *key: lambda *given: ways.append("compiled") or given[0])
    monkeypatch.setattr(module._ByRows, "apply", lambda *given: ways.append("rows") or given[0])
    for name in ("auto", "cpu", "compile", "reference"):
        kernels.use(name)
        call("sech")(*inputs)
    assert ways == ["rows", "rows", "compiled"]
    monkeypatch.setattr(backend, "resolve", lambda *given: "compiled")      # as on a GPU
    kernels.use("auto")
    call("sech")(*inputs)
    assert ways[3:] == ["compiled"]


@pytest.mark.slow
def test_through_inductor():
    inputs, dv = problem(torch.float32)
    kernels.use("compile")
    ours = torch.autograd.grad(call("chebyshev")(*inputs), inputs, dv)
    for one, other in zip(ours, torch.autograd.grad(reference("chebyshev")(*inputs), inputs, dv)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the layer
@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_begins_as_the_mlp_and_its_weights_name_their_basis(function):
    torch.manual_seed(0)
    layer, x = GroupKAN(12, 24, groups=2, function=function), torch.randn(7, 12)
    mlp = torch.nn.Sequential(layer.fc1, torch.nn.GELU(), layer.fc2)
    torch.testing.assert_close(layer(x), mlp(x))
    assert function == "rswaf" or f"8 {function} functions on [-3, 3]" in repr(layer.phi2)
    again = GroupKAN(12, 24, groups=2, function=function, device="meta").to_empty(device="cpu")
    for phi in (again.phi1, again.phi2):
        phi.reset_parameters()
    own = layer.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items() if "phi" in key)
    for other in FUNCTIONS:
        if other != function:
            with pytest.raises(RuntimeError, match=f"phi2.coefficients are of the basis {function} where the model has {other}"):
                GroupKAN(12, 24, groups=2, function=other).load_state_dict(own)


@torch.no_grad()
def test_functions_of_another_basis_are_not_taken_over():
    """Whether their grids are there, missing, doubled or odd."""
    source = timm.create_model(GKAN, kan_function="fourier", num_classes=3)
    for layer in function_layers(source).values():
        layer.coefficients.normal_()
    own = source.state_dict()
    key = "blocks.0.mlp.phi2.fourier_grid"
    for function in ("rswaf", "gaussian"):
        model = timm.create_model(GKAN, kan_function=function, num_classes=3)
        told = sentence(load_finetune, model, own)
        assert f"are of the basis fourier where the model has {function}: check --kan-function" in told
    without = {name: value for name, value in own.items() if "_grid" not in name}
    assert "come without a grid where the model has gaussian" in sentence(load_finetune, model, without)
    same = timm.create_model(GKAN, kan_function="fourier", num_classes=3)
    assert "basis rswaf and fourier" in sentence(load_finetune, same, {**own, key.replace("fourier_grid", "grid"): own[key]})
    for grid, told in ((own[key][0], "shape"), (own[key][None], "shape"), (own[key][:0], "shape"),
                       (own[key] > 0, "evenly"), (own[key].abs(), "from 3 to 3 where the model has 8 from -3")):
        with pytest.raises(RuntimeError, match=f"(?s)fourier_grid.*{told}"):
            same.load_state_dict({**own, key: grid})
    load_finetune(same, own)
    assert all(torch.equal(value, own[name]) for name, value in same.state_dict().items())


def test_an_unknown_basis_is_a_sentence():
    with pytest.raises(ValueError, match="function wavelet is not one of rswaf, gaussian, sech, rational"):
        GroupActivation(8, function="wavelet")
    with pytest.raises(ValueError, match="h = 1e-08 is too narrow for the grid"):
        GroupActivation(8, function="fourier", h=1e-8)


# ---------------------------------------------------------------- the commands
def test_the_flag_is_checked(capsys):
    assert refusal(capsys, "--kan-function", "wavelet") == (
        "--kan-function: 'wavelet' is not one of rswaf, gaussian, sech, rational, bspline, chebyshev, fourier")


def trained(folder, function):
    """Folders of data and of a run, and the flags for both."""
    data = write_digits(folder / "data")
    words = ("--device", "cpu", "--num_workers", "0", "--data-path", data)
    assert run(*QUICK, *words, "--model", GKAN, "--kan-function", function, "--kan-groups", 2, "--kan-grid-points", 6,
               "--lr", 0.02, "--epochs", 1, "--log-kan", 1, "--output_dir", folder / "run") == 0
    return data, folder / "run/checkpoint.pth", words


@pytest.mark.parametrize("function", every(6, OTHERS))
def test_it_is_trained_resumed_and_known_from_its_weights(function, tmp_path, capsys):
    data, file, words = trained(tmp_path, function)
    assert "for a grid or a basis that the kernels don't take" in capsys.readouterr().out
    state = checkpoint(file.parent)
    assert state["model_args"]["kwargs"]["kan_function"] == function and state["model"]["blocks.3.mlp.phi2.coefficients"].any()
    assert f"blocks.3.mlp.phi2.{function}_grid" in state["model_ema"]
    torch.save(state["model"], tmp_path / "bare.pth")
    results = []
    for weights in (file, tmp_path / "bare.pth"):
        capsys.readouterr()
        assert run("--eval", "--resume", weights, *words) == 0
        results.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("model: ")])
    assert results[0] == results[1] != []
    assert run("--resume", file, *words, "--epochs", 2, "--log-kan", 1, "--output_dir", file.parent) == 0
    assert predict.main([str(file), str(next(data.rglob("*.png"))), "--device", "cpu"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("function", OTHERS)
def test_every_tool_takes_it(function, tmp_path):
    """Inspected, given formulas, pruned in each way, exported."""
    data, file, _ = trained(tmp_path, function)
    words = [str(file), "--data-path", str(data), "--device", "cpu"]
    assert inspect_kan.main([*words, "--output", str(tmp_path / "report")]) == 0
    assert ("6 on [-3, 3]" in (tmp_path / "report/report.html").read_text()) == FUNCTIONS[function].fades
    words += ["--num_workers", "0"]
    assert symbolic.main([*words, "--output", str(tmp_path / "formulas"), "--limit", "12",
                          "--replace", str(tmp_path / "replaced.safetensors")]) == 0
    for what in ("hidden", "points", "groups"):
        small = tmp_path / f"{what}.pth"
        assert prune.main([words[0], str(small), *words[1:], "--what", what, "--keep-parameters", "0.6"]) == 0
        layer = function_layers(load_trained(str(small), device="cpu").model)["blocks.3.mlp.phi2"]
        assert layer.function == function
    assert export.main([str(file), str(tmp_path / "program.onnx")]) == 0
