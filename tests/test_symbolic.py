"""tools/symbolic.py: known functions are found again, and the formulas of real checkpoints do what they say."""
import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from e2e import QUICK, evaluation, run
from helpers import GKAN, RELEASED, every, needs_released
from matplotlib.mathtext import MathTextParser
from models import nano
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tools import symbolic
from tools.images import loaders_of
from vision_kan.analysis import formulas
from vision_kan.analysis.formulas import DEFINITIONS, FORMS, Formula, fit_symbolic
from vision_kan.analysis.symbolic import Learned, SymbolicActivation, find_formulas, with_fitted_basis, with_formulas
from vision_kan.checkpoints.read import load_file
from vision_kan.kernels import rswaf_activation_reference, rswaf_basis
from vision_kan.layers.group_kan import GroupActivation
from vision_kan.run.trained import load_trained

U = np.linspace(-3, 3, 300)


# ---------------------------------------------------------------- fits
KNOWN = {
    "0": 0 * U, "2.5": 0 * U + 2.5, "u": U, "3 - 2*u": 3 - 2 * U, "0.5*u**3 - u": 0.5 * U ** 3 - U,
    "u**5 + 2*u**2 - 1": U ** 5 + 2 * U ** 2 - 1,
    "gelu(u)": U * np.vectorize(math.erfc)(-U / 2 ** 0.5) / 2,
    "u + 2*relu(u - 0.7)": U + 2 * np.maximum(U - 0.7, 0),
    "1.5*silu(2*u - 1) - 0.5*u": 1.5 * (2 * U - 1) / (1 + np.exp(1 - 2 * U)) - 0.5 * U,
    "relu(-u)**2": np.minimum(U, 0) ** 2, "Abs(u - 1)": np.abs(U - 1),
    "2*sin(1.7*u + 0.4) + 0.3": 2 * np.sin(1.7 * U + 0.4) + 0.3, "tanh(2*u - 1)": np.tanh(2 * U - 1),
    "exp(-0.8*u) + 1": np.exp(-0.8 * U) + 1, "0.2*u + 2*exp(-(1.3*u - 0.5)**2)": 0.2 * U + 2 * np.exp(-(1.3 * U - 0.5) ** 2),
    "sqrt(4*u**2 + 1)": np.sqrt(1 + 4 * U ** 2)}


@pytest.mark.parametrize("text", every(4, KNOWN))
def test_a_known_function_is_found_again(text):
    """From numpy's values; the formula is compared as an expression, however it is written."""
    found = fit_symbolic(U, KNOWN[text])
    names = {name: sympy.Function(name) for name in DEFINITIONS} | {"u": formulas.U}
    difference = sympy.sympify(text, locals=names) - found.expression(4)
    assert sympy.simplify(difference) == 0 and found.r2 > 1 - 1e-9 and found.residual < 1e-6
    assert MathTextParser("path").parse(f"${found.latex}$")


@pytest.mark.parametrize("form", FORMS)
def test_a_formula_is_the_same_in_torch_and_in_sympy(form):
    """sympy's value of the definitions is the independent one, at 30 digits."""
    formula = Formula(form, (0.5, -1.25, 0.0, 0.125), 1.5, -0.75 if len(FORMS[form].signs) > 1 else 0.75, 0.3)
    exact = formula.exact()
    assert not exact.atoms(sympy.core.function.AppliedUndef)
    for u in (-2.0, -0.1, 0.4, 1.9):
        expected = float(exact.evalf(30, {formulas.U: u}))
        assert formula(torch.tensor(u, dtype=torch.float64)).item() == pytest.approx(expected, 1e-12)


def test_the_fit_is_where_the_weight_is():
    """A kink at 2, which almost no input reaches, is not reported."""
    y = U + 3 * np.maximum(U - 2, 0)
    assert fit_symbolic(U, y).text == "u + 3*relu(u - 2)"
    assert fit_symbolic(U, y, np.where(U < 2, 1.0, 0.0)).text == "u"
    assert fit_symbolic(U, y, np.exp(-8 * (U + 1) ** 2)).text == "u"


