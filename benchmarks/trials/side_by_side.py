"""Many runs side by side in one process on one GPU: each on a stream of its own, its whole step a CUDA graph.

All runs of a seed with the same recipe of images get the same batches, which are drawn, augmented and mixed once. A run's numbers
do not depend on those beside it.
"""
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.trials.images import Batches, EvalBatches, Images
from benchmarks.trials.training import Trial, begin
from benchmarks.trials.variants import Run
from engine import complete_state, ema_model, evaluate
from vision_kan.common.errors import TrainingFailed, one_line
from vision_kan.common.process import Process
from vision_kan.common.seeds import seed_everything
from vision_kan.training.captured import CudaGraphs, Graph, Recorder
from vision_kan.training.updates import Requests, Updater

SAVE_SECONDS = 60       # between checkpoints: for small models an epoch takes little longer than writing them


class WholeStep(Updater):
    """An Updater whose step - gradients, clipping, optimizer, moving average - is one graph after the first `WARM_UP` steps,
    which compile kernels and create states. The host reads the outcome once an epoch (`flush`).

    recorder: makes the graph; None: no graph."""
    WARM_UP = 3

    def __init__(self, trial: Trial, recorder: Recorder | None):
        super().__init__(trial.model, trial.state, trial.criterion, trial.process, amp_dtype=trial.amp_dtype,
                         clip_grad=trial.args.clip_grad, late=True)
        self.recorder, self.steps = recorder, 0
        self.graph: Graph | None = None
        self.loss_sum = torch.zeros((), device=trial.process.device)
        self.report = torch.zeros(9, device=trial.process.device)       # of the last step, or the first that was skipped

    def begin_epoch(self) -> None:
        self.begin()
        self.net.train()
        self.loss_sum.zero_()
        self.report.zero_()

    def step(self, step: int, images: Tensor, targets: Tensor) -> None:
        """images float32 [B, 3, H, W], targets [B] or [B, K], always of the same shape."""
        self._send(step, Requests())
        self.steps += 1
        if self.graph is None and self.recorder is not None and self.steps > self.WARM_UP:
            self._record(images, targets)
        if self.graph is None:
            self._whole(images, targets)
            self.state.optimizer.zero_grad(set_to_none=True)
        else:
            self.images.copy_(images)
            self.targets.copy_(targets)
            self.graph.replay()

    def flush(self) -> None:
        """Raises TrainingFailed if a step of the epoch was not finite."""
        self.exchange.begin(self.report)
        self._read()

    def _record(self, images: Tensor, targets: Tensor) -> None:
        assert self.recorder is not None
        self.images, self.targets = images.clone(), targets.clone()
        try:        # gradients are None here, so each replay makes them anew and none needs clearing
            self.graph, _ = self.recorder.record(lambda: self._whole(self.images, self.targets))
        except Exception as error:      # it has run without a graph before
            print(f"no CUDA graph, and so much slower: {one_line(error, 300)}", flush=True)
            self.state.optimizer.zero_grad(set_to_none=True)
            self.recorder = None

    def _whole(self, images: Tensor, targets: Tensor) -> None:
        self._new_group()
        self.loss_sum += self.add_gradients(images, targets, 1)
        report, norm, skip = self._measure()
        self._apply(norm, skip)
        self.report.copy_(torch.where(self.report[5] > 0, self.report, report))
        self._average(0)


