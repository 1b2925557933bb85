"""benchmarks/accuracy.py: what is compared is comparable, what is printed is what was run, a stop loses no run."""
import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from e2e import evaluation
from e2e import run as run_main
from helpers import ROOT, sentence
from PIL import Image
from recorded import RecordedGraphs, assert_same
from scipy import stats

import benchmarks.trials.images
import engine
from benchmarks import accuracy
from benchmarks.trials import report, side_by_side, training, variants
from benchmarks.trials.conversion import convert
from benchmarks.trials.images import Batches, EvalBatches, Images, load_images, normalise
from benchmarks.trials.models import ScaledActivation, SquaredReLU, build, calibrate
from benchmarks.trials.plan import read_plan
from benchmarks.trials.side_by_side import train_side_by_side
from benchmarks.trials.training import Smooth, begin, flags_of, train
from benchmarks.trials.variants import RECIPE, Run, parse_variant
from samplers import RASampler
from vision_kan.checkpoints.read import load_file
from vision_kan.common.process import Process
from vision_kan.common.text import to_builtin_types
from vision_kan.kernels import native
from vision_kan.layers.group_kan import GroupActivation
from vision_kan.models.cost import twin_mismatch
from vision_kan.run.folder import versions
from vision_kan.run.trained import load_trained
from vision_kan.training.updates import Updater

slow = pytest.mark.slow


def model(text: str, seed: int = 0):
    return build(parse_variant(text), seed, 10)


@pytest.mark.parametrize("text", ["gkan", "kan", "kan-original", "relu2", "silu", "gkan,kan_groups=32",
                                  "kan,kan_grid_points=4,hdim_kan=96", "swiglu", "kat",
                                  "gkan,phi2_scale=learned"])
def test_the_variants_are_fair_twins_of_the_mlp(text):
    assert twin_mismatch(model(text), model("mlp")) is None


def test_an_unfair_one_is_told():
    """efficient-KAN scales each edge's spline by a number that takes part in no product: 10 parameters, 9 FLOPs."""
    assert "FLOPs" in twin_mismatch(model("ekan"), model("mlp"))
    rows = [row("mlp", 0, 50.0), row("wide", 0, 55.0, parameters=110)]
    assert report.table(rows, "mlp").splitlines()[-1] == (
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
    assert SquaredReLU()(x).tolist() == [0.0, 0.0, 4.0]
    images = torch.randn(2, 3, 32, 32)
    for text, n in (("gkan", 2), ("gkan,phi_qkv=true", 3), ("gkan,phi_out=true", 3), ("gkan,kan_input_phi=false", 1)):
        net = model(text)
        coefficients = [key for key in net.state_dict() if key.startswith("blocks.0.") and key.endswith(".coefficients")]
        assert len(coefficients) == n
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(images), model("mlp").eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_scaled_functions_begin_as_their_base(dtype, autocast):
    """Bit for bit, as the plain activation does; autocast takes fc1's output, which is in bfloat16 too."""
    plain = GroupActivation(64)
    scaled = ScaledActivation(plain, trained=True)
    torch.nn.init.constant_(scaled.input_scale, 1.7)
    u = torch.randn(50, 64).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = scaled(u), plain(u)
        single = scaled(u.float())
    assert ours.dtype == theirs.dtype == dtype and single.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(ours, torch.nn.functional.gelu(u.float()).to(dtype))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["calibrated", "learned"])
def test_scaled_functions(kind):
    """They begin as the MLP; the factors are 1 over the deviation of the function's input; C acts on the scaled input."""
    images = torch.randn(16, 3, 32, 32)
    net = build(parse_variant(f"gkan,phi2_scale={kind}"), 0, 10, batch=images)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), model("mlp").eval()(images), atol=1e-5, rtol=1e-5)
    phi = net.blocks[0].mlp.phi2
    assert isinstance(phi, ScaledActivation) and phi.input_scale.requires_grad == (kind == "learned")
    kept = []
    phi.register_forward_pre_hook(lambda layer, args: kept.append(args[0]))
    calibrate(net, images)
    torch.testing.assert_close(phi.input_scale * kept[0].std(), torch.ones(8))
    torch.nn.init.normal_(phi.coefficients)
    u = torch.randn(5, 384)
    scaled = u * phi.input_scale[0]
    wanted = torch.nn.functional.gelu(u) + phi.basis(scaled)[..., :-1].unflatten(1, (8, 48)).mul(
        phi.coefficients[:, None]).sum(-1).flatten(1)
    torch.testing.assert_close(phi(u), wanted, atol=1e-5, rtol=1e-5)


def test_mimetic_attention_is_the_twins_too():
    ours, theirs, plain = (model(text).blocks[0].attn.qkv.weight
                           for text in ("gkan,weight_init=mimetic", "mlp,weight_init=mimetic", "mlp"))
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain)


@pytest.mark.parametrize("text, options, recipe", [
    ("gkan", {}, {}), ("gkan,kan_groups=16,lr=2e-3", {"kan_groups": 16}, {"lr": 2e-3}),
    ("kan,kan_grid_range=-4:4,kan_base_branch=true", {"kan_basis": "covering", "kan_grid_range": [-4.0, 4.0],
                                                      "kan_base_branch": True}, {}),
    ("gkan,grid=-2:1.5", {"kan_grid_range": [-2.0, 1.5]}, {}), ("kat", {}, {"kan_lr_mult": 1.0, "kan_weight_decay": 0.05}),
    ("mlp,epochs=15,weight_decay=0", {}, {"epochs": 15, "weight_decay": 0})])
def test_variants(text, options, recipe):
    variant = parse_variant(text)
    assert variant.options == options and variant.recipe == {**RECIPE, **recipe}


@pytest.mark.parametrize("texts, one", [
    (("mlp", "mlp,lr=1e-3", "mlp,epochs=3,size=micro", "mlp,gated=false", "mlp,weight_init=reset"), "mlp"),
    (("gkan,lr=2e-3,grid=-4:4", "gkan,kan_grid_range=-4.0:4,lr=0.002"), "gkan,kan_grid_range=-4:4,lr=0.002"),
    (("gkan,kan_groups=8", "gkan,grid=-3:3", "gkan,kan_trainable_base=false"), "gkan"), (("kan,kan_basis=covering",), "kan")])
