"""One epoch of training, one evaluation, and the state that a run resumes from."""
import io
import math
import multiprocessing
import re
import sys
import time
from argparse import Namespace
from copy import deepcopy
from itertools import islice

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from helpers import NANO, differences
from models import nano
from timm.data import Mixup
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import engine
from datasets import build_loaders
from engine import ema_model, evaluate, summary, train_epochs, train_one_epoch
from losses import ClassLoss, CosubLoss, build_criterion
from samplers import RASampler
from vision_kan.common.errors import TrainingFailed, UserError
from vision_kan.common.process import Process
from vision_kan.common.text import to_builtin_types
from vision_kan.config.resolve import parse_args
from vision_kan.data.images import ImageSet, Split
from vision_kan.data.known import open_digits
from vision_kan.data.transforms import build_mixup
from vision_kan.kernels import native
from vision_kan.training import updates as updates_module
from vision_kan.training.optim import build_state
from vision_kan.training.precision import autocast, choose_amp_dtype
from vision_kan.training.state import MovingAverage, TrainState, lr_of
from vision_kan.training.training import Hooks, Training
from vision_kan.training.updates import NonFinite, Requests, StopRequested, Updater, can_defer_readback

CPU = torch.device("cpu")
K = 4


def flags(*argv) -> Namespace:
    return parse_args(["--model", NANO, "--epochs", "3", "--warmup-epochs", "0", *map(str, argv)]).args


def state_of(model: nn.Module, *argv, lr: float = 0.1, updates: int = 4, dtype=torch.float32) -> TrainState:
    return build_state(flags("--opt", "momentum", "--momentum", 0, "--weight-decay", 0, "--no-model-ema", *argv), model, lr,
                       updates, CPU, dtype)


def batches(n: int, size: int = 8, seed: int = 0) -> list:
    """n batches of random images and targets; a list has all that train_one_epoch asks of a loader."""
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 32, 32, generator=random), torch.randint(K, (size,), generator=random))
            for _ in range(n)]


def epoch_of(state: TrainState, loader, criterion=None, hooks: Hooks | None = None, **kwargs) -> dict[str, float]:
    """A whole epoch of state.epoch."""
    state.step, state.position, state.losses, state.seconds = 0, 0, [], 0.0
    return train_one_epoch(training_of(state, criterion, **kwargs), loader, hooks or Hooks())


def training_of(state: TrainState, criterion=None, process: Process | None = None, amp_dtype=torch.float32, clip_grad=None,
                **options) -> Training:
    criterion = criterion or ClassLoss(nn.CrossEntropyLoss())
    updater = Updater(state.model, state, criterion, process or Process(), amp_dtype=amp_dtype, clip_grad=clip_grad)
    return Training(updater, **{"epochs": 3, "print_freq": 100, **options})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()]).clone()


# ---------------------------------------------------------------- training
def test_training_lowers_the_loss_on_real_images():
    args = flags("--data-set", "DIGITS", "--batch-size", 64, "--num_workers", 0, "--aa", "none", "--color-jitter", 0,
                 "--reprob", 0, "--hflip", 0, "--crop-padding", 0, "--input-size", 32, "--no-repeated-aug")
    loaders = build_loaders(args, Process())

    def zeros_and_ones(loader, n: int) -> list:
        part = [(images[targets < 2], targets[targets < 2]) for images, targets in islice(loader, n)]
        return [batch for images, targets in part for batch in zip(images.split(16), targets.split(16), strict=True)]

    train, val = zeros_and_ones(loaders.train, 10), zeros_and_ones(loaders.val, 10)
    model = nano(num_classes=2)
    before, state, losses = evaluate(model, val, Process()), state_of(model, "--opt", "adamw", lr=1e-3), []
    for state.epoch in range(6):
        losses.append(epoch_of(state, train)["loss"])
    after = evaluate(model, val, Process())
    assert losses[-1] < losses[0] - 0.1 and after["loss"] < before["loss"] - 0.05
    assert after["acc1"] > 65 and after["images"] == 72


def by_hand(model: nn.Module, groups, lr: float) -> torch.Tensor:
    """Weights after a step of gradient descent for each group of batches, on the mean of the batches' losses."""
    model = deepcopy(model).train()
    for group in groups:
        model.zero_grad()
        torch.stack([F.cross_entropy(model(images), targets) for images, targets in group]).mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad if p.grad is not None else 0
    return weights(model)