def test_r2_and_residual_by_hand():
    rng = np.random.default_rng(0)
    weight, noise = rng.random(300), rng.normal(size=300)
    found = fit_symbolic(U, 2 * U + 0.3 * noise, weight)
    assert found.form == "polynomial" and found.complexity <= 2
    error = found(torch.from_numpy(U)).numpy() - (2 * U + 0.3 * noise)
    mean_square = np.average(error ** 2, weights=weight)
    y = 2 * U + 0.3 * noise
    assert found.residual == pytest.approx(mean_square ** 0.5)
    assert found.r2 == pytest.approx(1 - mean_square / np.average((y - np.average(y, weights=weight)) ** 2, weights=weight))


def test_a_further_number_must_earn_its_place():
    y = np.cosh(U) * np.sin(2 * U)
    fits = [fit_symbolic(U, y, forms=(), parsimony=parsimony) for parsimony in (1.1, 2, 10, 100)]
    assert fits == [fit_symbolic(U, y, forms=(), parsimony=parsimony) for parsimony in (1.1, 2, 10, 100)]
    assert all(value == 0 for fit in fits for value in fit.polynomial[::2])     # of an odd function
    numbers, left = [fit.complexity for fit in fits], [1 - fit.r2 for fit in fits]
    assert numbers == sorted(numbers, reverse=True) and left == sorted(left) and numbers[0] == 3 > numbers[-1]
    for parsimony, fit in zip((2, 10, 100), fits[1:]):      # against all odd polynomials, by numpy
        scores = []
        for powers in ([1], [3], [5], [1, 3], [1, 5], [3, 5], [1, 3, 5]):
            matrix = np.stack([U ** n for n in powers], 1)
            error = np.mean((matrix @ np.linalg.lstsq(matrix, y, rcond=None)[0] - y) ** 2)
            scores.append(math.log(error / np.var(y) + 1e-6, parsimony) + len(powers))
        assert math.log(1 - fit.r2 + 1e-6, parsimony) + fit.complexity == pytest.approx(min(scores))


@pytest.mark.parametrize("scale,shift", every(3, [(1e-3, 0.0), (1e3, 0.0), (1.0, 50.0)]))
def test_units_do_not_matter(scale, shift):
    found = fit_symbolic(U * scale + shift, np.tanh(2 * U - 1) * 1e-4)
    assert found.form == "tanh" and found.r2 > 1 - 1e-9


@pytest.mark.parametrize("u,y,weight", [
    ([0, 1], [0, 1, 2], None), ([0, 1, math.nan], [0, 1, 2], None), ([0, 1], [0, math.inf], None), ([0, 1], [0, 1], [-1, 1]),
    ([1, 1], [0, 1], None), ([0, 1], [0, 1], [0, 1])])
def test_what_has_no_formula(u, y, weight):
    with pytest.raises(ValueError):
        fit_symbolic(u, y, weight)


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("middle", [200, 1000, -5000])
def test_narrow_inputs_far_from_0(middle):
    """exp overflows there, and is no candidate."""
    u = middle + torch.linspace(-2, 2, 400, dtype=torch.float64)
    found = fit_symbolic(u, (u - middle).sin())
    assert found.r2 > 0.999


def test_an_input_that_never_varies(small):
    """Its function is described over the grid."""
    trained = load_trained(str(small), device="cpu")
    images = [torch.zeros(2, 3, 32, 32)]
    for block in trained.model.blocks:
        torch.nn.init.zeros_(block.norm2.weight)
    assert all(learned.formula.r2 > 0.9 for learned in find_formulas(trained, images, 1))


@pytest.mark.parametrize("base", every(3, ["identity", "gelu", "silu", "relu", "relu2"]))
def test_an_untrained_activation_is_its_base(base):
    phi = GroupActivation(8, groups=2, base=base, trainable_base=True)
    x = torch.randn(5, 8, dtype=torch.float64)
    u = torch.linspace(-3, 3, 200, dtype=torch.float64)
    y = phi.double().reference_forward(u[:, None].expand(-1, 8)).detach()
    formulas = [fit_symbolic(u, y[:, channel]) for channel in (0, 4)]
    assert {formula.form for formula in formulas} == {"polynomial" if base == "identity" else base}
    torch.testing.assert_close(SymbolicActivation(formulas)(x), phi.reference_forward(x))


def train(folder: Path, data: Path, *more) -> Path:
    """A checkpoint that knows three digits better than chance."""
    assert run(*QUICK, "--data-path", data, "--lr", 2e-2, "--epochs", 8, "--aa", "none", "--reprob", 0, "--mixup", 0,
               "--cutmix", 0, "--hflip", 0, "--color-jitter", 0, "--output_dir", folder, *more) == 0
    return folder / "checkpoint.pth"