def test_a_variant_has_one_text_for_every_way_to_write_it(texts, one):
    assert {parse_variant(text).text for text in texts} == {one}


def test_long_ones():
    cpu, gpu, own = (parse_variant("mlp", "long"), parse_variant("mlp", "long", device="cuda"),
                     parse_variant("mlp,epochs=7,size=micro", "long", "nano", 9))
    assert (cpu.recipe["epochs"], gpu.recipe["epochs"], own.recipe["epochs"], own.size) == (50, 100, 7, "micro")
    assert (gpu.recipe["warmup_steps"], cpu.recipe["warmup_steps"]) == (1755, 877)
    assert parse_variant("mlp", "long", epochs=9).recipe["epochs"] == 9
    assert (cpu.recipe["mixup"], cpu.recipe["cutmix"], cpu.recipe["drop_path"], cpu.recipe["smoothing"]) == (0.8, 1.0, 0.1, 0.1)
    assert [block.drop_path1.drop_prob for block in build(cpu, 0, 10).blocks[1:]] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])


@pytest.mark.parametrize("text, part", [
    ("kann", "kann is not one of mlp, "), ("gkan,lr", "lr=VALUE"), ("gkan,grups=3", "grups is none of"),
    ("mlp,kan_groups=2", "kan_groups is none of"), ("gkan,lr=fast", "lr must be a number, not the text 'fast'"),
    ("gkan,epochs=1.5", "epochs must be a whole number, not the number 1.5"),
    ("gkan,size=huge", "size must be one of nano, micro, not 'huge'"),
    ("gkan,phi2_scale=2", "phi2_scale must be one of calibrated, learned, not '2'"),
    ("mlp,phi2_scale=learned", "mlp cannot have phi2_scale, which is for gkan, mean-shape, frozen"),
    ("kat,phi2_scale=learned", "kat cannot have phi2_scale"), ("kan,gated=true", "kan cannot have gated, which is for mlp,"),
    ("gkan,act=relu2", "gkan cannot have act"), ("kat,frozen=own", "kat cannot have frozen"),
    ("swiglu,act=relu", "swiglu cannot have both act and gated"), ("relu2,gated=true", "relu2 cannot have both act and gated"),
    ("mlp,gain=0.3", "mlp cannot have gain, which is for kan-original, kan"), ("ekan,whiten=pca", "ekan cannot have whiten"),
    ("kan,phi_out=true", "kan cannot have phi_out"), ("ekan,phi_out=true", "ekan cannot have phi_out"),
    ("mlp,epochs=0", "epochs must be from 1 to 1000000"),
    ("mlp,batch_size=0", "batch_size must be at least 1"),
    ("gkan,drop_path=2", "drop_path must be at least 0 and less than 1"), ("gkan,kan_groups=-1", "kan_groups must be at least 0"),
    ("gkan,kan_groups=many", "kan_groups must be a whole number"), ("mlp,mlp_ratio=0", "mlp_ratio must be at least 0.1"),
    ("mlp,mlp_ratio=wide", "mlp_ratio must be a number"), ("mlp,ema_decay=2", "ema_decay must be at least 0 and less than 1"),
    ("mlp,warmup_steps=-1", "warmup_steps must be at least 0"),
    ("kan,gain=1:2", "gain must be a number"), ("mlp,gated=maybe", "gated must be true or false"),
    ("gkan,smooth=.nan", "smooth must be a finite number"), ("mlp,weight_init=timm", "weight_init must be one of reset, mimetic"),
    ("mlp,batch_size=60000", "batch_size must be at most 22500"), ("mlp,mixup=0.8,batch_size=7", "batch_size must be even")])
def test_wrong_variants(text, part):
    assert part in sentence(parse_variant, text)


@pytest.mark.parametrize("name", sorted(set(variants.VARIANTS) - {"mean-shape", "frozen"}))     # these need finished runs
def test_what_a_variant_can_have_can_be_built(name):
    suffix, options = variants.VARIANTS[name]
    choices = {"act": "relu", "phi2_scale": "learned", "whiten": "pca", "gain": "0.5"}
    for key in (*(key for key, suffixes in variants.ONLY_FOR.items() if suffix in suffixes), "phi_qkv"):
        if key != "frozen" and not (key in ("act", "gated") and options):
            assert model(f"{name},{key}={choices.get(key, 'true')}")(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_the_interval_is_students():
    differences = [5.0, 6.5, 4.0, 7.0, 5.5]
    mean, half = report.interval(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(report.interval([1.0])[1])


def row(variant: str, seed: int, top1: float, **columns) -> dict:
    return {"setting": "scratch", "variant": variant, "seed": seed, "epochs": 3, "top1": top1, "top1_ema": top1 - 1,
            "train_loss": 1.5, "parameters": 100, "matmul_mflops": 1.0, "elementwise_mflops": 0.5, "step_ms": 10, **columns}


def test_table_pairs_by_seed():
    rows = [row("mlp", 0, 50.0), row("mlp", 1, 40.0), row("gkan", 1, 46.0), row("gkan", 0, 58.0), row("kan", 2, 45.0)]
    lines = report.table(rows, "mlp").splitlines()
    gkan = next(line for line in lines if line.startswith("| gkan"))
    assert "| 52.00 ± 8.49 | 2 | +7.00 [-5.71, +19.71] |" in gkan
    assert next(line for line in lines if line.startswith("| kan")).split("|")[4].strip() == ""


def tensors(train: int, val: int = 20) -> Images:
    """Images of 10 classes."""
    random = torch.Generator().manual_seed(0)
    made = {}
    for split, n in (("train", train), ("val", val)):
        made[split] = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=random)
        made[f"{split}_y"] = torch.arange(n) % 10
    return Images(made, list("0123456789"))


def batches_of(images, batch_size: int, seed: int) -> Batches:
    return Batches(images, flags_of({**RECIPE, "batch_size": batch_size}, 1), seed, torch.device("cpu"))


def test_batches_are_keyed_by_seed_and_epoch_and_hold_every_image_once():
    images = tensors(20, 1300) | {"train_y": torch.arange(20)}

    def epoch(seed, number):
        batches = batches_of(images, 5, seed)
        batches.sampler.set_epoch(number)
        return [list(part) for part in zip(*batches)]

    (a, ta), (b, tb) = epoch(0, 0), epoch(0, 0)
    assert all(map(torch.equal, a, b)) and all(map(torch.equal, ta, tb))
    assert sorted(torch.cat(ta).tolist()) == list(range(20))
    assert torch.cat(ta).tolist() == [key.index for key in RASampler(20, num_repeats=1, seed=0)]
    for other in (epoch(1, 0), epoch(0, 1)):
        assert torch.cat(other[1]).tolist() != torch.cat(ta).tolist()
    still = EvalBatches(images, torch.device("cpu"))
    assert len(still) == 3 and torch.equal(torch.cat([x for x, _ in still]), normalise(images["val"]))


def test_an_augmented_image_is_a_shifted_or_mirrored_one():
    image = tensors(1)["train"]
    batch, _ = next(iter(batches_of({"train": image.repeat(64, 1, 1, 1), "train_y": torch.zeros(64).long()}, 64, 0)))
    padded = torch.nn.functional.pad(torch.stack([image[0], image[0].flip(2)]), (4,) * 4)
    allowed = normalise(torch.stack([p[:, y:y + 32, x:x + 32] for p in padded for y in range(9) for x in range(9)]))
    found = {next(i for i, crop in enumerate(allowed) if torch.equal(crop, each)) for each in batch}
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
    for key, value in (("epochs", 2), ("batch_size", 12), ("warmup_steps", 1)):
        monkeypatch.setitem(variants.RECIPE, key, value)
    monkeypatch.setattr(variants, "LONG_WARMUP", 0.0001)
    monkeypatch.setattr(variants, "LONG_EPOCHS", {"cpu": 2, "cuda": 2})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    yield
    native.library.cache_clear()        # it has found no compiler either


def run(setting: str, variant: str, folder, seed: int = 0) -> dict:
    accuracy.run_alone(Run(setting, parse_variant(variant, setting), seed), folder / "data", folder / "work", folder / "results")
    with open(folder / "results" / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))[-1]


