"""A training step as CUDA graphs (`--cuda-graph`): recorded once, then replayed without the overhead of Python and of launches.

    a batch     forward pass, loss, backward pass: a graph for each shape and place in its group of accumulated batches
    measure     unscale the gradients, compute their norm and the numbers of the report
    apply       clipping, optimizer, loss scale

Between the graphs the host works as without them: seeds, mixup, learning rates, signals, reading the report one update late, the
moving average. The graphs record the functions of `Updater` themselves, so that every number stays the same.

`Updater` computes the first batches of a shape without a graph: meanwhile kernels are compiled, and cuBLAS and the optimizer
create their state. It also computes whatever is never recorded, such as a rare shape and the rest of its group.
"""
import gc
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vision_kan.common.errors import UserError, one_line
from vision_kan.common.process import Process
from vision_kan.common.text import say
from vision_kan.config.flags import OWN_GRAPHS
from vision_kan.training.criterion import Criterion
from vision_kan.training.state import TrainState, distributed, has_running_statistics
from vision_kan.training.updates import Requests, Updater, can_defer_readback


# ---------------------------------------------------------------- whether
def build_updater(args: Namespace, state: TrainState, criterion: Criterion, process: Process, amp_dtype: torch.dtype) -> Updater:
    """The Updater that --cuda-graph asks for; prints which. `state` must hold its final tensors. Raises UserError if the flag is
    `on` and graphs are not possible."""
    net = distributed(state.model, process)
    options: dict[str, Any] = {"amp_dtype": amp_dtype, "clip_grad": args.clip_grad}
    reason = "" if args.cuda_graph == "off" else reason_against(args, state, process)
    if args.cuda_graph == "on" and reason:
        raise UserError(f"--cuda-graph on: {reason}; take --cuda-graph auto or off")
    if args.cuda_graph == "off" or reason:
        say(f"CUDA graphs: off{reason and f', {reason}'}")
        return Updater(net, state, criterion, process, **options)
    say(f"CUDA graphs: on, after {CapturedUpdater.WARM_UP} batches of a shape")
    return CapturedUpdater(net, state, criterion, process, CudaGraphs(process.device), required=args.cuda_graph == "on",
                           **options)


def reason_against(args: Namespace, state: TrainState, process: Process) -> str:
    """The reason why a run's steps cannot be CUDA graphs, as far as it is known before the first step, or ''."""
    if process.device.type != "cuda":
        return f"there are none on {'a CPU' if process.device.type == 'cpu' else process.device.type}"
    if process.world_size > 1:
        return "with several processes they are not verified yet"
    if args.grad_checkpointing:
        return "--grad-checkpointing keeps the state of the random numbers on the host"
    if args.compile in OWN_GRAPHS:
        return f"--compile {args.compile} makes its own graphs"
    if not can_defer_readback(state, process.device):
        if state.ema is not None and has_running_statistics(state.model):
            return "--model-ema averages the statistics of BatchNorm at every step on the host"
        return f"--opt {args.opt} updates in steps of the host (adamw, adam and sgd do not)"
    return ""


# ---------------------------------------------------------------- graphs
T = TypeVar("T")


