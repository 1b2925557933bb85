"""The state of a training: everything that changes, and that a run resumes from."""
from argparse import Namespace
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vision_kan.checkpoints.read import BEST
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process, gather_number
from vision_kan.common.text import to_builtin_types
from vision_kan.data.names import evaluated_split

PROGRESS = ("step", "position", "losses", "seconds", "skipped")     # fields of TrainState that say how far the epoch is


@dataclass
class TrainState:
    """Everything that changes while training. `model` is not wrapped by DistributedDataParallel."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0                  # the next one, or the one under way
    step: int = 0                   # batches of the epoch that are done
    position: int = 0               # in the epoch's order over all processes (see RASampler)
    losses: list[float] = field(default_factory=list)   # sum of the epoch's losses so far, one per process
    seconds: float = 0.0            # duration of the epoch so far
    skipped: int = 0                # consecutive updates that float16's loss scaling has skipped
    max_accuracy: float = 0.0       # best top-1 in percent, raw model
    max_accuracy_ema: float = 0.0
    epochs_without_best: int = 0    # consecutive epochs in which neither of the two has risen
    results: dict[str, dict[str, Any]] = field(default_factory=dict)    # key of the last epoch's weights -> `result_of`

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's content: DeiT's keys and ours. `epoch` is the last finished one, as in DeiT's files."""
        return {"model": dict(self.model.state_dict()), "optimizer": to_builtin_types(self.optimizer.state_dict()),
                "lr_scheduler": to_builtin_types(_state_of(self.scheduler)), "scaler": to_builtin_types(self.scaler.state_dict()),
                "model_ema": dict(self.ema.module.state_dict()) if self.ema else None,
                "epoch": self.epoch - 1, "max_accuracy": self.max_accuracy, "max_accuracy_ema": self.max_accuracy_ema,
                "epochs_without_best": self.epochs_without_best,
                "results": {} if self.position else self.results,       # within an epoch the weights have changed since
                **{key: getattr(self, key) for key in PROGRESS}}

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step, self.position, self.losses, self.seconds = 0, 0, [], 0.0

    def fit_launch(self, batch_size: int, process: Process) -> str:
        """Let the epoch go on at its position with another batch size or number of processes; returns a sentence on what
        cannot be exact then, or ''.

        batch_size: images of a batch of one process."""
        images = batch_size * process.world_size
        step = self.position // images
        if not self.position or (step == self.step and step * images == self.position and len(self.losses) == process.world_size):
            return ""
        mean = sum(self.losses) / max(1, len(self.losses)) / max(1, self.step)
        self.step, self.losses = step, [mean * step] * process.world_size
        return (f"the epoch continues at image {self.position} with different batches (--batch-size or the number of processes "
                "has changed): the order of the images and their augmentation stay; mixup, dropout and the updates differ from "
                "those of an uninterrupted run")

    def update_best(self, results: dict[str, dict[str, float]]) -> tuple[str, ...]:
        """Update the best accuracies. Returns the further names under which this epoch's checkpoint is kept.

        results: from `evaluate`, under "test" for the raw model and "ema_test" for the average."""
        names = []
        if results["test"]["acc1"] > self.max_accuracy:
            self.max_accuracy = results["test"]["acc1"]
            names.append(BEST[0])
        if "ema_test" in results and results["ema_test"]["acc1"] > self.max_accuracy_ema:
            self.max_accuracy_ema = results["ema_test"]["acc1"]
            names.append(BEST[1])
        self.epochs_without_best = 0 if names else self.epochs_without_best + 1
        return tuple(names)

    def patience_exhausted(self, patience: int, process: Process) -> bool:
        """--patience: whether `patience` epochs have passed without a new best; 0: never. All processes use the count of
        process 0, so that they agree."""
        if not patience:
            return False
        return gather_number(torch.tensor(float(self.epochs_without_best), device=process.device), process)[0] >= patience

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError if the optimizer's state is of another model or optimizer."""
        try:
            stored = checkpoint["optimizer"]
            groups = [{**theirs, **{key: value for key, value in own.items() if isinstance(value, torch.dtype)}}
                      for own, theirs in zip(self.optimizer.param_groups, stored["param_groups"], strict=True)]     # kept as text
            stored = {**stored, "param_groups": groups}
            if "rng_state" in stored:       # Kron's; Python accepts it as tuples only
                stored["rng_state"] = tuple(tuple(part) if isinstance(part, list) else part for part in stored["rng_state"])
            self.optimizer.load_state_dict(stored)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's optimizer state does not fit ({error}): resume with the flags it was "
                            "trained with, or start a new run from its weights with --finetune") from error
        self.model.load_state_dict(checkpoint["model"])
        if self.ema:
            # a run that begins to average at this resume starts from the current weights
            self.ema.module.load_state_dict(checkpoint.get("model_ema") or checkpoint["model"])
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint.get("epoch", self.epoch - 1) + 1
        for key in PROGRESS:        # DeiT's files and those of earlier versions lack them: they are from the end of an epoch
            setattr(self, key, checkpoint.get(key, getattr(self, key)))
        self.max_accuracy = checkpoint.get("max_accuracy", 0.0)
        self.max_accuracy_ema = checkpoint.get("max_accuracy_ema", 0.0)
        self.epochs_without_best = checkpoint.get("epochs_without_best", 0)
        self.results = checkpoint.get("results", {})
        if isinstance(self.scheduler, PlateauLRScheduler):
            # The only schedule with a state. All others are functions of the epoch, so that --epochs and the batch size may
            # change.
            self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
            self.scheduler.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"]["plateau"])
            self.scheduler.restore_lr = checkpoint["lr_scheduler"]["restore_lr"]