@pytest.mark.parametrize("setting", ["scratch", "long"])
def test_a_run_and_its_repetition(folder, small, setting):
    first = run(setting, "gkan", folder)
    assert first["variant"] == "gkan" and first["epochs"] == "2" and len(first["top1_by_epoch"].split()) == 2
    assert (first["size"], first["device"], first["weight_decay"]) == ("nano", "cpu", "0.05") and float(first["train_loss"]) > 0
    (folder / "work").rename(folder / "elsewhere")
    again = run(setting, "gkan", folder)
    assert (again["top1"], again["train_loss"]) == (first["top1"], first["train_loss"])


def test_a_stopped_run_goes_on_where_it_was(folder, small, monkeypatch):
    whole = run("scratch", "gkan,kan_lr_end=1", folder)
    (folder / "work").rename(folder / "elsewhere")
    evaluate, calls = engine.evaluate, []

    def stop_in_the_second_epoch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(engine, "evaluate", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run("scratch", "gkan,kan_lr_end=1", folder)
    monkeypatch.setattr(engine, "evaluate", evaluate)
    resumed = run("scratch", "gkan,kan_lr_end=1", folder)
    for key in ("top1", "top1_ema", "top1_by_epoch", "train_loss"):
        assert resumed[key] == whole[key], key


def test_time_is_up(folder, small):
    """A run stops after its epoch, and goes on later."""
    one = Run("scratch", parse_variant("mlp"), 0)
    places = folder / "data", folder / "work", folder / "results"
    assert not accuracy.run_alone(one, *places, seconds=0)
    assert load_file(one.folder(folder / "work") / "checkpoint.pth")["epoch"] == 0 and not (folder / "results").exists()
    assert accuracy.run_alone(one, *places)
    assert report.finished(folder / "results").keys() == {one.key}


@pytest.mark.parametrize("text", ["mlp", "gkan,kan_groups=4,kan_lr_mult=5", "kat"])
def test_its_checkpoint_is_one_of_mains(text, folder, small, capsys):
    row = run("long", text, folder)
    place = next((folder / "work").rglob("checkpoint.pth"))
    assert run_main("--eval", "--resume", place, "--data-path", folder / "data", "--device", "cpu", "--num_workers", "0") == 0
    found = evaluation(capsys.readouterr().out)
    assert float(found["model"][0]) == pytest.approx(float(row["top1"]), abs=0.005)
    assert float(found["model_ema"][0]) == pytest.approx(float(row["top1_ema"]), abs=0.005)
    trained = load_trained(str(place), device="cpu")
    assert trained.class_names == list("0123456789") and (trained.args.mixup, trained.args.drop_path) == (0.8, 0.1)
    assert trained.args.kan_groups == (4 if "kan_groups" in text else None)
    assert trained.results["acc1"] == pytest.approx(float(row["top1"]), abs=0.005)
    assert trained.results["images"] == 20 and trained.about["versions"] == versions()


@pytest.mark.parametrize("text, told", [("relu2", "act=relu2"), ("swiglu", "gated=True"),
                                        ("gkan,phi2_scale=learned", "phi2_scale=learned"), ("gkan,phi_out=true", "phi_out=True")])
def test_a_checkpoint_of_another_model_is_refused(text, told, folder, small):
    """It would be evaluated as another function."""
    run("long", text, folder)
    place = next((folder / "work").rglob("checkpoint.pth"))
    assert f" with {told}')" in (said := sentence(load_trained, str(place), device="cpu")) and "\n" not in said


def test_classes_that_differ(folder):
    (folder / "data/val/0").rename(folder / "data/val/zero")
    assert sentence(load_images, folder / "data", folder / "work").endswith("train and val have different folders of classes")


def test_bad_images_and_checkpoints(folder, small, capsys):
    command = ["scratch", "--data", str(folder / "data"), "--variants", "mlp,batch_size=62", "--seeds", "0", "--device", "cpu",
               "--work-dir", str(folder / "work"), "--results", str(folder / "results")]
    assert accuracy.main(command) == 2
    assert "a batch of 62 is more than the 60 training images of --data" in capsys.readouterr().err
    one = Run("scratch", parse_variant("mlp"), 0)
    one.folder(folder / "work").mkdir(parents=True)
    (one.folder(folder / "work") / "checkpoint.pth").write_bytes(b"no")
    assert sentence(run, "scratch", "mlp", folder).endswith("checkpoint.pth is damaged: remove it, and the run begins again")
    for file in (folder / "data/train/3").iterdir():
        file.unlink()
    assert "every class needs a folder with images" in sentence(load_images, folder / "data", folder / "other")


def test_images_of_another_folder_are_not_taken_from_the_cache(folder, monkeypatch):
    first = load_images(folder / "data", folder / "work")
    (folder / "data").rename(folder / "other")
    Image.new("RGB", (32, 32)).save(folder / "other/train/0/0.png")
    second = load_images(folder / "other", folder / "work")
    assert first["train"][0].any() and not second["train"][0].any() and second.classes == list("0123456789")
    monkeypatch.setattr(benchmarks.trials.images, "ImageFolder", None)       # nothing is decoded again
    assert torch.equal(load_images(folder / "other", folder / "work")["train"], second["train"])


def test_images_that_are_replaced_or_a_damaged_cache_are_read_again(folder):
    first = load_images(folder / "data", folder / "work")
    cache, = (folder / "work").iterdir()
    for damage in (b"", b"damaged", cache.read_bytes()[:-99]):
        cache.write_bytes(damage)
        again = load_images(folder / "data", folder / "work")
        assert all(torch.equal(again[key], first[key]) for key in first) and again.classes == first.classes
    Image.new("RGB", (32, 32)).save(folder / "data/val/9/1.png")
    again = load_images(folder / "data", folder / "work")
    assert not again["val"][-1].any() and torch.equal(again["val"][:-1], first["val"][:-1])
    (folder / "data/train/0/0.png").unlink()
    assert len(load_images(folder / "data", folder / "work")["train"]) == len(first["train"]) - 1
    assert list((folder / "work").iterdir()) == [cache]


@pytest.mark.parametrize("spoil, told", [
    (lambda file: Image.new("RGB", (40, 32)).save(file), "has 40 x 32 pixels: these trials need 32 x 32"),
    (lambda file: file.write_bytes(b"no image"), "cannot be read (cannot identify image file"),
    (lambda file: file.write_bytes(file.read_bytes()[:200]), "cannot be read ("),
    (lambda file: (file.unlink(), file.symlink_to("gone")), "repair or remove it")])
def test_an_image_that_cannot_be_used_is_named(spoil, told, folder):
    spoil(folder / "data/val/9/1.png")
    said = sentence(load_images, folder / "data", folder / "work")
    assert said.startswith("--data") and str(folder / "data/val/9/1.png") in said and told in said


def test_functions_rate_goes_to_its_end(small, tmp_path):
    trial = begin(Run("scratch", parse_variant("gkan,epochs=5,kan_lr_mult=20,kan_lr_end=4"), 0), tensors(24), tmp_path, Process())
    rates = []
    for trial.state.epoch in range(5):
        trial.set_function_rate()
        trial.state.scheduler.step_update(100)
        plain, function = ([g["lr"] for g in trial.state.optimizer.param_groups if ("kan_multiple" in g) == own][0]
                           for own in (False, True))
        rates.append(function / plain)
    assert rates == pytest.approx([20, 16, 12, 8, 4])


def test_a_penalty_on_second_differences(small, tmp_path):
    trial = begin(Run("scratch", parse_variant("gkan,smooth=0.5"), 0), tensors(24), tmp_path, Process())
    assert isinstance(trial.criterion, Smooth)
    x, logits, y = torch.zeros(2, 3, 32, 32), torch.randn(2, 10), torch.tensor([1, 2])
    plain = trial.criterion.criterion(x, logits, y)
    c = trial.model.blocks[0].mlp.phi1.coefficients
    c.data.copy_(torch.linspace(0, 5, 8))
    torch.testing.assert_close(trial.criterion(x, logits, y), plain)
    c.data[3, 4] += 1
    torch.testing.assert_close(trial.criterion(x, logits, y), plain + 0.5 * (1 + 4 + 1))


def test_pretraining_is_as_long_as_its_setting_says(folder, small, monkeypatch):
    monkeypatch.setitem(variants.TRANSFERS, "transfer-long", 3)
    assert run("transfer-long", "gkan", folder)["epochs"] == "2"
    assert load_file(folder / "work/transfer-long/nano-cpu/pretrained-seed0/checkpoint.pth")["epoch"] == 2


def test_transfer_begins_equal_and_pretrains_once(folder, small):
    mlp = run("transfer", "mlp", folder)
    pretrained = folder / "work/transfer/nano-cpu/pretrained-seed0/checkpoint.pth"
    stamp = pretrained.stat().st_mtime_ns
    gkan = run("transfer", "gkan", folder)
    assert float(mlp["step0_error"]) == 0 and float(gkan["step0_error"]) <= 1e-5
    assert pretrained.stat().st_mtime_ns == stamp


def test_fixed_shapes_come_from_learned_ones_and_stay(folder, small):
    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(folder / f"work/scratch/nano-cpu/{name}-2epochs-seed0/checkpoint.pth")["model"]

    assert "run --variants gkan first" in sentence(run, "scratch", "mean-shape", folder)
    run("scratch", "gkan", folder)
    run("scratch", "mean-shape", folder)
    learned, fixed = weights("gkan"), weights("mean-shape")
    mean = torch.cat([value for key, value in learned.items() if key.endswith("phi2.coefficients")]).mean(0)
    assert mean.abs().max() > 0
    assert all(torch.equal(value[0], mean) for key, value in fixed.items() if key.endswith("phi2.coefficients"))
    assert not any("phi1" in key for key in fixed)


@slow
def test_conversion_of_finished_runs(folder, small, capsys):
    assert "run scratch --variants mlp --seeds 0 first" in sentence(convert, [0], folder / "data", folder / "work",
                                                                     folder / "results")
    run("scratch", "mlp", folder)
    convert([0], folder / "data", folder / "work", folder / "results")
    with open(folder / "results" / "conversion.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    errors = [max(map(float, row["block_errors"].split())) for row in rows]
    assert len(rows) == 4 and errors == sorted(errors, reverse=True) and errors[-1] < 0.05 < errors[0]
    assert float(rows[-1]["top1_kan"]) == pytest.approx(float(rows[-1]["top1_mlp"]), abs=10)     # of 20 images
    assert "| [-4, 4] | spacing |" in capsys.readouterr().out


# ---------------------------------------------------------------- side by side
SIDE = ("mlp", "gkan,kan_lr_mult=5", "swiglu", "kat", "gkan,phi2_scale=learned,smooth=0.1")


def side(texts, seeds, folder, setting: str = "long", **options) -> tuple[dict, list[str]]:
    """Run.key -> trial, and the failures. Graphs are emulated."""
    ended = {}
    runs = [Run(setting, parse_variant(text, setting), seed) for seed in seeds for text in texts]
    failures = train_side_by_side(runs, tensors(54), folder, Process(), lambda trial: ended.update({trial.run.key: trial}),
                                  **{"recorder": RecordedGraphs, **options})
    return ended, failures


def numbers(trial) -> dict:
    """What must be equal bit for bit."""
    state = to_builtin_types(trial.state.state_dict())
    return {key: state[key] for key in ("model", "model_ema", "optimizer")} | {
        key: trial.progress[key] for key in ("curve", "loss", "top1_ema")}


@pytest.mark.parametrize("text", [SIDE[1], *(pytest.param(text, marks=slow) for text in SIDE if text != SIDE[1])])
def test_side_by_side_is_alone_is_main(text, small, tmp_path, monkeypatch):
    """A run beside others of other seeds, batches and lengths, alone, and by main.py's loop: the same to the last bit."""
    beside, failures = side([text, "mlp,epochs=1,batch_size=6"], [0, 1], tmp_path / "a", most=3)
    alone, _ = side([text], [0], tmp_path / "b")
    (key, one), = alone.items()
    assert not failures and len(beside) == 4
    assert_same(numbers(beside[key]), numbers(one))

    monkeypatch.setattr(training, "Updater", lambda *args, **kwargs: Updater(*args, **kwargs, late=True))    # as on a GPU
    images = tensors(54)
    looped = begin(one.run, images, tmp_path / "c", Process())
    assert train(looped, images)
    assert_same(numbers(looped), numbers(one))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("text", SIDE)
def test_side_by_side_on_a_gpu(text, small, tmp_path, capsys):
    """In CUDA graphs beside others, in them alone, without them: the same to the last bit."""
    process = Process(device=torch.device("cuda", 0))
    ends = []
    for name, options in (("beside", {}), ("alone", {}), ("eager", {"recorder": lambda *place: None})):
        ended = {}
        runs = [Run("long", parse_variant(each, "long"), seed, "cuda") for each, seed in (
            (text, 0), *((("gkan,epochs=3", 1), ("mlp", 2), (text, 3)) if name == "beside" else ()))]
        assert train_side_by_side(runs, tensors(150), tmp_path / name, process,
                                  lambda trial, ended=ended: ended.update({trial.run.key: trial}), **options) == []
        assert len(ended) == len(runs)
        ends.append(numbers(ended[runs[0].key]))
    assert "no CUDA graph" not in capsys.readouterr().out
    assert_same(ends[0], ends[1])
    assert_same(ends[1], ends[2])


def test_side_by_side_in_graphs(small, tmp_path):
    """After three steps without: a replay for each step."""
    made = []
    ended, _ = side(["gkan"], [0], tmp_path, recorder=lambda *place: made.append(RecordedGraphs()) or made[-1])
    assert [graph.replays for recorder in made for graph in recorder.graphs] == [2 * 4 - 3]
    eager, _ = side(["gkan"], [0], tmp_path / "eager", recorder=lambda *place: None)
    assert_same(*(numbers(next(iter(each.values()))) for each in (ended, eager)))


def test_a_step_that_cannot_be_recorded_goes_on_without(small, tmp_path, capsys):
    class Refuses:
        def record(self, function):
            raise RuntimeError("no graphs here")

    ended, failures = side(["mlp"], [0], tmp_path, recorder=lambda *place: Refuses())
    assert len(ended) == 1 and not failures and "no CUDA graph, and so much slower: no graphs here" in capsys.readouterr().out


def test_side_by_side_stops_in_time_and_goes_on(small, tmp_path, monkeypatch):
    whole, _ = side(["mlp", "gkan,kan_lr_end=1"], [0], tmp_path / "whole")
    with monkeypatch.context() as patch:        # the time is up within the first evaluation
        evaluated = []
        patch.setattr(side_by_side, "evaluate", lambda *args, **kwargs: evaluated.append(1) or engine.evaluate(*args, **kwargs))
        patch.setattr(side_by_side, "time", SimpleNamespace(monotonic=lambda: 9 * len(evaluated), perf_counter=time.perf_counter))
        none, _ = side(["mlp", "gkan,kan_lr_end=1"], [0], tmp_path / "parts", deadline=5)
    assert not none and len(list((tmp_path / "parts").rglob("checkpoint.pth"))) == 2
    rest, _ = side(["mlp", "gkan,kan_lr_end=1"], [0], tmp_path / "parts")
    for key in whole:
        assert_same(numbers(rest[key]), numbers(whole[key]))
    again, _ = side(["mlp"], [0], tmp_path / "parts")       # finished without its row, when a program was killed
    assert again[("long", "nano", "mlp", 2, 0, "cpu")].columns()["top1"] == whole[
        ("long", "nano", "mlp", 2, 0, "cpu")].columns()["top1"]


def test_one_that_fails_stops_no_other(small, tmp_path):
    ended, failures = side(["mlp,lr=1e9,clip_grad=1e9,warmup_steps=0", "mean-shape", "mlp"], [0], tmp_path)
    assert [key[2] for key in ended] == ["mlp"]
    assert len(failures) == 2 and "run --variants gkan first" in failures[0] and "became" in failures[1]


def test_one_that_raises_stops_no_other(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Smooth, "forward", lambda *args: 1 / 0)
    ended, failures = side(["gkan,smooth=1", "mlp"], [0], tmp_path)
    assert [key[2] for key in ended] == ["mlp"]
    assert failures == ["gkan,smooth=1 seed 0: step 1 of epoch 0: division by zero"]


@pytest.mark.parametrize("place", ["begin", "Lane", "evaluate"])
def test_one_that_cannot_be_made_or_evaluated_stops_no_other(place, small, tmp_path, monkeypatch):
    """Its sentence is among the failures. Ctrl-C passes."""
    known, errors = getattr(side_by_side, place), [RuntimeError("no memory"), KeyboardInterrupt()]

    def fails(*args, **kwargs):
        if failing:
            raise failing.pop()
        return known(*args, **kwargs)

    monkeypatch.setattr(side_by_side, place, fails)
    failing = errors[:1]
    ended, failures = side(["mlp", "relu2"], [0], tmp_path)
    assert [key[2] for key in ended] == ["relu2"] and failures == ["mlp seed 0: no memory"]
    failing = errors[1:]
    with pytest.raises(KeyboardInterrupt):
        side(["silu"], [0], tmp_path)


def test_the_gpu_command(folder, small, monkeypatch, capsys):
    """Everything but the GPU."""
    monkeypatch.setattr(accuracy, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(accuracy, "train_side_by_side", lambda *args, **kwargs: side_by_side.train_side_by_side(
        *args, **kwargs, recorder=RecordedGraphs))
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump({"setting": "long", "epochs": 1, "seeds": [0], "stages": [
        {"variants": [{"variant": "mlp", "lr": ["1e-3", 0.002]}, "gkan"]},
        {"variants": [{"variant": "mlp", "lr": ["1e-3", 0.002]}], "best": True, "seeds": [0, 1]}]}))
    command = ["--plan", str(plan), "--data", str(folder / "data"), "--device", "cuda", "--jobs", "2", "--work-dir",
               str(folder / "work"), "--results", str(folder / "results")]
    assert accuracy.main([*command, "--seconds", "0"]) == 0
    assert accuracy.main(command) == 0
    said = capsys.readouterr().out
    assert "stage 1 of 2: 3 runs on a GPU" in said and "stage 2 of 2: 1 runs" in said
    rows = report.read_rows(folder / "results" / "runs.csv")
    assert len(rows) == 4 and {row["seed"] for row in rows if row["variant"] == "gkan"} == {0}
    best = max((row for row in rows if row["seed"] == 0 and row["variant"] != "gkan"), key=lambda row: row["top1"])
    assert [row["variant"] for row in rows if row["seed"] == 1] == [best["variant"]]
    assert (folder / "results" / "long_1_epochs_GPU_curves.png").stat().st_size > 5000


def test_sigterm_in_a_step_on_a_gpu_is_not_that_runs_failure(folder, small, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(side_by_side.WholeStep, "step", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert accuracy.main(["long", "--data", str(folder / "data"), "--variants", "mlp", "relu2", "--seeds", "0", "--device",
                          "cuda", "--work-dir", str(folder / "work"), "--results", str(folder / "results")]) == 75
    assert capsys.readouterr().err == "stopped: SIGTERM: the same command continues after each run's last saved epoch\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_transfer_is_refused_on_a_gpu_before_anything_runs(folder, capsys):
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump({"stages": [{"setting": "long", "variants": ["mlp"]},
                                               {"setting": "transfer", "variants": ["mlp"]}]}))
    assert accuracy.main(["--plan", str(plan), "--data", str(folder / "data"), "--device", "cuda", "--work-dir",
                          str(folder / "work"), "--results", str(folder / "results")]) == 2
    said = capsys.readouterr()
    assert said.err == "error: --device cuda: transfer and transfer-long run on a CPU, give --device cpu\n" and not said.out
    assert not (folder / "work").exists()


# ---------------------------------------------------------------- plans
@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/plans").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_plans(file):
    first, *others = read_plan(file)
    assert len(first.runs("cuda", {})) >= 12 and others
    assert all(stage.setting == "long" for stage in [first, *others])


def test_plans_in_the_docs_are_there():
    text = (ROOT / "docs/results.md").read_text()
    named = set(re.findall(r"benchmarks/plans/\S+\.yaml", text))
    assert named == {str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks/plans").iterdir()}


def test_a_plans_combinations(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("setting: long\nseeds: [3]\nstages:\n- variants: [relu2, {variant: 'gkan,grid=-2:2', lr: [1e-3, 2e-3], "
                    "weight_decay: [0.05, 0.1]}]\n  size: micro\n  epochs: 9\n")
    runs = read_plan(file)[0].runs("cpu", {})
    grid = "gkan,kan_grid_range=-2:2"
    assert [run.variant.text for run in runs] == [
        "relu2", grid, f"{grid},weight_decay=0.1", f"{grid},lr=0.002", f"{grid},lr=0.002,weight_decay=0.1"]
    assert {(run.seed, run.variant.size, run.variant.recipe["epochs"]) for run in runs} == {(3, "micro", 9)}


def test_the_best_of_what_is_finished(tmp_path):
    """Compared by the seeds that all have; other settings, sizes, lengths and devices do not count."""
    file = tmp_path / "plan.yaml"
    file.write_text("setting: long\nseeds: [4]\nstages:\n- best: true\n  variants: [{variant: mlp, lr: [1e-3, 2e-3]}, relu2]\n")
    stage, = read_plan(file)
    assert "best: no run of mlp is finished" in sentence(stage.runs, "cpu", {})

    def rows(*each: tuple[str, int, float], **columns):
        made = [row(variant, seed, top1, setting="long", epochs=50, size="nano", device="cpu") | columns
                for variant, seed, top1 in each]
        return {report.key_of(one): one for one in made}

    known = rows(("mlp", 0, 60.0), ("mlp,lr=0.002", 0, 61.0), ("mlp", 1, 99.0), ("relu2", 0, 50.0)) | rows(
        ("mlp", 0, 99.0), size="micro") | rows(("mlp", 0, 99.0), device="GPU") | rows(("mlp", 0, 99.0), epochs=20)
    assert [str(run) for run in stage.runs("cpu", known)] == ["mlp,lr=0.002 seed 4", "relu2 seed 4"]
    apart = rows(("mlp", 0, 60.0), ("mlp,lr=0.002", 1, 61.0))
    assert "best: the finished combinations of mlp share no seed" in sentence(stage.runs, "cpu", apart)


@pytest.mark.parametrize("change, said", [
    ({"setting": "longer"}, "setting longer is not one of scratch, transfer, transfer-long, long"),
    ({"size": "huge"}, "size huge is not one of"), ({"epochs": "many"}, "epochs must be a whole number, not many"),
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"seeds": [-1]}, "seeds must be whole numbers"), ({"seeds": []}, "seeds must be a list"),
    ({"setings": 1}, "setings is none of setting, size,"), ({"setting": None}, "setting must be a name"),
    ({"stages": []}, "stages must be a list of at least one"), ({"stages": [3]}, "stage 1: it must have keys such as variants"),
    ({"stages": [{"seeds": [0]}]}, "stage 1: variants is missing"),
    ({"stages": [{"variants": ["mlp"]}, {"variants": ["mpl"]}]}, "stage 2: variants: variant mpl: mpl is not one of"),
    ({"stages": [{"variants": [{"lr": [1]}]}]}, "stage 1: variants: an entry is a text or has the key variant"),
    ({"stages": [{"variants": [{"variant": "mlp", "lr": []}]}]}, "stage 1: variants: lr of mlp must be a list of at least one"),
    ({"stages": [{"variants": [{"variant": "mlp", "rate": [1]}]}]}, "rate is none of")])
def test_wrong_plans(change, said, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"setting": "long", "stages": [{"variants": ["mlp"]}], **change}))
    text = sentence(read_plan, file)
    assert said in text and str(file) in text


def test_plans_that_are_none(tmp_path):
    assert "cannot be read" in sentence(read_plan, tmp_path / "none.yaml")
    (tmp_path / "plan.yaml").write_text("stages: [")
    assert "cannot be read" in sentence(read_plan, tmp_path / "plan.yaml")


# ---------------------------------------------------------------- the command
@slow
def test_the_command_runs_what_is_missing_and_reports(folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")          # no compiler: the eager models start faster
    variant = "mlp,batch_size=12,warmup_steps=1"
    command = ["scratch", "--data", str(folder / "data"), "--variants", variant, "--seeds", "0", "1", "--epochs", "1",
               "--baseline", variant, "--work-dir", str(folder / "work"), "--results", str(folder / "results"), "--device", "cpu"]
    assert accuracy.main([*command, "--seconds", "0"]) == 0
    assert "stopped after 0 s: the same command continues" in capsys.readouterr().out
    assert accuracy.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("done:") == 2 and f"| {variant} | " in out
    assert (folder / "results" / "scratch_1_epochs.png").stat().st_size > 5000
    assert accuracy.main(command) == 0
    assert "done:" not in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals of POSIX")
@pytest.mark.parametrize("number, code, told", [
    (signal.SIGTERM, 75, "stopped: SIGTERM: the same command continues after each run's last saved epoch"),
    pytest.param(signal.SIGINT, 130, "stopped: interrupted", marks=slow)])
def test_a_stop_from_outside_ends_all_runs(number, code, told, folder):
    """No run that is waiting begins, none goes on alone."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/accuracy.py"), "scratch", "--data", str(folder / "data"), "--variants",
         "mlp,batch_size=12,warmup_steps=1", "--seeds", "0", "1", "--epochs", "100000", "--jobs", "1", "--device", "cpu",
         "--work-dir", str(folder / "work"), "--results", str(folder / "results")],
        env={**os.environ, "PATH": ""}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while not list((folder / "work").rglob("checkpoint.pth")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and err.strip().splitlines()[-1] == told and "Traceback" not in err, err
    logs = sorted((folder / "work").rglob("log.txt"))
    assert "failed" not in out and len(logs) == 1 and "seed0" in str(logs[0])
    size = logs[0].stat().st_size
    time.sleep(0.5)
    assert logs[0].stat().st_size == size       # it prints a line for each evaluation


def file_of_an_earlier_version(folder) -> Path:
    """The recorded rows from before size, device and weight decay were columns."""
    later, rows = ("size", "device", "weight_decay"), report.read_rows(ROOT / "benchmarks/results/accuracy/runs.csv")
    with open(folder / "runs.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, [field for field in report.FIELDS if field not in later], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if not row["weight_decay"])
    return folder / "runs.csv"


def test_rows_of_an_earlier_version_stay(tmp_path):
    file = file_of_an_earlier_version(tmp_path)
    before = report.read_rows(file)
    report.append(file, row("mlp", 7, 1.0, setting="long", size="micro", device="GPU") | {"epochs": 50})
    *rows, last = report.read_rows(file)
    assert [report.key_of(row) for row in rows] == [report.key_of(row) for row in before] and len(rows) > 50
    assert report.key_of(last) == ("long", "micro", "mlp", 50, 7, "cuda")


def test_a_kill_while_an_old_file_is_rewritten_loses_nothing(tmp_path, monkeypatch):
    file = file_of_an_earlier_version(tmp_path)
    before = file.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", killed)
        with pytest.raises(KeyboardInterrupt):
            report.append(file, row("mlp", 9, 50.0))
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_rows_survive_what_others_did_to_the_file(tmp_path):
    """Another's column, a line that was cut off, a spreadsheet's mark; damage is told by its line."""
    file = tmp_path / "runs.csv"
    for seed in (0, 1):
        report.append(file, row("mlp", seed, 50.0))
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join(["mine," + head.removesuffix(",weight_decay"), *("x," + line[:-1] for line in lines)]))
    for seed in (2, 3):
        report.append(file, row("mlp", seed, 50.0))
    assert [r["seed"] for r in report.read_rows(file)] == [0, 1, 2, 3]
    assert [r["mine"] for r in csv.DictReader(open(file, newline=""))] == ["x", "x", "", ""]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"scratch,ml")
    assert sentence(report.read_rows, file).startswith(f"{file}: line 6 is damaged (")
    file.write_text("no rows of ours\n1\n")
    assert sentence(report.read_rows, file).startswith(f"{file}: line 2 is damaged (LookupError: it has no setting, variant, ")


@pytest.mark.parametrize("spoil, told", [
    (lambda row: row.pop("torch"), "LookupError: it has no torch"), (lambda row: row.update(step_ms=""), "ValueError: "),
    (lambda row: row.update(top1_by_epoch="9.0 x"), "ValueError: ")])
def test_what_a_table_needs_is_in_each_row(spoil, told, tmp_path):
    spoil(columns := dict.fromkeys(report.FIELDS, "1") | row("mlp", 0, 50.0))
    with open(tmp_path / "runs.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerow(columns)
    assert sentence(report.report, tmp_path, "mlp").startswith(f"{tmp_path}/runs.csv: line 2 is damaged ({told}")


def test_many_append_to_an_old_file_at_once(tmp_path):
    """Each one's row is there, also of those that wait while the first one rewrites the file."""
    file = tmp_path / "runs.csv"
    shutil.copy(ROOT / "benchmarks/results/accuracy/runs.csv", file)
    before = len(report.read_rows(file))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: report.append(file, row("mlp", 100 + seed, 50.0)), range(24)))
    rows = report.read_rows(file)
    assert len(rows) == before + 24 and {each["seed"] for each in rows} >= set(range(100, 124))