@pytest.fixture(scope="module")
def group_kan(tmp_path_factory, data):
    return train(tmp_path_factory.mktemp("gkan") / "run", data, "--model", GKAN, "--kan-groups", 2, "--kan-trainable-base")


@pytest.fixture(scope="module")
def small(tmp_path_factory, data):
    """Of four functions."""
    return train(tmp_path_factory.mktemp("small") / "run", data, "--model", GKAN, "--kan-groups", 1, "--no-kan-input-phi")


def top1(text: str) -> dict[str, float]:
    return {line.partition(":")[0].strip(): float(line.partition("top-1 ")[2].split()[0])
            for line in text.splitlines() if ": top-1 " in line}


def test_what_replaces_a_model_is_evaluated_on_its_held_out_images(data, tmp_path, monkeypatch):
    args = {"data_set": "FOLDER", "val_split": 0.5, "seed": 5}
    torch.save({"model": nano(GKAN, num_classes=3).state_dict(), "args": args,
                "model_args": {"name": GKAN, "kwargs": {"depth": 1, "num_classes": 3}}}, tmp_path / "c.pth")
    flags = ["--data-path", str(data / "train"), "--num_workers", "0"]
    trained = load_trained(str(tmp_path / "c.pth"), device="cpu", flags=flags)
    monkeypatch.setattr(symbolic, "with_formulas", lambda model, found: model)
    monkeypatch.setattr(symbolic, "with_fitted_basis", lambda model, found: (model, [1.0]))
    symbolic.replace_functions(trained, [], tmp_path / "t.safetensors")
    kept = load_file(tmp_path / "t.safetensors")["args"]
    assert {key: kept[key] for key in args} == args


