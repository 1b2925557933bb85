"""The program from end to end: real flags, real images on disk, real files, and processes that are killed."""
import ctypes
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from e2e import QUICK, Run, checkpoint, command_line, evaluation, log, refusal, run, write_digits
from helpers import GKAN, NANO, RELEASED, ROOT, differences, every, needs_released, scalars, wait_for, wait_until
from PIL import Image
from safetensors.torch import save_file

import engine
import main as program
import models_kan
from tools import evaluate, export, inspect_kan, predict
from vision_kan.checkpoints.shipped import shipped
from vision_kan.common.errors import EXIT_PREEMPTED
from vision_kan.models.cost import count_flops
from vision_kan.run import folder as run_folder

slow = pytest.mark.slow
STATE = ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "max_accuracy", "max_accuracy_ema",
         "results")
# A slow average would be the initial model for the length of a test, a low rate would leave the weights alone.
LEARN = ("--model-ema-decay", "0.8", "--unscale-lr", "--lr", "1e-3")


@pytest.fixture(scope="module")
def digits64(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits64"), size=64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run of three epochs that nothing interrupted. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(*three_epochs(data, folder)) == 0
    return folder


def three_epochs(data: Path, folder: Path) -> tuple:
    return (*QUICK, *LEARN, "--epochs", 3, "--data-path", data, "--output_dir", folder)


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the finished run, which a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


@pytest.fixture
def watched(monkeypatch):
    """Weights before and after each epoch of the runs of a test: [(before, after, state), ...]."""
    epochs = []
    real = engine.train_one_epoch

    def watching(training, loader, hooks):
        state = training.state
        before = {key: value.clone() for key, value in state.model.state_dict().items()}
        result = real(training, loader, hooks)
        epochs.append((before, {key: value.clone() for key, value in state.model.state_dict().items()}, state))
        return result

    monkeypatch.setattr(engine, "train_one_epoch", watching)
    return epochs


def changed(before: dict, after: dict) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_run(a: Path, b: Path) -> None:
    one, two = checkpoint(a), checkpoint(b)
    assert not differences({key: one[key] for key in STATE}, {key: two[key] for key in STATE})
    assert log(a) == log(b)


# ---------------------------------------------------------------- training
def test_a_run_leaves_its_files(whole, data):
    names = {path.name for path in whole.iterdir()}
    assert {"checkpoint.pth", "checkpoint_previous.pth", "best_checkpoint.pth", "best_ema_checkpoint.pth", "log.txt",
            "args.yaml", "run.yaml"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    records = log(whole, times=True)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["test_images"] == record["ema_test_images"] == 24
        assert record["train_loss"] > 0 and record["epoch_seconds"] > 0 and record["img_per_s"] > 0
        assert 0 <= record["test_acc1"] <= record["test_acc5"] == 100
    best = max(records, key=lambda record: record["test_acc1"])
    assert checkpoint(whole)["max_accuracy"] == best["test_acc1"]
    for name in ("checkpoint.pth", "checkpoint_previous.pth", "best_checkpoint.pth", "best_ema_checkpoint.pth"):
        saved = checkpoint(whole, name)         # with what its own weights reach
        record = records[saved["epoch"]]
        assert saved["results"] == {weights: {**{key: record[f"{title}_{key}"] for key in ("acc1", "acc5", "images")},
                                              "data_set": "FOLDER", "split": "validation"}
                                    for weights, title in (("model", "test"), ("model_ema", "ema_test"))}
    assert checkpoint(whole, "best_checkpoint.pth")["epoch"] == best["epoch"]
    best = max(records, key=lambda record: record["ema_test_acc1"])
    assert checkpoint(whole, "best_ema_checkpoint.pth")["epoch"] == best["epoch"]
    args = yaml.safe_load((whole / "args.yaml").read_text())
    assert (args["model"], args["input_size"], args["data_set"], args["epochs"]) == (NANO, 32, "FOLDER", 3)
    assert args["data_path"] == str(data)
    launch, = yaml.safe_load((whole / "run.yaml").read_text())
    assert launch["processes"] == 1 and "--epochs 3" in launch["command"] and launch["versions"]["torch"]


def test_tensorboard_shows_the_numbers_of_the_log(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(whole))
    board.Reload()
    for tag, key in (("test/acc1", "test_acc1"), ("train/loss", "train_loss"), ("ema_test/loss", "ema_test_loss")):
        shown = {event.step: event.value for event in board.Scalars(tag)}
        assert shown == pytest.approx({record["epoch"]: record[key] for record in log(whole)})


@slow
def test_training_learns(tmp_path):
    data = write_digits(tmp_path / "data", classes=2)
    assert run(*QUICK, "--data-path", data, "--output_dir", tmp_path / "out", "--epochs", 12, "--batch-size", 8,
               "--unscale-lr", "--lr", 2e-3, "--mixup", 0, "--cutmix", 0, "--aa", "none", "--reprob", 0, "--hflip", 0,
               "--model-ema-decay", 0.8, "--drop-path", 0, "--color-jitter", 0, "--crop-padding", 0) == 0
    last = log(tmp_path / "out")[-1]
    assert last["test_acc1"] > 80 and last["ema_test_acc1"] > 80      # chance: 50


def test_the_rate_follows_the_schedule(data, whole, tmp_path):
    rates = [record["train_lr"] for record in log(whole)]       # cosine from 1e-3 to 1e-5, constant in an epoch
    assert rates == pytest.approx([1e-5 + 0.99e-3 * 0.5 * (1 + np.cos(np.pi * epoch / 3)) for epoch in range(3)])
    assert run(*three_epochs(data, tmp_path / "out"), "--sched-on-updates", "--warmup-epochs", 1, "--warmup-lr", 1e-4) == 0
    rates = [record["train_lr"] for record in log(tmp_path / "out")]        # after 3, 6 and 9 updates of 9
    assert rates == pytest.approx([1e-5 + 0.99e-3 * 0.5 * (1 + np.cos(np.pi * epoch / 3)) for epoch in (1, 2, 3)])


def test_each_epoch_has_an_order_of_its_own(data, monkeypatch):
    real, orders = engine.train_one_epoch, []

    def noting(training, loader, hooks):
        orders.append([key.index for key in loader.sampler])
        return real(training, loader, hooks)

    monkeypatch.setattr(engine, "train_one_epoch", noting)
    assert run(*QUICK, "--data-path", data, "--epochs", 3) == 0
    assert [sorted(order) for order in orders] == [list(range(48))] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_its_args_as_a_recipe_give_the_same_run(whole, tmp_path):
    assert run("--config", whole / "args.yaml", "--output_dir", tmp_path / "again") == 0
    same_run(whole, tmp_path / "again")


@slow
def test_another_seed_gives_another_run(whole, tmp_path):
    assert run("--config", whole / "args.yaml", "--output_dir", tmp_path / "other", "--seed", 1) == 0
    assert len(changed(checkpoint(whole)["model"], checkpoint(tmp_path / "other")["model"])) > 20


def test_worker_processes_do_not_change_the_run(whole, data, tmp_path):
    assert run(*three_epochs(data, tmp_path / "out"), "--num_workers", 2) == 0
    same_run(whole, tmp_path / "out")


def test_a_new_run_refuses_a_folder_that_holds_one(copied, data, capsys):
    before = contents(copied)
    for flags in ((), ("--finetune", copied / "checkpoint.pth")):
        assert "holds a run already" in refusal(capsys, *three_epochs(data, copied), *flags)
    assert contents(copied) == before


def test_without_an_output_folder_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*QUICK, "--data-path", data, "--epochs", 1) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", every(8, [
    "--bce-loss", "--bce-loss --mixup 0 --cutmix 0", "--mixup 0 --cutmix 0 --smoothing 0", "--cutmix-minmax 0.2 0.8",
    "--mixup-mode elem", "--mixup-mode pair", "--cosub", "--cosub --bce-loss", "--ThreeAugment", "--src", "--repeated-aug",
    "--repeated-aug --resplit", "--no-train-mode", "--grad-accum 2", "--grad-checkpointing", "--amp-dtype bfloat16",
    "--model-ema-force-cpu", "--no-model-ema", "--layer-decay 0.7", "--clip-grad 1", "--drop 0.2 --drop-path 0.2",
    "--opt sgd", "--opt lamb", "--opt muon", "--sched tanh", "--sched step --decay-epochs 1",
    "--sched multistep --decay-epochs 1", "--sched plateau", "--sched poly", "--sched-on-updates",
    "--lr-noise 0.1 0.9", "--aa augmix-m3", "--aa 3a", "--kan-trainable-grid --kan-trainable-h",
    "--hdim_kan 16 --kan-grid-points 4 --kan-grid-range -1 1 --kan-h 0.5", "--model vit_nano_patch8_32_ViT",
    "--model vit_nano_patch8_32_GKAN", "--model vit_nano_patch8_32_GKAN --opt muon --kan-trainable-base --kan-groups 0",
    "--model vit_nano_patch8_32_GKAN --sched plateau --kan-base relu2 --kan-weight-decay 0.1 --amp-dtype bfloat16",
    "--model resnet18 --input-size 32", "--model vit_tiny_patch16_224 --input-size 32", "--dist-eval --pin-mem --print-freq 1",
]))
def test_each_way_of_training_runs(flags, data, watched, capsys):
    assert run(*QUICK, "--data-path", data, "--epochs", 1, *flags.split()) == 0
    (before, after, state), = watched
    assert all(value.isfinite().all() for value in after.values())
    trained = {name for name, parameter in state.model.named_parameters()
               if before[name].ne(after[name]).any() or not parameter.requires_grad}
    if "resnet" not in flags:       # a zero-initialised scale leaves nothing out, but holds back what is before it
        assert trained == dict(state.model.named_parameters()).keys()
    out, err = capsys.readouterr()
    assert "model: top-1" in out and ("model_ema: top-1" in out) == ("--no-model-ema" not in flags)
    assert not err


