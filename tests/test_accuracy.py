"""benchmarks/accuracy.py: what is compared is comparable, what is printed is what was run, a stop loses no run."""
import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import engine
from benchmarks import accuracy
from samplers import RASampler
from vision_kan.kernels import native
from vision_kan.models.cost import twin_mismatch

pytestmark = pytest.mark.slow


def model(text: str, seed: int = 0):
    _, suffix, options, _ = accuracy.parse_variant(text)
    return accuracy.build(suffix, options, seed, 10, None)


@pytest.mark.parametrize("text", ["gkan", "kan", "kan-original", "relu2", "silu", "gkan,kan_groups=32",
                                  "kan,kan_grid_points=4,hdim_kan=96"])
def test_the_variants_are_fair_twins_of_the_mlp(text):
    assert twin_mismatch(model(text), model("mlp")) is None


def test_an_unfair_one_is_told():
    """efficient-KAN scales each edge's spline by a number that takes part in no product: 10 parameters, 9 FLOPs."""
    assert "FLOPs" in twin_mismatch(model("ekan"), model("mlp"))
    rows = [row("mlp", 0, 50.0), row("wide", 0, 55.0, parameters=110)]
    assert accuracy.table(rows, "mlp").splitlines()[-1] == (
        "wide and mlp are not twins: 110 against 100 parameters, a difference of 9.1%")


@pytest.mark.parametrize("text", ["gkan", "kan", "relu2", "ekan"])
def test_what_is_shared_begins_alike(text):
    """The MLP's very numbers, other ones for another seed."""
    theirs, ours, other = (net.state_dict() for net in (model("mlp"), model(text), model(text, 1)))
    shared = [key for key in theirs if key in ours]
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight", "pos_embed"} <= set(shared)
    assert all(torch.equal(theirs[key], ours[key]) for key in shared)
    assert not torch.equal(ours["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_group_kan_begins_as_the_mlp():
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model("gkan").eval()(x), model("mlp").eval()(x), atol=1e-5, rtol=1e-5)


def test_squared_relu_and_other_places_of_phi():
    x = torch.tensor([-1.0, 0.0, 2.0])
    assert accuracy.SquaredReLU()(x).tolist() == [0.0, 0.0, 4.0]
    images = torch.randn(2, 3, 32, 32)
    for text, n in (("gkan", 2), ("gkan,phi_qkv=true", 3), ("gkan,phi_out=true", 3), ("gkan,kan_input_phi=false", 1)):
        net = model(text)
        coefficients = [key for key in net.state_dict() if key.startswith("blocks.0.") and key.endswith(".coefficients")]
        assert len(coefficients) == n
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(images), model("mlp").eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text, options, recipe", [
    ("gkan", {}, {}), ("gkan,kan_groups=16,lr=2e-3", {"kan_groups": 16}, {"lr": 2e-3}),
    ("kan,kan_grid_range=-4:4,kan_base_branch=true", {"kan_basis": "covering", "kan_grid_range": [-4.0, 4.0],
                                                      "kan_base_branch": True}, {}),
    ("mlp,epochs=15,weight_decay=0", {}, {"epochs": 15, "weight_decay": 0})])
def test_variants(text, options, recipe):
    _, _, got, settings = accuracy.parse_variant(text)
    assert got == options and settings == {**accuracy.RECIPE, **recipe}


@pytest.mark.parametrize("text, sentence", [("kann", "is not one of"), ("gkan,lr", "lr=VALUE"), ("gkan,grups=3", "is none of")])
def test_wrong_variants(text, sentence):
    with pytest.raises(SystemExit, match=sentence):
        accuracy.parse_variant(text)


