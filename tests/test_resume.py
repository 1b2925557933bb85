"""A run that is stopped or killed in the middle of an epoch and resumed ends, bit by bit, as an uninterrupted one."""
import json
import os
import signal

import pytest
import timm
import torch
from e2e import QUICK, at, checkpoint, left, log, run, trained
from helpers import differences
from timm.optim import list_optimizers

import engine
from vision_kan.common.errors import EXIT_PREEMPTED
from vision_kan.common.seeds import seed_everything
from vision_kan.data.workers import batches

DISTILLED = "--model deit_tiny_distilled_patch16_224_KAN --input-size 16 --distillation-type {} --teacher-model resnet10t " \
            "--teacher-path {{teacher}}"
slow = pytest.mark.slow
WAYS = [
    "--augment-on device --repeated-aug --resplit --grad-accum 2 --clip-grad 0.5 --sched-on-updates",
    *(pytest.param(way, marks=slow) for way in (
        "", "--augment-on device --repeated-aug --resplit", "--grad-accum 2 --clip-grad 0.5 --sched-on-updates",
        "--repeated-aug --resplit --mixup-mode elem",
        "--model vit_nano_patch8_32_GKAN --kan-groups 0 --grad-checkpointing",
        "--model vit_nano_patch8_32_KAT --weight-init mimetic --kan-lr-mult 5",
        "--cutmix-minmax 0.2 0.6 --bce-loss --input-size 16 24", "--drop 0.2 --drop-path 0.3 --cosub --epochs 2",
        "--sched plateau --patience-epochs 0 --lr-noise 0.1 --opt momentum",
        "--mixup-mode pair --mixup-prob 0.5 --mixup-switch-prob 0.3", "--mixup 0 --cutmix 0 --smoothing 0",
        "--ThreeAugment --src --remode const --recount 2", "--aa augmix-m3 --train-interpolation random",
        "--aa none --color-jitter 0.4 --reprob 0.9", DISTILLED.format("hard"), DISTILLED.format("soft"), "--amp-dtype float16",
        "--amp-dtype bfloat16", "--opt lookahead_adamw", "--opt lamb --layer-decay 0.7",
        "--model resnet10t --model-ema-force-cpu", "--kan-trainable-grid --kan-trainable-h --no-model-ema",
        "--model-ema-warmup --patience 5 --grad-accum 2", "--no-train-mode --attn-only", "--compile")),
]


class Killed(BaseException):
    """Ends the program at once, as SIGKILL does: nothing is caught or written afterwards."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": timm.create_model("resnet10t", num_classes=3).state_dict()}, file)
    return file


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("opt", list_optimizers())
def test_every_optimizer_resumes_or_is_refused_at_the_start(opt, data, tmp_path, capsys):
    words = (*QUICK, "--model", "vit_nano_patch8_32_GKAN", "--data-path", data, "--opt", opt, "--epochs", 2)
    code = run(*words, "--output_dir", tmp_path / "whole")
    if code:
        assert code == 2 and f"error: --opt {opt} " in capsys.readouterr().err
        assert not list(tmp_path.glob("whole/*.pth"))
        return
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/checkpoint_previous.pth").rename(tmp_path / "again/checkpoint.pth")
    assert run(*words, "--output_dir", tmp_path / "again", "--resume", "auto") == 0
    whole, again = (left(tmp_path / folder)["files"]["checkpoint.pth"] for folder in ("whole", "again"))
    assert not differences(whole, again)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("way", WAYS)
def test_stopped_in_the_middle_of_an_epoch(way, data, teacher, tmp_path, monkeypatch):
    assert trained(data, tmp_path / "whole", way, teacher=teacher) == 0
    stop = "the update of step 2 of epoch 1"
    with monkeypatch.context() as patch:
        at(patch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert trained(data, tmp_path / "parts", way, teacher=teacher) == EXIT_PREEMPTED
    saved = checkpoint(tmp_path / "parts")
    assert (saved["epoch"], saved["step"], saved["position"]) == (0, 2, 32)
    assert trained(data, tmp_path / "parts", way, "--resume", "auto", teacher=teacher) == 0
    assert differences(left(tmp_path / "whole"), left(tmp_path / "parts")) == []


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert trained(data, out, "") == 0
    return out


@pytest.mark.parametrize("where, position", [
    ("the update of step 3 of epoch 1", (1, 2)),
    *(pytest.param(*case, marks=slow) for case in (
        ("the forward pass of step 1 of epoch 0", None),
        ("the backward pass of step 3 of epoch 0", (0, 2)), ("a batch of the evaluation (test)", (0, 2)),
        ("a batch of the evaluation (ema)", (0, 2)), ("the forward pass of step 1 of epoch 1", (1, 0))))])
def test_killed_anywhere(where, position, whole, data, tmp_path, monkeypatch):
    """`position`: epoch and step of the last checkpoint before."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at(patch, where, kill)
        trained(data, tmp_path, "--save-interval-steps 1")
    if position is not None:
        saved = checkpoint(tmp_path)
        assert (saved["epoch"] + 1, saved["step"]) == position
        assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    assert trained(data, tmp_path, "", "--resume", "auto") == 0
    assert differences(left(whole), left(tmp_path)) == []


