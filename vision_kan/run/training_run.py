"""A training as a run: signals, checkpoints, logs and status."""
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor

import models_kan
from models_kan import ModelSpec
from vision_kan.common import console
from vision_kan.common.errors import EXIT_PREEMPTED, Preempted, UserError
from vision_kan.common.interruption import UNREAD, Interruption, name_of
from vision_kan.common.process import Process, gather_number, peak_memory_mib
from vision_kan.common.text import say, warn
from vision_kan.config.recipes import dump_yaml
from vision_kan.data.loaders import Loaders
from vision_kan.models.cost import count_flops, count_parameters
from vision_kan.run.folder import RunFolder
from vision_kan.run.starting import Start
from vision_kan.training.debug_nan import KeptBatches, replay_non_finite
from vision_kan.training.optim import scaled_lr
from vision_kan.training.speed import StepProfiler, ideal_rate
from vision_kan.training.state import TrainState, results_of
from vision_kan.training.training import Epoch, Hooks, Training
from vision_kan.training.updates import NonFinite, Requests, StopRequested, Updater


class TrainingRun(Hooks):
    """A run's hooks between the steps, and its work after the epochs of a training.

    description: the entries of each checkpoint besides the state (`build.description`).
    """

    def __init__(self, args: Namespace, training: Training, loaders: Loaders, folder: RunFolder, description: dict[str, Any]):
        self.args, self.training, self.loaders, self.folder, self.description = args, training, loaders, folder, description
        self.process = training.process
        self.profiler = None
        if args.profile and self.process.is_main:
            self.profiler = StepProfiler(args.output_dir, len(loaders.train), self.process.device)
        self.kept = KeptBatches(args.grad_accum) if args.debug_nan else None
        self.best_before = 0.0, 0.0         # best top-1, raw and average, of the epochs before the last one
        self.interruption = Interruption(lambda: folder.interrupted(training.state), self.process.is_main)

    # ---- the whole run
    @contextmanager
    def running(self, argv: list[str]) -> Iterator[None]:
        """The context of the training: it handles signals and keeps status.json up to date.

        argv: the command line, for run.yaml.
        Raises Preempted if a signal stops the training, once everything is saved; UserError if the last files could not be
        written."""
        state, folder = self.training.state, self.folder
        with self.interruption, folder.reporting_status(state):
            folder.start(dump_yaml(self.args), argv, state.epoch, state.step)
            try:
                yield
            except StopRequested as stop:
                self.save()
                code = console.EXIT_UNREAD if stop.signal == UNREAD else EXIT_PREEMPTED
                raise Preempted(folder.stopped_by(name_of(stop.signal), state), code) from None
            except NonFinite as error:
                if self.kept is not None:
                    found = replay_non_finite(error, self.training, self.kept, self.args.output_dir)
                    with console.readers_may_leave():
                        print(found, file=sys.stderr, flush=True)       # every process reports its own batch
                raise
            folder.close()
            average = f", model_ema {state.max_accuracy_ema:.2f}" if state.ema else ""
            say(f"best top-1: model {state.max_accuracy:.2f}{average}")
            if folder.failed:
                raise UserError(f"{folder.failed}: " + (
                    f"add these lines to it:\n{folder.unwritten.rstrip()}" if folder.unwritten else
                    "the files there are from before; free some space and start again with --resume auto"))

    # ---- between steps
    def requests(self) -> Requests:
        self.loaders.check_unreadable()
        return Requests(self.interruption.signal, self.folder.wants_saving())

    def on_batch(self, step: int, images: Tensor, targets: Tensor) -> None:
        if self.kept is not None:
            self.kept.note(step, images, targets)

    def after_step(self) -> None:
        if self.profiler is not None:
            self.profiler()

    def after_evaluation(self) -> None:
        self.loaders.check_unreadable(gather=True)

    def save(self, also: tuple[str, ...] = ()) -> None:
        """Write a checkpoint, also under the names `also`. A collective: all processes call it at the same time."""
        state = self.training.state
        unreadable = self.loaders.gather_unreadable_state()
        self.folder.save({**state.state_dict(), **self.description, "unreadable": unreadable}, also)
        if also and self.folder.failed:
            state.max_accuracy, state.max_accuracy_ema = self.best_before
            warn(f"this epoch is not kept as {' and '.join(also)}: the next one that is better than those before it will be")
        self.folder.status("running", state.epoch, state.step)

    # ---- after an epoch
    def log(self, epoch: Epoch) -> None:
        """Write a line of log.txt, and the same numbers to TensorBoard and the trackers."""
        args, trained, memory = self.args, epoch.trained, peak_memory_mib(self.training.updater.process.device)
        self.folder.log({
            "epoch": epoch.number, "train_loss": trained["loss"], "train_lr": trained["lr"],
            **{f"{name}_{key}": value for name, result in epoch.results.items() for key, value in result.items()},
            "train_unreadable": self.loaders.gather_unreadable_train(),
            "n_parameters": sum(parameter.numel() for parameter in self.training.updater.parameters),
            **({"epochs_without_best": self.training.state.epochs_without_best} if args.patience else {}),
            **({} if memory is None else {"memory_mib": memory}),
            "epoch_seconds": trained["seconds"], **{key: trained[key] for key in ("img_per_s", "mfu") if key in trained}})

    def record_results(self, epoch: Epoch) -> tuple[str, ...]:
        """Record the results in the state. Returns the further names under which the epoch's checkpoint is kept."""
        state = self.training.state
        state.results = results_of(epoch.results, self.args)
        self.best_before = state.max_accuracy, state.max_accuracy_ema
        return state.update_best(epoch.results)

    def ends_early(self) -> bool:
        """Whether --patience ends the run before its last epoch; if so, prints it."""
        state = self.training.state
        if state.epoch >= self.args.epochs or not state.patience_exhausted(self.args.patience, self.process):
            return False
        self.folder.ended_by = stopped_early(state)
        say(f"the run ends early: {self.folder.ended_by}")
        return True