def test_two_small_batches_with_accumulation_are_one_large_batch():
    data = batches(4)
    large = [tuple(torch.cat(parts) for parts in zip(data[i], data[i + 1], strict=True)) for i in (0, 2)]
    small_state, large_state = state_of(nano()), state_of(nano())
    small, whole = epoch_of(small_state, data, accumulate=2), epoch_of(large_state, large)
    start = weights(nano())
    moved = (weights(small_state.model) - start).norm()
    assert (weights(small_state.model) - weights(large_state.model)).norm() < 1e-4 * moved
    assert small["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    every_batch = state_of(nano())
    epoch_of(every_batch, data)
    assert (weights(every_batch.model) - weights(large_state.model)).norm() > 0.1 * moved


@pytest.mark.parametrize(("n", "accumulate", "groups"), [(3, 2, [(0, 1), (2,)]), (2, 5, [(0, 1)]), (4, 3, [(0, 1, 2), (3,)])])
def test_the_last_group_may_be_smaller(n, accumulate, groups):
    data, state = batches(n), state_of(nano())
    expected = by_hand(state.model, [[data[i] for i in group] for group in groups], 0.1)
    updates = []
    state.scheduler.step_update = updates.append
    epoch_of(state, data, accumulate=accumulate)
    torch.testing.assert_close(weights(state.model), expected, atol=1e-6, rtol=1e-5)
    assert updates == list(range(1, len(groups) + 1))


def test_updates_are_counted_over_epochs():
    state = state_of(nano())
    state.epoch, updates = 2, []
    state.scheduler.step_update = updates.append
    epoch_of(state, batches(5), accumulate=2)
    assert updates == [7, 8, 9]         # 3 updates an epoch


def test_gradients_are_clipped():
    model = nano()
    free, clipped = state_of(deepcopy(model), lr=1.0), state_of(deepcopy(model), lr=1.0)
    start = weights(model)
    epoch_of(free, batches(1))
    epoch_of(clipped, batches(1), clip_grad=0.01)
    step = weights(free.model) - start
    assert step.norm() > 0.1
    torch.testing.assert_close(weights(clipped.model) - start, step * 0.01 / step.norm(), atol=1e-6, rtol=1e-3)
    loose = state_of(deepcopy(model), lr=1.0)
    epoch_of(loose, batches(1), clip_grad=1000.0)
    assert torch.equal(weights(loose.model), weights(free.model))


def test_moving_average():
    model, data = nano(), batches(3)
    state = state_of(model, "--model-ema", "--model-ema-decay", 0.75)
    reference, average = state_of(nano()), weights(nano())
    for step in range(3):               # the same run, an update at a time
        epoch_of(reference, data[step:step + 1])
        average = 0.75 * average + 0.25 * weights(reference.model)
    epoch_of(state, data)
    torch.testing.assert_close(weights(state.ema.module), average, atol=1e-6, rtol=1e-5)
    assert not state.ema.module.training and torch.equal(weights(model), weights(reference.model))
    accumulated = state_of(nano(), "--model-ema", "--model-ema-decay", 0.75)
    epoch_of(accumulated, data, accumulate=3)           # one update, one averaging
    expected = 0.75 * weights(nano()) + 0.25 * weights(accumulated.model)
    torch.testing.assert_close(weights(accumulated.ema.module), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("late", [False, True])
def test_warm_up_of_the_moving_average(late, monkeypatch):
    """As timm's: of the n-th update 1 - n^(-2/3) is kept, at most the decay; a resume goes on counting."""
    monkeypatch.setattr(updates_module, "can_defer_readback", lambda state, device: late)
    argv = ("--opt", "adamw", "--model-ema", "--model-ema-decay", 0.75, "--model-ema-warmup")
    data, average = batches(6), None
    state, reference = state_of(nano(), *argv, lr=1e-2), state_of(nano(), "--opt", "adamw", lr=1e-2)
    for number in range(1, 13):
        epoch_of(reference, data[(number - 1) % 6:][:1])
        keep = min(0.75, 1 - number ** (-2 / 3))
        average = weights(reference.model) if number == 1 else keep * average + (1 - keep) * weights(reference.model)
        if number in (6, 12):
            epoch_of(state, data)
            torch.testing.assert_close(weights(state.ema.module), average, atol=1e-6, rtol=1e-5)
            state.next_epoch()
            resumed = state_of(nano(), *argv, lr=1e-2)
            resumed.load_state_dict(through_a_file(state))
            state = resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_moving_average_is_timms_to_the_last_bit(dtype, device):
    """Buffers and counts too; the decay may change from one step to the next."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2)).to(dtype)
    options = {"device": device and torch.device(device), "use_warmup": True}
    ours, theirs = MovingAverage(model, 0.9, **options), ModelEmaV3(model, 0.9, **options)
    for step in range(4):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn_like(value) if value.is_floating_point() else 3)
        for average in (ours, theirs):
            average.update(model, step)
    assert not differences(dict(ours.module.state_dict()), dict(theirs.module.state_dict()))
    assert ours.module[1].num_batches_tracked == 12
    other = deepcopy(model)
    other.load_state_dict({key: 0 * value for key, value in model.state_dict().items()})
    ours.update(other)          # another model's tensors
    assert differences(dict(ours.module.state_dict()), dict(theirs.module.state_dict()))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_moving_average_takes_over_limits_that_are_none(device):
    """Gemma's layers keep theirs in buffers: infinity less infinity would not be a number."""
    model = nn.Linear(3, 2)
    model.register_buffer("input_max", torch.tensor(math.inf))
    average = MovingAverage(model, 0.5, device=device and torch.device(device))
    before = model.weight.detach().clone()
    for limit in (math.inf, 4.0):
        with torch.no_grad():
            model.weight.add_(1)
            model.input_max.fill_(limit)
        average.update(model)
        assert average.module.input_max == limit
    torch.testing.assert_close(average.module.weight, before + 1.25)


def test_train_mode_off_trains_without_dropout_and_drop_path():
    data = batches(2)
    random = {"drop_path_rate": 0.9, "proj_drop_rate": 0.5, "depth": 2}
    results = {}
    for name, kwargs, train_mode in (("plain", {"depth": 2}, True), ("off", random, False), ("on", random, True)):
        state = state_of(nano(**kwargs))
        epoch_of(state, data, train_mode=train_mode)
        results[name] = weights(state.model)
    assert torch.equal(results["off"], results["plain"]) and not torch.equal(results["on"], results["plain"])


class Recorder(nn.Module):
    """A criterion that keeps what it is called with."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion, self.copies, self.calls = criterion, criterion.copies, []

    def forward(self, images, outputs, targets):
        self.calls.append((images, outputs, targets))
        return self.criterion(images, outputs, targets)


def test_mixup_is_applied_and_depends_on_seed_epoch_and_step_alone():
    def mixed(seed=0, epoch=0, data=None):
        state = state_of(nano())
        state.epoch = epoch
        criterion = Recorder(build_criterion(flags(), K, True))
        epoch_of(state, data or batches(3), criterion, mixup=Mixup(0.8, 1.0, num_classes=K), seed=seed)
        return [targets for _, _, targets in criterion.calls], [images for images, _, _ in criterion.calls]

    targets, images = mixed()
    original = batches(3)
    assert all(t.shape == (8, K) and torch.allclose(t.sum(1), torch.ones(8)) for t in targets)
    assert not any(torch.equal(a, b[0]) for a, b in zip(images, original, strict=True))
    np.random.seed(99)
    assert not differences(mixed()[0], targets)
    assert differences(mixed(seed=1)[0], targets) and differences(mixed(epoch=1)[0], targets)
    last = mixed(data=[original[0]] * 3)[0]
    assert not torch.equal(last[0], last[1])            # the steps of an epoch differ


def test_cosub_shows_the_model_each_image_twice():
    model = nano(drop_path_rate=0.5, depth=2)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    criterion = Recorder(CosubLoss(K, 0.1))
    result = epoch_of(state_of(model), batches(2), criterion)
    assert [x.shape for x in seen] == [(16, 3, 32, 32)] * 2 and all(torch.equal(x[:8], x[8:]) for x in seen)
    assert [(len(images), outputs.shape, targets.shape) for images, outputs, targets in criterion.calls] == [
        (8, (16, K), (8,))] * 2
    a, b = criterion.calls[0][1].chunk(2)
    assert not torch.equal(a, b) and math.isfinite(result["loss"])      # two submodels


def test_the_device_is_waited_for_once_an_interval(monkeypatch):
    """As on a GPU, where a report ("tolist") is read an update later. (A grid in the CPU's memory is read there, which waits
    for nothing.)"""
    waits = []
    monkeypatch.setattr(native, "MAX_POINTS", 0)        # so that no grid is
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, original=original, name=name, **kwargs):
            waits.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    torch.zeros(1).item()
    assert waits.pop() == "item"
    monkeypatch.setattr(updates_module, "can_defer_readback", lambda state, device: True)
    state = state_of(nano(), "--model-ema")
    options = {"mixup": Mixup(0.8, 1.0, num_classes=K), "clip_grad": 1.0, "accumulate": 2}
    criterion = build_criterion(flags(), K, True)
    waits.clear()                       # building a model reads numbers too
    epoch_of(state, batches(12), criterion, print_freq=4, **options)
    at_the_end = ["tolist", "__bool__", "item"]         # the last report, are the weights finite, this process's loss
    assert waits == ["tolist", "item"] + ["tolist"] * 2 + ["item"] + ["tolist"] * 2 + ["item"] + at_the_end
    waits.clear()
    epoch_of(state, batches(12), criterion, print_freq=100, **options)
    assert waits == ["tolist"] * 5 + ["item"] + at_the_end


class Poison(ClassLoss):
    """A loss that is NaN, or infinite, from one step on."""

    def __init__(self, step: int, value: float):
        super().__init__(nn.CrossEntropyLoss())
        self.left, self.value = step, value

    def forward(self, images, outputs, targets):
        self.left -= 1
        return super().forward(images, outputs, targets) * (1 if self.left >= 0 else self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(value):
    state = state_of(nano(), lr=0.125)
    state.epoch = 1
    with pytest.raises(TrainingFailed) as e:
        epoch_of(state, batches(9), Poison(5, value), print_freq=3)
    text = str(e.value)
    kind = "nan" if math.isnan(value) else "infinite"
    assert "\n" not in text and f"the loss became {kind} at step 6 of epoch 1 (lr 0.125, gradient norm " in text
    assert "untouched" in text and "--lr" in text and "--clip-grad" in text and "--amp-dtype" in text
    with pytest.raises(TrainingFailed, match="at step 5 "):
        epoch_of(state_of(nano()), batches(5), Poison(4, value), print_freq=100)


@pytest.mark.parametrize("spoiled_step, stops", [(4, True), (9, False)])
def test_weights_that_the_last_update_spoils_end_the_training(spoiled_step, stops):
    """The loss of every step is finite: only the last gradient is not."""
    state, steps = state_of(nano()), iter(range(1, 100))
    state.model.head.weight.register_hook(lambda grad: grad * (math.nan if next(steps) == spoiled_step else 1))
    if stops:
        with pytest.raises(TrainingFailed, match="gradient became infinite or nan at step 4 of epoch 0 .*gradient norm nan"):
            epoch_of(state, batches(4), print_freq=100)
        assert weights(state.model).isfinite().all()
    else:
        assert math.isfinite(epoch_of(state, batches(4), print_freq=100)["loss"])


def test_returned_figures():
    state, data = state_of(nano(), lr=0.0), batches(4)
    result = epoch_of(state, data, print_freq=3)
    with torch.no_grad():
        expected = np.mean([F.cross_entropy(state.model(images), targets).item() for images, targets in data])
    assert result["loss"] == pytest.approx(expected, rel=1e-5) and result["lr"] == 0
    assert result["img_per_s"] == pytest.approx(32 / result["seconds"])


# ---------------------------------------------------------------- what is printed
LINE = re.compile(r"epoch (\d+)/(\d+)  step (\d+)/(\d+)  (\d+)%  loss (\d+\.\d{4})  lr (\S+)  (\d+) img/s  eta (\d+:\d\d:\d\d)")


def test_a_line_an_interval_and_no_bar_into_a_file(capsys):
    state = state_of(nano(), lr=0.25)
    state.epoch = 1
    result = epoch_of(state, batches(10), print_freq=4, epochs=2)
    out, err = capsys.readouterr()
    lines = [LINE.fullmatch(line).groups() for line in out.splitlines()]
    assert [line[:5] for line in lines] == [("1", "2", "4", "10", "40"), ("1", "2", "8", "10", "80"),
                                            ("1", "2", "10", "10", "100")]
    assert float(lines[-1][5]) == pytest.approx(result["loss"], abs=1e-4)
    assert {float(line[6]) for line in lines} == {0.25}
    assert lines[-1][8] == "0:00:00"                # the last step of the last epoch
    assert err == "" and "\r" not in out


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    epoch_of(state_of(nano()), batches(3), print_freq=2)
    out, err = capsys.readouterr()
    assert "epoch 0" in err and "\r" in err and len(out.splitlines()) == 2


def test_only_the_first_process_prints(capsys):
    state = state_of(nano())
    epoch_of(state, batches(2), process=Process(rank=1), epochs=1, print_freq=1)
    assert capsys.readouterr() == ("", "")


def test_eta_counts_the_epochs_that_are_left(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    state = state_of(nano())
    state.epoch = 1
    epoch_of(state, batches(2), print_freq=1, epochs=4)
    first = LINE.fullmatch(capsys.readouterr().out.splitlines()[0])
    # the clock goes on by 10 s at each look: 20 s for the first step, 1 more of this epoch and 2 x 2 after it
    assert first.group(8) == str(round(8 / 10)) and first.group(9) == "0:01:40"


# ---------------------------------------------------------------- arithmetic
def test_choice_of_arithmetic(monkeypatch):
    cuda = torch.device("cuda")
    assert choose_amp_dtype("auto", CPU) == torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, s=supported: s)
        assert choose_amp_dtype("auto", cuda) == expected
    assert choose_amp_dtype("auto", torch.device("mps")) == torch.float16
    for name in ("float32", "bfloat16", "float16"):
        assert choose_amp_dtype(name, cuda) == choose_amp_dtype(name, CPU) == getattr(torch, name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_on_a_cpu(dtype):
    model, data = nano(), batches(1) * 8
    inner = []
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    state = state_of(model, dtype=dtype, lr=0.05)
    assert state.scaler.is_enabled() == (dtype == torch.float16)
    criterion = Recorder(ClassLoss(nn.CrossEntropyLoss()))
    first, last = (epoch_of(state, data, criterion, amp_dtype=dtype)["loss"] for _ in range(2))
    assert last < first - 0.1 and set(inner) == {dtype}
    assert {outputs.dtype for _, outputs, _ in criterion.calls} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if dtype == torch.bfloat16:         # in float16 the first steps only find the scale
        assert first == pytest.approx(epoch_of(state_of(nano(), lr=0.05), data)["loss"], abs=0.05)
    with autocast(CPU, dtype):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


def test_clipping_is_of_unscaled_gradients():
    model = nano()
    steps = {}
    for dtype in (torch.float32, torch.float16):
        state = state_of(deepcopy(model), lr=1.0, dtype=dtype)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype == torch.float16)
        epoch_of(state, batches(1), clip_grad=0.5, amp_dtype=dtype)
        steps[dtype] = weights(state.model) - weights(model)
    assert steps[torch.float16].norm() == pytest.approx(0.5, rel=1e-3)
    assert F.cosine_similarity(*steps.values(), dim=0) > 0.99


# ---------------------------------------------------------------- updates that are not made
def spoiled_at(step: int, value: float = math.nan):
    """A criterion whose loss is not finite in one step alone."""
    class Once(ClassLoss):
        calls = 0

        def forward(self, images, outputs, targets):
            self.calls += 1
            return super().forward(images, outputs, targets) * (value if self.calls == step else 1)

    return Once(nn.CrossEntropyLoss())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("opt", ["adamw", "momentum", "adam"])
def test_an_update_that_is_not_finite_changes_nothing(opt, late, monkeypatch):
    """Neither weights nor average nor the optimizer's state; read late, too, as on a GPU."""
    monkeypatch.setattr(updates_module, "can_defer_readback", lambda state, device: late)
    argv = ("--opt", opt, "--momentum", 0.9, "--model-ema", "--model-ema-decay", 0.5)
    before, spoiled = state_of(nano(), *argv, lr=1e-3), state_of(nano(), *argv, lr=1e-3)
    epoch_of(before, batches(2))
    with pytest.raises(NonFinite, match="the loss became nan at step 3 of epoch 0 .*lr 0.001, gradient norm nan"):
        epoch_of(spoiled, batches(6), spoiled_at(3))
    a, b = (to_builtin_types(state.state_dict()) for state in (before, spoiled))
    for key in ("model", "model_ema", "optimizer"):
        assert not differences(a[key], b[key])


@pytest.mark.parametrize("argv", [("--opt", "adamw"), ("--opt", "sgd", "--momentum", 0.9)])
def test_read_late_is_the_same_run(argv, monkeypatch):
    states = []
    for late in (False, True):
        monkeypatch.setattr(updates_module, "can_defer_readback", lambda state, device, late=late: late)
        # late, the rate is read in float32, as this one is
        state = state_of(nano(), *argv, "--model-ema", "--model-ema-decay", 0.5, lr=2.0 ** -10)
        epoch_of(state, batches(7), accumulate=2, clip_grad=0.5)
        state.seconds = 0
        states.append(to_builtin_types(state.state_dict()))
    assert not differences(*states)


def test_when_an_update_may_be_read_late():
    cuda = torch.device("cuda")
    assert can_defer_readback(state_of(nano(), "--opt", "adamw", "--model-ema"), cuda)
    assert not can_defer_readback(state_of(nano(), "--opt", "adamw"), CPU)
    for opt in ("lookahead_adamw", "lamb"):         # they cannot skip an update on the device
        assert not can_defer_readback(state_of(nano(), "--opt", opt), cuda)
    resnet = timm.create_model("resnet10t", num_classes=K)
    assert not can_defer_readback(state_of(resnet, "--opt", "adamw", "--model-ema"), cuda)      # its average needs buffers
    assert can_defer_readback(state_of(resnet, "--opt", "adamw"), cuda)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_float16_skips_are_survived_and_a_run_of_them_is_not(late, monkeypatch):
    monkeypatch.setattr(updates_module, "can_defer_readback", lambda state, device: late)
    state = state_of(nano(), "--model-ema", "--model-ema-decay", 0.5, "--momentum", 0.9, dtype=torch.float16)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 30)       # overflows until it has come down
    before = weights(state.model)
    epoch_of(state, batches(5), amp_dtype=torch.float16)
    assert torch.equal(weights(state.model), before) and torch.equal(weights(state.ema.module), before)
    assert state.skipped == 5 and state.scaler.get_scale() == 2.0 ** 25
    epoch_of(state, batches(25), amp_dtype=torch.float16)
    assert not torch.equal(weights(state.model), before) and state.skipped == 0
    assert weights(state.model).isfinite().all()
    hopeless = state_of(nano(), dtype=torch.float16)
    hopeless.model.head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingFailed, match="skipped 21 updates in a row .* --amp-dtype bfloat16 or float32"):
        epoch_of(hopeless, batches(40), amp_dtype=torch.float16)
    with pytest.raises(NonFinite, match="the loss became nan at step 2 "):      # no scale would help
        epoch_of(state_of(nano(), dtype=torch.float16), batches(4), spoiled_at(2), amp_dtype=torch.float16)