@pytest.mark.parametrize("flags", [(), ("--finetune", "self")])
def test_attention_only(flags, data, watched, whole):
    flags = [str(whole / "checkpoint.pth") if word == "self" else word for word in flags]
    assert run(*QUICK, *LEARN, "--data-path", data, "--epochs", 1, "--attn-only", *flags) == 0
    (before, after, _), = watched
    moved = changed(before, after)
    assert moved == {key for key in before if ".attn." in key or key.startswith("head.") or key == "pos_embed"}


def test_a_loss_that_is_not_finite_ends_the_run_with_code_1(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*three_epochs(data, out), "--lr", "1e9", "--unscale-lr", "--save-interval-steps", 1) == 1
    assert re.search(r"stopped: the (loss|gradient|weights) .* step \d of epoch \d.*--lr", capsys.readouterr().err)
    assert all(tensor.isfinite().all() for tensor in checkpoint(out)["model"].values())
    told = json.loads((out / "status.json").read_text())
    assert told["state"] == "failed" and told["exit_code"] == 1 and "--lr" in told["reason"]


@pytest.mark.parametrize("name", every(3, ["SIGTERM", "SIGINT", "SIGUSR2"]))
def test_a_signal_stops_the_run_at_the_next_step_and_a_resume_finishes_it(name, data, tmp_path):
    out = tmp_path / "out"
    process = Run(tmp_path, *three_epochs(data, out), "--epochs", 1000)
    wait_for(out / "checkpoint.pth")
    os.kill(process.process.pid, getattr(signal, name))
    assert process.wait() == EXIT_PREEMPTED
    err = process.err.read_text()
    assert f"stopped: {name}: saved, --resume auto goes on after step" in err and "Traceback" not in err
    told, saved = json.loads((out / "status.json").read_text()), checkpoint(out)
    assert told["state"] == "preempted" and told["exit_code"] == EXIT_PREEMPTED and told["reason"].startswith(name)
    assert (told["epoch"], told["step"]) == (saved["epoch"] + 1, saved["step"])
    assert run(*three_epochs(data, out), "--resume", "auto", "--epochs", saved["epoch"] + 2) == 0
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("deaf", every(2, [False, True]))
def test_interrupts_are_answered_at_once_and_a_second_one_ends_the_run(deaf, data, tmp_path):
    out = tmp_path / "out"
    process = Run(tmp_path, *three_epochs(data, out), "--epochs", 1000, call=deaf_steps if deaf else slow_steps)
    wait_for(out / "slow")
    os.kill(process.process.pid, signal.SIGINT)
    wait_until(lambda: process.err.read_text() == "stopping after this step; press Ctrl-C again to stop now\n")
    assert process.process.is_alive()
    os.kill(process.process.pid, signal.SIGINT)
    assert process.wait() == 130
    reason = "SIGINT twice: ended at once, nothing is saved since the last checkpoint"
    assert process.err.read_text().splitlines()[1:] == [f"stopped: {reason}"]
    told = json.loads((out / "status.json").read_text())
    assert (told["state"], told["exit_code"], told["reason"]) == ("preempted", 130, reason)
    assert (told["epoch"], told["step"]) == (0, 0) and not (out / "checkpoint.pth").exists()


def slow_steps(argv: list[str], wait=time.sleep) -> int:
    """The program with a forward pass that never ends."""
    from vision_kan.common import peers

    def mark(doing: str) -> None:
        if doing.startswith("the forward"):
            (Path(argv[argv.index("--output_dir") + 1]) / "slow").touch()
            wait(1000)

    peers.progress = mark
    return program.main(argv)


def deaf_steps(argv: list[str]) -> int:
    """It is one C call, within which Python's own handlers do not run, as a long backward pass."""
    def lock_twice(seconds: float) -> None:
        lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
        lock(mutex)
        lock(mutex)

    return slow_steps(argv, lock_twice)


