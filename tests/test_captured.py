"""Training steps as recorded graphs: to the last bit those of the eager loop. On a CPU graphs are emulated (recorded.py);
tests/test_gpu.py has CUDA's."""
import math
import os
import signal
from functools import partial

import pytest
import torch
from e2e import at, checkpoint, log, trained, write_digits
from helpers import differences, every
from recorded import K, Net, Reading, RecordedGraphs, assert_same, batches, evaluation, flags, run, state_of, updater_of
from timm.data import Mixup
from torch import nn

from engine import train_one_epoch
from losses import ClassLoss, CosubLoss, DistillationLoss
from vision_kan.common.errors import EXIT_PREEMPTED, UserError
from vision_kan.common.process import Process
from vision_kan.common.text import to_builtin_types
from vision_kan.training import captured
from vision_kan.training import updates as updates_module
from vision_kan.training.captured import CapturedUpdater, reason_against
from vision_kan.training.debug_nan import KeptBatches, replay_non_finite
from vision_kan.training.training import Hooks, Training
from vision_kan.training.updates import NonFinite, Requests, StopRequested, Updater


@pytest.fixture(autouse=True)
def late(monkeypatch):
    monkeypatch.setattr(updates_module, "can_defer_readback", lambda state, device: True)


def replays(updater) -> tuple[int, int]:
    """Of batches, of updates (emulated graphs count)."""
    return sum(graph.replays for graph, *_ in updater.batches.values()), updater.apply.replays if updater.apply else 0


# ---------------------------------------------------------------- the same to the last bit
CASES = {
    "plain": {},
    "mixup, accumulation, clipping": {"mixup": lambda: Mixup(0.8, 1.0, num_classes=K), "accumulate": 2, "clip_grad": 0.05,
                                      "loader": lambda: batches(11)},
    "groups of 3, the last smaller": {"accumulate": 3, "loader": lambda: batches(16), "clip_grad": 1.0},
    "sgd": {"argv": ("--opt", "sgd", "--momentum", 0.9)},
    "rates by layer, no average": {"argv": ("--layer-decay", 0.7, "--no-model-ema")},
    "evaluation in between, the average warmed up": {"between": evaluation, "argv": ("--model-ema-warmup",)},
    "not in training mode": {"train_mode": False},
    "two submodels": {"criterion": lambda: CosubLoss(K, 0.1), "mixup": lambda: Mixup(0.8, 1.0, num_classes=K),
                       "loader": lambda: batches(9)},
    "bfloat16": {"amp_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", every(2, CASES))
def test_captured_is_eager(name):
    case = dict(CASES[name])
    mixup = case.pop("mixup", lambda: None)
    eager, wanted, _ = run(False, mixup=mixup(), **case)
    state, got, updater = run(True, mixup=mixup(), **case)
    assert_same(state, eager)
    assert_same(got, wanted)
    of_batches, of_updates = replays(updater)
    group = case.get("accumulate", 1)
    assert of_batches >= 14 and of_updates >= 14 // group - 2 and updater.recorder is not None


def test_a_short_last_batch_gets_a_graph_of_its_own():
    loader = partial(batches, 4, last=3)
    eager, _, _ = run(False, loader=loader, epochs=5, argv=("--epochs", 5))
    state, _, updater = run(True, loader=loader, epochs=5, argv=("--epochs", 5))
    assert_same(state, eager)
    assert [images.shape[0] for _, images, _, _ in updater.batches.values()] == [4, 3] and replays(updater) == (14, 14)


def epochs_of(updater: Updater, loader, epochs: int = 1) -> dict:
    for _ in range(epochs):
        train_one_epoch(Training(updater, epochs=9, print_freq=100), loader, Hooks())
        updater.state.next_epoch()
    updater.state.seconds = 0
    return to_builtin_types(updater.state.state_dict())


def test_running_statistics_and_parameters_without_gradient():
    ends = []
    for captured_ in (False, True):
        torch.manual_seed(1)
        state, criterion = state_of(flags("--no-model-ema"), Net()), ClassLoss(nn.CrossEntropyLoss())
        updater = updater_of(state, criterion, captured_)
        ends.append(epochs_of(updater, batches(8)))
    assert_same(*ends)
    assert ends[0]["model"]["norm.num_batches_tracked"] == 8 and replays(updater)[0] == 5


def test_a_teacher_in_the_graph():
    class Student(Net):
        def forward(self, x):
            return super().forward(x), super().forward(x)

    ends = []
    for captured_ in (False, True):
        torch.manual_seed(1)
        teacher = Net().eval().requires_grad_(False)
        state = state_of(flags("--no-model-ema"), Student())
        criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 2.0)
        ends.append(epochs_of(updater_of(state, criterion, captured_), batches(8)))
    assert_same(*ends)


