"""Report what a checkpoint has learned and attends to: an HTML report in one file, and pictures.

    python tools/inspect_kan.py CHECKPOINT [IMAGE|FOLDER ...] [--data-path DIR] [--compare OTHER] [--output FOLDER]

It shows the learned functions over the histogram of their inputs, the share of inputs off the grid, the distance of each function
from its base; attention maps and rollout; a table of the blocks. Inputs are measured on validation images of --data-path, or else
on the images given; attention is shown on the images given, or else on some of the validation images.
"""
import argparse
import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import jinja2
import torch
from matplotlib.figure import Figure
from timm.layers import to_2tuple
from torch import Tensor

from tools.common import check_at_least_1, command, model_parser, png
from tools.images import loaders_of
from vision_kan.analysis.attention import attention_panels, draw_attention
from vision_kan.analysis.drawing import functions_figure
from vision_kan.analysis.functions import chosen_layers
from vision_kan.analysis.inputs import ActivationStats, collect_inputs
from vision_kan.analysis.measures import DEAD_GAIN, LayerStats, measure
from vision_kan.analysis.training_log import off_grid_warning, wide_grid_note
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write
from vision_kan.common.text import say, warn
from vision_kan.config.parser import Parser
from vision_kan.data.images import ImageSet
from vision_kan.data.loaders import evenly_spaced, validation_images
from vision_kan.models.cost import count_parameters
from vision_kan.run.trained import (
    Pictures,
    Trained,
    default_output,
    denormalised,
    describe_result,
    image_files,
    load_trained,
)

SAMPLES = 256       # images on which inputs are measured
SHOWN = 6           # images whose attention is shown


@dataclass
class Findings:
    """The report's content for one checkpoint."""
    trained: Trained
    collected: ActivationStats
    measured: dict[str, LayerStats]
    functions: Figure | None
    attention: list[Figure] = field(default_factory=list)       # one per image
    without_attention: str = ""                                 # a sentence why there is none


# ---------------------------------------------------------------- measuring
def inspect(trained: Trained, files: Sequence[Path], samples: int, names: Sequence[str]) -> Findings:
    """Measure one checkpoint. files: images to look at. samples: images to measure inputs on. names: of the layers to show, all
    without."""
    layers = chosen_layers(trained.model, names)
    loaders = loaders_of(trained) if trained.has_data else None
    images, indices = _read(trained, files := evenly_spaced(files, SHOWN if loaders else samples))
    titles = [files[index].name for index in indices.tolist()]
    calibration = validation_images(loaders, samples) if loaders else images
    collected = collect_inputs(trained.model, calibration.split(32) if len(calibration) else ())
    measured = {name: measure(layer, collected.inputs[name]) for name, layer in layers.items()
                if name in collected.inputs}
    found = Findings(trained, collected, measured,
                     functions_figure(layers, collected.inputs) if layers else None)
    shown = evenly_spaced(list(zip(images, titles)), SHOWN)
    if loaders and not files:
        data: ImageSet = loaders.val.dataset
        items = [(index, *data[index]) for index in evenly_spaced(range(len(data)), SHOWN)]
        shown = [(image, f"{Path(data.images.name(index)).name}: {trained.class_names[target]}")
                 for index, image, target in items if target >= 0]
    if not shown:
        found.without_attention = "no image was given: name some, or give --data-path"
    try:
        found.attention = [_attention(trained, image, title) for image, title in shown]
    except UserError as error:
        found.without_attention = str(error)
    return found


