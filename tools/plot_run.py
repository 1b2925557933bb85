"""Training curves of one or several runs, and the functions that their KANs have learned, as a PNG.

    python tools/plot_run.py FOLDER [FOLDER ...] [--output picture.png]
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.common import loaders_of
from vision_kan.analysis.arriving import collect_inputs
from vision_kan.analysis.drawing import draw_functions, png
from vision_kan.checkpoints.read import CHECKPOINT
from vision_kan.common import peers
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write
from vision_kan.common.text import say
from vision_kan.config.parser import Parser
from vision_kan.data.loaders import validation_images
from vision_kan.layers.function_layer import function_layers
from vision_kan.run.trained import load_trained


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.txt, one an epoch; a last line that a kill cut off is left out.

    UserError where there is no log, no finished epoch, or something else."""
    log = folder / "log.txt"
    if not log.is_file():
        raise UserError(f"{folder} holds no log.txt: name the --output_dir of a run")
    lines, records = log.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            records.append({**json.loads(line), "epoch": int(json.loads(line)["epoch"])})
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines) or not records:
                raise UserError(f"{log} line {number} is no epoch of a training: name the --output_dir of a "
                                "run") from error
    if not records:
        raise UserError(f"{log} holds no finished epoch yet: wait for the first one")
    return records


def names_of(folders: list[Path]) -> list[str]:
    """Names of folders in a legend: as short as keeps them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def draw_curve(axes: Axes, logs: dict[str, list[dict]], key: str, label: str, dashed: str | None = None) -> None:
    """`key` of every run over its epochs; `dashed`: a second key, in the same colour."""
    for name, records in logs.items():
        line, = axes.plot([r["epoch"] + 1 for r in records], [r[key] for r in records], label=name, marker=".",
                          markersize=3)
        if dashed:
            axes.plot([r["epoch"] + 1 for r in records], [r[dashed] for r in records], "--", color=line.get_color(),
                      label=f"{name} (training)")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)     # type: ignore[call-arg]  # of matplotlib's stubs
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()


def plot_runs(folders: list[Path], picture: Path, arriving: bool = False) -> Path:
    """Draw loss and top-1 of all runs over the epochs, below them functions of the first KAN among them.

    arriving: over what arrives at them from validation images of the checkpoint's data set, which is at hand."""
    logs = {name: read_log(folder) for name, folder in zip(names_of(folders), folders)}
    models = (load_trained(str(folder / CHECKPOINT), device="cpu") for folder in folders if (folder / CHECKPOINT).is_file())
    kan = next((trained for trained in models if function_layers(trained.model)), None)
    layers = list(function_layers(kan.model).items()) if kan else []
    inputs = collect_inputs(kan.model, [validation_images(loaders_of(kan))]).inputs if kan and arriving else {}
    shown = layers if len(layers) <= 4 else [*layers[:2], *layers[-2:]]
    rows = 1 + -(-len(shown) // 2)
    figure = Figure((11, 3.6 * rows), layout="constrained")
    for place, (key, label, dashed) in enumerate([("test_loss", "loss", "train_loss"), ("test_acc1", "top-1 (%)", None)], 1):
        draw_curve(figure.add_subplot(rows, 2, place), logs, key, label, dashed)
    for place, (name, layer) in enumerate(shown, 3):
        draw_functions(figure.add_subplot(rows, 2, place), name, layer, inputs.get(name))
    with atomic_write(picture) as file:
        file.write_bytes(png(figure, dpi=110))
    return picture


def run(argv: list[str]) -> int:
    parser = Parser("plot_run.py", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folders of runs")
    parser.add_argument("--output", type=Path, help="the picture (default: curves.png in the first folder)")
    args = parser.parse_args(argv)
    say(plot_runs(args.folders, args.output or args.folders[0] / "curves.png"))
    return 0


def main(argv: list[str] | None = None) -> int:
    return peers.exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
