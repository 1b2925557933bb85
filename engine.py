"""The training loop: epochs, one epoch, one evaluation."""
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils import progress, tqdm_safe_print
from vision_kan.common import peers
from vision_kan.common.errors import TrainingFailed, UserError
from vision_kan.common.process import Process, exact_float, gather_number, mean_over_processes
from vision_kan.common.seeds import seed_everything
from vision_kan.common.text import say
from vision_kan.data.workers import batches
from vision_kan.training.precision import autocast
from vision_kan.training.state import TrainState, lr_of
from vision_kan.training.training import Epoch, Hooks, Training
from vision_kan.training.updates import Exchange, Requests, StopRequested


# ---------------------------------------------------------------- training
def train_epochs(training: Training, train: DataLoader, val: DataLoader, hooks: Hooks) -> Iterator[Epoch]:
    """Train and evaluate epoch by epoch, from `training.state` on. Yields each once the state has moved on to the start of the
    next. Raises what `train_one_epoch` and `evaluate` raise."""
    state = training.state
    sampler: Any = train.sampler
    by_result = isinstance(state.scheduler, PlateauLRScheduler)     # all other schedules depend on the epoch only
    while state.epoch < training.epochs:
        number = state.epoch
        sampler.set_epoch(number, state.position)
        if not by_result:
            state.scheduler.step(number)
        state.scheduler.step_update(training.updates_done(state.step, len(train)))
        trained = train_one_epoch(training, train, hooks)
        results = evaluate_epoch(training, val, hooks)
        hooks.after_evaluation()
        state.next_epoch()
        if by_result:
            device = training.process.device
            accuracy = torch.tensor(results["test"]["acc1"], dtype=exact_float(device), device=device)
            state.scheduler.step(state.epoch, gather_number(accuracy, training.process)[0])     # the same on all processes
        yield Epoch(number, trained, results)


def train_one_epoch(training: Training, loader: DataLoader, hooks: Hooks) -> dict[str, float]:
    """One pass over `loader`, or the rest of it from state.step on.

    Returns {"loss", "lr", "seconds", "img_per_s"} over all processes, and "mfu" if the ideal rate is known.
    Raises StopRequested if any process asks to stop, and TrainingFailed if loss, gradient or weights are not finite: both on all
    processes at once, with a state from which a run can resume.
    """
    updater, state, process, criterion = training.updater, training.state, training.process, training.criterion
    net, accumulate = updater.net, training.accumulate
    net.train(training.train_mode)
    device, epoch, first, length = process.device, state.epoch, state.step, len(loader)
    steps = first + steps_left(loader, state.position, process)
    loss_sum = torch.tensor(state.losses[process.rank] if state.losses else 0., device=device)
    updater.begin(lambda step: training.updates_done(step + 1, length))    # keeps no loader, whose processes end with it
    start = time.perf_counter()
    began = start - state.seconds       # as if the epoch had not been interrupted
    saved, images_seen, mean = first, 0, None
    shown = progress(batches(loader), steps - first, f"epoch {epoch}", process)
    for step, (images, targets) in zip(range(first, steps), shown):
        where = f"step {step + 1} of epoch {epoch}"
        peers.progress(f"the forward pass of {where}")
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        state.position += len(images) * process.world_size
        seed_everything(training.seed, epoch, step, process.rank)
        if training.mixup is not None:
            images, targets = training.mixup(images, targets)
        hooks.on_batch(step, images, targets)
        group_start = step // accumulate * accumulate
        group = min(steps, group_start + accumulate) - max(first, group_start)
        update = (step + 1) % accumulate == 0 or step + 1 == steps
        with nullcontext() if update else getattr(net, "no_sync", nullcontext)():
            loss_sum += updater.add_gradients(images, targets, group, where)
        images_seen += len(images)
        if update:
            peers.progress(f"the update of {where}")
            updater.update(step, hooks.requests())
            state.scheduler.step_update(updater.number_of(step))
            state.step = step + 1
            every = training.save_every
            due = bool(every) and state.step // every > saved // every and state.step < steps
            if updater.signal or updater.save or due:
                complete_state(training, loss_sum, began)
                saved, updater.save = state.step, False
                hooks.save()
        if (step + 1) % training.print_freq == 0 or step + 1 == steps:
            mean = mean_over_processes(loss_sum / (step + 1), process)
            rate = images_seen * process.world_size / (time.perf_counter() - start)
            used = f"  {100 * criterion.copies * rate / training.ideal_rate:.1f}% MFU" if training.ideal_rate else ""
            steps_to_come = steps - step - 1 + length * (training.epochs - epoch - 1)
            left = timedelta(seconds=round(steps_to_come * (time.perf_counter() - start) / (step + 1 - first)))
            tqdm_safe_print(f"epoch {epoch}/{training.epochs}  step {step + 1}/{steps}  {100 * (step + 1) / steps:.0f}%  loss "
                            f"{mean:.4f}  lr {lr_of(state.optimizer):.3g}  {rate:.0f} img/s{used}  eta {left}", process)
        hooks.after_step()
    complete_state(training, loss_sum, began)
    if mean is None:        # resumed after the epoch's last step
        mean = mean_over_processes(loss_sum / max(1, first), process)
    end = time.perf_counter()
    rate = images_seen * process.world_size / (end - start)
    return {"loss": mean, "lr": lr_of(state.optimizer), "seconds": end - began, "img_per_s": rate,
            **({"mfu": criterion.copies * rate / training.ideal_rate} if training.ideal_rate else {})}