@pytest.mark.parametrize("text, setting, epochs, device", [
    ("mlp,warmup_steps=877", "long", 100, "cuda"), ("mlp,warmup_steps=1755", "long", 50, "cpu"), ("mlp", "long", 9, "cpu"),
    ("gkan,batch_size=64,warmup_steps=9", "scratch", 3, "cpu")])
def test_a_row_is_read_as_the_run_that_wrote_it(text, setting, epochs, device, tmp_path):
    one = Run(setting, parse_variant(text, setting, epochs=epochs, device=device), 5, device)
    columns = row(one.variant.text, 5, 50.0, setting=setting, device={"cpu": "cpu", "cuda": "GPU"}[device], size="nano")
    report.append(tmp_path / "runs.csv", {**columns, "epochs": epochs})
    assert report.finished(tmp_path).keys() == {one.key}


def test_a_baseline_is_that_of_its_epochs(tmp_path, capsys):
    """warmup_steps=877 is what 50 epochs have anyway, but a change at 100."""
    for variant, seed in (("mlp,warmup_steps=877", 0), ("gkan", 0)):
        report.append(tmp_path / "runs.csv", row(variant, seed, 50.0, setting="long", device="GPU", lr=1e-3, torch="2", timm="1",
                                                 weight_decay=0.05, top1_by_epoch="50.0") | {"epochs": 100})
    report.report(tmp_path, "mlp,warmup_steps=877")
    said = capsys.readouterr().out
    assert "100 epochs, GPU, difference from mlp,warmup_steps=877\n" in said and "| gkan | 50.00 | 1 | +0.00 |" in said