@pytest.mark.slow
def test_a_group_kan_end_to_end(group_kan, data, tmp_path, capsys):
    target, out = tmp_path / "deep" / "formulas.safetensors", tmp_path / "out"
    words = [str(group_kan), "--data-path", str(data), "--device", "cpu", "--num_workers", "0"]
    assert symbolic.main([*words, "--output", str(out), "--replace", str(target)]) == 0
    said = capsys.readouterr().out
    assert "weighted by the inputs on these images" in said
    records = json.loads((out / "formulas.json").read_text())
    assert [(r["block"], r["activation"], r["group"]) for r in records] == [
        (str(block), f"phi{phi}", str(group)) for block in range(4) for phi in (1, 2) for group in range(2)]
    assert sorted(path.name for path in out.iterdir()) == [f"formulas.{end}" for end in ("csv", "json", "png", "tex", "txt")]
    assert [row["formula"] for row in csv.DictReader((out / "formulas.csv").open())] == [r["formula"] for r in records]
    latex = (out / "formulas.tex").read_text()
    assert all(r["formula"] in said and r["latex"] in latex for r in records) and (out / "formulas.txt").read_text() in said
    assert Image.open(out / "formulas.png").size[0] > 1000

    # each R^2 again, on the model's own functions, from the file alone
    trained = load_trained(str(group_kan), device="cpu", flags=words[1:3])
    seen, formulas = arriving(trained), {}
    for record in records:
        name = f"blocks.{record['block']}.mlp.{record['activation']}"
        phi, group = trained.model.get_submodule(name), int(record["group"])
        u = seen[name][..., group * phi.channels // 2:(group + 1) * phi.channels // 2].flatten().double()
        y = rswaf_activation_reference(u[:, None], phi.coefficients[group:group + 1].double(), phi.points, phi.h,
                                                phi.base, phi.scale[group:group + 1].double()).squeeze(1)
        formula = Formula(record["form"], tuple(record["polynomial"]), record["a"], record["b"], record["c"])
        assert formula.text == record["formula"] and record["r2"] > 0.99
        formulas.setdefault(name, []).append(formula)
        unexplained = ((formula(u) - y).square().mean() / y.var(correction=0)).item()
        assert unexplained < 3 * (1 - record["r2"]) + 1e-5

    accuracy = top1(said)
    assert evaluated(group_kan, data, capsys) == accuracy["learned functions"] > 50
    assert accuracy["their formulas"] >= accuracy["learned functions"] - 15
    assert evaluated(target, data, capsys) == accuracy["saved"]
    for name, both in formulas.items():
        trained.model.set_submodule(name, SymbolicActivation(both))
    assert top1_of(trained.model, trained) == pytest.approx(accuracy["their formulas"], abs=0.01)


def evaluated(file: Path, data: Path, capsys) -> float:
    capsys.readouterr()
    assert run("--eval", "--resume", file, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    return float(evaluation(capsys.readouterr().out)["model"][0])


def top1_of(model: nn.Module, trained) -> float:
    right = torch.cat([model(images).argmax(1) == targets for images, targets in loaders_of(trained).val])
    return 100 * right.float().mean().item()


def arriving(trained) -> dict[str, torch.Tensor]:
    seen = {}
    for name, module in trained.model.named_modules():
        if isinstance(module, GroupActivation):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
    for images, _ in loaders_of(trained).val:
        trained.model(images)
    for module in trained.model.modules():
        module._forward_pre_hooks.clear()
    return {name: torch.cat(values) for name, values in seen.items()}


@pytest.mark.slow
def test_the_saved_functions_are_the_nearest_ones_of_the_grid(small, data):
    """Against numpy's least squares; the model is unchanged."""
    trained = load_trained(str(small), device="cpu", flags=["--data-path", str(data)])
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    found = find_formulas(trained)
    fitted, fits = with_fitted_basis(trained.model, found)
    assert len(found) == len(fits) == 4 and min(fits) > 0.99
    for each in found:
        phi = fitted.get_submodule(each.part)
        basis = rswaf_basis(each.u, torch.tensor(phi.points).double(), phi.h).numpy()
        base, root = F.gelu(each.u).numpy(), each.weight.sqrt().numpy()
        target = each.formula(each.u).numpy() - base
        nearest = basis @ np.linalg.lstsq(root[:, None] * basis, root * target, rcond=None)[0]
        own = basis @ phi.coefficients[0].double().numpy()
        assert np.linalg.norm(own - target) < np.linalg.norm(nearest - target) + 1e-3 * np.linalg.norm(target + base)
    # the learned function in a formula's place gives the model back
    learned = [replace(each, formula=lambda u, each=each: each.y) for each in found]
    same, fits = with_fitted_basis(trained.model, learned)
    images, _ = next(iter(loaders_of(trained).val))
    assert min(fits) > 1 - 1e-6
    torch.testing.assert_close(same(images), trained.model(images), rtol=0.02, atol=0.02)
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())
    replaced = with_formulas(trained.model, found)
    assert isinstance(replaced.blocks[3].mlp.phi2, SymbolicActivation)
    assert isinstance(trained.model.blocks[3].mlp.phi2, GroupActivation)


@pytest.mark.slow
def test_it_is_the_same_twice_and_weighted_by_images_of_a_folder(small, data, tmp_path, capsys):
    words = [str(small), "--device", "cpu", "--num_workers", "0", "--images", str(data / "train"), "--limit", "10"]
    outputs = []
    for number in range(2):
        assert symbolic.main([*words, "--output", str(tmp_path / str(number))]) == 0
        outputs.append((tmp_path / str(number) / "formulas.csv").read_text())
    assert outputs[0] == outputs[1]
    capsys.readouterr()
    assert symbolic.main([str(small), "--device", "cpu", "--weights", "model_ema", "--output", str(tmp_path / "even")]) == 0
    assert "no images: the grid is weighted evenly" in capsys.readouterr().out
    assert (tmp_path / "even" / "formulas.csv").read_text() != outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("model,more", [("vit_nano_patch8_32_KAN", ["--kan-base-branch"]), ("vit_nano_patch8_32_EKAN", [])])
def test_the_strongest_edges_of_a_full_edge_kan(model, more, data, tmp_path, capsys):
    """Their strength and values, computed independently: the layer's output as one input moves."""
    file = train(tmp_path / "run", data, "--epochs", 1, "--model", model, *more)
    flags = ["--data-path", str(data), "--num_workers", "0"]
    assert symbolic.main([str(file), *flags, "--device", "cpu", "--edges", "1", "--output", str(tmp_path / "out")]) == 0
    records = json.loads((tmp_path / "out" / "formulas.json").read_text())
    assert len(records) == 8 and {(r["block"], r["activation"]) for r in records} == {
        (str(block), f"layers.{layer}") for block in range(4) for layer in range(2)}
    trained = load_trained(str(file), device="cpu", flags=flags)
    found = find_formulas(trained, [images for images, _ in loaders_of(trained).val], 1, edges=1)
    seen = []
    layer = trained.model.blocks[1].mlp.layers[0]
    norm = getattr(layer, "layernorm", nn.Identity())
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(norm(args[0]).flatten(0, 1)))
    for images, _ in loaders_of(trained).val:
        trained.model(images)
    hook.remove()
    u = torch.cat(seen)
    if hasattr(layer, "layernorm"):
        layer.layernorm = nn.Identity()
    zero = layer(torch.zeros(1, layer.in_features))
    strength = torch.empty(layer.out_features, layer.in_features)
    for i in range(layer.in_features):
        x = torch.zeros(len(u), layer.in_features)
        x[:, i] = u[:, i]
        strength[:, i] = (layer(x) - zero).std(0)
    edges = [each for each in found if each.part == "blocks.1.mlp.layers.0"]
    for each in edges:
        i, o = map(int, each.function.split(" -> "))
        assert strength[o, i] > 0.95 * strength.max()       # 4096 values of each input are drawn
        x = torch.zeros(len(each.u), layer.in_features)
        x[:, i] = each.u.float()
        y = (layer(x) - zero)[:, o].double()
        torch.testing.assert_close(each.y - each.weight @ each.y, y - each.weight @ y, rtol=1e-3, atol=1e-4)
        assert each.formula.r2 <= 1 and each.formula.residual < 0.9 * each.y.std() or each.formula.r2 < 0.5
    capsys.readouterr()
    assert symbolic.main([str(file), *flags, "--replace", str(tmp_path / "t.safetensors")]) == 2
    assert "leave it out" in capsys.readouterr().err and not (tmp_path / "t.safetensors").exists()


