"""One epoch of training, one evaluation, and the state that a run resumes from."""
import math
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import peers
from checkpoints import plain
from console import readers_may_leave
from datasets import batches, evaluated
from debug_nan import KeptBatches, replay
from losses import Criterion, loss_of
from utils import Process, TrainingFailed, UserError, seed_everything

AMP_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """`--amp-dtype`; auto: bfloat16 where the GPU computes in it, else float16; float32 on a CPU."""
    if name != "auto":
        return AMP_DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def autocast(device: torch.device, dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


# ---------------------------------------------------------------- state
PROGRESS = ("step", "position", "losses", "seconds", "skipped")    # of TrainState: how far the epoch is


@dataclass
class TrainState:
    """Everything that changes while training. `model` is the plain one, without DistributedDataParallel."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0                  # the next one, or the one that is under way
    step: int = 0                   # batches of it that are done
    position: int = 0               # where its order goes on, over all processes (see RASampler)
    losses: list[float] = field(default_factory=list)   # sums of the epoch's losses so far, one for each process
    seconds: float = 0.0            # that the epoch has taken so far
    skipped: int = 0                # updates in a row that float16's loss scaling has skipped
    max_accuracy: float = 0.0       # best top-1 in percent, raw model
    max_accuracy_ema: float = 0.0
    epochs_without_best: int = 0    # in a row that neither of the two has risen
    results: dict[str, dict[str, Any]] = field(default_factory=dict)    # of the last epoch's weights, by their key: `result_of`

    def state_dict(self) -> dict[str, Any]:
        """DeiT's keys and ours; `epoch` is the last finished one as in DeiT's files."""
        return {"model": dict(self.model.state_dict()), "optimizer": plain(self.optimizer.state_dict()),
                "lr_scheduler": plain(_state_of(self.scheduler)), "scaler": plain(self.scaler.state_dict()),
                "model_ema": dict(self.ema.module.state_dict()) if self.ema else None,
                "epoch": self.epoch - 1, "max_accuracy": self.max_accuracy, "max_accuracy_ema": self.max_accuracy_ema,
                "epochs_without_best": self.epochs_without_best,
                "results": {} if self.position else self.results,       # within an epoch the weights are others
                **{key: getattr(self, key) for key in PROGRESS}}

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step, self.position, self.losses, self.seconds = 0, 0, [], 0.0

    def fit_launch(self, batch_size: int, process: Process) -> str:
        """Let the epoch go on at its position with another batch size or number of processes; returns a sentence on what
        cannot be exact then, or ''.

        batch_size: images of a batch of one process."""
        step = self.position // (batch_size * process.world_size)
        if not self.position or (step == self.step and len(self.losses) == process.world_size):
            return ""
        mean = sum(self.losses) / max(1, len(self.losses)) / max(1, self.step)
        self.step, self.losses = step, [mean * step] * process.world_size
        return (f"the epoch goes on at image {self.position} of its order in other batches than before (--batch-size or the "
                "number of processes): the order of the images and their augmentation stay; mixup, dropout and the updates "
                "cannot be those of the run as it was")

    def note_best(self, results: dict[str, dict[str, float]]) -> tuple[str, ...]:
        """Raise the best accuracies; returns the names under which this epoch's checkpoint is kept too.

        results: of `evaluate`, under "test" for the raw model and "ema_test" for the average."""
        also = []
        if results["test"]["acc1"] > self.max_accuracy:
            self.max_accuracy = results["test"]["acc1"]
            also.append("best_checkpoint.pth")
        if "ema_test" in results and results["ema_test"]["acc1"] > self.max_accuracy_ema:
            self.max_accuracy_ema = results["ema_test"]["acc1"]
            also.append("best_ema_checkpoint.pth")
        self.epochs_without_best = 0 if also else self.epochs_without_best + 1
        return tuple(also)

    def patience_is_over(self, patience: int, process: Process) -> bool:
        """--patience: whether there was no new best for so many epochs; 0: never. Alike on all processes, as process 0 has
        counted."""
        if not patience:
            return False
        return _of_all(torch.tensor(float(self.epochs_without_best), device=process.device), process)[0] >= patience

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError if the optimizer's state is of another model or optimizer."""
        try:
            stored = checkpoint["optimizer"]
            groups = [{**theirs, **{key: value for key, value in own.items() if isinstance(value, torch.dtype)}}
                      for own, theirs in zip(self.optimizer.param_groups, stored["param_groups"], strict=True)]     # kept as text
            stored = {**stored, "param_groups": groups}
            if "rng_state" in stored:       # Kron's, which Python takes as tuples alone
                stored["rng_state"] = tuple(tuple(part) if isinstance(part, list) else part for part in stored["rng_state"])
            self.optimizer.load_state_dict(stored)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's optimizer state does not fit ({error}): resume with the flags it was "
                            "trained with, or start a new run from its weights with --finetune") from error
        self.model.load_state_dict(checkpoint["model"])
        if self.ema:
            # a run that begins to average only now averages from its present weights on
            self.ema.module.load_state_dict(checkpoint.get("model_ema") or checkpoint["model"])
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint.get("epoch", self.epoch - 1) + 1
        for key in PROGRESS:        # a file of DeiT's or of an earlier version is of an epoch's end
            setattr(self, key, checkpoint.get(key, getattr(self, key)))
        self.max_accuracy = checkpoint.get("max_accuracy", 0.0)
        self.max_accuracy_ema = checkpoint.get("max_accuracy_ema", 0.0)
        self.epochs_without_best = checkpoint.get("epochs_without_best", 0)
        self.results = checkpoint.get("results", {})
        if isinstance(self.scheduler, PlateauLRScheduler):
            # the only schedule with a memory; all others are functions of the epoch, so that --epochs and the
            # batch size may change
            self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
            self.scheduler.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"]["plateau"])
            self.scheduler.restore_lr = checkpoint["lr_scheduler"]["restore_lr"]