def test_weights_that_overflow_are_not_saved():
    state, saved, hooks = state_of(nano(), lr=3e38), [], Hooks()
    hooks.save = lambda: saved.append(weights(state.model))
    with pytest.raises(TrainingFailed, match="not finite|became"):
        epoch_of(state, batches(4), hooks=hooks, save_every=1)
    assert all(each.isfinite().all() for each in saved)


def test_what_is_requested_happens_at_the_next_update():
    saved, state, hooks = [], state_of(nano()), Hooks()
    requests = iter([Requests(), Requests(save=True), Requests(), Requests(signal=15)])
    hooks.requests, hooks.save = lambda: next(requests), lambda: saved.append(state.step)
    with pytest.raises(StopRequested) as e:
        epoch_of(state, batches(9), accumulate=2, hooks=hooks)
    assert saved == [4] and state.step == 8 and e.value.signal == 15 and state.position == 64 and len(state.losses) == 1


def test_other_batches_after_a_resume():
    state = state_of(nano())
    state.step, state.position, state.losses = 4, 64, [8.0]
    assert state.fit_launch(16, Process()) == "" and state.losses == [8.0]
    text = state.fit_launch(8, Process(0, 2))
    assert text == "" or "image 64" in text
    assert state.step == 4 and state.losses == [8.0, 8.0]       # the mean of 2 is that of both
    assert "image 64" in state.fit_launch(32, Process()) and state.step == 2 and state.losses == [4.0]
    assert "image 64" in state.fit_launch(31, Process()) and state.step == 2        # as many batches, of other images
    state.next_epoch()
    assert (state.step, state.position, state.losses) == (0, 0, []) and state.fit_launch(8, Process()) == ""


