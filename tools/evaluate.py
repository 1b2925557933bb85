"""Evaluate a trained model in detail: accuracy by class, confusions, calibration, worst mistakes.

    python tools/evaluate.py CHECKPOINT --data-path DIR [--output FOLDER] [--weights model_ema]

Accuracy and loss are those of `main.py --eval`. Further flags are main.py's (--data-set, --batch-size, --num_workers, ...).
FOLDER (by default beside the checkpoint) gets report.json with everything, classes.csv, confusion.png, reliability.png and
mistakes.png.
"""
import argparse
import csv
import heapq
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from engine import evaluate, summary
from tools.common import command, model_parser, save_picture
from tools.images import loaders_of
from vision_kan.common.files import atomic_write
from vision_kan.common.process import Process
from vision_kan.common.text import printable, to_json
from vision_kan.config.parser import Parser
from vision_kan.data.images import Images, ImageSet
from vision_kan.run.folder import versions
from vision_kan.run.trained import Trained, default_output, denormalised, load_trained

BINS = 15           # of the calibration error, as in Guo et al.
MISTAKES = 24       # on the contact sheet
CONFUSIONS = 20     # pairs of classes to list
LABELLED = 40       # up to this number of classes the confusion matrix names each
BLOCKS = 100        # maximum number of rows of its picture


@dataclass
class Mistake:
    index: int          # of the image in the data set
    target: int
    predicted: int
    confidence: float
    image: Tensor       # float32 [3, H, W], the model's input