# ---------------------------------------------------------------- learned activations
@slow
def test_a_group_kan_from_training_to_evaluation(data, tmp_path, watched, capsys):
    """Its coefficients move at their own rate, are averaged and saved, and are there again for an evaluation."""
    out = tmp_path / "out"
    flags = (*QUICK, *LEARN, "--data-path", data, "--output_dir", out, "--resume", "auto")
    options = ("--model", GKAN, "--kan-groups", 4, "--kan-base", "silu", "--kan-grid-range", -2, 2, "--kan-grid-points", 6,
               "--kan-h", 0.7, "--kan-lr-mult", 10, "--kan-weight-decay", 0.01)
    assert run(*flags, *options, "--epochs", 1) == 0
    (before, after, state), = watched
    coefficients = {key for key in before if key.endswith(".coefficients")}
    assert len(coefficients) == 8 and all(before[key].abs().max() == 0 < after[key].abs().min() for key in coefficients)
    group, = [group for group in state.optimizer.param_groups if "kan_multiple" in group]
    assert group["weight_decay"] == 0.01 and log(out)[0]["train_lr"] == pytest.approx(group["lr"] / 10)
    # 3 updates of Adam: at most about 3 rates
    assert 0.012 < max(after[key].abs().max() for key in coefficients) < 0.035

    saved = checkpoint(out)
    assert saved["model_args"] == {"name": GKAN, "kwargs": {
        "num_classes": 3, "img_size": 32, "kan_groups": 4, "kan_base": "silu", "kan_grid_range": [-2.0, 2.0],
        "kan_grid_points": 6, "kan_h": 0.7}}
    for key in coefficients:
        assert torch.equal(saved["model"][key], after[key])
        assert 0 < saved["model_ema"][key].abs().max() < after[key].abs().max()
    capsys.readouterr()
    # no flag says what it is
    assert run("--eval", "--resume", out / "checkpoint.pth", "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    assert evaluation(capsys.readouterr().out) == logged(log(out)[-1])
    assert run(*[word for word in flags if word not in (NANO, "--model")], "--epochs", 2) == 0
    assert [record["epoch"] for record in log(out)] == [0, 1] and state is not watched[1][2]
    assert {(g["kan_multiple"], g["weight_decay"]) for g in watched[1][2].optimizer.param_groups if "kan_multiple" in g} == {
        (10.0, 0.01)}
    for more, words in ((("--kan-lr-mult", 3), "--kan-lr-mult 3.0"), (("--kan-groups", 8), "--kan-groups 8"),
                        (("--kan-base", "gelu"), "--kan-base gelu"), (("--no-kan-input-phi",), "--kan-input-phi")):
        assert words in refusal(capsys, *flags, "--model", GKAN, "--epochs", 3, *more)


def test_a_group_kan_starts_from_its_twins_weights(data, tmp_path, watched, capsys):
    """Fine-tuned from an MLP it begins as the MLP, and to the last bit of its numbers."""
    twin = tmp_path / "twin"
    flags = (*QUICK, *LEARN, "--data-path", data, "--epochs", 1)
    assert run(*flags, "--model", "vit_nano_patch8_32_ViT", "--output_dir", twin) == 0
    capsys.readouterr()
    quiet = ("--data-path", data, "--device", "cpu", "--num_workers", 0)
    assert run("--eval", "--finetune", twin / "checkpoint.pth", "--model", GKAN, *quiet) == 0
    out = capsys.readouterr().out
    assert evaluation(out)["model"] == logged(log(twin)[-1])["model"] and "blocks.*.mlp.fc1.weight  x4" in out
    assert run(*flags, "--finetune", twin / "checkpoint.pth", "--model", GKAN) == 0
    own, before = checkpoint(twin)["model"], watched[1][0]
    assert not changed(own, before) and all(before[key].abs().max() == 0 for key in before if "coefficients" in key)


@slow
@pytest.mark.parametrize("model", [pytest.param("vit_nano_patch8_32_ViT", marks=slow), GKAN,
                                   pytest.param("dla46x_c", marks=slow)])           # the last has no stochastic depth
def test_a_runs_args_yaml_runs_again(model, data, tmp_path):
    """To the same result, and goes on with the run that wrote it."""
    flags = (*QUICK, "--model", model, "--input-size", 32, "--data-path", data, "--epochs", 1)
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    recipe = ("--config", tmp_path / "one" / "args.yaml")
    assert run(*recipe, "--output_dir", tmp_path / "two") == 0
    assert not differences(checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"])
    assert run(*recipe, "--resume", "auto", "--epochs", 2) == 0 and len(log(tmp_path / "one")) == 2
    assert run(*recipe, "--eval", "--resume", tmp_path / "one" / "checkpoint.pth") == 0


@pytest.mark.parametrize("flags", ["--kan-lr-mult 5", "--kan-weight-decay 0.1", "--kan-groups 4", "--kan-base silu"])
@pytest.mark.parametrize("model", [NANO, "vit_nano_patch8_32_ViT"])
def test_a_flag_of_learned_activations_for_a_model_without_them(flags, model, data, capsys):
    text = refusal(capsys, *QUICK, "--data-path", data, "--epochs", 1, "--model", model, *flags.split())
    assert text.startswith(f"{flags.split()[0]} has no effect on --model {model}: leave it out, or choose {GKAN}")


@slow
def test_an_oblong_input_size(data, tmp_path, capsys):
    """Trained from square weights, evaluated from its checkpoint alone, inspected and used to predict."""
    assert run(*QUICK, "--model", GKAN, "--data-path", data, "--epochs", 1, "--output_dir", tmp_path / "square") == 0
    flags = (*QUICK, *LEARN, "--model", GKAN, "--data-path", data, "--input-size", 32, 48)
    capsys.readouterr()
    assert run(*flags, "--epochs", 1, "--finetune", tmp_path / "square" / "checkpoint.pth", "--output_dir", tmp_path / "run") == 0
    out, width = capsys.readouterr().out, timm.create_model(GKAN).embed_dim
    assert f"pos_embed  ((1, 17, {width}) -> (1, 25, {width}))" in out and "left as initialised: 0 tensors" in out
    stored = checkpoint(tmp_path / "run")
    assert stored["args"]["input_size"] == stored["model_args"]["kwargs"]["img_size"] == [32, 48]
    assert f"{count_flops(timm.create_model(GKAN, img_size=(32, 48), num_classes=3)).matmul / 1e6:.1f} M matmul" in out

    file = tmp_path / "run" / "checkpoint.pth"
    assert run("--eval", "--resume", file, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    assert evaluation(capsys.readouterr().out)["model"][0] == f"{log(tmp_path / 'run')[-1]['test_acc1']:.2f}"
    assert run("--config", tmp_path / "run" / "args.yaml", "--finetune", "", "--output_dir", tmp_path / "again") == 0
    assert checkpoint(tmp_path / "again")["args"]["input_size"] == [32, 48]
    assert "--input-size 48 32" in refusal(capsys, *flags[:-2], 48, 32, "--resume", file)

    torch.save(stored["model"], tmp_path / "bare.pth")      # without a word of what it is
    words = ("--eval", "--resume", tmp_path / "bare.pth", "--data-path", data, "--device", "cpu", "--num_workers", 0)
    assert "--input-size" in refusal(capsys, *words) and run(*words, "--input-size", 32, 48) == 0

    photo, words = next((data / "val").rglob("*.png")), ("--device", "cpu")
    capsys.readouterr()
    assert predict.main([str(file), str(photo), "--format", "json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["file"] == str(photo)
    assert inspect_kan.main([str(file), str(photo), "--output", str(tmp_path / "seen"), *words]) == 0


# ---------------------------------------------------------------- distillation
@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("teacher")
    assert run(*QUICK, "--model", "vit_nano_patch8_32_ViT", "--epochs", 1, "--data-path", data, "--output_dir", folder) == 0
    return "--teacher-model", "vit_nano_patch8_32_ViT", "--teacher-path", str(folder / "checkpoint.pth")


STUDENT = ("--model", "deit_tiny_distilled_patch16_224_KAN", "--input-size", "32", "--hdim_kan", "8")


@pytest.mark.parametrize("kind", every(3, ["hard", "soft", "none"]))
def test_distillation(kind, data, teacher, watched):
    weights_of_teacher = torch.load(teacher[-1], weights_only=True)["model"]
    assert run(*QUICK, *STUDENT, *LEARN, "--data-path", data, "--epochs", 1, "--distillation-type", kind, *teacher) == 0
    (before, after, _), = watched
    assert {"dist_token", "cls_token", "head.weight", "head_dist.weight"} <= changed(before, after)
    assert not changed(weights_of_teacher, torch.load(teacher[-1], weights_only=True)["model"])


@slow
def test_a_teacher_of_another_size_and_normalisation(data, tmp_path, watched, capsys):
    """Teaches, and a resumed run learns the same from it; one that a run trained is asked for its size there."""
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("test_vit", num_classes=3).state_dict()}, tmp_path / "teacher.pth")
    flags = (*QUICK, *STUDENT, *LEARN, "--data-path", data, "--distillation-type", "soft", "--teacher-model", "test_vit",
             "--teacher-path", tmp_path / "teacher.pth")
    assert run(*flags, "--epochs", 2, "--output_dir", tmp_path / "whole") == 0
    assert "the teacher test_vit sees the images at 160 px, mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in capsys.readouterr().out
    assert run(*flags, "--epochs", 1, "--sched", "step", "--output_dir", tmp_path / "one") == 0
    assert run(*flags, "--epochs", 2, "--sched", "step", "--output_dir", tmp_path / "two") == 0
    assert run(*flags, "--epochs", 2, "--sched", "step", "--output_dir", tmp_path / "one", "--resume", "auto") == 0
    assert not differences(checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"])
    assert differences(checkpoint(tmp_path / "whole")["model"], checkpoint(tmp_path / "two")["model"])

    assert run(*QUICK, "--model", "vit_nano_patch8_32_ViT", "--input-size", 48, "--mean", 0.1, 0.1, 0.1, "--data-path", data,
               "--epochs", 1, "--output_dir", tmp_path / "large") == 0
    capsys.readouterr()
    assert run(*QUICK, *STUDENT, "--data-path", data, "--epochs", 1, "--distillation-type", "hard", "--teacher-model",
               "vit_nano_patch8_32_ViT", "--teacher-path", tmp_path / "large" / "checkpoint.pth") == 0
    assert "the teacher vit_nano_patch8_32_ViT sees the images at 48 px, mean 0.1 0.1 0.1" in capsys.readouterr().out


def test_the_teacher_alone_teaches_with_alpha_1(data, teacher, watched):
    """alpha 1 leaves the labels out: nothing moves the head of the class token."""
    assert run(*QUICK, *STUDENT, *LEARN, "--data-path", data, "--epochs", 1, "--distillation-type", "hard",
               "--distillation-alpha", 1, "--weight-decay", 0, *teacher) == 0
    (before, after, _), = watched
    moved = changed(before, after)
    assert "head_dist.weight" in moved and "head.weight" not in moved


def test_distillation_needs_its_teacher_and_a_student_with_a_token(data, teacher, tmp_path, capsys):
    flags = (*QUICK, "--data-path", data, "--epochs", 1, "--distillation-type", "soft")
    assert "--teacher-path" in refusal(capsys, *flags, *STUDENT)
    assert "distillation token" in refusal(capsys, *flags, *teacher)
    assert "--teacher-model no_such_model" in refusal(capsys, *flags, *STUDENT, *teacher, "--teacher-model", "no_such_model")
    assert "--teacher-path" in refusal(capsys, *flags, *STUDENT, *teacher, "--teacher-model", "resnet18")
    assert "does not exist" in refusal(capsys, *flags, *STUDENT, "--teacher-path", tmp_path / "absent.pth")


# ---------------------------------------------------------------- evaluation
def logged(record: dict, images: int = 24) -> dict:
    return {name: (f"{record[f'{key}_acc1']:.2f}", f"{record[f'{key}_acc5']:.2f}", images)
            for name, key in (("model", "test"), ("model_ema", "ema_test"))}


def test_evaluation_gives_the_numbers_of_the_training(whole, data, capsys):
    for name in ("checkpoint.pth", "checkpoint_previous.pth", "best_checkpoint.pth"):
        assert run("--eval", "--resume", whole / name, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
        record = log(whole)[checkpoint(whole, name)["epoch"]]
        assert evaluation(capsys.readouterr().out) == logged(record)


@slow
def test_evaluation_from_the_command_line_in_another_folder(whole, data, tmp_path):
    done = command_line("--eval", "--resume", whole / "checkpoint.pth", "--data-path", data, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert evaluation(done.stdout) == logged(log(whole)[-1])
    assert not list(tmp_path.iterdir())


@slow
def test_evaluation_counts_each_image_whatever_the_batch(whole, data, tmp_path, capsys):
    odd = write_digits(tmp_path / "odd", val=7)
    for size in (1, 3, 64):
        assert run("--eval", "--resume", whole / "checkpoint.pth", "--data-path", odd, "--device", "cpu",
                   "--num_workers", 0, "--batch-size", size) == 0
        assert {line[2] for line in evaluation(capsys.readouterr().out).values()} == {21}


@slow
def test_evaluation_of_digits_without_a_folder(tmp_path, capsys, monkeypatch):
    flags = (*QUICK, *LEARN, "--data-set", "DIGITS", "--aa", "none", "--reprob", 0, "--batch-size", 256)
    assert run(*flags, "--epochs", 1, "--output_dir", tmp_path / "out") == 0
    capsys.readouterr()
    assert run("--eval", "--resume", tmp_path / "out/checkpoint.pth") == 0
    assert evaluation(capsys.readouterr().out) == logged(log(tmp_path / "out")[-1], images=360)


def test_evaluation_maps_classes_by_name(whole, data, tmp_path, capsys):
    """Classes of the data that are missing or lie in another order keep the checkpoint's meaning."""
    part = tmp_path / "part"
    for name in ("digit1", "digit2"):
        shutil.copytree(data / "val" / name, part / "val" / name)
    assert run("--eval", "--resume", whole / "checkpoint.pth", "--data-path", part, "--device", "cpu") == 0
    top1, _, images = evaluation(capsys.readouterr().out)["model"]
    model = timm.create_model(NANO, num_classes=3).eval()
    model.load_state_dict(checkpoint(whole)["model"])
    right = sum((predictions(model, data / "val" / f"digit{c}") == c).sum().item() for c in (1, 2))
    assert (top1, images) == (f"{100 * right / 16:.2f}", 16)


def predictions(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Classes that the model gives the images of a folder, which already have its size."""
    mean, std = (np.array(numbers, dtype=np.float32) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = np.stack([np.asarray(Image.open(path), dtype=np.float32) for path in sorted(folder.rglob("*.png"))])
    with torch.inference_mode():
        return model(torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2))).argmax(1)


def test_evaluation_needs_a_checkpoint(data, tmp_path, capsys):
    assert "--resume" in refusal(capsys, "--eval", "--data-path", data)
    assert "holds no checkpoint" in refusal(capsys, "--eval", "--resume", "auto", "--output_dir", tmp_path)


def test_evaluation_writes_nothing(copied, data):
    before = contents(copied)
    assert run("--eval", "--resume", "auto", "--output_dir", copied, "--data-path", data, "--device", "cpu") == 0
    assert contents(copied) == before


# ---------------------------------------------------------------- resuming
class Cut(BaseException):
    """Ends a run as abruptly as possible within this process."""


@slow
@pytest.mark.parametrize("flags", [
    (), ("--grad-accum", 2, "--sched-on-updates", "--warmup-epochs", 1, "--opt", "sgd", "--cosub", "--drop", 0.1),
    ("--sched", "plateau", "--patience-epochs", 0, "--cooldown-epochs", 1, "--decay-rate", 0.5),
    ("--lr-noise", 0.1, "--layer-decay", 0.7, "--no-model-ema", "--repeated-aug", "--resplit"),
    ("--model", GKAN, "--kan-trainable-base", "--kan-groups", 4, "--kan-weight-decay", 0.1, "--layer-decay", 0.7),
    ("--model", GKAN, "--sched", "plateau", "--patience-epochs", 0, "--warmup-epochs", 2, "--opt", "lookahead_adamw")])
def test_resumed_equals_uninterrupted(flags, data, tmp_path, monkeypatch):
    flags = (*QUICK, *LEARN, "--data-path", data, "--epochs", 5, *flags)
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    real, epochs = engine.train_one_epoch, []

    def cut_in_the_third_epoch(*args, **kwargs):
        epochs.append(real(*args, **kwargs))
        if len(epochs) == 3:
            raise Cut
        return epochs[-1]

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(engine, "train_one_epoch", cut_in_the_third_epoch)
        run(*flags, "--output_dir", tmp_path / "parts")
    assert len(log(tmp_path / "parts")) == 2
    assert run(*flags, "--output_dir", tmp_path / "parts", "--resume", "auto") == 0
    same_run(tmp_path / "whole", tmp_path / "parts")
    starts = [launch["first_epoch"] for launch in yaml.safe_load((tmp_path / "parts/run.yaml").read_text())]
    assert starts == [0, 2]


@slow
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(whole, data, tmp_path):
    moments = random.Random(0)
    flags = (*three_epochs(data, tmp_path / "out"), "--resume", "auto")
    for _ in range(3):
        process = Run(tmp_path, *flags)
        time.sleep(moments.uniform(0, 2))
        process.kill()
        if (tmp_path / "out/checkpoint.pth").exists():
            checkpoint(tmp_path / "out")        # whole
    last = Run(tmp_path, *flags)
    assert last.wait() == 0, last.err.read_text()
    same_run(whole, tmp_path / "out")


def test_resuming_keeps_a_better_best_checkpoint(copied, data):
    saved = checkpoint(copied)
    torch.save({**saved, "max_accuracy": 100.0, "max_accuracy_ema": 0.0}, copied / "checkpoint.pth")
    best, best_ema = ((copied / name).read_bytes() for name in ("best_checkpoint.pth", "best_ema_checkpoint.pth"))
    assert run(*three_epochs(data, copied), "--resume", "auto", "--epochs", 4) == 0
    assert (copied / "best_checkpoint.pth").read_bytes() == best
    assert checkpoint(copied)["max_accuracy"] == 100
    assert (copied / "best_ema_checkpoint.pth").read_bytes() != best_ema    # there any accuracy was better than 0


def test_a_finished_run_has_nothing_left_to_do(copied, data, capsys):
    before = contents(copied)
    assert run(*three_epochs(data, copied), "--resume", "auto") == 0
    assert "has finished its 3 epochs" in capsys.readouterr().out
    assert contents(copied) == before


@slow
def test_patience_ends_a_run_that_no_longer_improves(data, tmp_path, capsys):
    """With weights that do not move, the first epoch stays the best. A stop in between changes nothing."""
    still = (*QUICK, "--lr", "1e-30", "--warmup-lr", 0, "--min-lr", 0, "--weight-decay", 0, "--unscale-lr", "--data-path", data,
             "--epochs", 9, "--patience", 3)
    assert run(*still, "--output_dir", tmp_path / "whole") == 0
    out = capsys.readouterr().out
    assert "the run ends early: no new best top-1 in 3 epochs (--patience)\nbest top-1: model " in out
    records = log(tmp_path / "whole")
    assert [(record["epoch"], record["epochs_without_best"]) for record in records] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert dict(scalars(tmp_path / "whole"))["epochs_without_best"] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    told = json.loads((tmp_path / "whole/status.json").read_text())
    assert (told["state"], told["exit_code"], told["epoch"]) == ("finished", 0, 4) and "--patience" in told["reason"]

    real = engine.train_one_epoch

    def cut(training, loader, hooks):
        if training.state.epoch == 2:
            raise Cut
        return real(training, loader, hooks)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(engine, "train_one_epoch", cut)
        run(*still, "--output_dir", tmp_path / "parts")
    for _ in range(2):
        assert run(*still, "--output_dir", tmp_path / "parts", "--resume", "auto") == 0
        same_run(tmp_path / "whole", tmp_path / "parts")
    assert "the run has ended early, no new best top-1 in 3 epochs" in capsys.readouterr().out
    (tmp_path / "parts/status.json").unlink()
    assert run(*still, "--output_dir", tmp_path / "parts", "--resume", "auto") == 0
    assert "--patience" in json.loads((tmp_path / "parts/status.json").read_text())["reason"]
    assert run(*still, "--output_dir", tmp_path / "parts", "--resume", "auto", "--patience", 4) == 0
    assert [record["epoch"] for record in log(tmp_path / "parts")] == [0, 1, 2, 3, 4]


@slow
def test_epochs_may_grow(copied, data):
    assert run(*three_epochs(data, copied), "--resume", "auto", "--epochs", 5) == 0
    assert [record["epoch"] for record in log(copied)] == [0, 1, 2, 3, 4]


def test_resume_auto_begins_where_there_is_nothing(whole, data, tmp_path, capsys):
    assert run(*three_epochs(data, tmp_path / "new"), "--resume", "auto") == 0
    assert "a new run begins" in capsys.readouterr().out
    same_run(whole, tmp_path / "new")


@slow
def test_only_the_folders_are_needed_to_resume(copied, data, capsys):
    assert run("--resume", "auto", "--output_dir", copied, "--data-path", data, "--epochs", 4, "--device", "cpu") == 0
    assert f"model {NANO}" in capsys.readouterr().out
    assert len(log(copied)) == 4


@pytest.mark.parametrize(("flag", "value"), every(3, [
    ("--lr", "0.5"), ("--opt", "sgd"), ("--seed", "7"), ("--model", "vit_nano_patch4_32_KAN"), ("--hdim_kan", "96"),
    ("--input-size", "64"), ("--data-set", "DIGITS"), ("--mixup", "0"), ("--sched", "step"), ("--kan-h", "0.5")]))
def test_a_flag_that_contradicts_the_checkpoint(flag, value, copied, data, capsys):
    before = contents(copied)
    assert flag in refusal(capsys, "--resume", "auto", "--output_dir", copied, "--data-path", data, "--epochs", 4,
                            "--device", "cpu", flag, value)
    assert contents(copied) == before


def test_resuming_a_checkpoint_into_the_folder_of_another_run(whole, copied, data, tmp_path, capsys):
    other = shutil.copytree(whole, tmp_path / "other")
    before = contents(copied)
    assert "--output_dir" in refusal(capsys, *three_epochs(data, copied), "--resume", other / "checkpoint.pth",
                                      "--epochs", 4)
    assert contents(copied) == before


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(whole, copied, data, capsys):
    (copied / "checkpoint.pth").write_bytes((copied / "checkpoint.pth").read_bytes()[:100_000])
    assert run(*three_epochs(data, copied), "--resume", "auto") == 0
    err = capsys.readouterr().err
    assert "warning: checkpoint" in err and "checkpoint_previous.pth" in err
    same_run(whole, copied)


def test_all_checkpoints_damaged(copied, data, capsys):
    for file in copied.glob("*.pth"):
        file.write_bytes(b"")
    before = contents(copied)
    assert "cannot be read" in refusal(capsys, *three_epochs(data, copied), "--resume", "auto")
    assert contents(copied) == before


# ---------------------------------------------------------------- checkpoints of the original Vision-KAN
def released(path: Path, classes: int = 3) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Write a checkpoint in the layout of the original code; returns our models of its two sets of weights."""
    kwargs = dict(img_size=64, num_classes=classes, hdim_kan=20, qkv_bias=False, block_norm_eps=1e-5)
    models, states = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model("deit_tiny_patch16_224_KAN", **kwargs).eval()
        torch.nn.init.normal_(model.head.weight)
        for block in model.blocks:     # random blocks at full strength amplify rounding until predictions flip
            block.mlp.layers[1].spline_linear.weight.data *= 0.1
        state = {key.replace(".mlp.layers.", ".kan.layers."): value for key, value in model.state_dict().items()}
        for block in range(12):        # the original's unused MLP
            for name, shape in (("fc1.weight", (768, 192)), ("fc1.bias", (768,)), ("fc2.weight", (192, 768)),
                                ("fc2.bias", (192,))):
                state[f"blocks.{block}.mlp.{name}"] = torch.zeros(shape)
        models.append(model)
        states.append(state)
    args = Namespace(model="deit_tiny_patch16_224_KAN", data_set="CIFAR", input_size=64, eval_crop_ratio=1, hdim_kan=20,
                     data_path="./data", device="cuda", batch_size=144, nb_classes=classes, dist_eval=False)
    torch.save({"model": states[0], "model_ema": states[1], "optimizer": {}, "lr_scheduler": {}, "epoch": 299,
                "scaler": {}, "args": args}, path)
    return tuple(models)


def test_released_checkpoint_needs_no_flags(digits64, tmp_path, capsys):
    models = released(tmp_path / "released.pth")
    assert run("--eval", "--resume", tmp_path / "released.pth", "--data-path", digits64, "--num_workers", 0) == 0
    out = capsys.readouterr().out
    inferred = out.partition("from the checkpoint: ")[2].partition("\n")[0]
    for word in ("model deit_tiny_patch16_224_KAN", "hdim_kan 20", "input_size 64", "eval_crop_ratio 1"):
        assert word in inferred
    lines = evaluation(out)
    truth = torch.arange(3).repeat_interleave(8)
    for name, model in zip(("model", "model_ema"), models):
        right = (predictions(model, digits64 / "val") == truth).sum().item()
        assert lines[name] == (f"{100 * right / 24:.2f}", "100.00", 24)
    assert lines["model"] != lines["model_ema"]


def test_released_checkpoint_is_no_start_for_resuming(digits64, tmp_path, capsys):
    released(tmp_path / "released.pth")
    assert "--finetune" in refusal(capsys, "--resume", tmp_path / "released.pth", "--data-path", digits64, "--device", "cpu",
                                    "--data-set", "FOLDER", "--output_dir", tmp_path / "out")


@slow
def test_released_checkpoint_as_a_start_for_fine_tuning(digits64, tmp_path, watched, capsys):
    model, _ = released(tmp_path / "released.pth", classes=100)
    assert run("--finetune", tmp_path / "released.pth", "--data-path", digits64, *QUICK[:4], "--epochs", 1, "--input-size", 64,
               "--batch-size", 16, "--warmup-epochs", 0) == 0
    before = watched[0][0]
    own = model.state_dict()
    assert before.keys() - own.keys() == {f"blocks.{i}.attn.qkv.bias" for i in range(12)}
    assert changed({key: own[key] for key in own}, before) <= {"head.weight", "head.bias"} | {
        f"blocks.{i}.attn.qkv.bias" for i in range(12)}
    assert before["head.weight"].shape == (3, 192)


@needs_released
def test_checkpoint_written_by_the_original_code(tmp_path, capsys):
    names = [f"class{i:03}" for i in range(100)]
    data = write_digits(tmp_path / "data", train=1, val=1, names=names, size=64)
    shutil.rmtree(data / "train")
    assert run("--eval", "--resume", RELEASED, "--data-path", data, "--num_workers", 0) == 0
    out = capsys.readouterr().out
    assert "hdim_kan 20" in out and "input_size 64" in out
    assert {name: line[2] for name, line in evaluation(out).items()} == {"model": 100, "model_ema": 100}


# ---------------------------------------------------------------- fine-tuning
@pytest.fixture(scope="module")
def deit_tiny():
    """DeiT-tiny as timm has it, with weights that are not the initial ones anywhere."""
    torch.manual_seed(3)
    model = timm.create_model("deit_tiny_patch16_224")
    return {key: torch.randn_like(value) * 0.02 for key, value in model.state_dict().items()}


FINE = ("--device", "cpu", "--num_workers", "0", "--model", "deit_tiny_patch16_224_KAN", "--hdim_kan", "8", "--batch-size", "16",
        "--warmup-epochs", "0", "--epochs", "1")


@pytest.mark.parametrize(("name", "size"), every(3, [("weights.safetensors", 64), ("weights.pth", 32), ("parallel.pth", 32)]))
def test_finetune_takes_the_attention_over(name, size, data, deit_tiny, tmp_path, watched, capsys):
    if name.endswith(".safetensors"):
        save_file(deit_tiny, tmp_path / name)
    elif name == "parallel.pth":
        torch.save({f"module.{key}": value for key, value in deit_tiny.items()}, tmp_path / name)
    else:
        torch.save({"model": deit_tiny}, tmp_path / name)
    assert run(*FINE, "--data-path", data, "--input-size", size, "--finetune", tmp_path / name) == 0
    before, after, _ = watched[0]
    attention = {key for key in before if ".attn." in key}
    assert len(attention) == 12 * 4
    assert not changed({key: deit_tiny[key] for key in attention}, {key: before[key] for key in attention})
    assert torch.equal(before["pos_embed"][:, 0], deit_tiny["pos_embed"][:, 0])
    assert before["pos_embed"].shape == (1, 1 + (size // 16) ** 2, 192)
    assert attention <= changed(before, after)
    out = capsys.readouterr().out
    assert f"pos_embed  ((1, 197, 192) -> {tuple(before['pos_embed'].shape)})" in out
    assert "blocks.*.attn.qkv.weight  x12" in out
    assert ("blocks.*.mlp.fc1.weight  x12  (no conversion: its MLP is 192 x 768, the KAN 192 x 8: give --hdim_kan 768)"
            in out)
    assert "head.weight  ((1000, 192) against (3, 192))" in out and "left as initialised: " in out


def test_finetuned_model_can_be_evaluated_at_once(data, deit_tiny, tmp_path, capsys):
    command = (*FINE, "--data-path", data, "--input-size", 32, "--finetune", tmp_path / "weights.pth", "--eval")
    weights = {key: value[:3] if key.startswith("head.") else value for key, value in deit_tiny.items()}
    torch.save({"model": weights}, tmp_path / "weights.pth")
    assert run(*command) == 2
    assert "--eval --finetune" in capsys.readouterr().err       # the KAN's weights would be random
    assert run(*command, "--model", "deit_tiny_patch16_224_GKAN", "--hdim_kan", 768) == 0
    out = capsys.readouterr().out
    assert re.search(r"^model: top-1 \d+\.\d\d top-5 100\.00 \(24 images\)$", out.splitlines()[-1]) and "loaded: " in out


def test_finetune_refuses_what_shares_no_attention(data, whole, tmp_path, capsys):
    torch.save({"model": timm.create_model("resnet18").state_dict()}, tmp_path / "resnet.pth")
    for file, holds, remedy in (
            (tmp_path / "resnet.pth", "'conv1.weight', 'bn1.weight'", "choose weights of a vision transformer"),
            (whole / "checkpoint.pth", "attention fits this model (blocks.0.attn.qkv.weight: (288, 96) against (576, 192))",
             "choose a --model of the same width")):
        says = refusal(capsys, *FINE, "--data-path", data, "--input-size", 32, "--finetune", file)
        assert holds in says and remedy in says
    says = refusal(capsys, *FINE, "--data-path", data, "--finetune", "no_such_model")
    assert "neither a file, a folder, a URL nor the name" in says


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for the files of a folder: (folder, address)."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


@slow
def test_finetune_from_an_address_with_a_hash(data, deit_tiny, server, tmp_path, capsys):
    folder, address = server
    buffer = io.BytesIO()
    torch.save({"model": {key: value[:3] if key.startswith("head.") else value for key, value in deit_tiny.items()}}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    (folder / f"tiny-{digest[:8]}.pth").write_bytes(buffer.getvalue())
    flags = (*FINE, "--data-path", data, "--input-size", 32, "--eval", "--model", "deit_tiny_patch16_224_GKAN", "--hdim_kan", 768)
    assert run(*flags, "--finetune", f"{address}/tiny-{digest[:8]}.pth") == 0
    assert "downloading" in capsys.readouterr().out
    (folder / f"tiny-{digest[:8]}.pth").unlink()
    assert run(*flags, "--finetune", f"{address}/tiny-{digest[:8]}.pth") == 0       # kept from the first time

    (folder / "tiny-0123abcd.pth").write_bytes(buffer.getvalue())
    assert "not the file that its name promises" in refusal(capsys, *flags, "--finetune", f"{address}/tiny-0123abcd.pth")
    assert [path.name for path in (tmp_path / "hub/checkpoints").iterdir()] == [f"tiny-{digest[:8]}.pth"]
    assert "cannot be downloaded" in refusal(capsys, *flags, "--finetune", f"{address}/absent-0123abcd.pth")


# ---------------------------------------------------------------- --list-models
@slow
def test_list_models(capsys):
    assert run("--list-models") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    if shipped():
        assert rows.pop().endswith(f": {', '.join(shipped())}")
    assert head.split() == ["model", "parameters", "matmul", "GFLOPs", "elementwise", "GFLOPs"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(table) == models_kan.registered_models()
    assert table["deit_tiny_patch16_224_ViT"][0] == "5,717,416"         # DeiT-tiny
    assert float(table["deit_tiny_patch16_224_ViT"][1]) == pytest.approx(2.5, abs=0.1)
    assert all(float(number.replace(",", "")) > 0 for row in table.values() for number in row)


# ---------------------------------------------------------------- bad input
def test_bad_flags_and_recipes(data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1\n")
    assert "--batch-size" in refusal(capsys, "--batch-sise", 8)
    assert "learning_rate" in refusal(capsys, "--config", recipe)
    recipe.write_text("lr: fast\n")
    assert "lr must be a number" in refusal(capsys, "--config", recipe)
    assert "no such file" in refusal(capsys, "--config", tmp_path / "absent.yaml")
    assert "--epochs" in refusal(capsys, "--epochs", "many")
    assert "--epochs" in refusal(capsys, "--epochs", -1)
    for flags, word in (("--input-size 30", "--input-size 30"), ("--model resnet999", "--model resnet999"),
                        ("--batch-size 64", "--batch-size 64"), ("--model resnet18 --hdim_kan 8", "--hdim_kan"),
                        ("--model resnet18 --attn-only", "--attn-only"), ("--data-set CIFAR", "--data-path"),
                        ("--data-set IMNET", "--data-set"), ("--batch-size 15", "--batch-size"),
                        ("--finetune /nowhere.pth", "--finetune"), ("--resume auto", "--output_dir")):
        assert word in refusal(capsys, *QUICK, "--epochs", 1, "--data-path", data, *flags.split())
    if not torch.cuda.is_available():
        assert "--device cuda" in refusal(capsys, *QUICK, "--data-path", data, "--device", "cuda")


def test_bad_data_folders(data, tmp_path, capsys):
    flags = (*QUICK, "--epochs", 1, "--output_dir", tmp_path / "out", "--data-path")
    (tmp_path / "empty").mkdir()
    assert "--data-path" in refusal(capsys, *QUICK, "--epochs", 1)
    assert "--data-path" in refusal(capsys, *flags, tmp_path / "absent")
    assert "is an empty folder" in refusal(capsys, *flags, tmp_path / "empty")
    assert "--data-path" in refusal(capsys, *flags, data / "train/digit0/0.png")

    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    (copy / "val/extra").mkdir()
    assert "'extra'" in refusal(capsys, *flags, copy)
    shutil.rmtree(copy / "val/extra")
    for image in (copy / "train/digit1").iterdir():
        image.unlink()
    assert f"train{os.sep}digit1" in refusal(capsys, *flags, copy)
    shutil.rmtree(copy / "val")
    assert "--data-path" in refusal(capsys, *flags, copy)
    assert not (tmp_path / "out").exists()


@slow
def test_unreadable_images_are_named_counted_and_survived(data, tmp_path, capsys):
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    one = sorted((copy / "train/digit0").iterdir())[0]
    one.write_bytes(one.read_bytes()[:60])
    (copy / "val/digit1/notes.jpg").write_text("this is no picture")
    (copy / "val/digit2/empty.png").touch()
    assert run(*QUICK, "--data-path", copy, "--epochs", 2, "--output_dir", tmp_path / "out", "--max-unreadable", 0.1) == 0
    out, err = capsys.readouterr()
    for path in (one, copy / "val/digit1/notes.jpg", copy / "val/digit2/empty.png"):
        assert err.count(f"Skipping an unreadable image: {path} ") == 1
    assert [(r["train_unreadable"], r["test_unreadable"], r["test_images"]) for r in log(tmp_path / "out")] == [(1, 2, 24)] * 2
    assert "(24 images)" in out
    evaluated = ("--eval", "--resume", tmp_path / "out/checkpoint.pth", "--data-path", copy, "--device", "cpu")
    assert "2 of the" in refusal(capsys, *evaluated, "--max-unreadable", 0)
    assert run(*evaluated) == 0             # more than 1%, but only two
    out = capsys.readouterr().out
    assert "2 images could not be read" in out and evaluation(out) == logged(log(tmp_path / "out")[-1])


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("flags", ["--eval --resume", "--resume", "--finetune", "--teacher-path"])
def test_files_that_are_no_checkpoint(flags, data, whole, tmp_path, capsys):
    files = {}
    for name in ("text", "zip", "empty", "half", "evil_zip", "evil_pickle", "list", "nothing"):
        files[name] = tmp_path / f"{name}.pth"
    files["text"].write_text("weights\n" * 100)
    with zipfile.ZipFile(files["zip"], "w") as archive:
        archive.writestr("weights.txt", "none")
    files["empty"].touch()
    files["half"].write_bytes((whole / "checkpoint.pth").read_bytes()[:1_000_000])
    marker = tmp_path / "code_has_run"
    torch.save({"model": Evil(marker)}, files["evil_zip"])
    files["evil_pickle"].write_bytes(pickle.dumps({"model": Evil(marker)}))
    torch.save([1, 2], files["list"])
    torch.save({"epoch": 3}, files["nothing"])
    files["folder"] = tmp_path
    files["absent"] = tmp_path / "absent.pth"
    extra = (*STUDENT, "--distillation-type", "hard", "--teacher-model", NANO) if "teacher" in flags else ()
    for path in files.values():
        text = refusal(capsys, *QUICK, *extra, "--data-path", data, "--epochs", 1, "--output_dir", tmp_path / "out",
                        *flags.split(), path)
        assert str(path) in text, text
        assert not marker.exists()
    assert not (tmp_path / "out/checkpoint.pth").exists()


def test_a_checkpoint_of_another_kind(data, whole, tmp_path, capsys):
    torch.save({"model": timm.create_model("resnet18", num_classes=3).state_dict()}, tmp_path / "resnet.pth")
    flags = ("--eval", "--data-path", data, "--device", "cpu", "--num_workers", 0)
    assert "vision transformer" in refusal(capsys, *flags, "--resume", tmp_path / "resnet.pth")
    assert "vision transformer" in refusal(capsys, *flags, "--resume", tmp_path / "resnet.pth", "--model", NANO)
    assert run(*flags, "--resume", tmp_path / "resnet.pth", "--model", "resnet18", "--input-size", 32) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("model: top-1")
    assert "--model" in refusal(capsys, *flags, "--resume", whole / "checkpoint.pth", "--model", "resnet18")


def test_data_that_are_not_the_checkpoints(data, whole, tmp_path, capsys):
    flags = ("--eval", "--resume", whole / "checkpoint.pth", "--device", "cpu", "--num_workers", 0)
    assert "class" in refusal(capsys, *flags, "--data-set", "DIGITS")
    foreign = write_digits(tmp_path / "foreign", names=["cat", "dog", "frog"])
    assert "'cat'" in refusal(capsys, *flags, "--data-path", foreign)
    assert "--data-path" in refusal(capsys, *flags, "--data-path", data, "--data-set", "CIFAR")


def test_an_output_folder_that_cannot_be_written(data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        assert "--output_dir" in refusal(capsys, *QUICK, "--data-path", data, "--epochs", 1, "--output_dir", folder)
    assert (tmp_path / "file").read_text() == "mine"


@slow
def test_a_full_disk_does_not_end_the_training(copied, data, tmp_path):
    """Files may grow to 100 kB here: the log fits, a checkpoint does not."""
    before = contents(copied)
    process = Run(tmp_path, *three_epochs(data, copied), "--resume", "auto", "--epochs", 5, file_limit=100_000)
    assert process.wait() == 2
    out, err = process.out.read_text(), process.err.read_text()
    assert "epoch 4/5" in out and "best top-1" in out
    assert err.count("warning: checkpoint.pth could not be written") == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: checkpoint.pth could not be written")
    after = contents(copied)
    assert {name: after[name] for name in before if name.endswith(".pth")} == {
        name: content for name, content in before.items() if name.endswith(".pth")}
    assert not [name for name in after if name.endswith(".tmp")]
    assert run(*three_epochs(data, copied), "--resume", "auto", "--epochs", 5) == 0
    assert [record["epoch"] for record in log(copied)] == [0, 1, 2, 3, 4]


def test_a_best_epoch_that_could_not_be_written_is_not_the_one_to_beat(data, tmp_path, monkeypatch, capsys):
    """The accuracy stays the same here, so only the first epoch that is written can be kept as the best."""
    write, failures = run_folder.save_checkpoint, iter([OSError(28, "No space left on device")])

    def fails_once(*args):
        for error in failures:
            raise error
        write(*args)

    monkeypatch.setattr(run_folder, "save_checkpoint", fails_once)
    out = tmp_path / "out"
    assert run(*QUICK, "--data-path", data, "--epochs", 2, "--lr", 1e-12, "--min-lr", 0, "--output_dir", out) == 0
    assert "not kept as best_checkpoint.pth and best_ema_checkpoint.pth" in capsys.readouterr().err
    records = log(out)
    assert records[0]["test_acc1"] == records[1]["test_acc1"] > 0
    for name in ("best_checkpoint.pth", "best_ema_checkpoint.pth"):
        assert checkpoint(out, name)["epoch"] == 1 and checkpoint(out, name)["max_accuracy"] == records[1]["test_acc1"]


def test_any_folder_is_a_class(tmp_path, capsys):
    """Names with spaces and joiners of other scripts, with control characters and bytes that are not UTF-8."""
    names = ["new\u3000york", "می\u200cخواهم", "red\x1b[31m\n", os.fsdecode(b"caf\xe9")]
    data, out = write_digits(tmp_path / "data", names=names), tmp_path / "out"
    words = (*QUICK, "--data-path", data, "--data-set", "FOLDER")
    assert run(*words, "--epochs", 1, "--class-weights", "balanced", "--output_dir", out) == 0
    assert "class weights: all 1, each class has 16 images" in capsys.readouterr().out
    assert run(*words, "--epochs", 2, "--resume", "auto", "--output_dir", out) == 0
    assert checkpoint(out)["class_names"] == sorted(names)
    assert run("--device", "cpu", "--eval", "--resume", out / "checkpoint.pth", "--data-path", data, "--num_workers", 0) == 0
    image = next((data / "val" / names[0]).iterdir())
    for tool, words in ((evaluate, ("--num_workers", "0", "--data-path", str(data))), (predict, (str(image),)),
                        (inspect_kan, (str(image),)), (export, (str(tmp_path / "exported"),))):
        assert tool.main([str(out / "checkpoint.pth"), *words, "--device", "cpu"]) == 0, tool
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "Traceback" not in said.err and "hardest classes" in said.out


@slow
def test_a_disk_that_is_full_for_a_while(data, tmp_path):
    """Not a byte is free, then all is well again: no line of the log is missing or cut, and the run counts as done."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", disk], check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    process = Run(tmp_path, *three_epochs(data, disk / "out"), "--epochs", 40)
    try:
        wait_for(disk / "out/checkpoint_previous.pth")
        fill = open(disk / "fill", "wb", buffering=0)
        with pytest.raises(OSError):
            while True:
                fill.write(bytes(4096))
        lost = ("checkpoint.pth could not", "log.txt could not")
        end = time.monotonic() + 60
        while not all(words in process.err.read_text() for words in lost):
            assert process.process.is_alive() and time.monotonic() < end
            with pytest.raises(OSError):        # what a failed save has given back
                while True:
                    fill.write(bytes(4096))
            time.sleep(0.01)
        fill.close()
        (disk / "fill").unlink()
        assert process.wait() == 0
        assert "Traceback" not in process.err.read_text()
        assert [record["epoch"] for record in log(disk / "out")] == list(range(40))
        assert checkpoint(disk / "out")["epoch"] == 39
    finally:
        process.kill()
        subprocess.run(["umount", disk], check=True)


@slow
def test_bad_input_on_the_real_command_line(data, tmp_path):
    """Several at once, each in its own process: exit code 2, one sentence, no traceback."""
    (tmp_path / "text.pth").write_text("no weights")
    cases = {"--batch-size": ["--batch-sise", "8"], "absent": [*QUICK, "--data-path", str(tmp_path / "absent")],
             "text.pth": ["--eval", "--resume", str(tmp_path / "text.pth"), "--data-path", str(data)]}
    started = {word: subprocess.Popen([sys.executable, str(ROOT / "main.py"), *argv], cwd=tmp_path, text=True,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"},
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for word, argv in cases.items()}
    for word, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, out + err
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err, err