def _read(trained: Trained, files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    if not files:
        return torch.zeros(0, 3, *to_2tuple(trained.args.input_size)), torch.zeros(0, dtype=torch.int64)
    read = list(Pictures(files, trained.args, workers=0))
    if not read:
        raise UserError(f"none of the {len(files)} images can be read: name others")
    images, indices = zip(*read)
    return torch.cat(images), torch.cat(indices)


def _attention(trained: Trained, image: Tensor, title: str) -> Figure:
    if trained.class_names:
        with torch.inference_mode():
            share, number = trained.model(image[None].to(trained.device)).softmax(-1)[0].max(-1)
        title += f"\n→ {trained.class_names[number].partition(',')[0]} ({share:.0%})"
    title = "".join(c if c.isprintable() or c == "\n" else "?" for c in title)       # file names may contain any character
    return draw_attention(denormalised(image, trained.args), attention_panels(trained.model, image), title)


def share_limits(a: Figure, b: Figure) -> None:
    """Give panels of the same layer the same axis limits, so that two pictures can be compared by eye."""
    ours, theirs = ({axes.get_label(): axes for axes in figure.axes if axes.get_label()} for figure in (a, b))
    for name in ours.keys() & theirs.keys():
        for which in ("x", "y"):
            limits = [getattr(axes, f"get_{which}lim")() for axes in (ours[name], theirs[name])]
            for axes in (ours[name], theirs[name]):
                axes.set(**{f"{which}lim": (min(low for low, _ in limits), max(high for _, high in limits))})


# ---------------------------------------------------------------- tables
def about(found: Findings) -> list[list[str]]:
    trained = found.trained
    options = ", ".join(f"{key} {value}" for key, value in trained.spec.kwargs.items())
    rows = [["checkpoint", trained.path], ["model", trained.spec.name], ["options", options or "none"],
            ["parameters", f"{count_parameters(trained.model):,}"]]
    epoch = trained.about.get("epoch")
    if type(epoch) is int:
        rows.append(["epochs done", str(epoch + 1)])
    if trained.results:
        rows.append(["evaluated", describe_result(trained.results)])
    images = f"{found.collected.images} images" if found.collected.images else \
        "no images: functions are drawn without their inputs (name images, or give --data-path)"
    return [*rows, ["measured on", images]]


def blocks_table(found: Findings) -> list[list[str]]:
    outputs = found.collected.outputs
    blocks = [name.removesuffix(".mlp") for name in outputs if name.endswith(".mlp")]
    return [["block", "attention", "feed-forward", "leaves the block"],
            *([name, *(f"{outputs[name + part]:.3g}" for part in (".attn", ".mlp", ""))] for name in blocks)] if blocks else []


def layers_table(found: Findings) -> list[list[str]]:
    rows = [["layer", "functions", "grid", "inputs", "smallest, 5%, 95%, largest", "off the grid", "distance", "furthest", "gain",
             "dead"]]
    for name, layer in found.measured.items():
        spread = ", ".join(f"{value:.2f}" for value in (layer.smallest, layer.p5, layer.p95, layer.largest))
        distances = ["–" if value is None else f"{value:.3g}" for value in (layer.distance, layer.furthest)]
        grid, off = ("–", "–") if not layer.points else (f"{layer.points} on [{layer.low:.3g}, {layer.high:.3g}]",
                                                         f"{layer.off_grid:.1%}")
        rows.append([name, f"{layer.functions:,}", grid, f"{layer.mean:.2f} ± {layer.std:.2f}", spread, off, *distances,
                     f"{layer.gain.min():.2g} to {layer.gain.max():.2g}",
                     f"{layer.dead} of {len(layer.gain)} {layer.units}"])
    return rows if found.measured else []


# ---------------------------------------------------------------- the page
NOTES = {
    "Blocks":
        "Root mean square of what the attention and the feed-forward of each block add (before any layer scale), and of the "
        "block's output.",
    "Layers of learned functions":
        "Inputs: mean and deviation; 5%, 95%: percentiles. Off the grid: the share of inputs beyond the first or last grid "
        "point, where learned functions fade out. Distance: root mean square, over the inputs, of function minus base (in a "
        "full-edge KAN with a base branch: of the spline), the mean and the maximum over the functions. Gain: deviation of the "
        "outputs of a group (in a full-edge KAN: of an input, over all its edges), relative to that of its inputs; dead: below "
        f"{DEAD_GAIN:g}.",
    "Learned functions":
        "Group KAN: each group's function over its base (dashed). Full-edge KAN: the edges whose functions vary most over the "
        "inputs, exact from the weights. The range leaves out a thousandth of the inputs on either side. Grey lines: grid "
        "points; blue: histogram of the inputs; dotted: their 5th and 95th percentile.",
    "Attention":
        "Rollout (arXiv:2005.00928): the product over the blocks of (attention + identity)/2, averaged over heads. Then the "
        "attention in each block, averaged over heads, and in each head of the last block: the class token's, or the mean over "
        "the patches in a model without one. Each panel ranges from a patch's smallest share (dark) to the largest (bright); its "
        "title gives both."}


TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                               lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def page(columns: Sequence[Findings], pictures: Sequence[dict[str, bytes]]) -> str:
    """The report on one checkpoint, or on two side by side, as HTML. pictures: file name -> PNG, for each."""
    no_images = "not measured: no images were given"
    return TEMPLATES.get_template("report.html.jinja").render(notes=NOTES, columns=[{
        "path": found.trained.path, "model": found.trained.spec.name, "about": about(found),
        "warning": off_grid_warning(found.measured), "note": wide_grid_note(found.measured),
        "blocks": blocks_table(found), "without_blocks": "no transformer blocks" if found.collected.images else no_images,
        "layers": layers_table(found), "without_layers": no_images if found.functions else "no learned functions",
        "has_functions": found.functions is not None, "without_attention": found.without_attention,
        "pictures": {name: base64.b64encode(png).decode() for name, png in drawn.items()},
    } for found, drawn in zip(columns, pictures)])


def write(columns: Sequence[Findings], folder: Path) -> Path:
    """Write the pictures and report.html to the folder, replacing files of these names. Returns the report's path."""
    pictures = []
    for prefix, found in zip(("", "other_"), columns):
        figures = ({f"{prefix}functions.png": found.functions} if found.functions else {}) | {
            f"{prefix}attention_{number}.png": figure for number, figure in enumerate(found.attention, 1)}
        pictures.append({name: png(figure, dpi=90) for name, figure in figures.items()})
    for name, content in (item for drawn in pictures for item in drawn.items()):
        with atomic_write(folder / name) as file:
            file.write_bytes(content)
    report = folder / "report.html"
    with atomic_write(report) as file:
        file.write_text(page(columns, pictures), encoding="utf-8", errors="replace")
    return report


# ---------------------------------------------------------------- the command
def arguments() -> Parser:
    parser = model_parser("inspect_kan.py", __doc__)
    parser.add_argument("images", nargs="*", type=Path, default=[], metavar="IMAGE",
                        help="images or folders of images to show attention on")
    parser.add_argument("--data-path", metavar="DIR", help="data set on whose validation images inputs are measured")
    parser.add_argument("--data-set", metavar="NAME", help="as main.py's, if the folder does not show it")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N",
                        help="images to measure inputs on, at most (default: %(default)s)")
    parser.add_argument("--layer", action="append", metavar="NAME",
                        help="show only this layer or block, such as blocks.3 or blocks.3.mlp.phi2; may be repeated")
    parser.add_argument("--compare", metavar="OTHER", help="a second checkpoint, shown beside the first")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: CHECKPOINT's name with _inspect at its end")
    return parser


def run(args: argparse.Namespace, _: list[str]) -> int:
    check_at_least_1(args, "samples")
    flags = [word for flag in ("data_path", "data_set") if getattr(args, flag) for word in (f"--{flag}", getattr(args, flag))]
    columns = []
    for place in filter(None, (args.checkpoint, args.compare)):
        trained = load_trained(place, weights=args.weights, device=args.device, flags=flags)
        columns.append(inspect(trained, image_files(args.images), args.samples, args.layer or ()))
    figures = [found.functions for found in columns if found.functions]
    if len(figures) == 2:
        share_limits(*figures)
    report = write(columns, args.output or default_output(args.checkpoint, "_inspect"))
    for found in columns:
        if warning := off_grid_warning(found.measured):
            warn(f"{found.trained.path}: {warning}")
    say(report)
    return 0


main = command(arguments, run)

if __name__ == "__main__":
    sys.exit(main())