def test_old_rows_beside_new_ones_are_told(tmp_path):
    """Older rows have no weight decay."""
    file = file_of_an_earlier_version(tmp_path)

    def said() -> str:
        rows = report.read_rows(file)
        return report.table([each for each in rows if (each["setting"], each["epochs"]) == ("scratch", 4)], "mlp")

    assert "other crops" not in said()
    report.append(file, {**row("gkan", 7, 60.0, weight_decay=0, device="cpu"), "epochs": 4})
    assert said().splitlines()[-1].startswith("Some of these rows are from before images were augmented by the device's code")


def test_the_picture_of_the_readme(tmp_path, monkeypatch):
    """Eight rows of the recorded runs, by plain names, the best on top."""
    from matplotlib import pyplot as plt
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    rows = [each for each in report.read_rows(accuracy.ROOT / "benchmarks/results/accuracy/runs.csv")
            if (each["setting"], each["epochs"]) == ("scratch", 4)]
    report.plot(rows, tmp_path / "summary.png", "it", plain=True)
    monkeypatch.undo()
    axes, = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "full-edge KAN, original", "efficient-KAN", "full-edge KAN, repaired", "MLP, SiLU", "MLP, GELU", "MLP, squared ReLU",
        "MLP, fixed mean of learned functions", "group KAN"]
    assert sorted(axes.lines[-2].get_xdata()) == sorted(row["top1"] for row in rows if row["variant"] == "gkan")
    plt.close(figures[0])


