"""--log-kan: learned functions in the TensorBoard events of a training."""
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vision_kan.analysis.drawing import functions_figure
from vision_kan.analysis.inputs import InputHistogram, collect_inputs
from vision_kan.analysis.measures import LayerStats, measure
from vision_kan.common import peers
from vision_kan.common.text import say
from vision_kan.layers.function_layer import FunctionLayer, function_layers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from vision_kan.run.folder import RunFolder


MAX_OFF_GRID = 0.05     # training warns if a larger share of a layer's inputs is off the grid


def log_functions(model: nn.Module, images: Tensor, folder: "RunFolder", epoch: int) -> None:
    """Write functions, their inputs, grid coverage and dead units to the run's TensorBoard events, and warn on stderr if more
    than `MAX_OFF_GRID` of a layer's inputs are off the grid. Changes neither the model nor any random number.

    images: [B, 3, H, W], normalised."""
    peers.progress(f"the functions learned in epoch {epoch}")
    layers, inputs = function_layers(model), collect_inputs(model, images.split(32)).inputs
    measured = {name: measure(layers[name], inputs[name]) for name in inputs}
    blocks: dict[str, dict[str, FunctionLayer]] = {}
    for name in inputs:
        blocks.setdefault(name.split(".mlp.")[0], {})[name] = layers[name]

    def write(board: "SummaryWriter") -> None:
        for name, found in measured.items():
            if found.points:
                board.add_scalar(f"kan_off_grid/{name}", found.off_grid, epoch)
            board.add_scalar(f"kan_dead_{found.units}/{name}", found.dead, epoch)
            if found.distance is not None:
                board.add_scalar(f"kan_distance/{name}", found.distance, epoch)
            _add_histogram(board, f"kan_inputs/{name}", inputs[name], found, epoch)
        for block, part in blocks.items():
            board.add_figure(f"kan_functions/{block}", functions_figure(part, inputs), epoch, close=False)

    folder.events(epoch, write)
    if warning := off_grid_warning(measured):
        say(f"warning: epoch {epoch}: {warning}", file=sys.stderr)


def off_grid_warning(measured: Mapping[str, LayerStats]) -> str:
    """A sentence about the layers with more than `MAX_OFF_GRID` of their inputs off the grid, or ''."""
    far = sorted((name for name in measured if measured[name].off_grid > MAX_OFF_GRID),
                 key=lambda name: -measured[name].off_grid)
    if not far:
        return ""
    worst = measured[far[0]]
    others = f", and more than {MAX_OFF_GRID:.0%} in {len(far) - 1} of the other {len(measured) - 1} layers"
    more = others if len(far) > 1 else ""
    return (f"{worst.off_grid:.1%} of the inputs of {far[0]} fall off its grid [{worst.low:g}, {worst.high:g}]{more}: learned "
            "functions fade out there, a new run with a wider --kan-grid-range would cover them")


def wide_grid_note(measured: Mapping[str, LayerStats]) -> str:
    """A sentence about the layers whose grid is far wider than their inputs (`LayerStats.too_wide`), or ''."""
    wide = sorted((name for name in measured if measured[name].too_wide), key=lambda name: measured[name].used_width)
    if not wide:
        return ""
    worst = measured[wide[0]]
    more = f", and {len(wide) - 1} of the other {len(measured) - 1} layers have such a grid, too" if len(wide) > 1 else ""
    return (f"nine in ten inputs of {wide[0]} lie within [{worst.p5:.2g}, {worst.p95:.2g}], its grid is "
            f"[{worst.low:g}, {worst.high:g}]{more}: few of its {worst.points} points shape the function where the "
            "inputs are, a narrower --kan-grid-range (of all layers) or more --kan-grid-points would put more there")


def _add_histogram(board: "SummaryWriter", tag: str, inputs: InputHistogram, found: LayerStats, epoch: int) -> None:
    counts = inputs.counts.sum(0).cpu()
    full = counts.nonzero().flatten()
    part = slice(int(full[0]), int(full[-1]) + 1)       # TensorBoard draws empty buckets, too
    total = int(counts.sum())
    board.add_histogram_raw(tag, found.smallest, found.largest, total, found.mean * total,
                            (found.std ** 2 + found.mean ** 2) * total, inputs.edges[1:][part].tolist(),
                            counts[part].tolist(), epoch)