def test_the_interval_is_students():
    differences = [5.0, 6.5, 4.0, 7.0, 5.5]
    mean, half = accuracy.interval(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(accuracy.interval([1.0])[1])


def row(variant: str, seed: int, top1: float, **columns) -> dict:
    return {"setting": "scratch", "variant": variant, "seed": seed, "epochs": 3, "top1": top1, "top1_ema": top1 - 1,
            "parameters": 100, "matmul_mflops": 1.0, "elementwise_mflops": 0.5, "step_ms": 10, **columns}


def test_table_pairs_by_seed():
    rows = [row("mlp", 0, 50.0), row("mlp", 1, 40.0), row("gkan", 1, 46.0), row("gkan", 0, 58.0), row("kan", 2, 45.0)]
    lines = accuracy.table(rows, "mlp").splitlines()
    gkan = next(line for line in lines if line.startswith("| gkan"))
    assert "| 52.00 ± 8.49 | 2 | +7.00 [-5.71, +19.71] |" in gkan
    assert next(line for line in lines if line.startswith("| kan")).split("|")[4].strip() == ""


def test_batches_are_keyed_by_seed_and_epoch_and_hold_every_image_once():
    images, targets = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20)

    def epoch(seed, number):
        batches = accuracy.Batches(images, targets, 5, seed)
        batches.sampler.set_epoch(number)
        return [list(part) for part in zip(*batches)]

    (a, ta), (b, tb) = epoch(0, 0), epoch(0, 0)
    assert all(map(torch.equal, a, b)) and all(map(torch.equal, ta, tb))
    assert sorted(torch.cat(ta).tolist()) == list(range(20))
    assert torch.cat(ta).tolist() == [key.index for key in RASampler(20, num_repeats=1, seed=0)]
    for other in (epoch(1, 0), epoch(0, 1)):
        assert torch.cat(other[1]).tolist() != torch.cat(ta).tolist()
    still = accuracy.Batches(images, targets, 8, 0, augment=False)
    assert len(still) == 3 and torch.equal(torch.cat([x for x, _ in still]), accuracy.normalise(images))