# ---------------------------------------------------------------- evaluation
class Table(nn.Module):
    """Logits by number; an image carries its number as its pixels."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.logits[images[:, 0, 0, 0].long()])


def numbered(targets: list[int], size: int) -> list:
    images = torch.arange(float(len(targets))).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return list(zip(images.split(size), torch.tensor(targets).split(size), strict=True))


def expected_of(logits: np.ndarray, targets: list[int]) -> dict[str, float]:
    n = [i for i, target in enumerate(targets) if target >= 0]
    order = np.argsort(-logits, axis=1)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return {"loss": -np.mean([log_p[i, targets[i]] for i in n]),
            "acc1": 100 * np.mean([order[i, 0] == targets[i] for i in n]),
            "acc5": 100 * np.mean([targets[i] in order[i, :5] for i in n]),
            "images": len(n), "unreadable": len(targets) - len(n)}


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_evaluation_equals_a_computation_by_hand(classes, size):
    random = np.random.default_rng(classes)
    logits = random.normal(size=(23, classes)) * 2
    targets = random.integers(-1, classes, 23).tolist()
    targets[4:8] = [-1] * 4             # with size 4 a batch of which nothing can be read
    assert 4 < targets.count(-1) < 20
    result = evaluate(Table(torch.tensor(logits)), numbered(targets, size), Process())
    assert result == pytest.approx(expected_of(logits, targets), rel=1e-5)
    assert isinstance(result["images"], int) and (classes == 10) == (result["acc5"] < 100)


def test_a_model_that_gives_nan_is_not_right():
    result = evaluate(Table(torch.full((4, 3), math.nan)), numbered([0, 1, 2, 1], 4), Process())
    assert math.isnan(result["loss"]) and result["images"] == 4


def test_nothing_readable():
    with pytest.raises(UserError) as e:
        evaluate(Table(torch.zeros(3, 2)), numbered([-1, -1, -1], 2), Process())
    text = str(e.value)
    assert "none of the 3 images" in text and "data folder" in text


def test_evaluation_disturbs_neither_training_nor_random_numbers():
    model = nano(drop_path_rate=0.5, depth=2)
    torch.manual_seed(5)
    before, state = torch.get_rng_state(), weights(model)
    first = evaluate(model.train(), batches(2), Process())
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(weights(model), state)
    assert evaluate(model, batches(2), Process()) == first      # no drop path
    with_evaluation, without = state_of(nano(drop_path_rate=0.5)), state_of(nano(drop_path_rate=0.5))
    for _ in range(2):
        evaluate(with_evaluation.model, batches(2), Process())
        epoch_of(with_evaluation, batches(2))
        epoch_of(without, batches(2))
    assert with_evaluation.model.training and torch.equal(weights(with_evaluation.model), weights(without.model))


def test_a_distilled_model_is_evaluated_on_both_tokens():
    model = timm.create_model("deit_tiny_distilled_patch16_224_KAN", depth=1, img_size=32, num_classes=K)
    model.set_distilled_training(True)
    data = batches(2)
    result = evaluate(model.train(), data, Process())
    pairs = [model.train()(images) for images, _ in data]
    logits = torch.cat([(a + b) / 2 for a, b in pairs]).detach().double().numpy()
    assert result == pytest.approx(expected_of(logits, torch.cat([t for _, t in data]).tolist()), rel=1e-4)


def test_evaluation_in_half_precision_is_close():
    model = nano()
    full, half = (evaluate(model, batches(2), Process(), amp_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half["loss"] == pytest.approx(full["loss"], abs=0.02) and half["loss"] != full["loss"]


def test_summary():
    assert summary("model", {"acc1": 71.296, "acc5": 90.0, "images": 50000}) == \
        "model: top-1 71.30 top-5 90.00 (50000 images)"


# ---------------------------------------------------------------- several processes
def part_of(rank: int, folder, queue, logits, targets) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    process = Process(rank, 2, rank)
    data = [(images, t) for images, t in numbered(targets, 1)]
    model = Table(torch.tensor(logits))
    shared = evaluate(model, data[rank::2], process, shared=True)
    alone = evaluate(model, data, process)
    nothing_here = evaluate(model, data[:3] if rank else [], process, shared=True)["images"]
    state = state_of(nano())
    try:
        epoch_of(state, batches(6), Poison(2 if rank else 100, math.nan), process=process, epochs=1, print_freq=2)
        failure = None
    except TrainingFailed as error:
        failure = str(error)
    state = state_of(nano())
    loss = epoch_of(state, batches(2, seed=rank), process=process, epochs=1)["loss"]
    queue.put((rank, shared, alone, nothing_here, failure, loss))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_an_evaluation_and_stop_together_at_a_nan(tmp_path):
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(7, 10)), random.integers(-1, 10, 7).tolist()
    targets[0] = -1
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    running = [context.Process(target=part_of, args=(rank, tmp_path, queue, logits, targets)) for rank in range(2)]
    for process in running:
        process.start()
    answers = sorted((queue.get(timeout=60) for _ in running), key=lambda answer: answer[0])
    for process in running:
        process.join(60)
    (_, shared, alone, few, failure, loss), other = answers
    assert shared == pytest.approx(expected_of(logits, targets), rel=1e-5)
    assert other[1] == shared and alone == pytest.approx(shared) and other[2] == alone
    assert few == other[3] == sum(target >= 0 for target in targets[:3])
    failures = {text.partition(", gradient norm")[0] for text in (failure, other[4])}     # each has its own gradient here
    assert len(failures) == 1 and "the loss became nan at step 3 of epoch 0 on process 1" in failure
    both = [epoch_of(state_of(nano()), batches(2, seed=rank))["loss"] for rank in range(2)]
    assert loss == other[5] == pytest.approx(np.mean(both), rel=1e-6)


# ---------------------------------------------------------------- state
def through_a_file(state: TrainState) -> dict:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_goes_through_a_file():
    state = state_of(nano(), "--opt", "adamw", "--model-ema", dtype=torch.float16)
    epoch_of(state, batches(2), amp_dtype=torch.float16)
    state.epoch, state.max_accuracy, state.max_accuracy_ema = 5, 71.25, 72.5
    state.scaler.update(1024.0)
    saved = through_a_file(state)
    assert saved["epoch"] == 4          # the last finished one, as in DeiT's files
    assert {"model", "optimizer", "lr_scheduler", "scaler", "model_ema", "max_accuracy"} <= saved.keys()
    fresh = state_of(nano(seed=9), "--opt", "adamw", "--model-ema", dtype=torch.float16)
    fresh.load_state_dict(saved)
    assert not differences(to_builtin_types(fresh.state_dict()), to_builtin_types(state.state_dict()))
    state.results = {"model": {"acc1": 50.0, "acc5": 80.0, "images": 8, "data_set": "FOLDER", "split": "validation"}}
    state.position = 16         # within the next epoch its weights are others
    assert through_a_file(state)["results"] == {}
    state.position = 0
    fresh.load_state_dict(through_a_file(state))
    assert fresh.results == state.results
    fresh.load_state_dict({key: value for key, value in saved.items() if key != "results"})     # of an earlier version
    assert fresh.results == {}
    assert (fresh.epoch, fresh.max_accuracy, fresh.max_accuracy_ema, fresh.scaler.get_scale()) == (5, 71.25, 72.5, 1024)


def test_state_without_an_average_and_of_other_programs():
    state = state_of(nano())
    saved = through_a_file(state)
    assert saved["model_ema"] is None
    averaging = state_of(nano(seed=9), "--model-ema")
    averaging.load_state_dict(saved)    # begins to average at the weights that it resumes from
    assert torch.equal(weights(averaging.ema.module), weights(state.model))
    for key in ("epoch", "max_accuracy", "max_accuracy_ema", "scaler"):
        del saved[key]
    state = state_of(nano(seed=9), "--start_epoch", 7)
    state.load_state_dict(saved)
    assert (state.epoch, state.max_accuracy) == (7, 0)


def test_optimizer_state_of_another_model():
    for other in (nano(depth=2), nano(num_classes=5)):
        saved = through_a_file(state_of(other))
        saved["model"] = nano().state_dict()
        if other.num_classes == K:
            with pytest.raises(UserError, match="optimizer state does not fit.*--finetune"):
                state_of(nano()).load_state_dict(saved)
    saved = through_a_file(state_of(nano()))
    del saved["optimizer"]
    with pytest.raises(UserError, match="optimizer"):
        state_of(nano()).load_state_dict(saved)
    before = weights(state_of(nano()).model)
    assert torch.equal(before, weights(nano()))


def test_best_accuracies():
    state = state_of(nano(), "--model-ema")
    best, average = "best_checkpoint.pth", "best_ema_checkpoint.pth"

    def note(test, ema=None):
        results = {"test": {"acc1": test}} | ({} if ema is None else {"ema_test": {"acc1": ema}})
        return state.update_best(results)

    assert note(50.0, 20.0) == (best, average) and (state.max_accuracy, state.max_accuracy_ema) == (50, 20)
    assert note(49.0, 21.0) == (average,) and note(50.0, 21.0) == () and note(51.0) == (best,)
    assert (state.max_accuracy, state.max_accuracy_ema) == (51, 21)
    resumed = state_of(nano(), "--model-ema")
    resumed.load_state_dict(through_a_file(state))
    assert resumed.update_best({"test": {"acc1": 50.5}, "ema_test": {"acc1": 20.0}}) == ()


def test_patience_counts_epochs_in_which_neither_model_nor_average_is_better():
    state = state_of(nano(), "--model-ema")

    def over(test, ema, patience=2):
        state.update_best({"test": {"acc1": test}, "ema_test": {"acc1": ema}})
        return state.patience_exhausted(patience, Process())

    assert not any([over(50, 20), over(49, 20), over(49, 21), over(50, 21)])     # equal is not better
    state.load_state_dict(through_a_file(state))
    assert over(50, 21) and over(50, 21, 3) and not over(50, 21, 5) and not over(50, 21, 0) and not over(50.5, 21, 1)


def test_average_where_it_is_evaluated():
    state = state_of(nano(), "--model-ema")
    assert ema_model(state, CPU) is state.ema.module
    moved = ema_model(state, torch.device("meta"))
    assert moved is not state.ema.module and next(moved.parameters()).device.type == "meta"
    assert next(state.ema.module.parameters()).device == CPU
    assert isinstance(state.ema, ModelEmaV3)


def test_the_rate_that_is_told_is_the_highest_but_the_coefficients():
    def rate(*groups) -> float:
        return lr_of(torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **group} for group in groups]))

    assert rate({"lr": 0.1}) == 0.1
    assert rate({"lr": 0.1}, {"lr": 0.4}, {"lr": 0.2}) == 0.4           # with --layer-decay the head's
    assert rate({"lr": 8.0, "kan_multiple": 20.0}, {"lr": 0.1}, {"lr": 0.4}) == 0.4
    assert rate({"lr": 0.0, "kan_multiple": 0.0}, {"lr": 0.1}) == 0.1
    torch.manual_seed(0)
    state = state_of(timm.create_model("vit_nano_patch8_32_GKAN", depth=1, num_classes=K), lr=0.01)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    assert max(group["lr"] for group in state.optimizer.param_groups) == pytest.approx(0.2)
    assert epoch_of(state, batches(1))["lr"] == 0.01
    assert all(not torch.equal(before[name], p) for name, p in state.model.named_parameters())


# ---------------------------------------------------------------- resuming
class Run:
    """A small run through the loop of `main`: digits, repeated augmentation, mixup, drop path, dropout, average."""

    def __init__(self, *argv, seed: int = 0):
        self.args = flags("--opt", "adamw", "--drop-path", 0.3, "--model-ema", "--model-ema-decay", 0.9, "--warmup-epochs", 1,
                          "--batch-size", 16, "--input-size", 32, *argv)
        split = open_digits(True)
        few = Split(type(split.images)(split.images.pixels[:48]), split.targets[:48], split.classes)
        data = ImageSet(few, True, self.args)
        self.sampler = RASampler(data, seed=self.args.seed)
        self.loader = DataLoader(data, 16, sampler=self.sampler, generator=torch.Generator())
        torch.manual_seed(seed)
        model = timm.create_model(self.args.model, num_classes=10, depth=2, drop_path_rate=0.3, proj_drop_rate=0.2,
                                  pos_drop_rate=0.2)
        assert any(isinstance(module, DropPath) for module in model.modules())
        self.state = build_state(self.args, model, 1e-3, len(self.loader), CPU, torch.float32)
        self.mixup = build_mixup(self.args, 10)
        self.criterion = build_criterion(self.args, 10, True)
        self.rates = []

    def epochs(self, until: int, sampler_shift: int = 0) -> "Run":
        """Evaluations all find the same accuracy; `rates` gets the learning rate of each step."""
        training = training_of(self.state, self.criterion, mixup=self.mixup, seed=self.args.seed, clip_grad=1.0, epochs=until)
        hooks = Hooks()
        hooks.on_batch = lambda *batch: self.rates.append(lr_of(self.state.optimizer))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "evaluate", lambda *args, **options: {"acc1": 50.0, "acc5": 80.0, "images": 48})
            set_epoch = self.sampler.set_epoch
            patch.setattr(self.sampler, "set_epoch", lambda epoch, position: set_epoch(epoch + sampler_shift, position))
            for _ in train_epochs(training, self.loader, [], hooks):
                pass
        return self

    def resumed(self, *argv) -> "Run":
        """A run in a new process, resumed from this one's file."""
        saved = through_a_file(self.state)
        other = Run(*argv, seed=123)
        other.state.load_state_dict(saved)
        torch.rand(17), np.random.random(5)         # what came before does not count
        return other


