"""One epoch of training, one evaluation, and the state that a run resumes from."""
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import plain
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
@dataclass
class TrainState:
    """Everything that changes while training. `model` is the plain one, without DistributedDataParallel."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0                  # the next one
    max_accuracy: float = 0.0       # best top-1 in percent, raw model
    max_accuracy_ema: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """DeiT's keys and ours; `epoch` is the last finished one as in DeiT's files."""
        return {"model": dict(self.model.state_dict()), "optimizer": plain(self.optimizer.state_dict()),
                "lr_scheduler": plain(_state_of(self.scheduler)), "scaler": plain(self.scaler.state_dict()),
                "model_ema": dict(self.ema.module.state_dict()) if self.ema else None,
                "epoch": self.epoch - 1, "max_accuracy": self.max_accuracy, "max_accuracy_ema": self.max_accuracy_ema}

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
        return tuple(also)

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError if the optimizer's state is of another model or optimizer."""
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (KeyError, ValueError) as error:
            raise UserError(f"the checkpoint's optimizer state does not fit ({error}): resume with the flags it was "
                            "trained with, or start a new run from its weights with --finetune") from error
        self.model.load_state_dict(checkpoint["model"])
        if self.ema:
            # a run that begins to average only now averages from its present weights on
            self.ema.module.load_state_dict(checkpoint.get("model_ema") or checkpoint["model"])
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint.get("epoch", self.epoch - 1) + 1
        self.max_accuracy = checkpoint.get("max_accuracy", 0.0)
        self.max_accuracy_ema = checkpoint.get("max_accuracy_ema", 0.0)
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


