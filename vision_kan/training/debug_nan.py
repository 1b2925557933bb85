"""--debug-nan: keep the last batches, and replay those of an update that was not finite to name the layer."""
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from vision_kan.common.errors import one_line
from vision_kan.common.seeds import seed_everything
from vision_kan.training.criterion import Criterion, loss_of
from vision_kan.training.precision import autocast
from vision_kan.training.training import Training
from vision_kan.training.updates import NonFinite


class KeptBatches:
    """The last batches that the model saw, after mixup. Those of two updates, because an Updater may report one update late."""

    def __init__(self, accumulate: int = 1):
        self.accumulate = accumulate
        self.batches: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=2 * accumulate)

    def note(self, step: int, images: Tensor, targets: Tensor) -> None:
        self.batches.append((step, images, targets))

    def of_update(self, step: int) -> list[tuple[int, Tensor, Tensor]]:
        """The batches of the update that followed batch `step`."""
        return [batch for batch in self.batches if step // self.accumulate == batch[0] // self.accumulate]


def replay_non_finite(error: NonFinite, training: Training, kept: KeptBatches, folder: str) -> str:
    """Replay the update that `error` reports. Returns a sentence that names the layer; saves batch and weights in `folder`."""
    state, process = training.state, training.process
    file = Path(folder).expanduser() / f"nan_rank{process.rank}.pth"
    try:
        return replay(state.model, training.criterion, kept.of_update(error.step),
                      lambda: autocast(process.device, training.amp_dtype), state.scaler.get_scale(),
                      (training.seed, state.epoch, process.rank), file)
    except (OSError, RuntimeError) as problem:
        return f"--debug-nan: {file} could not be written, or the batch could not be replayed ({one_line(problem)})"


def replay(model: nn.Module, criterion: Criterion, batches: list[tuple[int, Tensor, Tensor]], context,
           scale: float, key: tuple[int, int, int], file: Path | None) -> str:
    """Repeat the forward and backward passes of an update's batches with the same random numbers.

    Args:
        model: without DistributedDataParallel, with the weights before the update.
        criterion: as in `Updater`.
        batches: (step, images, targets) of the update.
        context: returns the autocast context.
        scale: of the loss (float16).
        key: seed, epoch, rank.
        file: where {"images", "targets", "step", "seed", "epoch", "rank", "model"} are saved; None saves nothing.
    Returns: a sentence that names what became infinite or nan first.
    Raises: OSError if the file cannot be written.
    """
    seed, epoch, rank = key
    for step, images, targets in batches:
        seed_everything(seed, epoch, step, rank)
        found = _first_not_finite(model, criterion, images, targets, context, scale)
        if found:
            break
    else:
        step, images, targets = batches[-1]
        found = "nothing on this process"
    if file is not None:
        torch.save({"images": images.cpu(), "targets": targets.cpu(), "step": step, "seed": seed, "epoch": epoch, "rank": rank,
                    "model": dict(model.state_dict())}, file)
    return f"--debug-nan: replayed step {step + 1} of epoch {epoch}, not finite: {found}" + (f"; batch and weights are in {file}"
                                                                                           if file else "")


def _first_not_finite(model: nn.Module, criterion: Criterion, images: Tensor, targets: Tensor, context,
                      scale: float) -> str:
    first: list[str] = []

    def check(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            tensors = [tensor for tensor in (output if isinstance(output, (tuple, list)) else [output])
                       if isinstance(tensor, Tensor)]
            if not first and not all(bool(tensor.isfinite().all()) for tensor in tensors):
                largest = [tensor.detach().abs().max().item() for tensor in inputs if isinstance(tensor, Tensor)]
                first.append(f"the output of {name} ({type(module).__name__}; largest input {max(largest, default=0):.4g})")
        return hook

    if not bool(images.isfinite().all()):
        return "the images themselves"
    model.zero_grad(set_to_none=True)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                stack.callback(module.register_forward_hook(check(name)).remove)
        with context():
            # not the model itself: a compiled one would skip the hooks
            loss = loss_of(model.forward, criterion, images, targets)
    if first:
        return first[0]
    if not bool(loss.isfinite()):
        return f"the loss ({loss.item()}), from finite outputs"
    (loss * scale).backward()
    # the last in the list is the first that backward computed
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    model.zero_grad(set_to_none=True)
    return f"the gradient of {wrong[-1]} (and {len(wrong) - 1} more tensors)" if wrong else ""