def test_curves(tmp_path, monkeypatch):
    """Means over seeds, of each feed-forward's variant with the most seeds; the legend begins with the best."""
    from matplotlib import pyplot as plt
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    rows = [row("mlp", 0, 40.0, top1_by_epoch="30.0 40.0"), row("mlp", 1, 44.0, top1_by_epoch="32.0 44.0"),
            *(row("gkan,kan_lr_mult=5", seed, top1, top1_by_epoch=curve)
              for seed, top1, curve in ((0, 50.0, "31.0 50.0"), (1, 52.0, "33.0 52.0"))),
            row("gkan", 0, 99.0, top1_by_epoch="98.0 99.0")]
    report.plot_curves(rows, tmp_path / "curves.png", "it")
    monkeypatch.undo()
    axes, = figures[0].axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {
        "group KAN, kan_lr_mult=5 (n=2)": [32.0, 51.0], "MLP, GELU (n=2)": [31.0, 42.0]}
    assert [text.get_text() for text in axes.get_legend().texts] == ["group KAN, kan_lr_mult=5 (n=2)", "MLP, GELU (n=2)"]
    plt.close(figures[0])


@pytest.mark.parametrize("words, said", [
    ("scratch --data {0} --variants mlp --work-dir {0}/w --results {0}", "has no folder train"),
    ("report --results {0}", "holds no finished run yet"), ("scratch --data {0}", "give --variants, or --plan FILE"),
    ("--data {0}", "give --plan FILE or one of scratch"), ("long --variants mlp", "give --data FOLDER"),
    ("long --plan x --data {0}", "--plan and setting: the plan says that"),
    ("long --variants mlp --data {0} --seconds nan", "--seconds nan must be at least 0"),
    ("long --variants mlp --data {0} --seeds -1", "--seeds must be whole numbers from 0 on"),
    ("long --variants mlp --data {0} --results /dev/null/x", "--results /dev/null/x cannot be written to ("),
    ("--plan x --data {0} --epochs 3", "--plan and --epochs: the plan says that"),
    ("long --data {0} --variants mlp,lr=x", "lr must be a number, not the text 'x'"),
    ("long --data {0} --epochs 0", "--epochs 0 must be at least 1")])
def test_bad_input(words, said, tmp_path, capsys):
    assert accuracy.main([word.format(tmp_path) for word in words.split()]) == 2
    text = capsys.readouterr().err
    assert said in text and text.startswith("error: ") and text.count("\n") == 1
