"""The inputs of learned functions, collected as histograms."""
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_kan.layers.function_layer import FunctionLayer, function_layers

# A grid more than this many times as wide as the span of nine in ten inputs is too wide (a standard normal on [-3, 3]: 1.8).
FAR_WIDER = 5


class InputHistogram:
    """A histogram of the inputs of a layer's functions, one for each channel, filled batch by batch.

    It has `BINS` bins over four times the grid's span, with the grid in the middle and its ends on edges of bins. Inputs further
    out count into the first and last bin.

    counts: int64 [I, BINS].
    extremes: the exact smallest and largest of all inputs, [2]."""
    BINS = 512

    def __init__(self, channels: int, grid: Tensor, device: torch.device | str = "cpu"):
        self.low, self.high = float(grid[0]), float(grid[-1])
        self.start, self.width = self.low - 1.5 * (self.high - self.low), 4 * (self.high - self.low) / self.BINS
        self.counts = torch.zeros(channels, self.BINS, dtype=torch.int64, device=device)
        self.extremes = torch.tensor([math.inf, -math.inf], device=device)

    def add(self, u: Tensor) -> None:
        """Count u [..., I], of any floating dtype."""
        u = u.detach().reshape(-1, len(self.counts))
        first = torch.arange(len(self.counts), device=u.device) * self.BINS
        for part in u.split(max(1, 2 ** 22 // len(self.counts))):
            part = part.float().nan_to_num(nan=math.inf)
            low, high = part.aminmax()
            self.extremes = torch.stack([self.extremes[0].minimum(low), self.extremes[1].maximum(high)])
            bins = ((part - self.start) / self.width).floor().clamp_(0, self.BINS - 1).long()
            self.counts += torch.bincount((bins + first).flatten(), minlength=self.counts.numel()).view_as(self.counts)

    @property
    def centres(self) -> Tensor:
        """[BINS], float64: the middle of each bin."""
        return self.start + (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * self.width

    @property
    def edges(self) -> Tensor:
        """[BINS + 1], float64."""
        return self.start + torch.arange(self.BINS + 1, dtype=torch.float64) * self.width

    def shares(self, parts: int = 1) -> Tensor:
        """[parts, BINS], float64: the share of the inputs in each bin, for each of `parts` equal parts of the channels."""
        counts = self.counts.cpu().double().view(parts, -1, self.BINS).sum(1)
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    @property
    def off_grid(self) -> float:
        """The share of all inputs beyond the first or last grid point."""
        inside = slice(3 * self.BINS // 8, 5 * self.BINS // 8)
        return 1 - float(self.shares()[0, inside].sum())

    def quantile(self, share: float) -> float:
        """The value below which this share (0 to 1) of all inputs lies, by linear interpolation within its bin."""
        below = F.pad(self.shares()[0].cumsum(0), (1, 0))                           # [BINS + 1], at the edges
        last = int((below < share).sum().clamp(1, self.BINS))                       # the edge at which the share is reached
        part = (share - float(below[last - 1])) / max(float(below[last] - below[last - 1]), 1e-12)
        value = float(self.edges[last - 1]) + min(1.0, max(0.0, part)) * self.width
        smallest, largest = self.extremes.tolist()
        return min(max(value, smallest), largest)


def used_width(low: float, high: float, p5: float, p95: float) -> float:
    """The share of a grid's width that holds nine in ten inputs. Below 1 / `FAR_WIDER` the grid is too wide."""
    return (p95 - p5) / (high - low)


@contextmanager
def hook_inputs(layers: Mapping[str, FunctionLayer], see: Callable[[str, FunctionLayer, Tensor], None]) -> Iterator[None]:
    """Inside, each forward pass of a layer calls see(name, layer, u) with the inputs of its functions, u [..., I]."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda layer, x, name=name: see(name, layer, layer.normalised(x[0])))
            stack.callback(hook.remove)
        yield


@dataclass
class ActivationStats:
    inputs: dict[str, InputHistogram]                           # name of each layer with learned functions -> its inputs
    outputs: dict[str, float] = field(default_factory=dict)     # name of each block, its `attn`, its `mlp` -> root mean square
    images: int = 0                                             # their number


@torch.inference_mode()
def collect_inputs(model: nn.Module, batches: Iterable[Tensor]) -> ActivationStats:
    """Pass batches of images [B, 3, H, W] through the model and collect the inputs of its learned functions.

    The model computes in evaluation mode; its mode is restored. A model without learned functions has no inputs."""
    inputs: dict[str, InputHistogram] = {}
    squares: dict[str, list[tuple[Tensor, int]]] = {}
    images = 0

    def count(name: str, layer: FunctionLayer, u: Tensor) -> None:
        if name not in inputs:
            inputs[name] = InputHistogram(u.shape[-1], layer.grid_points(), u.device)
        inputs[name].add(u)

    def add_square(name: str, y: object) -> None:
        if isinstance(y, Tensor):
            squares.setdefault(name, []).append((y.detach().float().square().sum(), y.numel()))

    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        stack.enter_context(hook_inputs(function_layers(model), count))
        for name, module in model.named_modules():
            if _is_block(module):
                for part, child in (("", module), (".attn", module.attn), (".mlp", module.mlp)):
                    hook = child.register_forward_hook(lambda _, x, y, name=name + part: add_square(name, y))
                    stack.callback(hook.remove)
        device = next(model.parameters()).device
        for batch in batches:
            images += len(batch)
            model.forward(batch.to(device))     # not model(): a compiled model would skip the hooks
    outputs = {name: math.sqrt(sum(float(total) for total, _ in parts) / sum(values for _, values in parts))
               for name, parts in squares.items()}
    return ActivationStats(inputs, outputs, images)


def _is_block(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn", None), nn.Module) and isinstance(getattr(module, "mlp", None), nn.Module)
