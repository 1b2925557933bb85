"""One update: the gradients of a group of batches, clipping, the optimizer's step, and a report to the host."""
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vision_kan.common import peers
from vision_kan.common.errors import TrainingFailed
from vision_kan.common.process import Process
from vision_kan.training.criterion import Criterion, loss_of
from vision_kan.training.precision import autocast
from vision_kan.training.state import TrainState, has_running_statistics, lr_of


@dataclass(frozen=True)
class Requests:
    """What this process asks for at the next update. Any process's request applies to all of them."""
    signal: int = 0         # number of a signal that asks the run to stop
    save: bool = False


class Report(NamedTuple):
    """The outcome of an update, identical on every process; the fields are the numbers of one tensor."""
    trouble: float          # 0: the loss is finite, 1: infinite, 2: not a number
    process: float          # its process, counted from 1
    signal: float
    save: float
    loss: float             # largest of all processes
    skip: float             # 1: loss or gradient were not finite and nothing was updated
    norm: float             # of the gradient
    step: float
    lr: float


class Exchange:
    """Reduces numbers over the processes and brings them to the host. `begin` starts the transfer and `read` takes the result
    later, so that the host does not wait for a GPU."""

    def __init__(self, process: Process):
        self.process = process
        self.begun: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest value of each number over the processes, in place."""
        if self.process.world_size > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers

    def begin(self, numbers: Tensor) -> None:
        """Start copying `numbers` (float32 [n], on the device) to the host."""
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        host.copy_(numbers, non_blocking=True)      # numbers may be overwritten before they are read
        event = None
        if numbers.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.begun.append((host, event))

    def read(self) -> list[float]:
        """The oldest numbers that have not been read."""
        numbers, event = self.begun.popleft()
        if event is not None:
            event.synchronize()
        return numbers.tolist()


class StopRequested(Exception):
    """A signal asks the run to stop; all processes raise this at the same point."""

    def __init__(self, signal: int):
        self.signal = signal


class NonFinite(TrainingFailed):
    """Loss or gradient were not finite in the update whose last batch is `step`; the weights are those before it."""

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step


class Updater:
    """Computes the gradients of batches, then updates weights and moving average. It skips an update if the gradient, or the loss
    of any process, is not finite.

    The device knows this immediately. The host reads it one update later (`late`), so that it does not wait for a GPU. With
    `late` the optimizer must support `found_inf`, as PyTorch's fused ones do, and read its learning rates on the device, in
    float32. The average then follows one update behind, with the same numbers if the forward pass changes no buffers. All data
    between host and device pass through tensors that stay the same objects, as CUDA graphs need (captured.py).

    Args:
        net: state.model, wrapped by DistributedDataParallel if there are several processes.
        criterion: called as criterion(images, outputs, targets); the model gets `criterion.copies` of each batch.
        clip_grad: largest norm of the gradient; None: no limit.
        late: None chooses by `can_defer_readback`.
    """
    MAX_SKIPS = 20      # consecutive ones by float16's loss scaling; each halves the scale, from 65,536 down to 1/16

    def __init__(self, net: nn.Module, state: TrainState, criterion: Criterion, process: Process, *,
                 amp_dtype: torch.dtype = torch.float32, clip_grad: float | None = None, late: bool | None = None):
        self.net, self.state, self.criterion, self.process = net, state, criterion, process
        self.amp_dtype, self.clip_grad = amp_dtype, clip_grad
        self.late = can_defer_readback(state, process.device) if late is None else late
        self.exchange = Exchange(process)
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        # on the device: `trouble` of the group's losses (see Report), the largest loss, and the numbers that `_send` copies
        self.trouble, self.loss = torch.zeros((), device=process.device), torch.zeros((), device=process.device)
        self.sent = torch.zeros(5 + len(state.optimizer.param_groups), device=process.device)
        self.begin()

    def begin(self, number_of: Callable[[int], int] = lambda step: step + 1) -> None:
        """Start an epoch. number_of: maps the last batch of an update to the update's number in the run, from 1."""
        self.signal, self.save = 0, False       # requests of any process in the reports read so far
        self.number_of = number_of
        self._new_group()

    def _new_group(self) -> None:
        self.trouble.zero_()
        self.loss.zero_()

    def add_gradients(self, images: Tensor, targets: Tensor, group: int, where: str = "") -> Tensor:
        """Forward and backward pass of one of the `group` batches of an update. Returns the loss, a scalar without gradient."""
        with autocast(self.process.device, self.amp_dtype):
            loss = loss_of(self.net, self.criterion, images, targets)
        peers.progress(f"the backward pass of {where}")
        self.state.scaler.scale(loss / group).backward(create_graph=getattr(self.state.optimizer, "is_second_order", False))
        loss = loss.detach()
        value = loss.float()
        self.trouble.copy_(torch.maximum(self.trouble, value.isinf() + 2. * value.isnan()))
        self.loss.copy_(torch.maximum(self.loss, value.nan_to_num(0.)))
        return loss

    def update(self, step: int, requests: Requests) -> None:
        """Apply the gradients of the batches up to `step`. Raises TrainingFailed, on all processes at once."""
        self._send(step, requests)
        report, norm, skip = self._measure()
        self.exchange.begin(report)
        if self.late:
            self._drain(1)
        done = self.late or not self._read().skip
        if done:
            self._apply(norm, skip)
        self.state.scaler.update()
        self.state.optimizer.zero_grad(set_to_none=True)
        self._new_group()
        if done and not self.late:
            self._average(step)

    def _send(self, step: int, requests: Requests) -> None:
        """Copy the host's numbers of this update to the device."""
        optimizer = self.state.optimizer
        numbers = [self.process.rank + 1, requests.signal, requests.save, step, lr_of(optimizer),
                   *(group["lr"] for group in optimizer.param_groups)]
        self.sent.copy_(torch.tensor(numbers, dtype=torch.float32, pin_memory=self.sent.is_cuda), non_blocking=True)

    @torch.no_grad()
    def _measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unscale the gradients and agree on the outcome. Returns the Report's numbers, the gradient's norm, and `skip` (1.: the
        update is skipped)."""
        self.state.scaler.unscale_(self.state.optimizer)
        norm = nn.utils.get_total_norm([p.grad.detach() for p in self.parameters if p.grad is not None]).float()
        where, signal, save = self.sent[:3]
        agreed = self.exchange.largest(torch.stack([self.trouble, where * (self.trouble > 0), signal, save, self.loss]))
        skip = ((agreed[0] > 0) | ~norm.isfinite()).float()
        return torch.cat([agreed, torch.stack([skip, norm]), self.sent[3:5]]), norm, skip

    def _apply(self, norm: Tensor, skip: Tensor) -> None:
        """Clip the gradients and do the optimizer's step. With `late` it changes nothing if skip is 1."""
        optimizer = self.state.optimizer
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        if self.late:
            optimizer.found_inf = skip      # type: ignore[attr-defined]  # what fused optimizers look for
        with _rates_on_device(optimizer, self.sent[5:]) if self.late else nullcontext():
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
        """Update the moving average. step: the last batch of the update that gave the weights."""
        ema = self.state.ema
        if ema is not None:     # with a number, timm's first update copies the weights, which only a warm-up needs
            ema.update(self.state.model, self.number_of(step) if ema.use_warmup else None)

    def _drain(self, behind: int) -> None:
        """Read the reports of all but the last `behind` updates."""
        while len(self.exchange.begun) > behind:
            report = self._read()
            if not report.skip:
                self._average(int(report.step))

    def flush(self) -> None:
        """Wait for the last update; the state then includes it. Raises TrainingFailed."""
        self._drain(0)


@contextmanager
def _rates_on_device(optimizer: torch.optim.Optimizer, rates: Tensor) -> Iterator[None]:
    """Inside, the optimizer reads its groups' learning rates from `rates` on the device, and its step may be captured."""
    before: list[dict[str, Any]] = [{key: group[key] for key in ("lr", "capturable") if key in group}
                                    for group in optimizer.param_groups]
    for group, old, rate in zip(optimizer.param_groups, before, rates):
        group.update({**old, "capturable": True, "lr": rate} if "capturable" in old else {"lr": rate})
    try:
        yield
    finally:
        for group, old in zip(optimizer.param_groups, before):      # the schedules need floats
            group.update(old)


def can_defer_readback(state: TrainState, device: torch.device) -> bool:
    """Whether the device can skip an update before the host knows. If not, the host waits for each update, which on a CPU costs
    nothing."""
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
