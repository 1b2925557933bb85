"""Draw the training curves of runs, and the functions that the first KAN among them has learned, as a PNG.

    python tools/plot_run.py FOLDER [FOLDER ...] [--output picture.png]
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
from matplotlib.figure import Figure

from tools.common import command, save_picture, tool_parser
from tools.images import loaders_of
from tools.logs import draw_curve, drawable, names_of, read_log
from vision_kan.analysis.drawing import draw_functions
from vision_kan.analysis.inputs import collect_inputs
from vision_kan.checkpoints.read import CHECKPOINT
from vision_kan.common.text import say
from vision_kan.config.parser import Parser
from vision_kan.data.loaders import validation_images
from vision_kan.layers.function_layer import function_layers
from vision_kan.run.trained import load_trained


def plot_runs(folders: list[Path], picture: Path, with_inputs: bool = False) -> Path:
    """Draw loss and top-1 of all runs over the epochs, and below them functions of the first KAN among them.

    with_inputs: also draw histograms of the functions' inputs, for validation images of the checkpoint's data set, which must be
        available."""
    logs = {name: complete for name, folder in zip(names_of(folders), folders) if (complete := drawable(read_log(folder)))}
    models = (load_trained(str(folder / CHECKPOINT), device="cpu") for folder in folders if (folder / CHECKPOINT).is_file())
    kan = next((trained for trained in models if function_layers(trained.model)), None)
    layers = list(function_layers(kan.model).items()) if kan else []
    inputs = collect_inputs(kan.model, [validation_images(loaders_of(kan))]).inputs if kan and with_inputs else {}
    shown = layers if len(layers) <= 4 else [*layers[:2], *layers[-2:]]
    rows = 1 + -(-len(shown) // 2)
    figure = Figure((11, 3.6 * rows), layout="constrained")
    for place, (key, label, dashed) in enumerate([("test_loss", "loss", "train_loss"), ("test_acc1", "top-1 (%)", None)], 1):
        draw_curve(figure.add_subplot(rows, 2, place), logs, key, label, dashed)
    for place, (name, layer) in enumerate(shown, 3):
        draw_functions(figure.add_subplot(rows, 2, place), name, layer, inputs.get(name))
    save_picture(figure, picture)
    return picture


def arguments() -> Parser:
    parser = tool_parser("plot_run.py", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folders of runs")
    parser.add_argument("--output", type=Path, help="the picture (default: curves.png in the first folder)")
    return parser


def run(args: argparse.Namespace, _: list[str]) -> int:
    say(plot_runs(args.folders, args.output or args.folders[0] / "curves.png"))
    return 0


main = command(arguments, run)

if __name__ == "__main__":
    sys.exit(main())