class Graph(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    def record(self, function: Callable[[], T]) -> tuple[Graph, T]:
        """A graph of what `function` computes, and its result, whose tensors each replay overwrites. Recording changes neither
        weights nor random numbers, even if it raises."""


class CudaGraphs:
    """Records graphs that share one memory pool, because they are replayed one after the other.

    stream: where they are recorded; None: PyTorch's stream for that. Graphs that are replayed at the same time must not share it,
    because cuBLAS's workspace belongs to the stream."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None):
        self.device, self.stream, self.pool = device, stream, torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], T]) -> tuple[Graph, T]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[self.device.index or 0]
        device_rng, host_rng = generator.clone_state(), _host_rng_states()
        gc.collect()        # freeing a tensor while recording would call CUDA
        try:
            # thread_local: a loader's pinning thread and NCCL's watchdog call CUDA meanwhile, which "global" forbids
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = function()
            if not _equal_states(_host_rng_states(), host_rng):
                raise RuntimeError("it draws random numbers on the host, which would be the same ones in every step")
        except BaseException:
            torch.cuda.set_stream(stream)               # after a failed capture PyTorch leaves its own stream current
            generator.graphsafe_set_state(device_rng)   # and the generator in capture mode
            _restore_host_rng(host_rng)
            with suppress(RuntimeError):
                graph.reset()
            raise
        return graph, result


def _host_rng_states() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore_host_rng(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _equal_states(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and a[1][2] == b[1][2] and bool((a[1][1] == b[1][1]).all()) and torch.equal(a[2], b[2])


# ---------------------------------------------------------------- the step
class CapturedUpdater(Updater):
    """An Updater that replays graphs, for all epochs of a run. Every epoch must use the same mode (training or evaluation).

    recorder: makes the graphs.
    required: raise UserError if a step cannot be recorded, instead of continuing without graphs.
    """
    WARM_UP = 3     # batches of a shape computed without a graph first, to create what a graph cannot

    def __init__(self, net: nn.Module, state: TrainState, criterion: Criterion, process: Process, recorder: Recorder, *,
                 required: bool = False, **options):
        super().__init__(net, state, criterion, process, **options)
        assert self.late
        self.recorder: Recorder | None = recorder
        self.required = required
        self.seen: Counter[tuple] = Counter()
        self.batches: dict[tuple, tuple[Graph, Tensor, Tensor, Tensor]] = {}    # with images, targets and loss
        self.gradients: list[Tensor | None] = []        # of the parameters; the graphs write into them
        self.recorded_settings: tuple | None = None     # the optimizer's when `measure` and `apply` were recorded
        self.measure: tuple[Graph, Tensor] | None = None
        self.apply: Graph | None = None

    def _new_group(self) -> None:
        super()._new_group()
        self.first, self.in_graphs = True, True         # the next batch is the first of its group; no batch without a graph yet

    def add_gradients(self, images: Tensor, targets: Tensor, group: int, where: str = "") -> Tensor:
        recorded = self._recorded(images, targets, group)
        if recorded is None:
            if self.first:                              # don't add to the gradients of the graphs
                self.state.optimizer.zero_grad(set_to_none=True)
            self.first = self.in_graphs = False
            return super().add_gradients(images, targets, group, where)
        graph, static_images, static_targets, loss = recorded
        static_images.copy_(images, non_blocking=True)
        static_targets.copy_(targets, non_blocking=True)
        graph.replay()
        self.first = False
        return loss

    def update(self, step: int, requests: Requests) -> None:
        recorded = self._recorded_update() if self.in_graphs else None
        if recorded is None:
            super().update(step, requests)
            return
        measure, report, apply = recorded
        self._send(step, requests)
        measure.replay()
        self.exchange.begin(report)
        self._drain(1)
        apply.replay()
        self._new_group()

    # ---- recording
    def _recorded(self, images: Tensor, targets: Tensor, group: int) -> tuple[Graph, Tensor, Tensor, Tensor] | None:
        """The graph for a batch of this shape at its place in the group, or None if it has to be computed without one."""
        key = (images.shape, images.dtype, targets.shape, targets.dtype, group, self.first)
        self.seen[key] += 1
        if self.recorder is None or not self.in_graphs or self.seen[key] <= self.WARM_UP:
            return None
        if self.gradients and self.first:       # an update without graphs sets them to None
            for parameter, gradient in zip(self.parameters, self.gradients):
                if parameter.grad is not gradient:
                    parameter.grad = gradient
        if key not in self.batches:
            static_images, static_targets = images.clone(), targets.clone()
            clear = self.first and bool(self.gradients)

            def batch() -> Tensor:
                if clear:
                    torch._foreach_zero_([g for g in self.gradients if g is not None])
                return Updater.add_gradients(self, static_images, static_targets, group)

            if not self.gradients:
                self.state.optimizer.zero_grad(set_to_none=True)        # this graph creates them, so it need not clear them
            recorded = self._record(batch)
            if recorded is None:
                return None
            self.batches[key] = (recorded[0], static_images, static_targets, recorded[1])
            self.gradients = self.gradients or [parameter.grad for parameter in self.parameters]
        return self.batches[key]

    def _recorded_update(self) -> tuple[Graph, Tensor, Graph] | None:
        groups = self.state.optimizer.param_groups
        settings = tuple((key, value) for group in groups for key, value in group.items() if key not in ("params", "lr"))
        if settings != self.recorded_settings:
            graphs = self._record_update()
            if graphs is None:
                return None
            self.recorded_settings, (self.measure, self.apply) = settings, graphs
        assert self.measure is not None and self.apply is not None
        return (*self.measure, self.apply)

    def _record_update(self) -> tuple[tuple[Graph, Tensor], Graph] | None:
        scaler = self.state.scaler
        measured = self._record(self._measure)
        if measured is not None:
            measure, (report, norm, skip) = measured

            def apply() -> None:
                self._apply(norm, skip)
                scaler.update()

            applied = self._record(apply)
            if applied is not None:
                return (measure, report), applied[0]
        if scaler.is_enabled():
            scaler._per_optimizer_states.clear()    # the gradients have not been unscaled
        return None

    def _record(self, function: Callable[[], T]) -> tuple[Graph, T] | None:
        """The graph and result of `function`, or None if it cannot be recorded; then no graph is used from here on."""
        assert self.recorder is not None
        kept = [parameter.grad for parameter in self.parameters]
        try:
            return self.recorder.record(function)
        except Exception as error:      # any error concerns the recording: the same step has run before without a graph
            reason = one_line(error, 200)
        for parameter, gradient in zip(self.parameters, kept):
            parameter.grad = gradient
        if self.required:
            raise UserError(f"--cuda-graph on: a training step cannot be recorded ({reason}); take --cuda-graph auto or off")
        say(f"CUDA graphs: off from here on, a training step cannot be recorded ({reason})")
        self.recorder = None
        self.batches.clear()
        return None
