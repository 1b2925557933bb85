"""Prune a trained KAN: remove the least important hidden units, groups or grid points, and measure the loss of accuracy.

    python tools/prune.py CHECKPOINT TARGET --what hidden --keep-parameters 0.5 --data-path DIR
    python tools/prune.py CHECKPOINT TARGET --what hidden --max-loss 0.5 --data-path DIR
    python tools/prune.py CHECKPOINT TARGET.csv --what hidden --curve [SHARE ...] --data-path DIR

Importance is measured on some training images, top-1 before and after on all validation images. TARGET (.pth or .safetensors) is
a checkpoint for `main.py --eval --resume` and `main.py --finetune`; --curve writes a table and a picture beside it. Further flags
are main.py's (--data-path, --data-set, --seed, --kan-backend ...). See docs/prune.md.
"""
import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import DataLoader, Subset

from engine import evaluate
from models_kan import KAN_OPTIONS, ModelSpec
from tools.common import check_at_least_1, check_not_source, command, model_parser, save_picture
from tools.images import loaders_of, training_images
from vision_kan.analysis.pruning import plans
from vision_kan.analysis.pruning.calibrate import calibrate
from vision_kan.analysis.pruning.plans import KINDS, Hidden, Plan, first_level
from vision_kan.analysis.pruning.rank import random_order
from vision_kan.checkpoints.write import save_pth, save_safetensors
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write
from vision_kan.common.process import Process
from vision_kan.common.text import say, to_builtin_types
from vision_kan.config.parser import Parser
from vision_kan.data.loaders import Loaders
from vision_kan.data.workers import batches
from vision_kan.models.cost import count_flops, count_parameters
from vision_kan.run.folder import versions
from vision_kan.run.trained import Trained, load_trained
from vision_kan.training.precision import choose_amp_dtype

SHARES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
COUNTED = {"hidden": "parameters of the feed-forwards", "edges": "parameters of the feed-forwards",
           "groups": "coefficients of the learned functions", "points": "coefficients of the learned functions"}


class Measured(NamedTuple):
    """A model's cost and its results on the validation images."""
    share: float            # kept, of the prunable parameters
    pruned: int             # prunable parameters kept
    parameters: int         # of the whole model
    matmul_flops: int
    acc1: float
    acc5: float
    loss: float
    images: int