@dataclass
class Tally:
    """Sums over the images of an evaluation, in memory that does not grow with their number.

    confusion: int64 [C, C], images of class row predicted as class column.
    top5: int64 [C], images of a class that is among the five first choices.
    bins: float64 [3, BINS], of the images with confidence in (b / BINS, (b + 1) / BINS]: number, number of correct ones, sum of
        confidences.
    mistakes: a heap of the `MISTAKES` most confident mistakes."""
    num_classes: int
    seen: int = 0
    mistakes: list[tuple[float, int, Mistake]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        self.top5 = np.zeros(self.num_classes, dtype=np.int64)
        self.bins = np.zeros((3, BINS))

    def add(self, images: Tensor, outputs: Tensor, targets: Tensor, readable: Tensor) -> None:
        """Add a batch; `on_batch` of `engine.evaluate`."""
        indices = self.seen + readable.nonzero().flatten().numpy()
        self.seen += len(readable)
        if not len(targets):
            return
        outputs, classes = outputs.float().cpu(), targets.cpu().numpy()
        best = outputs.topk(min(5, self.num_classes)).indices.numpy()
        confidence = outputs.double().softmax(1).amax(1).numpy()
        predicted = best[:, 0]
        np.add.at(self.confusion, (classes, predicted), 1)
        np.add.at(self.top5, classes[(best == classes[:, None]).any(1)], 1)
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        for sums, values in zip(self.bins, (1.0, predicted == classes, confidence)):
            np.add.at(sums, bins, values)
        for row in np.flatnonzero(predicted != classes):
            entry = (float(confidence[row]), -int(indices[row]))        # at equal confidence the first image wins
            if len(self.mistakes) < MISTAKES or entry > self.mistakes[0][:2]:
                mistake = Mistake(int(indices[row]), int(classes[row]), int(predicted[row]), entry[0], images[row].float().cpu())
                (heapq.heappush if len(self.mistakes) < MISTAKES else heapq.heapreplace)(self.mistakes, (*entry, mistake))

    @property
    def worst(self) -> list[Mistake]:
        """The mistakes, the most confident first."""
        return [mistake for *_, mistake in sorted(self.mistakes, key=lambda entry: entry[:2], reverse=True)]

    def calibration(self) -> dict[str, Any]:
        """Expected and maximum calibration error, in shares of 1, and the bins. The errors are the mean (weighted by images) and
        the maximum of |accuracy - confidence| over the bins (Guo et al. 2017, arXiv:1706.04599, equations 3 and 5)."""
        images, correct, confidence = self.bins
        filled = images > 0
        gap = np.abs(correct - confidence)[filled]
        return {"ece": float(gap.sum() / images.sum()), "mce": float((gap / images[filled]).max()),
                "mean_confidence": float(confidence.sum() / images.sum()),
                "bins": [{"from": b / BINS, "to": (b + 1) / BINS, "images": int(images[b]),
                          "accuracy": float(correct[b] / images[b]) if images[b] else None,
                          "confidence": float(confidence[b] / images[b]) if images[b] else None} for b in range(BINS)]}

    def per_class(self, names: list[str]) -> list[dict[str, Any]]:
        """A row for each class: recall as `top1` and `top5`, and precision, in percent; None without images."""
        images, predicted, correct = self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal()

        def percent(part: np.ndarray, of: np.ndarray, c: int) -> float | None:
            return 100 * float(part[c] / of[c]) if of[c] else None

        return [{"class": c, "name": names[c], "images": int(images[c]), "top1": percent(correct, images, c),
                 "top5": percent(self.top5, images, c), "predicted": int(predicted[c]),
                 "precision": percent(correct, predicted, c)} for c in range(self.num_classes)]

    def confusions(self) -> list[tuple[int, int, int]]:
        """(class, predicted class, images) of all confused pairs, the most frequent first."""
        wrong = self.confusion - np.diag(self.confusion.diagonal())
        rows, columns = np.nonzero(wrong)
        counts = wrong[rows, columns]
        order = np.lexsort((columns, rows, -counts))
        return list(zip(rows[order].tolist(), columns[order].tolist(), counts[order].tolist()))


# ---------------------------------------------------------------- pictures
def _short(name: str, most: int = 22) -> str:
    name = printable(name.partition(",")[0])
    return name if len(name) <= most else f"{name[:most - 3]}..."


def draw_confusion(tally: Tally, names: list[str]) -> Figure:
    """The confusion matrix, in shares of each class's images, and the most frequent confusions.

    With more than LABELLED classes it shows the mistakes only, with more than BLOCKS in blocks of neighbouring classes."""
    count, labels, few = tally.num_classes, [_short(name) for name in names], tally.num_classes <= LABELLED
    size = -(-count // BLOCKS)
    starts = range(0, count, size)
    pooled = tally.confusion if few else tally.confusion - np.diag(tally.confusion.diagonal())
    pooled = np.add.reduceat(np.add.reduceat(pooled, starts, 0), starts, 1)
    shares = pooled / np.maximum(np.add.reduceat(tally.confusion.sum(1, keepdims=True), starts, 0), 1)
    side = min(11.0, max(5.0, 0.32 * count))
    figure, (axes, listed) = plt.subplots(1, 2, figsize=(side + 4.6, side), width_ratios=(side, 3.8), layout="constrained")
    # a square-root scale, so that one image in a hundred is visible
    picture = axes.imshow(shares, cmap="magma_r", norm=PowerNorm(0.5, 0, max(shares.max(), 1e-6)), interpolation="nearest")
    figure.colorbar(picture, ax=axes, shrink=0.7, format=PercentFormatter(1, decimals=None))
    what = "" if few else f", the mistakes{f' in blocks of {size} classes' if size > 1 else ''}"
    axes.set(xlabel="taken for", ylabel="class", title=f"{int(tally.confusion.sum())} images of {count} classes{what}")
    every = -(-len(starts) // LABELLED)
    ticks, shown = range(0, len(starts), every), [labels[start] for start in starts[::every]]
    axes.set_xticks(ticks, shown, rotation=90 if max(map(len, shown)) > 2 else 0)
    axes.set_yticks(ticks, shown)
    for row, column in zip(*np.nonzero(pooled)) if few else ():
        number = pooled[row, column]
        axes.text(column, row, str(number), ha="center", va="center", fontsize=8 if number < 1000 else 6,
                  color="white" if picture.norm(shares[row, column]) > 0.5 else "black")
    listed.axis("off")
    lines = [f"{number} x  {labels[row]} taken for {labels[column]}" for row, column, number in tally.confusions()[:CONFUSIONS]]
    listed.text(0, 1, "\n".join(["most frequent confusions", "", *(lines or ["none"])]), va="top", fontsize=8, linespacing=1.5)
    return figure


def draw_reliability(calibration: dict[str, Any]) -> Figure:
    """Accuracy over confidence, and the share of images in each bin of confidence."""
    bins = [b for b in calibration["bins"] if b["images"]]     # an empty bin would show as a line
    left, images = [b["from"] for b in bins], np.array([b["images"] for b in bins])
    accuracy, confidence = ([b[key] for b in bins] for key in ("accuracy", "confidence"))
    figure, (axes, below) = plt.subplots(2, 1, figsize=(5.5, 6.5), height_ratios=(3, 1), sharex=True, layout="constrained")
    axes.bar(left, accuracy, 1 / BINS, align="edge", edgecolor="white", color="tab:blue", label="accuracy")
    gaps = [c - a for a, c in zip(accuracy, confidence)]
    axes.bar(left, gaps, 1 / BINS, bottom=accuracy, align="edge", color="none", edgecolor="tab:red", hatch="///",
             label="gap to the mean confidence")
    axes.plot([0, 1], [0, 1], "--", color="gray", label="perfect calibration")
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy",
             title=f"expected calibration error {calibration['ece']:.2%}, {BINS} bins")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    below.bar(left, 100 * images / images.sum(), 1 / BINS, align="edge", edgecolor="white", color="tab:gray")
    below.set(xlabel="confidence", ylabel="% of images")
    return figure


def draw_mistakes(mistakes: list[Mistake], names: list[str], args: Namespace) -> Figure:
    """The images as the model got them, with their class and the predicted one. args: the flags that prepared them."""
    columns = 6
    rows = max(1, -(-len(mistakes) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.75 * rows), squeeze=False, layout="constrained")
    for cell in axes.flat:
        cell.axis("off")
    for cell, mistake in zip(axes.flat, mistakes):
        cell.imshow(denormalised(mistake.image, args).permute(1, 2, 0).numpy())
        cell.set_title(f"taken for {_short(names[mistake.predicted])}, {mistake.confidence:.0%}\n"
                       f"is {_short(names[mistake.target])}", fontsize=8)
    figure.suptitle(f"the {len(mistakes)} most confident mistakes" if mistakes
                    else "no mistake was made")
    return figure


def save(figure: Figure, path: Path) -> None:
    save_picture(figure, path, bbox_inches="tight")
    plt.close(figure)


# ---------------------------------------------------------------- command
def report_of(trained: Trained, weights: str, result: dict[str, float], tally: Tally, images: Images) -> dict[str, Any]:
    """The content of report.json. images: the data set's, for their names."""
    names = trained.class_names
    return {"checkpoint": trained.path, "weights": weights, "model": trained.spec.name, "data_set": trained.args.data_set,
            "data_path": trained.args.data_path, **{key: result[key] for key in ("images", "unreadable", "loss", "acc1", "acc5")},
            "calibration": tally.calibration(), "classes": tally.per_class(names),
            "confusions": [{"class": row, "taken_for": column, "images": number} for row, column, number in tally.confusions()],
            "mistakes": [{"image": images.name(mistake.index), "class": mistake.target, "name": names[mistake.target],
                          "taken_for": mistake.predicted, "taken_for_name": names[mistake.predicted],
                          "confidence": mistake.confidence} for mistake in tally.worst],
            "versions": versions()}


def describe(report: dict[str, Any]) -> str:
    """The report's main figures in a few lines."""
    calibration, classes = report["calibration"], report["classes"]
    measured = sorted((row for row in classes if row["images"]), key=lambda row: (row["top1"], row["class"]))
    names = [printable(row["name"], 40) for row in classes]
    lines = [summary(report["weights"], report),
             f"loss {report['loss']:.4f}, mean confidence {calibration['mean_confidence']:.1%}, expected calibration error "
             f"{calibration['ece']:.2%} ({BINS} bins)",
             "hardest classes: " + ", ".join(f"{names[row['class']]} {row['top1']:.1f} ({row['images']} images)"
                                             for row in measured[:5])]
    if report["confusions"]:
        lines.append("most frequent confusions: " + ", ".join(
            f"{names[pair['class']]} for {names[pair['taken_for']]} {pair['images']}" for pair in report["confusions"][:5]))
    if report["unreadable"]:
        lines.insert(0, f"{report['unreadable']} images could not be read and are left out")
    return "\n".join(lines)


def default_folder(checkpoint: str, weights: str) -> Path:
    return default_output(checkpoint, f"_evaluation{'_ema' if weights == 'model_ema' else ''}")


def arguments() -> Parser:
    parser = model_parser("evaluate.py", __doc__)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder of the report (default: beside the checkpoint)")
    return parser


def run(own: argparse.Namespace, flags: list[str]) -> int:
    output = own.output or default_folder(own.checkpoint, own.weights)
    with atomic_write(output / "report.json") as file, plt.rc_context({"text.parse_math": False}):
        trained = load_trained(own.checkpoint, weights=own.weights, device=own.device, flags=flags)
        loaders = loaders_of(trained)
        tally = Tally(len(trained.class_names))
        result = evaluate(trained.model, loaders.val, Process(device=trained.device), title=own.weights, on_batch=tally.add)
        loaders.check_unreadable()
        report = report_of(trained, own.weights, result, tally, cast(ImageSet, loaders.val.dataset).images)
        names = trained.class_names
        save(draw_confusion(tally, names), output / "confusion.png")
        save(draw_reliability(report["calibration"]), output / "reliability.png")
        save(draw_mistakes(tally.worst, names, trained.args), output / "mistakes.png")
        with atomic_write(output / "classes.csv") as table, \
                open(table, "w", encoding="utf-8", errors="backslashreplace", newline="") as out:
            rows = csv.DictWriter(out, list(report["classes"][0]), lineterminator="\n")
            rows.writeheader()
            rows.writerows(report["classes"])
        file.write_text(to_json(report, indent=1), encoding="utf-8")
    print(describe(report))
    print(f"{output}: report.json, classes.csv, confusion.png, reliability.png, mistakes.png")
    return 0


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
