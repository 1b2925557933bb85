"""Fit formulas to the functions that a KAN has learned.

    python tools/symbolic.py CHECKPOINT [--data-path DIR | --images FOLDER] [--output FOLDER]
    python tools/symbolic.py CHECKPOINT --data-path DIR --replace TARGET.safetensors

Each function of a group KAN, or of the strongest edges of each layer of a full-edge KAN, is fitted by a*f(b*u + c) + d*u + e with
f one of `FORMS`, or by a polynomial up to degree 5, weighted by the inputs on real images. --replace replaces the functions of a
group KAN by their formulas, evaluates the model before and after, and saves the nearest model that main.py can read. Further
flags are main.py's (--data-set, --batch-size, ...).
"""
import argparse
import csv
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import matplotlib

matplotlib.use("Agg")
import numpy as np
import sympy
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from engine import evaluate, summary
from tools.common import check_at_least_1, check_not_source, chooses_images, command, model_parser
from tools.images import loaders_of
from vision_kan.analysis.formulas import DEFINITIONS
from vision_kan.analysis.symbolic import Learned, find_formulas, with_fitted_basis, with_formulas
from vision_kan.checkpoints.write import save_safetensors
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write
from vision_kan.common.process import Process
from vision_kan.common.text import say, to_builtin_types, to_json
from vision_kan.config.flags import FLAGS
from vision_kan.config.parser import Parser
from vision_kan.data.images import ImageSet
from vision_kan.data.loaders import evenly_spaced
from vision_kan.data.workers import batches
from vision_kan.layers.function_layer import function_layers
from vision_kan.run.trained import Pictures, Trained, image_files, load_trained


def replace_functions(trained: Trained, found: Sequence[Learned], target: Path) -> str:
    """Evaluate a group KAN with its functions, with their formulas, and with the nearest functions in its basis, which are saved
    to `target` for `main.py --eval`. Returns the table of the three."""
    loaders, process = loaders_of(trained), Process(device=trained.device)
    fitted, fits = with_fitted_basis(trained.model, found)
    about = {"model_args": to_builtin_types({"name": trained.spec.name, "kwargs": trained.spec.kwargs}),
             "args": to_builtin_types({dest: value for dest, value in vars(trained.args).items()
                                       if FLAGS[dest].scope == "model" or chooses_images(dest)})}
    if trained.about.get("class_names"):
        about["class_names"] = trained.about["class_names"]
    lines = [summary(f"{title:17}", evaluate(model, loaders.val, process)) for title, model in (
        ("learned functions", trained.model), ("their formulas", with_formulas(trained.model, found)), ("saved", fitted))]
    loaders.check_unreadable(gather=True)
    save_safetensors(fitted.state_dict(), about, target)
    return "\n".join([*lines, f"{target}: {trained.spec.name}, its functions are the formulas fitted by the grid's basis (R^2 "
                      f"{min(fits):.4f} or more, half of them {float(np.median(fits)):.6f} or more)"])


# ---------------------------------------------------------------- reports
def _is_edge(found: Sequence[Learned]) -> bool:
    return "->" in found[0].function


def rows(found: Sequence[Learned]) -> list[dict]:
    """A record of each function for the CSV and JSON files."""
    name = "edge" if _is_edge(found) else "group"
    return [{"block": each.block, "activation": each.layer, name: each.function, "formula": each.formula.text,
             "r2": each.formula.r2, "residual": each.formula.residual, "complexity": each.formula.complexity,
             "form": each.formula.form, "a": each.formula.a, "b": each.formula.b, "c": each.formula.c,
             "polynomial": list(each.formula.polynomial), "latex": each.formula.latex} for each in found]


def table(found: Sequence[Learned]) -> str:
    lines = [["block", "activation", "edge" if _is_edge(found) else "group", "R^2", "residual", "formula"]]
    lines += [[each.block, each.layer, each.function, f"{each.formula.r2:.5f}", f"{each.formula.residual:.2g}",
               each.formula.text] for each in found]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines)