def result_of(found: dict[str, float], args: Namespace) -> dict[str, Any]:
    """The results of an evaluation for a checkpoint: "acc1", "acc5" and "images" of `engine.evaluate`, "data_set" and "split"."""
    return {**{key: found[key] for key in ("acc1", "acc5", "images")}, **evaluated_split(args)}


def results_of(evaluations: dict[str, dict[str, float]], args: Namespace) -> dict[str, dict[str, Any]]:
    """`TrainState.results` of an epoch's evaluations, as `update_best` takes them."""
    return {key: result_of(evaluations[name], args)
            for key, name in (("model", "test"), ("model_ema", "ema_test")) if name in evaluations}


def _state_of(scheduler: Scheduler) -> dict[str, Any]:
    if not isinstance(scheduler, PlateauLRScheduler):
        return scheduler.state_dict()
    # timm's state_dict lacks how long the schedule has waited, and the rate without noise
    return {**scheduler.state_dict(), "plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": scheduler.restore_lr}


def has_running_statistics(model: nn.Module) -> bool:
    """Whether the forward pass changes buffers (BatchNorm)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def distributed(model: nn.Module, process: Process) -> nn.Module:
    """`model` wrapped to average its gradients over the processes, if there are several."""
    if process.world_size == 1:
        return model
    # Grids are buffers, too. Broadcasting these constants before each forward pass would make the processes wait.
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"       # the older name
    options: dict[str, Any] = {name: has_running_statistics(model)}
    return DistributedDataParallel(model, [process.device] if process.device.type == "cuda" else None, **options)


class MovingAverage(ModelEmaV3):
    """timm's average, bit for bit, over lists of tensors that are made once: walking through a model's state takes longer than
    averaging.

    The tensors of the model and the average must stay the same objects, as they do with `load_state_dict` and optimizers."""

    def __init__(self, model: nn.Module, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        # infinity minus infinity is nan, so buffers with infinite limits are copied
        self.infinite = {name for name, value in self.module.named_buffers() if value.isinf().any()}
        self.model_id = 0       # of the model that `pairs` are of
        self.pairs: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if not self.foreach:        # the average is on another device
            super().apply_update_(model, decay)
            for name in self.infinite:
                self.module.get_buffer(name).copy_(model.get_buffer(name))
            return
        if self.model_id != id(model):
            self.model_id = id(model)
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


def lr_of(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate of the groups, without --kan-lr-mult; with --layer-decay it is the head's."""
    return max(group["lr"] for group in optimizer.param_groups if "kan_multiple" not in group)