@pytest.mark.slow
def test_float16_and_its_scaler():
    case = {"amp_dtype": torch.float16, "clip_grad": 1.0, "accumulate": 2, "loader": lambda: batches(24),
            "scaler": lambda: torch.amp.GradScaler("cpu", init_scale=2.0 ** 24, growth_interval=3)}
    eager, wanted, _ = run(False, **case)
    state, got, updater = run(True, **case)
    assert_same(state, eager)
    assert_same(got, wanted)
    assert replays(updater)[1] >= 30 and state["scaler"]["scale"] != 2.0 ** 24 and state["skipped"] >= 0


def replay_of(updater: Updater, kept: KeptBatches, step: int, folder) -> str:
    """What --debug-nan says."""
    return replay_non_finite(NonFinite("", step), Training(updater), kept, str(folder))


def keeping(kept: KeptBatches) -> Hooks:
    hooks = Hooks()
    hooks.on_batch = kept.note
    return hooks


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 7])
def test_what_is_not_finite_is_told_alike_and_changes_nothing(step, value, tmp_path):
    def loader():
        spoiled = batches(10)
        spoiled[step][0][0, 0, 0, 0] = value
        return spoiled

    eager, wanted, updater = run(False, loader=loader, clip_grad=1.0, hooks=keeping(kept := KeptBatches()))
    replayed = [replay_of(updater, kept, step, tmp_path)]
    state, got, updater = run(True, loader=loader, clip_grad=1.0, hooks=keeping(kept := KeptBatches()))
    replayed.append(replay_of(updater, kept, step, tmp_path))
    assert replayed[0] == replayed[1] and "the images themselves" in replayed[0]
    assert f"at step {step + 1} of epoch 0" in got[-1] and got == wanted
    assert_same(state, eager)


def test_a_resume_is_to_the_last_bit():
    """In the middle of an epoch; the first batches after it are computed without graphs."""
    criterion = ClassLoss(nn.CrossEntropyLoss())
    whole = state_of(flags())
    wanted = epochs_of(updater_of(whole, criterion, True), batches(8), 2)

    first = state_of(flags())
    updater, stop = updater_of(first, criterion, True), Hooks()
    stop.requests = lambda: Requests(signal=15 if first.step >= 4 else 0)
    with pytest.raises(StopRequested):
        train_one_epoch(Training(updater, epochs=9), batches(8), stop)
    assert replays(updater)[1] >= 1
    kept = to_builtin_types(first.state_dict())
    second = state_of(flags())
    second.load_state_dict(kept)
    rest = batches(8)[second.step:]
    updater = updater_of(second, criterion, True)
    train_one_epoch(Training(updater, epochs=9), _Rest(rest, 8), Hooks())
    second.next_epoch()
    got = epochs_of(updater, batches(8))
    assert_same(got["model"], wanted["model"])
    assert_same(got["model_ema"], wanted["model_ema"])
    assert_same(got["optimizer"], wanted["optimizer"])


class _Rest(list):
    """What is left of an epoch of n batches."""

    def __init__(self, left, n):
        super().__init__(left)
        self.batch_size, self.sampler, self.n = 4, range(4 * n), n

    def __len__(self):
        return self.n