def latex_table(found: Sequence[Learned]) -> str:
    """A longtable to include in a LaTeX document."""
    edge = _is_edge(found)
    lines = [r"% \usepackage{amsmath, longtable}", r"\begin{longtable}{lllrl}",
             rf"block & activation & {'edge' if edge else 'group'} & $R^2$ & $\varphi(u)$ \\ \hline"]
    for each in found:
        function = each.function.replace("->", r"\to")
        lines.append(rf"{each.block} & \verb|{each.layer}| & ${function}$ & {each.formula.r2:.4f} & ${each.formula.latex}$ \\")
    lines += [r"\end{longtable}", r"\noindent Here "
              + ", ".join(rf"$\operatorname{{{name}}}(x) = {sympy.latex(value)}$" for name, value in DEFINITIONS.items()) + "."]
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Learned], picture: Path) -> None:
    """Draw the functions of each module, their formulas dashed, and the range of nine of ten inputs."""
    parts = list(dict.fromkeys(each.part for each in found))
    columns = min(4, len(parts))
    lines = -(-len(parts) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.4 * lines), squeeze=False, layout="constrained")
    for axis, part in zip(axes.flat, parts):
        for each in (each for each in found if each.part == part):
            u, order = each.u.sort()
            line, = axis.plot(u, each.y[order], linewidth=2.4, alpha=0.45, label=each.function)
            axis.plot(u, each.formula(u), "--", color=line.get_color(), linewidth=1.1)
        inputs = torch.cat([each.u[each.weight == each.weight.max()] for each in found if each.part == part])
        axis.axvspan(*inputs.quantile(torch.tensor([0.05, 0.95]).double()).tolist(), color="grey", alpha=0.12, linewidth=0)
        worst = min(each.formula.r2 for each in found if each.part == part)
        axis.set_title(f"{part}: R² {worst:.4f} or more", fontsize=9)
        axis.set_xlabel("input u (grey: nine of ten)", fontsize=8)
        axis.set_ylabel("φ(u), dashed: its formula", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if (count := len(axis.get_legend_handles_labels()[1])) <= 48:     # more colours cannot be told apart
            axis.legend(fontsize=6, title="edge" if _is_edge(found) else "group", title_fontsize=6, ncols=-(-count // 16),
                        loc="center left", bbox_to_anchor=(1, 0.5), borderaxespad=0.3)      # outside, so that it hides no curve
    for axis in list(axes.flat)[len(parts):]:
        axis.remove()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def report(found: Sequence[Learned], folder: Path) -> None:
    """Write formulas.txt, .csv, .json, .tex and .png to a folder."""
    sheet = io.StringIO()
    records = rows(found)
    writer = csv.DictWriter(sheet, records[0])
    writer.writeheader()
    writer.writerows(records)
    texts = {".txt": table(found) + "\n", ".csv": sheet.getvalue(), ".json": to_json(records, indent=1) + "\n",
             ".tex": latex_table(found)}
    for suffix, text in texts.items():
        with atomic_write(folder / f"formulas{suffix}") as file:
            file.write_text(text, encoding="utf-8")
    with atomic_write(folder / "formulas.png") as file:
        draw(found, file)


# ---------------------------------------------------------------- the command
def _images(trained: Trained, folder: Path | None, limit: int) -> tuple[Iterable[Tensor] | None, int]:
    """Batches of up to `limit` images, evenly spaced, and the number of batches; (None, 0) without images."""
    if folder:
        files = image_files([folder])
        pictures = Pictures(evenly_spaced(files, limit), trained.args)
        return (images for images, _ in pictures), -(-len(pictures) // 64)
    if not trained.has_data:
        return None, 0
    data: ImageSet = loaders_of(trained).val.dataset
    some = Subset(data, evenly_spaced(range(len(data)), limit))
    loader = DataLoader(some, 64, generator=torch.Generator())
    return (images[targets >= 0] for images, targets in batches(loader) if (targets >= 0).any()), len(loader)


def arguments() -> Parser:
    parser = model_parser("symbolic.py", __doc__)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images whose inputs to the functions weight the fits "
                        "(default: the validation images of --data-path; without images the grid is weighted evenly)")
    parser.add_argument("--limit", type=int, default=512, metavar="N",
                        help="number of these images, evenly spaced (default: 512)")
    parser.add_argument("--edges", type=int, default=6, metavar="N",
                        help="number of edges in each layer of a full-edge KAN, the strongest (default: 6)")
    parser.add_argument("--parsimony", type=float, default=2.0, metavar="FACTOR", help="each further number in a formula must "
                        "divide the unexplained rest by this factor; near 1 gives the closest fits (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FOLDER",
                        help="write the table as text, CSV, JSON and LaTeX, and a picture")
    parser.add_argument("--replace", type=Path, metavar="TARGET",
                        help="replace the functions by the formulas, evaluate, and save the nearest model that main.py reads "
                        "(.safetensors; group KAN)")
    return parser


def run(own: argparse.Namespace, flags: list[str]) -> int:
    check_at_least_1(own, "limit", "edges")
    if not 1 < own.parsimony < math.inf:
        raise UserError(f"--parsimony {own.parsimony:g} must be more than 1")
    if own.replace and own.replace.suffix != ".safetensors":
        raise UserError(f"--replace {own.replace} must end in .safetensors")
    trained = load_trained(own.checkpoint, weights=own.weights, device=own.device, flags=flags)
    layers = function_layers(trained.model).values()
    if own.replace:
        check_not_source(own.replace, trained.path)
    if own.replace and all(layer.per_edge for layer in layers):
        raise UserError(f"--replace puts formulas in place of a group KAN's functions, and {trained.path} holds "
                        f"{trained.spec.name}: leave it out")
    if own.replace and not all(layer.takes_weights for layer in layers):
        raise UserError(f"--replace fits each function's coefficients to its formula, and in {trained.spec.name} all groups "
                        "share some of theirs: leave it out")
    if own.replace and not trained.has_data:
        raise UserError("--replace evaluates the model before and after: name its data with --data-path DIR")
    images, rounds = _images(trained, own.images, own.limit)
    say("weighted by the inputs on these images" if images else "no images: the grid is weighted evenly (see --images)")
    found = find_formulas(trained, images, rounds, own.edges, own.parsimony)
    say(table(found))
    if own.output:
        report(found, own.output)
        say(f"{own.output}: formulas.txt, .csv, .json, .tex and .png")
    if own.replace:
        say(replace_functions(trained, found, own.replace))
    return 0


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