@pytest.mark.parametrize("argv", [
    ("--model", "vit_nano_patch8_32_GKAN", "--kan-weight-decay", 0.01, "--sched-on-updates"),
    *(pytest.param(argv, marks=pytest.mark.slow) for argv in (
        (), ("--opt", "lookahead_adamw"), ("--opt", "muon"), ("--opt", "sgd", "--layer-decay", 0.7),
        ("--sched", "plateau", "--patience-epochs", 0, "--warmup-epochs", 0, "--lr-noise", 0.1, "--decay-rate", 0.5),
        ("--model", "vit_nano_patch8_32_GKAN", "--sched", "plateau", "--patience-epochs", 0, "--opt", "lookahead_adamw")))])
def test_resumed_equals_uninterrupted_to_the_last_bit(argv):
    whole = Run(*argv).epochs(2)
    resumed, done = whole.resumed(*argv), len(whole.rates)
    whole.epochs(3)
    resumed.epochs(3)
    assert not differences(to_builtin_types(resumed.state.state_dict()), to_builtin_types(whole.state.state_dict()))
    assert resumed.rates == whole.rates[done:] and len(set(whole.rates)) > 1


@pytest.mark.slow
def test_another_order_of_the_images_or_seed_gives_other_weights():
    half = Run().epochs(1)
    right = half.resumed().epochs(2)
    shifted = half.resumed().epochs(2, sampler_shift=1)
    reseeded = half.resumed("--seed", 1).epochs(2)
    for other in (shifted, reseeded):
        assert not torch.equal(weights(other.state.model), weights(right.state.model))