# ---------------------------------------------------------------- training
def train_one_epoch(net: nn.Module, state: TrainState, criterion: nn.Module, loader: DataLoader, process: Process, *,
                    epochs: int, seed: int = 0, amp_dtype: torch.dtype = torch.float32, accumulate: int = 1,
                    clip_grad: float | None = None, mixup: Callable | None = None, train_mode: bool = True,
                    print_freq: int = 10, ideal_rate: float | None = None,
                    after_step: Callable[[], None] | None = None) -> dict[str, float]:
    """One pass over `loader`; returns {"loss", "lr", "seconds", "img_per_s"} of all processes together, and "mfu"
    with `ideal_rate`.

    Args:
        net: state.model, wrapped for several processes where there are some.
        criterion: called as criterion(images, outputs, targets); its `copies` says how often the model sees a batch.
        accumulate: batches whose gradients are averaged before an update.
        mixup: timm's Mixup, or None. train_mode: False trains in evaluation mode (no dropout, no drop path).
        print_freq: batches between log lines; the device is waited for only there.
        ideal_rate: images/s of all devices at their nominal peak, for the model FLOPs utilisation (MFU).
        after_step: called after each batch.
    Raises: TrainingFailed when the loss is not finite, on all processes at once.
    """
    net.train(train_mode)
    device, epoch, steps = process.device, state.epoch, len(loader)
    updates_per_epoch = math.ceil(steps / accumulate)
    second_order = getattr(state.optimizer, "is_second_order", False)
    loss_sum = torch.zeros((), device=device)
    images_seen, start = 0, time.perf_counter()
    batches = iter(loader)
    for step, (images, targets) in enumerate(progress(batches, steps, f"epoch {epoch}", process)):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        seed_everything(seed, epoch, step, process.rank)
        if mixup is not None:
            images, targets = mixup(images, targets)
        update = (step + 1) % accumulate == 0 or step + 1 == steps
        group = min(accumulate, steps - step // accumulate * accumulate)    # the last group may be smaller
        with nullcontext() if update or not hasattr(net, "no_sync") else net.no_sync():
            with autocast(device, amp_dtype):
                outputs = net(images if criterion.copies == 1 else torch.cat([images] * criterion.copies))
                loss = criterion(images, _float(outputs), targets)
            state.scaler.scale(loss / group).backward(create_graph=second_order)
        loss_sum += loss.detach()
        images_seen += len(images)
        if update:
            _update(state, clip_grad)
            state.scheduler.step_update(epoch * updates_per_epoch + step // accumulate + 1)
        if (step + 1) % print_freq == 0 or step + 1 == steps:
            mean = loss_sum / (step + 1)
            if step + 1 == steps:       # the last update's weights are in no loss of this epoch
                mean = torch.where(_all_finite(state.model), mean, torch.nan)
            mean = _mean_loss(mean, process, state, step)
            rate = images_seen * process.world_size / (time.perf_counter() - start)
            used = f"  {100 * criterion.copies * rate / ideal_rate:.1f}% MFU" if ideal_rate else ""
            left = (steps * (epochs - epoch) - step - 1) * (time.perf_counter() - start) / (step + 1)
            tqdm_safe_print(f"epoch {epoch}/{epochs}  step {step + 1}/{steps}  {100 * (step + 1) / steps:.0f}%  loss "
                            f"{mean:.4f}  lr {lr_of(state.optimizer):.3g}  {rate:.0f} img/s{used}  eta "
                            f"{timedelta(seconds=round(left))}", process)
        if after_step is not None:
            after_step()
    seconds = time.perf_counter() - start
    rate = images_seen * process.world_size / seconds
    return {"loss": mean, "lr": lr_of(state.optimizer), "seconds": seconds, "img_per_s": rate,
            **({"mfu": criterion.copies * rate / ideal_rate} if ideal_rate else {})}


def _float(outputs):
    """Logits in float32 for the loss: one tensor, or the class and distillation tokens' pair."""
    return outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)


def _update(state: TrainState, clip_grad: float | None) -> None:
    state.scaler.unscale_(state.optimizer)
    if clip_grad is not None:
        dispatch_clip_grad(state.model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.model)


def _all_finite(model: nn.Module) -> Tensor:
    return torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()


def _mean_loss(mean: Tensor, process: Process, state: TrainState, step: int) -> float:
    """The loss so far, averaged over processes; all of them see the same number and stop together."""
    if process.world_size > 1:
        dist.all_reduce(mean)
        mean = mean / process.world_size
    value = mean.item()
    if not math.isfinite(value):
        raise TrainingFailed(f"the loss became {value} by step {step + 1} of epoch {state.epoch} (lr "
                             f"{lr_of(state.optimizer):.3g}): the checkpoints of earlier epochs are untouched; lower "
                             "--lr, set --clip-grad 1, or use --amp-dtype float32")
    return value


def lr_of(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the group with the largest: with --layer-decay that is the head's. Without --kan-lr-mult."""
    return max(group["lr"] for group in optimizer.param_groups if "kan_multiple" not in group)


def progress(batches: Iterator, steps: int, title: str, process: Process) -> Iterator:
    """`batches` behind a progress bar, which is drawn on a terminal only."""
    return tqdm(batches, title, steps, leave=False, disable=not (process.is_main and sys.stderr.isatty()))


def tqdm_safe_print(text: str, process: Process) -> None:
    if process.is_main:
        tqdm.write(text)
        sys.stdout.flush()


# ---------------------------------------------------------------- evaluation
@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, process: Process, *, amp_dtype: torch.dtype = torch.float32,
             shared: bool = False, title: str = "test") -> dict[str, float]:
    """{"loss", "acc1", "acc5", "images", "unreadable"}: mean cross-entropy, percents, counts.

    Every readable image counts once: unreadable ones come with target -1 and are left out. With `shared` each
    process has a part of the images and the sums are added up."""
    model.eval()
    device = process.device
    evaluator = ClassificationEvaluator(device)
    unreadable = 0
    for images, targets in progress(iter(loader), len(loader), title, process):
        readable = targets >= 0
        if not readable.all():
            unreadable += int((~readable).sum())
            images, targets = images[readable], targets[readable]
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            outputs = model(images) if len(images) else images.new_zeros(0, 1)
        evaluator.update(outputs, targets)
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


def ema_model(state: TrainState, device: torch.device) -> nn.Module:
    """The averaged model where it can be evaluated: itself, or a copy on `device` if it is kept elsewhere."""
    module = state.ema.module
    if next(module.parameters()).device == device:
        return module
    return deepcopy(module).to(device)


def summary(name: str, result: dict[str, float]) -> str:
    """`model: top-1 71.30 top-5 90.05 (50000 images)`"""
    return f"{name}: top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} ({result['images']} images)"