def calibration_loaders(trained: Trained, count: int) -> tuple[DataLoader, DataLoader]:
    """Two loaders of `count` training images each (at most half of all), without an image in both, drawn by --seed."""
    data, args = training_images(trained), trained.args
    count = min(count, len(data) // 2)
    if not count:
        raise UserError(f"there are {len(data)} training images, too few to calibrate with: check --data-path")
    order = np.random.default_rng(args.seed).permutation(len(data)).tolist()
    first, second = (DataLoader(Subset(data, part), args.batch_size) for part in (order[:count], order[count:2 * count]))
    return first, second


def make_plan(trained: Trained, what: str, loader: DataLoader, random: bool) -> Plan:
    """The levels of pruning. Units are removed by their importance for the images of `loader`, or (random) in random order."""
    readable = (images[targets >= 0].to(trained.device) for images, targets in batches(loader))
    calibration = calibrate(trained.model, (images for images in readable if len(images)), trained.args.seed)
    if not calibration.inputs:
        raise UserError("no image to calibrate with can be read: check the data folder")
    plan = plans.make_plan(trained.model, trained.spec, what, calibration)
    if random and isinstance(plan, Hidden):
        plan = Hidden(trained.model, trained.spec, calibration, random_order(plan.removals, trained.args.seed))
    return plan


def accuracy(trained: Trained, model: nn.Module, loader: DataLoader, title: str) -> dict[str, float]:
    return evaluate(model, loader, Process(device=trained.device), title=title,
                    amp_dtype=choose_amp_dtype(trained.args.amp_dtype, trained.device))


def measure(trained: Trained, plan: Plan, model: nn.Module, loader: DataLoader) -> Measured:
    result, left = accuracy(trained, model, loader, "validation"), plan.prunable(model)
    return Measured(left / plan.prunable(trained.model), left, count_parameters(model),
                    count_flops(model).matmul, result["acc1"], result["acc5"], result["loss"], int(result["images"]))


def level_within(plan: Plan, share: float) -> int:
    """The first level that keeps at most `share` of the prunable parameters; len(plan) if there is none."""
    return first_level(plan, lambda level: plan.size(level) <= share * plan.size(0))


def level_losing(trained: Trained, plan: Plan, points: float, loader: DataLoader) -> int:
    """The last level whose top-1 on these images is at most `points` below the model's, by bisection."""
    before = accuracy(trained, trained.model, loader, "held out")["acc1"]

    def loses_more(level: int) -> bool:
        if not level:
            return False
        acc1 = accuracy(trained, plan.build(level)[0], loader, "held out")["acc1"]
        say(f"{plan.size(level) / plan.size(0):.1%} kept: {acc1 - before:+.2f} points on the held-out images")
        return acc1 < before - points - 1e-9

    return first_level(plan, loses_more) - 1


def header(what: str) -> str:
    return f"{'':8}{'top-1':>8}{'top-5':>8}{'loss':>8}{'parameters':>14}{'matmul MFLOPs':>15}  {COUNTED[what]}"


def line(name: str, row: Measured, changed: str = "") -> str:
    return (f"{name:8}{row.acc1:>8.2f}{row.acc5:>8.2f}{row.loss:>8.3f}{row.parameters:>14,}{row.matmul_flops / 1e6:>15,.2f}"
            f"  {row.pruned:,} ({row.share:.1%})  {changed}").rstrip()


def what_changed(before: ModelSpec, after: ModelSpec) -> str:
    """The arguments in which the smaller model differs: `hdim_kan 104 120 104 160`."""
    changed = {key: value for key, value in after.kwargs.items() if before.kwargs.get(key) != value}
    return ", ".join(f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in changed.items())


def save(model: nn.Module, spec: ModelSpec, trained: Trained, loaders: Loaders, target: Path) -> None:
    """Write the checkpoint, .pth or .safetensors, completely or not at all."""
    options = {key: spec.kwargs[key] for key in KAN_OPTIONS if key in spec.kwargs}
    about: dict[str, Any] = {
        "model_args": to_builtin_types({"name": spec.name, "kwargs": spec.kwargs}), "class_names": loaders.class_names,
        "args": to_builtin_types({**trained.about.get("args", {}), "model": spec.name, "input_size": trained.args.input_size,
                                  **options, "data_set": loaders.data_set, "nb_classes": loaders.nb_classes}),
        "versions": versions()}
    if target.suffix == ".safetensors":
        save_safetensors(model.state_dict(), about, target)
    else:
        save_pth({"model": dict(model.state_dict()), **about}, target)


# ---------------------------------------------------------------- the curve
def write_curve(rows: list[Measured], what: str, target: Path, title: str) -> Path:
    """Write TARGET.csv with a line for each row, and a picture beside it. Returns the picture's path."""
    picture = target.with_suffix(".png")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([row.pruned for row in rows], [row.acc1 for row in rows], marker="o", markersize=4)
    axes.axhline(rows[0].acc1, linestyle="--", color="black", linewidth=0.8, label="the model as it is")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.secondary_xaxis("top", functions=(lambda x: np.divide(x, rows[0].pruned), lambda x: np.multiply(x, rows[0].pruned))
                         ).set_xlabel("share")
    axes.set_xlabel(COUNTED[what])
    axes.set_ylabel(f"top-1 (%) on {rows[0].images:,} images")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(target) as place, open(place, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Measured._fields, *(
            [f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)])
    save_picture(figure, picture)
    plt.close(figure)
    return picture


def draw_curve(own: argparse.Namespace, trained: Trained, plan: Plan, loaders: Loaders) -> None:
    levels = sorted({0, *(min(level_within(plan, share), len(plan) - 1) for share in own.curve or SHARES)})
    rows = []
    say(header(own.what))
    for level in levels:
        model, spec = plan.build(level)
        rows.append(measure(trained, plan, model, loaders.val))
        loaders.check_unreadable()
        say(line("", rows[-1], what_changed(trained.spec, spec)))
    what = {"hidden": "hidden units", "edges": "hidden units, by their edges", "points": "grid points"}.get(own.what, own.what)
    how = "in random order" if own.random else "the least important first"
    picture = write_curve(rows, own.what, own.target, f"{trained.spec.name} with fewer {what}: {how}")
    say(f"{own.target}, {picture}")


# ---------------------------------------------------------------- the command
def arguments() -> Parser:
    parser = model_parser("prune.py", __doc__)
    parser.add_argument("target", metavar="TARGET", type=Path, help="file to write: .pth or .safetensors; .csv with --curve")
    parser.add_argument("--what", required=True, choices=KINDS,
                        help="hidden: hidden units; edges: the units of a full-edge KAN whose edges are all weak; groups or "
                        "points: groups or grid points of the learned functions")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep-parameters", type=float, metavar="SHARE", help="share to keep, at most, of the feed-forwards' "
                        "parameters (hidden, edges) or of the functions' coefficients (groups, points)")
    budget.add_argument("--max-loss", type=float, metavar="POINTS", help="largest loss of top-1 on held-out training images; "
                        "bisection finds the smallest model")
    budget.add_argument("--curve", type=float, nargs="*", metavar="SHARE", help="top-1 at several shares (0.9 to 0.1)")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="training images to calibrate on, and the same "
                        "number of others for --max-loss (default: %(default)s)")
    parser.add_argument("--random", action="store_true", help="remove units in random order, as a baseline")
    return parser