def _state_of(scheduler: Scheduler) -> dict[str, Any]:
    if not isinstance(scheduler, PlateauLRScheduler):
        return scheduler.state_dict()
    # timm's leaves out for how long the schedule has waited, and the rate under the noise
    return {**scheduler.state_dict(), "plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": scheduler.restore_lr}


def has_running_statistics(model: nn.Module) -> bool:
    """Whether the forward pass changes buffers (BatchNorm)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def distributed(model: nn.Module, process: Process) -> nn.Module:
    """`model`, its gradients averaged over the processes where there are several."""
    if process.world_size == 1:
        return model
    # grids are buffers too: to send them before each forward pass would make every process wait there for nothing
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"       # the older name
    options: dict[str, Any] = {name: has_running_statistics(model)}
    return DistributedDataParallel(model, [process.device] if process.device.type == "cuda" else None, **options)


class MovingAverage(ModelEmaV3):
    """timm's average, bit for bit, over lists of tensors that are made once: to walk through a model's state costs more time
    than the average itself.

    The model's and the average's tensors must stay the same ones, as `load_state_dict` and optimizers leave them."""

    def __init__(self, model: nn.Module, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        # infinity less infinity is not a number: limits that are none are taken over as they are
        self.infinite = {name for name, value in self.module.named_buffers() if value.isinf().any()}
        self.made_for = 0       # id of the model
        self.pairs: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if not self.foreach:        # it is kept on another device
            super().apply_update_(model, decay)
            for name in self.infinite:
                self.module.get_buffer(name).copy_(model.get_buffer(name))
            return
        if self.made_for != id(model):
            self.made_for = id(model)
            self.pairs = ([], [], [], [])
            for (name, average), value in zip(self.module.state_dict().items(), model.state_dict().values()):
                first = 0 if average.is_floating_point() and name not in self.infinite else 2
                self.pairs[first].append(average)
                self.pairs[first + 1].append(value)
        averages, values, own_counts, counts = self.pairs
        if all(a.dtype == b.dtype == torch.float32 for a, b in zip(averages, values)):
            torch._foreach_lerp_(averages, values, 1. - decay)
        else:
            self._foreach_lerp_(averages, values, 1. - decay)
        if counts:
            torch._foreach_copy_(own_counts, counts)


# ---------------------------------------------------------------- what the processes agree on
@dataclass(frozen=True)
class Wishes:
    """What this process would like to happen at the next update; what one wishes holds for all."""
    signal: int = 0         # number of the signal that asks the run to stop
    save: bool = False


class Report(NamedTuple):
    """An update, seen afterwards and alike on all processes; all are numbers of one tensor."""
    trouble: float          # 0: the loss is finite, 1: infinite, 2: not a number
    process: float          # where, counted from 1
    signal: float
    save: float
    loss: float             # largest of the processes'
    skip: float             # 1: loss or gradient are not finite, nothing was updated
    norm: float             # of the gradient
    step: float
    lr: float


class Exchange:
    """The largest value of each number over the processes: begun at one moment, read at a later one, so that a GPU need
    not be waited for."""

    def __init__(self, process: Process):
        self.process = process
        self.begun: deque[tuple[Tensor, Any]] = deque()

    def largest(self, numbers: Tensor) -> Tensor:
        if self.process.world_size > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers

    def begin(self, numbers: Tensor) -> None:
        """Start to bring `numbers` (float32 [n], on the device) to the host."""
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        host.copy_(numbers, non_blocking=True)      # numbers may be overwritten before they are read
        event = None
        if numbers.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.begun.append((host, event))

    def read(self) -> list[float]:
        """The numbers begun first and not yet read."""
        numbers, event = self.begun.popleft()
        if event is not None:
            event.synchronize()
        return numbers.tolist()


class StopRequested(Exception):
    """A signal has asked for the end, and all processes are at the same point."""

    def __init__(self, signal: int):
        self.signal = signal


class NonFinite(TrainingFailed):
    """Loss or gradient are not finite; the weights are those before that update, whose last batch is `step`."""

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step


class Updater:
    """Computes the gradients of batches, and makes the updates of optimizer and moving average from them: none where the loss
    on any process or the gradient is not finite.

    Whether it is, is known on the device at once and on the host one update later (`late`), so that a GPU is not waited
    for. With `late` the optimizer must take `found_inf`, as PyTorch's fused ones do, and the average follows one update
    behind, which is the same where the forward pass changes no buffers. It then reads its learning rates on the device too,
    in float32. What the device needs and what it answers is in tensors that stay the same, as CUDA graphs want it (captured.py).

    Args:
        net: state.model, wrapped for several processes where there are some. criterion: as in `train_one_epoch`.
    """
    MAX_SKIPS = 20      # by float16's loss scaling in a row: it halves at each, from 65,536 to 1/16

    def __init__(self, net: nn.Module, state: TrainState, criterion: Criterion, process: Process, *,
                 amp_dtype: torch.dtype = torch.float32, clip_grad: float | None = None, late: bool | None = None):
        self.net, self.state, self.criterion, self.process = net, state, criterion, process
        self.amp_dtype, self.clip_grad = amp_dtype, clip_grad
        self.late = can_read_late(state, process.device) if late is None else late
        self.exchange = Exchange(process)
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        # on the device: what is the matter with the group's losses (see Report), the largest, and what `_send` sends
        self.trouble, self.loss = torch.zeros((), device=process.device), torch.zeros((), device=process.device)
        self.sent = torch.zeros(5 + len(state.optimizer.param_groups), device=process.device)
        self.begin()

    def begin(self) -> None:
        """An epoch begins."""
        self.signal, self.save = 0, False       # what was asked for by any process in the reports read so far
        self.number_of: Callable[[int], int] = lambda step: step + 1    # of the run's updates, for the average's warm-up
        self._new_group()

    def _new_group(self) -> None:
        self.trouble.zero_()
        self.loss.zero_()

    def add_gradients(self, images: Tensor, targets: Tensor, group: int, where: str = "") -> Tensor:
        """Forward and backward pass of one of the `group` batches of an update; returns its loss, a scalar without gradient."""
        with autocast(self.process.device, self.amp_dtype):
            loss = loss_of(self.net, self.criterion, images, targets)
        peers.mark(f"the backward pass of {where}")
        self.state.scaler.scale(loss / group).backward(create_graph=getattr(self.state.optimizer, "is_second_order", False))
        loss = loss.detach()
        value = loss.float()
        self.trouble.copy_(torch.maximum(self.trouble, value.isinf() + 2. * value.isnan()))
        self.loss.copy_(torch.maximum(self.loss, value.nan_to_num(0.)))
        return loss

    def update(self, step: int, wishes: Wishes) -> None:
        """Apply the gradients that the batches up to `step` left. Raises TrainingFailed, on all processes at once."""
        self._send(step, wishes)
        report, norm, skip = self._measure()
        self.exchange.begin(report)
        if self.late:
            self._settle(1)
        done = self.late or not self._read().skip
        if done:
            self._apply(norm, skip)
        self.state.scaler.update()
        self.state.optimizer.zero_grad(set_to_none=True)
        self._new_group()
        if done and not self.late:
            self._average(step)

    def _send(self, step: int, wishes: Wishes) -> None:
        """The host's numbers of this update to the device."""
        optimizer = self.state.optimizer
        numbers = [self.process.rank + 1, wishes.signal, wishes.save, step, lr_of(optimizer),
                   *(group["lr"] for group in optimizer.param_groups)]
        self.sent.copy_(torch.tensor(numbers, dtype=torch.float32, pin_memory=self.sent.is_cuda), non_blocking=True)

    @torch.no_grad()
    def _measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unscale the gradients and agree on what this update is: the numbers of its Report, the gradient's norm, and 1. where
        nothing may change by it."""
        self.state.scaler.unscale_(self.state.optimizer)
        norm = nn.utils.get_total_norm([p.grad.detach() for p in self.parameters if p.grad is not None]).float()
        where, signal, save = self.sent[:3]
        agreed = self.exchange.largest(torch.stack([self.trouble, where * (self.trouble > 0), signal, save, self.loss]))
        skip = ((agreed[0] > 0) | ~norm.isfinite()).float()
        return torch.cat([agreed, torch.stack([skip, norm]), self.sent[3:5]]), norm, skip

    def _apply(self, norm: Tensor, skip: Tensor) -> None:
        """Clip the gradients and make the optimizer's step; late: none where skip is 1."""
        optimizer = self.state.optimizer
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        if self.late:
            optimizer.found_inf = skip      # type: ignore[attr-defined]  # what fused optimizers look for
        with _reading(optimizer, self.sent[5:]) if self.late else nullcontext():
            optimizer.step()

    def _read(self) -> Report:
        report = Report(*self.exchange.read())
        self.signal, self.save = max(self.signal, int(report.signal)), self.save or bool(report.save)
        state = self.state
        if report.skip and (report.trouble or not state.scaler.is_enabled()):
            raise NonFinite(_non_finite(report, state.epoch, self.process), int(report.step))
        state.skipped = state.skipped + 1 if report.skip else 0
        if state.skipped > self.MAX_SKIPS:
            raise TrainingFailed(f"float16's loss scaling has skipped {state.skipped} updates in a row up to step "
                                 f"{report.step + 1:.0f} of epoch {state.epoch} (lr {report.lr:.3g}): the gradients overflow at "
                                 "any scale; the last checkpoint is untouched, use --amp-dtype bfloat16 or float32")
        return report

    def _average(self, step: int) -> None:
        """step: the last batch of the update whose weights these are."""
        ema = self.state.ema
        if ema is not None:     # without a warm-up timm's first update, told its number, would copy the weights
            ema.update(self.state.model, self.number_of(step) if ema.use_warmup else None)

    def _settle(self, behind: int) -> None:
        while len(self.exchange.begun) > behind:
            report = self._read()
            if not report.skip:
                self._average(int(report.step))

    def flush(self) -> None:
        """Wait for the last update: afterwards the state is whole. Raises TrainingFailed."""
        self._settle(0)