# ---------------------------------------------------------------- before the run
def open_folder(args: Namespace, start: Start, process: Process) -> RunFolder:
    """Open --output_dir. Raises UserError if it cannot be written to, or holds another run than the resumed one."""
    folder = RunFolder(args.output_dir, process, args.keep, args.save_interval_minutes, args.track or (), args.track_project)
    if folder.holds_another_run(start.checkpoint.path if start.purpose == "resume" else ""):
        raise UserError(f"--output_dir {args.output_dir} holds a run already: continue it with --resume auto, or choose another "
                        "folder")
    return folder


def resume(state: TrainState, args: Namespace, start: Start, loaders: Loaders, process: Process) -> None:
    """Load the checkpoint that the run continues, if any, and free its memory. A collective.

    Raises UserError if it does not fit, or if the processes would begin at different places."""
    if start.purpose == "resume":
        state.load_state_dict(start.checkpoint.state)
        loaders.load_unreadable_state(start.checkpoint.state.get("unreadable") or [])
        start.checkpoint.free()
        step = f", step {state.step}" if state.step else ""
        say(f"resumed from {start.checkpoint.path}: epoch {state.epoch}{step}, best top-1 {state.max_accuracy:.2f}")
    for count, what in ((state.epoch, "epoch"), (state.step, "step")):
        counts = gather_number(torch.tensor(float(count), device=process.device), process)
        if other := next((rank for rank, its in enumerate(counts) if its != counts[0]), 0):
            remedy = f"--output_dir {args.output_dir} must be a folder that all machines share" if args.resume == "auto" else \
                f"--resume {args.resume} must be the same file on all machines"
            raise UserError(f"process 0 begins at {what} {counts[0]:.0f}, process {other} at {counts[other]:.0f}: {remedy}")


def has_ended(args: Namespace, state: TrainState, folder: RunFolder, process: Process) -> bool:
    """Whether a run has nothing left to do; if so, prints why."""
    if state.epoch >= args.epochs:
        say(f"the run has finished its {args.epochs} epochs: nothing left to do (raise --epochs to train on)")
        folder.finished(state.epoch)
    elif state.patience_exhausted(args.patience, process):
        say(f"the run has ended early, {stopped_early(state)}: nothing left to do (raise --patience to train on)")
        folder.finished(state.epoch, stopped_early(state))
    else:
        return False
    return True


def stopped_early(state: TrainState) -> str:
    return f"no new best top-1 in {state.epochs_without_best} epochs (--patience)"


def build_training(args: Namespace, spec: ModelSpec, updater: Updater, mixup: Mixup | None, loaders: Loaders) -> Training:
    """The training that the flags describe; prints its model, data and learning rate."""
    model, process, lr = updater.state.model, updater.process, scaled_lr(args, updater.process.world_size)
    flops = count_flops(model) if models_kan.split_name(spec.name)[0] else None
    trained = sum(parameter.numel() for parameter in updater.parameters)
    cost = f", {flops.matmul / 1e6:,.1f} M matmul and {flops.elementwise / 1e6:,.2f} M elementwise FLOPs" if flops else ""
    images = args.batch_size * process.world_size * args.grad_accum
    say(f"{spec.name}: {count_parameters(model):,} parameters, {trained:,} trained{cost}; {loaders.data_set}, "
        f"{loaders.nb_classes} classes; lr {lr:.3g} for {images} images an update")
    return Training(updater, mixup, epochs=args.epochs, seed=args.seed, accumulate=args.grad_accum, train_mode=args.train_mode,
                    print_freq=args.print_freq, save_every=args.save_interval_steps, shared_evaluation=args.dist_eval,
                    ideal_rate=ideal_rate(flops and flops.matmul, process, updater.amp_dtype))