@slow
def test_stopped_while_evaluating(whole, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at(patch, "a batch of the evaluation (ema)", lambda: os.kill(os.getpid(), signal.SIGUSR2))
        assert trained(data, tmp_path, "") == EXIT_PREEMPTED
    assert checkpoint(tmp_path)["step"] == 3 and not (tmp_path / "log.txt").exists()
    assert trained(data, tmp_path, "", "--resume", "auto") == 0
    assert differences(left(whole), left(tmp_path)) == []


@slow
@pytest.mark.parametrize("before, after", [(0, 2), pytest.param(2, 1, marks=slow)])
def test_with_other_workers_after_the_resume(before, after, whole, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at(patch, "the update of step 1 of epoch 1", lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert trained(data, tmp_path, "", "--num_workers", before) == EXIT_PREEMPTED
    assert trained(data, tmp_path, "", "--resume", "auto", "--num_workers", after) == 0
    assert differences(left(whole), left(tmp_path)) == []


@slow
def test_a_spoiled_position_step_seed_or_key_gives_other_weights(whole, data, tmp_path, monkeypatch):
    """The negative control: no state of a random number generator is stored; (seed, epoch, step) replaces it."""
    with monkeypatch.context() as patch:
        at(patch, "the update of step 1 of epoch 1", lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert trained(data, tmp_path / "out", "") == EXIT_PREEMPTED
    file = tmp_path / "out" / "checkpoint.pth"
    saved = checkpoint(tmp_path / "out")
    expected = checkpoint(whole)["model"]

    def ends_with(**changes) -> dict:
        torch.save({**saved, **changes}, file)
        assert trained(data, tmp_path / "out", "", "--resume", "auto") == 0
        return checkpoint(tmp_path / "out")["model"]

    assert not differences(expected, ends_with())
    assert differences(expected, ends_with(position=saved["position"] + 16, step=2))
    assert differences(expected, ends_with(args={**saved["args"], "seed": 1}))
    original = seed_everything
    monkeypatch.setattr(engine, "seed_everything", lambda seed, epoch, step, rank: original(seed, epoch, step + 7, rank))
    assert differences(expected, ends_with())       # mixup and dropout


@slow
def test_another_batch_size_goes_on_where_the_order_was(data, tmp_path, monkeypatch, capsys):
    seen = []
    original = batches

    def watched(loader):
        for images, targets in original(loader):
            seen.extend(images.flatten(1).sum(1).tolist())
            yield images, targets

    monkeypatch.setattr(engine, "batches", watched)
    assert trained(data, tmp_path / "whole", "") == 0
    first = seen[:48]
    assert len(first) == 48
    del seen[:]
    with monkeypatch.context() as patch:
        at(patch, "the update of step 1 of epoch 0", lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert trained(data, tmp_path / "parts", "") == EXIT_PREEMPTED
    assert seen == first[:16]
    assert trained(data, tmp_path / "parts", "", "--resume", "auto", "--batch-size", 8) == 0
    assert seen[16:48] == first[16:]
    said = capsys.readouterr().err
    assert "continues at image 16 with different batches" in said and "the updates differ" in said
    record, other = log(tmp_path / "parts")[0], log(tmp_path / "whole")[0]
    assert record["train_loss"] == pytest.approx(other["train_loss"], rel=0.2)
    assert checkpoint(tmp_path / "parts")["step"] == 0


@slow
def test_the_clock_asks_for_a_checkpoint_and_keep_says_how_many(data, tmp_path):
    assert trained(data, tmp_path, "", "--save-interval-minutes", 1e-9, "--keep", 4) == 0
    names = ["checkpoint.pth", "checkpoint_previous.pth", "checkpoint_previous_2.pth", "checkpoint_previous_3.pth"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == names
    assert [(saved["epoch"] + 1, saved["step"]) for saved in (checkpoint(tmp_path, name) for name in names)] == [
        (2, 0), (1, 3), (1, 2), (1, 1)]
    assert trained(data, tmp_path, "", "--resume", "auto", "--epochs", 3, "--keep", 1) == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == names[:1]