@pytest.mark.slow
def test_stopped_and_resumed_through_main(tmp_path, monkeypatch, capsys):
    """The real program; its graphs are emulated."""
    data = write_digits(tmp_path / "data", train=32)         # 6 steps of 16 images
    assert trained(data, tmp_path / "without", "--grad-accum 2 --clip-grad 0.5 --drop 0.1") == 0
    monkeypatch.setattr(captured, "reason_against", lambda *args: "")
    monkeypatch.setattr(captured, "CudaGraphs", RecordedGraphs)
    way = "--grad-accum 2 --clip-grad 0.5 --drop 0.1 --cuda-graph on"
    with monkeypatch.context() as patch:
        at(patch, "the update of step 4 of epoch 1", lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert trained(data, tmp_path / "with", way) == EXIT_PREEMPTED
    assert trained(data, tmp_path / "with", way, "--resume", "auto", "--save-interval-steps", 2) == 0
    assert capsys.readouterr().out.count("CUDA graphs: on") == 2
    a, b = (checkpoint(tmp_path / out) for out in ("without", "with"))
    for key in ("model", "model_ema", "optimizer", "losses", "epoch", "step"):
        assert differences(a[key], b[key]) == []
    assert differences(log(tmp_path / "without"), log(tmp_path / "with")) == []


# ---------------------------------------------------------------- what cannot be
def test_a_step_that_cannot_be_recorded_goes_on_without_and_nothing_is_lost(capsys):
    ends = []
    for captured_ in (False, True):
        torch.manual_seed(1)
        state, criterion = state_of(flags("--no-model-ema"), Reading()), ClassLoss(nn.CrossEntropyLoss())
        updater = updater_of(state, criterion, captured_, clip_grad=1.0)
        ends.append(epochs_of(updater, batches(8), 2))
    assert_same(*ends)
    said = [line for line in capsys.readouterr().out.splitlines() if "CUDA graphs" in line]
    assert len(said) == 1 and "off from here on" in said[0] and "reads the device" in said[0] and updater.recorder is None


def test_an_update_that_cannot_be_recorded(capsys, monkeypatch):
    clip = nn.utils.clip_grads_with_norm_

    def not_in_a_graph(*args):
        if torch.utils._python_dispatch._get_current_dispatch_mode():
            raise RuntimeError("no such thing in a graph")
        clip(*args)

    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", not_in_a_graph)
    ends = []
    for captured_ in (False, True):
        state, criterion = state_of(flags(), dtype=torch.float16), ClassLoss(nn.CrossEntropyLoss())
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10, growth_interval=3)
        updater = updater_of(state, criterion, captured_, clip_grad=1.0)
        ends.append(epochs_of(updater, batches(8), 2))
    assert_same(*ends)
    assert "no such thing in a graph" in capsys.readouterr().out and updater.recorder is None


def test_on_refuses():
    state, criterion = state_of(flags("--no-model-ema"), Reading()), ClassLoss(nn.CrossEntropyLoss())
    updater = updater_of(state, criterion, True, required=True)
    with pytest.raises(UserError, match="--cuda-graph on: a training step cannot be recorded .*; take --cuda-graph auto or off"):
        epochs_of(updater, batches(8))


def test_settings_that_change_are_recorded_anew():
    ends = []
    for captured_ in (False, True):
        state, criterion = state_of(flags()), ClassLoss(nn.CrossEntropyLoss())
        updater = updater_of(state, criterion, captured_)
        epochs_of(updater, batches(8))
        for group in state.optimizer.param_groups:
            group["weight_decay"] *= 3
        ends.append(epochs_of(updater, batches(8)))
    assert_same(*ends)


@pytest.mark.parametrize(("argv", "reason"), [
    ((), ""), (("--grad-checkpointing",), "--grad-checkpointing"), (("--compile",), ""),
    (("--compile", "reduce-overhead"), "--compile reduce-overhead makes its own"),
    (("--compile", "max-autotune-no-cudagraphs"), ""), (("--opt", "lamb"), "--opt lamb"), (("--opt", "sgd"), "")])
def test_when_it_can_be(argv, reason, monkeypatch):
    monkeypatch.undo()
    args = flags(*argv)
    found = reason_against(args, state_of(args), Process(device=torch.device("cuda:0")))
    assert found.startswith(reason) and bool(found) == bool(reason)
    assert "several processes" in reason_against(args, state_of(args), Process(0, 2, 0, torch.device("cuda:0")))
    assert "CPU" in reason_against(args, state_of(args), Process())


def test_what_a_run_is_told(capsys, monkeypatch):
    args = flags()
    parts = (state_of(args), ClassLoss(nn.CrossEntropyLoss()), Process(), torch.float32)
    assert type(captured.build_updater(args, *parts)) is Updater
    assert capsys.readouterr().out == "CUDA graphs: off, there are none on a CPU\n"
    assert type(captured.build_updater(flags("--cuda-graph", "off"), *parts)) is Updater
    assert capsys.readouterr().out == "CUDA graphs: off\n"
    with pytest.raises(UserError, match="--cuda-graph on: there are none on a CPU; take --cuda-graph auto or off"):
        captured.build_updater(flags("--cuda-graph", "on"), *parts)
    monkeypatch.setattr(captured, "reason_against", lambda *args: "")
    monkeypatch.setattr(captured, "CudaGraphs", RecordedGraphs)
    updater = captured.build_updater(flags("--cuda-graph", "on"), *parts)
    assert isinstance(updater, CapturedUpdater) and updater.required
    assert capsys.readouterr().out == "CUDA graphs: on, after 3 batches of a shape\n"