def test_the_legend_hides_no_curve(tmp_path, monkeypatch):
    """Many functions in each of two panels: each legend lies outside all of them, within the picture."""
    u = torch.linspace(-3, 3, 60, dtype=torch.float64)
    weight = torch.full((60,), 1 / 60, dtype=torch.float64)
    formulas = [Formula("polynomial", (0.0, slope / 8, 0.0, 0.0), 0.0, 0.0, 0.0) for slope in range(8)]
    found = [Learned(f"blocks.0.mlp.{part}", str(n), u, weight, formula(u), replace(formula, r2=1.0))
             for part in ("phi1", "phi2") for n, formula in enumerate(formulas)]
    figures = []
    monkeypatch.setattr(symbolic.plt, "close", figures.append)
    symbolic.draw(found, tmp_path / "f.png")
    monkeypatch.undo()
    figure, = figures
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 2
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert len(axes.get_legend().get_texts()) == 8 and not any(legend.overlaps(box) for box in boxes)
        assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    symbolic.plt.close(figure)


@pytest.mark.slow
@needs_released
def test_a_file_of_the_original_code(capsys):
    assert symbolic.main([str(RELEASED), "--device", "cpu", "--edges", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == lines.index(next(line for line in lines if line.startswith("block"))) + 25


@pytest.mark.parametrize("words,sentence", [
    (["nowhere.pth"], "does not exist"), (["FILE", "--replace", "t.pth"], "must end in .safetensors"),
    (["FILE", "--replace", "t.safetensors"], "--data-path DIR"), (["FILE", "--limit", "0"], "--limit 0"),
    (["FILE", "--parsimony", "1"], "--parsimony 1"),
    (["FILE", "--images", "EMPTY"], "holds no images"), (["FILE", "--images", "BROKEN"], "no image could be read"),
    (["MLP"], "holds no KAN"), (["FILE", "--edgse", "3"], "unknown flag --edgse"),
    pytest.param(["FILE", "--output", "BROKEN/broken.png/x"], "cannot be written", marks=pytest.mark.slow)])
def test_mistakes(words, sentence, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.png").write_bytes(b"no image")
    if "MLP" in words:
        import timm
        model = timm.create_model("vit_nano_patch8_32_ViT", num_classes=3)
        torch.save({"model": model.state_dict(), "args": {"model": "vit_nano_patch8_32_ViT"}}, tmp_path / "mlp.pth")
    for name, place in (("FILE", small), ("EMPTY", tmp_path / "empty"), ("BROKEN", tmp_path / "broken"),
                        ("MLP", tmp_path / "mlp.pth")):
        words = [word.replace(name, str(place)) if word.startswith(name) else word for word in words]
    assert symbolic.main([*words, "--device", "cpu", "--num_workers", "0"]) == 2
    err = capsys.readouterr().err
    assert sentence in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