def test_a_longer_run_after_a_resume_follows_the_schedule_of_its_new_length():
    longer = Run().epochs(1).resumed("--epochs", 10).epochs(2)
    assert longer.rates[0] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 1 / 10)) / 2)


def test_plateau_takes_the_accuracy_of_process_0(monkeypatch):
    """Others may differ by an image that only one could not read; with other rates the weights would drift apart."""
    seen = []

    def gather_number(number, process):
        assert number.dtype == torch.float32
        return [number.item() + 1, number.item()]

    monkeypatch.setattr(engine, "gather_number", gather_number)
    monkeypatch.setattr(engine, "exact_float", lambda device: torch.float32)     # as of an Apple GPU
    run = Run("--sched", "plateau", "--warmup-epochs", 0)
    monkeypatch.setattr(run.state.scheduler, "step", lambda epoch, metric=None: seen.append(metric))
    run.epochs(1)
    assert seen == [51.0]


def test_plateau_remembers_how_long_it_has_waited():
    argv = ("--sched", "plateau", "--patience-epochs", 3, "--cooldown-epochs", 2, "--warmup-epochs", 0, "--decay-rate", 0.5)
    accuracies = [50.0] * 14

    def rates(interrupted_at: int | None) -> list[float]:
        state, result = state_of(nano(), *argv, lr=1.0), []
        for epoch, accuracy in enumerate(accuracies):
            if epoch == interrupted_at:
                saved = through_a_file(state)
                state = state_of(nano(), *argv, lr=1.0)
                state.load_state_dict(saved)
            state.scheduler.step(epoch + 1, accuracy)
            result.append(lr_of(state.optimizer))
        return result

    whole = rates(None)
    assert len(set(whole)) == 3         # decayed twice
    for epoch in range(1, 14):
        assert rates(epoch) == whole, epoch