def replay_non_finite(error: NonFinite, state: TrainState, criterion: Criterion, kept: KeptBatches, process: Process,
                      amp_dtype: torch.dtype, seed: int, folder: str) -> str:
    """The batches once more, and a sentence on the layer; batch and weights go into `folder`."""
    file = Path(folder).expanduser() / f"nan_rank{process.rank}.pth"
    try:
        return replay(state.model, criterion, kept.of_update(error.step), lambda: autocast(process.device, amp_dtype),
                      state.scaler.get_scale(), (seed, state.epoch, process.rank), file)
    except (OSError, RuntimeError) as error:
        return f"--debug-nan: {file} could not be written or the batch not be replayed ({str(error).splitlines()[0]})"


@contextmanager
def _reading(optimizer: torch.optim.Optimizer, rates: Tensor) -> Iterator[None]:
    """While entered, the optimizer reads its groups' learning rates from `rates` on the device, and may be captured."""
    before: list[dict[str, Any]] = [{key: group[key] for key in ("lr", "capturable") if key in group}
                                    for group in optimizer.param_groups]
    for group, old, rate in zip(optimizer.param_groups, before, rates):
        group.update({**old, "capturable": True, "lr": rate} if "capturable" in old else {"lr": rate})
    try:
        yield
    finally:
        for group, old in zip(optimizer.param_groups, before):      # floats for the schedules, which write them anew
            group.update(old)