def check(own: argparse.Namespace) -> None:
    suffixes = (".csv",) if own.curve is not None else (".pth", ".safetensors")
    if own.target.suffix not in suffixes:
        raise UserError(f"TARGET {own.target} must end in {' or '.join(suffixes)}")
    for flag, shares in (("--keep-parameters", [own.keep_parameters]), ("--curve", own.curve or [])):
        for share in shares:
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{flag} {share:g} must be greater than 0 and at most 1: it is the share to keep")
    if own.max_loss is not None and not 0 <= own.max_loss < 100:
        raise UserError(f"--max-loss {own.max_loss:g} must be at least 0 and below 100: it is in points of top-1")
    check_at_least_1(own, "images")
    if own.random and own.what not in ("hidden", "edges"):
        raise UserError(f"--random removes units, and --what {own.what} removes none: leave it out")


def run(own: argparse.Namespace, flags: list[str]) -> int:
    check(own)
    trained = load_trained(own.checkpoint, weights=own.weights, device=own.device, flags=flags)
    check_not_source(own.target, trained.path)
    plans.check(trained.spec, own.what)
    loaders = loaders_of(trained)
    calibration, held_out = calibration_loaders(trained, own.images)
    plan = make_plan(trained, own.what, calibration, own.random)
    if own.curve is not None:
        draw_curve(own, trained, plan, loaders)
        return 0
    if own.keep_parameters is not None:
        level = level_within(plan, own.keep_parameters)
        if level == len(plan):
            least = math.ceil(1000 * plan.size(level - 1) / plan.size(0)) / 1000
            raise UserError(f"--keep-parameters {own.keep_parameters:g} is out of reach with --what {own.what}, which keeps "
                            f"{least:g} at least: give {least:g} or more")
    else:
        level = level_losing(trained, plan, own.max_loss, held_out)
    if not level:
        raise UserError("nothing can be removed within the budget, and nothing was written: raise --max-loss"
                        if own.max_loss is not None else
                        f"--keep-parameters {own.keep_parameters:g} keeps all, and nothing was written: give a smaller share")
    model, spec = plan.build(level)
    before, after = (measure(trained, plan, net, loaders.val) for net in (trained.model, model))
    loaders.check_unreadable()
    say("\n".join([header(own.what), line("before", before), line("after", after)]))
    lost = before.acc1 - after.acc1
    if own.max_loss is not None and lost > own.max_loss:
        say(f"note: on the validation images it is {lost:.2f} points, more than --max-loss {own.max_loss:g}: the held-out "
            "images are training images, which the model has learned", file=sys.stderr)
    save(model, spec, trained, loaders, own.target)
    say(f"{own.target}: {spec.name}, {what_changed(trained.spec, spec)}")
    return 0


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
