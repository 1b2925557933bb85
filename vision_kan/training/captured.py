"""A training step as CUDA graphs (`--cuda-graph`): recorded once, then replayed without Python's cost and the launches'.

    a batch     forward pass, loss, backward pass: one for each shape and place in its group of accumulated batches
    measure     unscale the gradients, their norm, the numbers of the report
    apply       clipping, optimizer, loss scale

Between them the host does what it does without graphs: seeds, mixup, learning rates, signals, reading the report one update
late, the moving average. The graphs hold the very functions of `engine.Updater`, so that every number is that of its run.

The first batches of a shape are computed by `Updater` itself: kernels are compiled, cuBLAS and the optimizer make their state,
and nothing has to be undone afterwards. What is never recorded (a rare shape, the rest of its group) goes on so.
"""
import gc
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

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
    """The Updater that --cuda-graph asks for, of a state that holds its final tensors; says which. Raises UserError where it must
    be graphs and they are not possible."""
    net = distributed(state.model, process)
    options: dict[str, Any] = {"amp_dtype": amp_dtype, "clip_grad": args.clip_grad}
    reason = "" if args.cuda_graph == "off" else reason_against(args, state, process)
    if args.cuda_graph == "on" and reason:
        raise UserError(f"--cuda-graph on: {reason}; take --cuda-graph auto or off")
    if args.cuda_graph == "off" or reason:
        say(f"CUDA graphs: off{reason and f', {reason}'}")
        return Updater(net, state, criterion, process, **options)
    say(f"CUDA graphs: on, after {CapturedUpdater.WARM_UP} batches of a shape")
    return CapturedUpdater(net, state, criterion, process, CudaGraphs(process.device), must=args.cuda_graph == "on", **options)


def reason_against(args: Namespace, state: TrainState, process: Process) -> str:
    """Why a run's steps cannot be CUDA graphs, as far as that is known before the first; '' where they can."""
    if process.device.type != "cuda":
        return f"there are none on {'a CPU' if process.device.type == 'cpu' else process.device.type}"
    if process.world_size > 1:
        return "with several processes they are not verified yet"
    if args.grad_checkpointing:
        return "--grad-checkpointing keeps the state of the random numbers on the host"
    if args.compile in OWN_GRAPHS:
        return f"--compile {args.compile} makes its own"
    if not can_defer_readback(state, process.device):
        if state.ema is not None and has_running_statistics(state.model):
            return "--model-ema averages the statistics of BatchNorm at every step on the host"
        return f"--opt {args.opt} updates in steps of the host (adamw, adam and sgd do not)"
    return ""