def can_read_late(state: TrainState, device: torch.device) -> bool:
    """Whether an update can be left undone on the device without the host's knowing: elsewhere each update is waited for,
    which on a CPU costs nothing."""
    fused = type(state.optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD) and \
        all(group.get("fused") for group in state.optimizer.param_groups)
    return device.type == "cuda" and fused and not (state.ema is not None and has_running_statistics(state.model))


def _non_finite(report: Report, epoch: int, process: Process) -> str:
    where = f" on process {report.process - 1:.0f}" if report.trouble and process.world_size > 1 else ""
    kind = {0: "gradient became infinite or nan", 1: "loss became infinite", 2: "loss became nan"}[int(report.trouble)]
    loss = "" if report.trouble else f"loss {report.loss:.4g}, "
    return (f"the {kind} at step {report.step + 1:.0f} of epoch {epoch}{where} ({loss}lr {report.lr:.3g}, gradient norm "
            f"{report.norm:.3g}): that update was not made and the checkpoints are untouched; lower --lr, set --clip-grad 1, or "
            "use --amp-dtype float32, and --debug-nan names the layer")


# ---------------------------------------------------------------- training
def train_one_epoch(net: nn.Module, state: TrainState, criterion: Criterion, loader: DataLoader, process: Process, *,
                    epochs: int, seed: int = 0, amp_dtype: torch.dtype = torch.float32, accumulate: int = 1,
                    clip_grad: float | None = None, mixup: Callable | None = None, train_mode: bool = True,
                    print_freq: int = 10, ideal_rate: float | None = None,
                    after_step: Callable[[], None] | None = None, wishes: Callable[[], Wishes] = Wishes,
                    save: Callable[[], None] | None = None, save_every: int = 0,
                    keep_batches: KeptBatches | None = None, updater: Updater | None = None) -> dict[str, float]:
    """One pass over `loader`, or the rest of it from state.step on; returns {"loss", "lr", "seconds", "img_per_s"} of all
    processes together, and "mfu" with `ideal_rate`.

    Args:
        net: state.model, wrapped for several processes where there are some.
        criterion: called as criterion(images, outputs, targets); its `copies` says how often the model sees a batch.
        accumulate: batches whose gradients are averaged before an update.
        mixup: timm's Mixup, or None. train_mode: False trains in evaluation mode (no dropout, no drop path).
        print_freq: batches between log lines; the device is waited for only there.
        ideal_rate: images/s of all devices at their nominal peak, for the model FLOPs utilisation (MFU).
        after_step: called after each batch. wishes: asked before each update.
        save: called within the epoch where a checkpoint is wished for, and after every `save_every` batches: `state` is
            then what a resume needs, on all processes.
        keep_batches: takes what the last updates were made from, for a replay.
        updater: of these very objects, for all epochs; None: a new `Updater`.
    Raises: StopRequested where a signal was wished for; TrainingFailed where loss, gradient or weights are not finite.
        Both on all processes at once, `state` whole.
    """
    net.train(train_mode)
    device, epoch, first = process.device, state.epoch, state.step
    steps = first + steps_left(loader, state.position, process)
    updates_per_epoch = math.ceil(len(loader) / accumulate)
    loss_sum = torch.tensor(state.losses[process.rank] if state.losses else 0., device=device)
    updater = updater or Updater(net, state, criterion, process, amp_dtype=amp_dtype, clip_grad=clip_grad)
    updater.begin()
    updater.number_of = lambda step: epoch * updates_per_epoch + step // accumulate + 1
    saved, images_seen, start, before = first, 0, time.perf_counter(), state.seconds
    mean = None

    def whole() -> None:
        updater.flush()
        if not _all_finite(state.model):
            raise TrainingFailed(f"the weights are not finite after step {state.step} of epoch {epoch} (lr "
                                 f"{lr_of(state.optimizer):.3g}): they are not saved, the last checkpoint is untouched; lower "
                                 "--lr")
        state.losses, state.seconds = _of_all(loss_sum, process), before + time.perf_counter() - start

    title = f"epoch {epoch}"
    for step, (images, targets) in zip(range(first, steps), progress(batches(loader), steps - first, title, process)):
        where = f"step {step + 1} of epoch {epoch}"
        peers.mark(f"the forward pass of {where}")
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        state.position += len(images) * process.world_size
        seed_everything(seed, epoch, step, process.rank)
        if mixup is not None:
            images, targets = mixup(images, targets)
        update = (step + 1) % accumulate == 0 or step + 1 == steps
        group = min(steps, step // accumulate * accumulate + accumulate) - max(first, step // accumulate * accumulate)
        if keep_batches is not None:
            keep_batches.note(step, images, targets)
        with nullcontext() if update else getattr(net, "no_sync", nullcontext)():
            loss_sum += updater.add_gradients(images, targets, group, where)
        images_seen += len(images)
        if update:
            peers.mark(f"the update of {where}")
            updater.update(step, wishes())
            state.scheduler.step_update(updater.number_of(step))
            state.step = step + 1
            due = bool(save_every) and state.step // save_every > saved // save_every
            if updater.signal or updater.save or (due and step + 1 < steps):
                whole()
                if updater.signal:
                    raise StopRequested(updater.signal)
                saved, updater.save = state.step, False
                if save is not None:
                    save()
        if (step + 1) % print_freq == 0 or step + 1 == steps:
            mean = _mean_loss(loss_sum / (step + 1), process)
            rate = images_seen * process.world_size / (time.perf_counter() - start)
            used = f"  {100 * criterion.copies * rate / ideal_rate:.1f}% MFU" if ideal_rate else ""
            left = (steps - step - 1 + len(loader) * (epochs - epoch - 1)) * (time.perf_counter() - start) / (step + 1 - first)
            tqdm_safe_print(f"epoch {epoch}/{epochs}  step {step + 1}/{steps}  {100 * (step + 1) / steps:.0f}%  loss "
                            f"{mean:.4f}  lr {lr_of(state.optimizer):.3g}  {rate:.0f} img/s{used}  eta "
                            f"{timedelta(seconds=round(left))}", process)
        if after_step is not None:
            after_step()
    whole()
    if updater.signal:
        raise StopRequested(updater.signal)
    if mean is None:        # resumed at its very end
        mean = _mean_loss(loss_sum / max(1, first), process)
    seconds = time.perf_counter() - start
    rate = images_seen * process.world_size / seconds
    return {"loss": mean, "lr": lr_of(state.optimizer), "seconds": before + seconds, "img_per_s": rate,
            **({"mfu": criterion.copies * rate / ideal_rate} if ideal_rate else {})}


def steps_left(loader: DataLoader, position: int, process: Process) -> int:
    """Batches of each process from a position of the epoch's order on."""
    if not position:
        return len(loader)
    sampler: Any = loader.sampler
    return max(0, len(sampler) * process.world_size - position) // process.world_size // (loader.batch_size or 1)


def _all_finite(model: nn.Module) -> bool:
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())