def test_an_augmented_image_is_a_shifted_or_mirrored_one():
    images = torch.arange(3 * 32 * 32, dtype=torch.float32).view(1, 3, 32, 32).repeat(64, 1, 1, 1) + 1
    out = accuracy._augment(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0], (4,) * 4)
    allowed = [p[:, y:y + 32, x:x + 32] for p in (padded, torch.nn.functional.pad(images[0].flip(2), (4,) * 4))
               for y in range(9) for x in range(9)]
    found = {next(i for i, crop in enumerate(allowed) if torch.equal(crop, image)) for image in out}
    assert len(found) > 20


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 2)):
        for c in range(10):
            (tmp_path / "data" / split / str(c)).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / "data" / split / str(c) / f"{i}.png")
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Two epochs of batches of 12, uncompiled."""
    monkeypatch.setitem(accuracy.RECIPE, "epochs", 2)
    monkeypatch.setitem(accuracy.RECIPE, "batch_size", 12)
    monkeypatch.setitem(accuracy.RECIPE, "warmup_steps", 1)
    monkeypatch.setattr(accuracy.shutil, "which", lambda name: None)
    yield
    native.library.cache_clear()        # it has found no compiler either


def run(setting: str, variant: str, folder, seed: int = 0) -> dict:
    accuracy.run(setting, variant, seed, folder / "data", folder / "work", folder / "results")
    with open(folder / "results" / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))[-1]


def test_a_run_from_scratch_and_its_repetition(folder, small):
    first = run("scratch", "gkan", folder)
    assert first["variant"] == "gkan" and first["epochs"] == "2" and len(first["top1_by_epoch"].split()) == 2
    (folder / "work").rename(folder / "elsewhere")
    again = run("scratch", "gkan", folder)
    assert (again["top1"], again["train_loss"]) == (first["top1"], first["train_loss"])


def test_a_stopped_run_goes_on_where_it_was(folder, small, monkeypatch):
    whole = run("scratch", "gkan", folder)
    (folder / "work").rename(folder / "elsewhere")
    evaluate, calls = engine.evaluate, []

    def stop_in_the_second_epoch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(engine, "evaluate", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run("scratch", "gkan", folder)
    monkeypatch.setattr(engine, "evaluate", evaluate)
    resumed = run("scratch", "gkan", folder)
    for key in ("top1", "top1_ema", "top1_by_epoch", "train_loss"):
        assert resumed[key] == whole[key], key


def test_transfer_begins_equal_and_pretrains_once(folder, small):
    mlp = run("transfer", "mlp", folder)
    stamp = (folder / "work" / "transfer" / "pretrained-seed0" / "checkpoint.pth").stat().st_mtime_ns
    gkan = run("transfer", "gkan", folder)
    assert float(mlp["step0_error"]) == 0 and float(gkan["step0_error"]) <= 1e-5
    assert (folder / "work" / "transfer" / "pretrained-seed0" / "checkpoint.pth").stat().st_mtime_ns == stamp


def test_fixed_shapes_come_from_learned_ones_and_stay(folder, small):
    with pytest.raises(SystemExit, match="run --variants gkan first"):
        run("scratch", "mean-shape", folder)
    run("scratch", "gkan", folder)
    run("scratch", "mean-shape", folder)
    learned = accuracy.load_file(folder / "work" / "scratch" / "gkan-2epochs-seed0" / "checkpoint.pth")["model"]
    fixed = accuracy.load_file(folder / "work" / "scratch" / "mean-shape-2epochs-seed0" / "checkpoint.pth")["model"]
    mean = torch.cat([value for key, value in learned.items() if key.endswith("phi2.coefficients")]).mean(0)
    assert mean.abs().max() > 0
    assert all(torch.equal(value[0], mean) for key, value in fixed.items() if key.endswith("phi2.coefficients"))
    assert not any("phi1" in key for key in fixed)


def test_conversion_of_finished_runs(folder, small, capsys):
    with pytest.raises(SystemExit, match="run scratch --variants mlp --seeds 0 first"):
        accuracy.convert([0], folder / "data", folder / "work", folder / "results")
    run("scratch", "mlp", folder)
    accuracy.convert([0], folder / "data", folder / "work", folder / "results")
    with open(folder / "results" / "conversion.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    errors = [max(map(float, row["block_errors"].split())) for row in rows]
    assert len(rows) == 4 and errors == sorted(errors, reverse=True) and errors[-1] < 0.05 < errors[0]
    assert float(rows[-1]["top1_kan"]) == pytest.approx(float(rows[-1]["top1_mlp"]), abs=10)     # of 20 images
    assert "| [-4, 4] | spacing |" in capsys.readouterr().out


def test_the_command_runs_what_is_missing_and_reports(folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")          # no compiler: the eager models start faster
    command = ["scratch", "--data", str(folder / "data"), "--variants", "mlp,epochs=1,batch_size=12,warmup_steps=1", "--seeds",
               "0", "1", "--baseline", "mlp,epochs=1,batch_size=12,warmup_steps=1", "--work-dir", str(folder / "work"),
               "--results", str(folder / "results")]
    assert accuracy.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("done:") == 2 and "| mlp,epochs=1" in out
    assert (folder / "results" / "scratch_1_epochs.png").stat().st_size > 5000
    assert accuracy.main(command) == 0
    assert "done:" not in capsys.readouterr().out


def test_the_picture_of_the_readme(tmp_path, monkeypatch):
    """Six rows of the recorded runs, by plain names, the best on top."""
    from matplotlib import pyplot as plt
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    rows = [each for each in accuracy.read_rows(accuracy.ROOT / "benchmarks/results/accuracy/runs.csv")
            if (each["setting"], each["epochs"]) == ("scratch", 4)]
    accuracy.plot(rows, tmp_path / "summary.png", "it", plain=True)
    monkeypatch.undo()
    axes, = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "full-edge KAN, original", "efficient-KAN", "full-edge KAN, repaired", "MLP, GELU", "MLP, squared ReLU", "group KAN"]
    assert sorted(axes.lines[-2].get_xdata()) == sorted(row["top1"] for row in rows if row["variant"] == "gkan")
    plt.close(figures[0])


def test_bad_folders(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no folder train"):
        accuracy.main(["scratch", "--data", str(tmp_path), "--variants", "mlp", "--work-dir", str(tmp_path / "w")])
    with pytest.raises(SystemExit, match="no finished run"):
        accuracy.main(["report", "--results", str(tmp_path)])