class Lane:
    """A trial with its stream and random numbers."""

    def __init__(self, trial: Trial, recorder: Callable[..., Recorder | None]):
        self.trial, self.error, device = trial, "", trial.process.device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.generator = torch.default_generator
        if self.stream is not None:     # graphs of one generator would share the memory of its seed
            self.generator = torch.cuda.default_generators[device.index or 0]
            self.random = self.generator.clone_state()
            self.stream.wait_stream(torch.cuda.current_stream(device))
        with self.own():
            self.updater = WholeStep(trial, recorder(device, self.stream))
        self.training = trial.training(self.updater)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Inside, its stream and random numbers are the current ones."""
        if self.stream is None:
            yield
            return
        before = self.generator.graphsafe_get_state()
        self.generator.graphsafe_set_state(self.random)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self.random = self.generator.graphsafe_get_state()      # after a failed recording it is another one
            self.generator.graphsafe_set_state(before)

    @property
    def source(self) -> tuple:
        """Lanes with the same source get the same batches in the coming epoch."""
        recipe = self.trial.recipe
        return (self.trial.run.seed, self.trial.state.epoch, *(recipe[key] for key in ("batch_size", "mixup", "cutmix",
                                                                                       "smoothing")))

    def begin_epoch(self) -> None:
        """As `engine.train_epochs` does."""
        state = self.trial.state
        state.scheduler.step(state.epoch)
        state.scheduler.step_update(state.epoch * self.trial.steps)
        with self.own():
            self.updater.begin_epoch()

    def step(self, step: int, images: Tensor, targets: Tensor, seed: int) -> None:
        """An error ends this trial alone, at the end of the epoch."""
        if self.error:
            return
        try:
            with self.own():
                if self.stream is not None:
                    self.stream.wait_stream(torch.cuda.default_stream(self.trial.process.device))
                    for tensor in (images, targets):
                        tensor.record_stream(self.stream)
                self.generator.manual_seed(seed)
                self.updater.step(step, images, targets)
        except Exception as error:
            self.error = f"step {step + 1} of epoch {self.trial.state.epoch}: {one_line(error, 300)}"
        self.trial.state.scheduler.step_update(self.trial.state.epoch * self.trial.steps + step + 1)

    def end_epoch(self, val: EvalBatches, seconds: float, beside: int) -> None:
        """Evaluate. seconds: of the epoch. beside: models that were trained in them. Raises TrainingFailed."""
        if self.error:
            raise TrainingFailed(self.error)
        trial, state = self.trial, self.trial.state
        state.step = trial.steps        # for messages
        complete_state(self.training, self.updater.loss_sum, time.perf_counter() - seconds)
        loss = (self.updater.loss_sum / trial.steps).item()
        options: dict[str, Any] = {"amp_dtype": trial.amp_dtype}
        results = {"test": evaluate(trial.model, val, trial.process, **options)}
        if state.ema is not None:
            results["ema_test"] = evaluate(ema_model(state, trial.process.device), val, trial.process, **options)
        state.next_epoch()
        trial.note(loss, results, seconds, 1000 * seconds / trial.steps / beside)


def train_epoch(lanes: Sequence[Lane], batches: Batches) -> Iterator[None]:
    """An epoch of lanes with the same source, a step for each `next`."""
    first = lanes[0].trial
    seed, epoch = first.run.seed, first.state.epoch
    batches.sampler.set_epoch(epoch)
    for step, (images, targets) in enumerate(batches):
        seed_everything(seed, epoch, step, 0)       # as `engine.train_one_epoch` does
        drawn = torch.initial_seed()
        if first.mixup is not None:
            images, targets = first.mixup(images, targets)
        for lane in lanes:
            lane.step(step, images, targets, drawn)
        yield


def train_round(lanes: list[Lane], images: Images, process: Process) -> float:
    """An epoch of every lane. Returns its seconds."""
    sources = defaultdict(list)
    for lane in lanes:
        sources[lane.source].append(lane)
        lane.begin_epoch()
    began = time.perf_counter()
    epochs = [train_epoch(each, Batches(images, each[0].trial.args, each[0].trial.run.seed, process.device))
              for each in sources.values()]
    while epochs:
        epochs = [epoch for epoch in epochs if next(epoch, epoch) is None]
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return time.perf_counter() - began


def train_side_by_side(runs: list[Run], images: Images, work: Path, process: Process, finish: Callable[[Trial], None], *,
                       most: int = 12, deadline: float = float("inf"),
                       recorder: Callable[..., Recorder | None] = CudaGraphs) -> list[str]:
    """Train `runs` in their order, `most` at a time, each from its checkpoint on. Returns a sentence for each that failed: an
    error while a model is made, trained or evaluated ends that run alone.

    finish: called with each finished trial.
    deadline: by time.monotonic(); after the round that ends past it, all are saved.
    recorder: called with the device and a stream."""
    images = Images({key: value.to(process.device) if key != "val_y" else value for key, value in images.items()}, images.classes)
    val = EvalBatches(images, process.device)
    waiting, lanes, failures, saved = list(runs), [], [], time.monotonic()
    number, late = 0, time.monotonic() >= deadline
    while (waiting or lanes) and not late:
        started = time.perf_counter()
        while waiting and len(lanes) < most:
            run = waiting.pop(0)
            try:
                trial = begin(run, images, work, process)
                lane = None if trial.done else Lane(trial, recorder)
            except Exception as error:
                failures.append(f"{run}: {one_line(error, 300)}")
                continue
            if lane is None:        # its row was not written
                finish(trial)
            else:
                lanes.append(lane)
        if not lanes:
            break
        if (prepared := time.perf_counter() - started) > 1:
            print(f"{len(lanes)} models ready after {prepared:.0f} s", flush=True)
        trained = train_round(lanes, images, process)
        evaluating, beside, number = time.perf_counter(), len(lanes), number + 1
        for lane in list(lanes):
            try:
                lane.end_epoch(val, trained, beside)
            except Exception as error:
                failures.append(f"{lane.trial.run}: {one_line(error, 300)}")
                lanes.remove(lane)
        ended = [lane for lane in lanes if lane.trial.done]
        late = time.monotonic() >= deadline
        due = late or time.monotonic() - saved > SAVE_SECONDS
        for lane in lanes if due else ended:
            lane.trial.save()
        if due:
            saved = time.monotonic()
        for lane in ended:
            finish(lane.trial)
            lanes.remove(lane)
        evaluated = time.perf_counter() - evaluating
        print(f"round {number}: {beside} models, {trained:.1f} s of training, {evaluated:.1f} s of evaluation; "
              + ", ".join(f"{lane.trial.run} {lane.trial.progress['curve'][-1]}" for lane in [*ended, *lanes]), flush=True)
    return failures