# ---------------------------------------------------------------- graphs
class Graph(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    def record(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        """A graph of what `function` computes, and its result, whose tensors each replay fills anew. Changes nothing, neither
        weights nor random numbers, whether it raises or not."""


class CudaGraphs:
    """Records graphs that share their memory: they are replayed one after the other."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[self.device.index or 0]
        on_device, on_host = generator.clone_state(), _host_numbers()
        gc.collect()        # nothing that is freed meanwhile may call CUDA
        try:
            # thread_local: a loader's pinning thread and NCCL's watchdog call CUDA meanwhile, which "global" forbids
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = function()
            if not _same(_host_numbers(), on_host):
                raise RuntimeError("it draws random numbers on the host, which would be the same ones in every step")
        except BaseException:
            torch.cuda.set_stream(stream)               # PyTorch leaves its own stream set where a capture could not end,
            generator.graphsafe_set_state(on_device)    # and its generator as if it still went on
            _restore_host_numbers(on_host)
            with suppress(RuntimeError):
                graph.reset()
            raise
        return graph, result


def _host_numbers() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore_host_numbers(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _same(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and a[1][2] == b[1][2] and bool((a[1][1] == b[1][1]).all()) and torch.equal(a[2], b[2])


# ---------------------------------------------------------------- the step
class CapturedUpdater(Updater):
    """An Updater of graphs; for all epochs of a run, each of which must train in the same mode.

    recorder: makes the graphs. must: UserError where a step can't be recorded, in place of going on without graphs.
    """
    WARM_UP = 3     # batches of a shape that are computed as without graphs, so that all is made that a graph can't make

    def __init__(self, net: nn.Module, state: TrainState, criterion: Criterion, process: Process, recorder: Recorder, *,
                 must: bool = False, **options):
        super().__init__(net, state, criterion, process, **options)
        assert self.late
        self.recorder: Recorder | None = recorder
        self.must = must
        self.seen: Counter[tuple] = Counter()
        self.batches: dict[tuple, tuple[Graph, Tensor, Tensor, Tensor]] = {}    # with images, targets and loss
        self.gradients: list[Tensor | None] = []        # the parameters', as the graphs write them
        self.update_of: tuple | None = None             # the optimizer's settings that these were recorded with
        self.measure: tuple[Graph, Tensor] | None = None
        self.apply: Graph | None = None

    def _new_group(self) -> None:
        super()._new_group()
        self.first, self.in_graphs = True, True         # the next batch is a group's first; all of it so far in graphs

    def add_gradients(self, images: Tensor, targets: Tensor, group: int, where: str = "") -> Tensor:
        recorded = self._recorded(images, targets, group)
        if recorded is None:
            if self.first:                              # the graphs' gradients are not for adding to
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
        """The graph of such a batch at this place of its group; None where it is to be computed without one."""
        key = (images.shape, images.dtype, targets.shape, targets.dtype, group, self.first)
        self.seen[key] += 1
        if self.recorder is None or not self.in_graphs or self.seen[key] <= self.WARM_UP:
            return None
        if self.gradients and self.first:       # without graphs they end as None
            for parameter, gradient in zip(self.parameters, self.gradients):
                if parameter.grad is not gradient:
                    parameter.grad = gradient
        if key not in self.batches:
            static_images, static_targets = images.clone(), targets.clone()
            again = self.first and bool(self.gradients)

            def batch() -> Tensor:
                if again:
                    torch._foreach_zero_([g for g in self.gradients if g is not None])
                return Updater.add_gradients(self, static_images, static_targets, group)

            if not self.gradients:
                self.state.optimizer.zero_grad(set_to_none=True)        # the graph makes them: it need not clear them first
            recorded = self._record(batch)
            if recorded is None:
                return None
            self.batches[key] = (recorded[0], static_images, static_targets, recorded[1])
            self.gradients = self.gradients or [parameter.grad for parameter in self.parameters]
        return self.batches[key]

    def _recorded_update(self) -> tuple[Graph, Tensor, Graph] | None:
        groups = self.state.optimizer.param_groups
        settings = tuple((key, value) for group in groups for key, value in group.items() if key not in ("params", "lr"))
        if settings != self.update_of:
            both = self._record_update()
            if both is None:
                return None
            self.update_of, (self.measure, self.apply) = settings, both
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
            scaler._per_optimizer_states.clear()    # its gradients are not unscaled after all
        return None

    def _record(self, function: Callable[[], Any]) -> tuple[Graph, Any] | None:
        """None where it can't be, and from then on nothing is."""
        assert self.recorder is not None
        kept = [parameter.grad for parameter in self.parameters]
        try:
            return self.recorder.record(function)
        except Exception as error:      # whatever it is: the step itself has been computed before, without a graph
            reason = one_line(error, 200)
        for parameter, gradient in zip(self.parameters, kept):
            parameter.grad = gradient
        if self.must:
            raise UserError(f"--cuda-graph on: a training step cannot be recorded ({reason}); take --cuda-graph auto or off")
        say(f"CUDA graphs: off from here on, a training step cannot be recorded ({reason})")
        self.recorder = None
        self.batches.clear()
        return None