def complete_state(training: Training, loss_sum: Tensor, began: float) -> None:
    """Wait for the last update, so that the state has all that a resume needs, including the epoch's losses and duration.

    began: when the epoch began, by time.perf_counter().
    Raises TrainingFailed if the weights are not finite, and StopRequested if any process asks to stop."""
    updater, state = training.updater, training.state
    updater.flush()
    if not torch.stack([parameter.isfinite().all() for parameter in state.model.parameters()]).all():
        raise TrainingFailed(f"the weights are not finite after step {state.step} of epoch {state.epoch} (lr "
                             f"{lr_of(state.optimizer):.3g}): they are not saved, the last checkpoint is untouched; lower --lr")
    state.losses, state.seconds = gather_number(loss_sum, training.process), time.perf_counter() - began
    if updater.signal:
        raise StopRequested(updater.signal)


def steps_left(loader: DataLoader, position: int, process: Process) -> int:
    """Batches per process from a position of the epoch's order on."""
    if not position:
        return len(loader)
    sampler: Any = loader.sampler
    return max(0, len(sampler) * process.world_size - position) // process.world_size // (loader.batch_size or 1)


# ---------------------------------------------------------------- evaluation
@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, process: Process, *, amp_dtype: torch.dtype = torch.float32,
             shared: bool = False, title: str = "test", requests: Callable[[], Requests] = Requests,
             on_batch: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None) -> dict[str, float]:
    """Evaluate `model`. Returns {"loss", "acc1", "acc5", "images", "unreadable"}: mean cross-entropy, percents, counts.

    Every readable image counts once; unreadable ones come with target -1 and are left out.

    shared: each process evaluates a part of the images, and the results are those of all.
    requests: called after each batch; a signal in any process stops the evaluation on all of them.
    on_batch: called for each batch with the images, outputs and targets of the readable ones, and a mask, bool [B], that says
        which of the loader's batch these are.
    Raises StopRequested, on all processes at once; UserError if no image can be read."""
    model.eval()
    device = process.device
    evaluator = ClassificationEvaluator(device)
    unreadable = 0
    exchange = Exchange(process)
    rounds = len(loader)
    if process.world_size > 1:
        rounds = int(exchange.largest(torch.tensor(rounds, device=device)).item())

    def agree() -> None:
        asked = torch.tensor([float(requests().signal)], device=device)
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
        if on_batch is not None:
            on_batch(images, outputs, targets, readable)
        peers.progress(f"a batch of the evaluation ({title})")
        agree()
    for _ in range(rounds - len(loader)):       # other processes have one more batch
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


def evaluate_epoch(training: Training, loader: DataLoader, hooks: Hooks) -> dict[str, dict[str, float]]:
    """Evaluate the model ("test") and its moving average, if there is one ("ema_test"), and print a line for each."""
    state, process = training.state, training.process
    options: dict[str, Any] = {"amp_dtype": training.amp_dtype, "shared": training.shared_evaluation, "requests": hooks.requests}
    results = {"test": evaluate(state.model, loader, process, **options)}
    say(summary("model", results["test"]))
    if state.ema is not None:
        results["ema_test"] = evaluate(ema_model(state, process.device), loader, process, title="ema", **options)
        say(summary("model_ema", results["ema_test"]))
    return results


def ema_model(state: TrainState, device: torch.device) -> nn.Module:
    """The averaged model on `device`, a copy if it is kept elsewhere."""
    assert state.ema is not None
    module = state.ema.module
    if next(module.parameters()).device == device:
        return module
    return deepcopy(module).to(device)


def summary(name: str, result: dict[str, float]) -> str:
    """`model: top-1 71.30 top-5 90.05 (50000 images)`"""
    return f"{name}: top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} ({result['images']} images)"
