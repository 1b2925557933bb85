"""One epoch of training, one evaluation, and the state that a run resumes from."""
import math
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils import progress, tqdm_safe_print
from vision_kan.common import peers
from vision_kan.common.errors import TrainingFailed, UserError
from vision_kan.common.process import Process, gather_number, mean_over_processes
from vision_kan.common.seeds import seed_everything
from vision_kan.data.names import evaluated
from vision_kan.data.workers import batches
from vision_kan.training.criterion import Criterion
from vision_kan.training.debug_nan import KeptBatches
from vision_kan.training.precision import autocast
from vision_kan.training.state import TrainState, lr_of
from vision_kan.training.updates import Exchange, StopRequested, Updater, Wishes


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
        state.losses, state.seconds = gather_number(loss_sum, process), before + time.perf_counter() - start

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
            mean = mean_over_processes(loss_sum / (step + 1), process)
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
        mean = mean_over_processes(loss_sum / max(1, first), process)
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