def _of_all(number: Tensor, process: Process) -> list[float]:
    """A scalar of each process, on all of them."""
    numbers = [number]
    if process.world_size > 1:
        numbers = [torch.empty_like(number) for _ in range(process.world_size)]
        dist.all_gather(numbers, number)
    return [value.item() for value in numbers]


def _mean_loss(mean: Tensor, process: Process) -> float:
    """The mean over processes."""
    if process.world_size > 1:
        dist.all_reduce(mean)
        mean = mean / process.world_size
    return mean.item()


def lr_of(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the group with the largest: with --layer-decay that is the head's. Without --kan-lr-mult."""
    return max(group["lr"] for group in optimizer.param_groups if "kan_multiple" not in group)


def progress(batches: Iterator, steps: int, title: str, process: Process) -> Iterator:
    """`batches` behind a progress bar, which is drawn on a terminal only."""
    return tqdm(batches, title, steps, leave=False, disable=not (process.is_main and sys.stderr.isatty()))


def tqdm_safe_print(text: str, process: Process) -> None:
    if process.is_main:
        with readers_may_leave():
            tqdm.write(text)
            sys.stdout.flush()


# ---------------------------------------------------------------- evaluation
@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, process: Process, *, amp_dtype: torch.dtype = torch.float32,
             shared: bool = False, title: str = "test", wishes: Callable[[], Wishes] = Wishes,
             see: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None) -> dict[str, float]:
    """{"loss", "acc1", "acc5", "images", "unreadable"}: mean cross-entropy, percents, counts.

    Every readable image counts once: unreadable ones come with target -1 and are left out. With `shared` each
    process has a part of the images and the sums are added up.

    see: called for each batch with its images and outputs, the targets, all of the B' that are readable, and bool [B] which
        of the loader's these are.
    Raises StopRequested, on all processes at once, where a signal was wished for."""
    model.eval()
    device = process.device
    evaluator = ClassificationEvaluator(device)
    unreadable = 0
    exchange = Exchange(process)
    rounds = len(loader)
    if process.world_size > 1:
        rounds = int(exchange.largest(torch.tensor(rounds, device=device)).item())

    def agree() -> None:
        asked = torch.tensor([float(wishes().signal)], device=device)
        exchange.begin(exchange.largest(asked))
        if len(exchange.begun) > (device.type == "cuda"):
            signal, = exchange.read()
            if signal:
                raise StopRequested(int(signal))

    for images, targets in progress(batches(loader), len(loader), title, process):
        readable = targets >= 0
        if not readable.all():
            unreadable += int((~readable).sum())
            images, targets = images[readable], targets[readable]
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            outputs = model(images) if len(images) else images.new_zeros(0, 1)
        evaluator.update(outputs, targets)
        if see is not None:
            see(images, outputs, targets, readable)
        peers.mark(f"a batch of the evaluation ({title})")
        agree()
    for _ in range(rounds - len(loader)):       # other processes have a batch more
        agree()
    counts = torch.tensor([evaluator.num_samples, unreadable], device=device)
    distributed = shared and process.world_size > 1
    if distributed:
        dist.all_reduce(counts)
    images, unreadable = counts.tolist()
    if not images:
        raise UserError(f"none of the {unreadable} images of the evaluation could be read: check the data folder")
    result = evaluator.compute(distributed=distributed)
    return {"loss": result["loss"], "acc1": result["top1"], "acc5": result["top5"],
            "images": images, "unreadable": unreadable}


def result_of(found: dict[str, float], args: Namespace) -> dict[str, Any]:
    """What a checkpoint keeps of an evaluation: {"acc1", "acc5", "images"} of `evaluate`, "data_set" and "split"."""
    return {**{key: found[key] for key in ("acc1", "acc5", "images")}, **evaluated(args)}


def ema_model(state: TrainState, device: torch.device) -> nn.Module:
    """The averaged model where it can be evaluated: itself, or a copy on `device` if it is kept elsewhere."""
    assert state.ema is not None
    module = state.ema.module
    if next(module.parameters()).device == device:
        return module
    return deepcopy(module).to(device)


def summary(name: str, result: dict[str, float]) -> str:
    """`model: top-1 71.30 top-5 90.05 (50000 images)`"""
    return f"{name}: top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} ({result['images']} images)"
