"""The training that engine.py's loop works on, and the hooks between its steps."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_kan.common.process import Process
from vision_kan.training.criterion import Criterion
from vision_kan.training.state import TrainState
from vision_kan.training.updates import Requests, Updater


@dataclass
class Training:
    """A model in training. The updater, kept for all epochs, holds the model, the state, the criterion and the precision."""
    updater: Updater
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None      # timm's
    epochs: int = 1                     # of the whole run
    seed: int = 0
    accumulate: int = 1                 # batches whose gradients are averaged before an update
    train_mode: bool = True             # False trains in evaluation mode: no dropout, no drop path
    print_freq: int = 10                # batches between log lines; only these wait for the device
    save_every: int = 0                 # batches between checkpoints within an epoch; 0: none
    shared_evaluation: bool = False     # each process evaluates a part of the validation images
    ideal_rate: float | None = None     # images/s of all devices at their nominal peak, for model FLOPs utilisation (MFU)

    @property
    def state(self) -> TrainState:
        return self.updater.state

    @property
    def criterion(self) -> Criterion:
        return self.updater.criterion

    @property
    def process(self) -> Process:
        return self.updater.process

    @property
    def amp_dtype(self) -> torch.dtype:
        return self.updater.amp_dtype

    def updates_done(self, steps: int, steps_per_epoch: int) -> int:
        """Updates of the run up to batch `steps` of the current epoch."""
        return self.state.epoch * math.ceil(steps_per_epoch / self.accumulate) + math.ceil(steps / self.accumulate)


class Hooks:
    """Called between the steps of a training; subclasses override what they need. Every process calls every hook at the same
    point."""

    def requests(self) -> Requests:
        """Called before each update and after each batch of an evaluation. Returns this process's requests."""
        return Requests()

    def on_batch(self, step: int, images: Tensor, targets: Tensor) -> None:
        """Called before each forward pass, with the batch that the model will get, on its device."""

    def after_step(self) -> None:
        """Called after each batch."""

    def save(self) -> None:
        """Called within an epoch when a checkpoint is due; `state` then has all that a resume needs."""

    def after_evaluation(self) -> None:
        """Called after an epoch is trained and evaluated, before `state` moves on to the next."""


@dataclass(frozen=True)
class Epoch:
    """The outcome of a trained and evaluated epoch."""
    number: int                             # from 0
    trained: dict[str, float]               # from `train_one_epoch`
    results: dict[str, dict[str, float]]    # from `evaluate`: "test" for the model, "ema_test" for its average
