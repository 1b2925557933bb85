"""Finished runs: rows of a CSV file, tables, pictures."""
import csv
import fcntl
import math
import os
import statistics
import textwrap
from collections import defaultdict
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.trials.variants import RECIPE, parse_variant
from tools.common import half_interval
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.files import atomic_write
from vision_kan.models.cost import cost_mismatch

FIELDS = ["setting", "variant", "seed", "epochs", "lr", "top1", "top1_ema", "top1_by_epoch", "train_loss", "parameters",
          "matmul_mflops", "elementwise_mflops", "step_ms", "seconds", "step0_error", "torch", "timm", "size", "device",
          "weight_decay"]
LATER = {"step0_error", "size", "device", "weight_decay"}      # columns that a file need not have
NUMBERS = ("train_loss", "matmul_mflops", "elementwise_mflops", "step_ms")
Row = dict[str, Any]


# ---------------------------------------------------------------- rows
def append(file: Path, columns: Row) -> None:
    """Add a row. A file with fewer columns, of an earlier version, is rewritten with all of them; other columns stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(file, "a+", newline="") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(stream.fileno()), os.stat(file)):      # another process has just rewritten it
                continue
            stream.seek(0)
            text = stream.read()
            reader = csv.DictReader(StringIO(text, newline=""))
            fields = list(dict.fromkeys([*(reader.fieldnames or ()), *FIELDS]))
            if reader.fieldnames == fields:
                stream.write("" if text.endswith("\n") else "\r\n")       # of a line that was cut off
                csv.DictWriter(stream, fields).writerow(columns)
                return
            with atomic_write(file) as temporary, open(temporary, "w", newline="") as rewritten:
                writer = csv.DictWriter(rewritten, fields)
                writer.writeheader()
                writer.writerows([*reader, columns])
            return


def read_rows(file: Path) -> list[Row]:
    """The rows, with variants as `Variant.text` has them: size and epochs are columns. Raises UserError for a damaged file."""
    if not file.exists():
        return []
    rows = []
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                if missing := [field for field in FIELDS if field not in LATER and row.get(field) is None]:
                    raise LookupError(f"it has no {', '.join(missing)}")
                for number in (*(row[field] for field in NUMBERS), *row["top1_by_epoch"].split()):
                    float(number)
                int(row["parameters"])
                epochs = int(row["epochs"])
                rows.append({**row, "variant": parse_variant(row["variant"], row["setting"], epochs=epochs).text,
                             "seed": int(row["seed"]), "top1": float(row["top1"]), "top1_ema": float(row["top1_ema"]),
                             "epochs": epochs, "size": row.get("size") or "nano", "device": row.get("device") or "cpu"})
        except (UserError, LookupError, TypeError, ValueError, AttributeError, csv.Error) as error:
            why = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(f"{file}: line {reader.line_num} is damaged ({why}): repair or remove it") from error
    return rows


def kind(row: Row) -> str:
    """"cpu" or "cuda": runs in float32 are not compared with those in bfloat16."""
    return "cpu" if row["device"] == "cpu" else "cuda"


def key_of(row: Row) -> tuple:
    """As `Run.key`."""
    return row["setting"], row["size"], row["variant"], row["epochs"], row["seed"], kind(row)


def finished(results: Path) -> dict[tuple, Row]:
    return {key_of(row): row for row in read_rows(results / "runs.csv")}


# ---------------------------------------------------------------- tables
def interval(differences: list[float]) -> tuple[float, float]:
    """The mean of paired differences, and half the width of its 95% interval (Student's t)."""
    n = len(differences)
    if n < 2:
        return differences[0], math.nan
    return statistics.mean(differences), half_interval(differences)


def table(rows: list[Row], baseline: str) -> str:
    """Markdown: mean and deviation of every variant, and its paired difference from `baseline`."""
    by_variant: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        by_variant[row["variant"]][row["seed"]] = row
    lines = ["| variant | top-1 | n | difference (95%) | averaged weights | training loss | parameters | matmul MFLOPs | "
             "elementwise | ms/step |", "|---|---|---|---|---|---|---|---|---|---|"]
    reference, notes = by_variant.get(baseline, {}), []
    for variant, runs in sorted(by_variant.items(), key=lambda item: -statistics.mean(r["top1"] for r in item[1].values())):
        top1, averaged, loss = ([float(row[key]) for row in runs.values()] for key in ("top1", "top1_ema", "train_loss"))
        pairs = [runs[seed]["top1"] - reference[seed]["top1"] for seed in runs if seed in reference]
        mean, half = interval(pairs) if pairs else (math.nan, math.nan)
        difference = "" if variant == baseline or not pairs else (
            f"{mean:+.2f}" + (f" [{mean - half:+.2f}, {mean + half:+.2f}]" if len(pairs) > 1 else "")
            + (f" n={len(pairs)}" if len(pairs) != len(runs) else ""))
        first = next(iter(runs.values()))
        if reference:
            mismatch = cost_mismatch(_cost(first), _cost(next(iter(reference.values()))))
            notes += [f"{variant} and {baseline} are {mismatch}"] if mismatch else []
        step_ms = statistics.median(float(r["step_ms"]) for r in runs.values())
        lines.append(f"| {variant} | {_spread(top1)} | {len(runs)} | {difference} | {_spread(averaged)} | "
                     f"{statistics.mean(loss):.3f} | {int(first['parameters']):,} | {first['matmul_mflops']} | "
                     f"{first['elementwise_mflops']} | {step_ms:.{0 if step_ms >= 10 else 2}f} |")
    if len({row.get("weight_decay") in (None, "") for row in rows}) > 1:       # older rows have no such column
        notes.append("Some of these rows are from before images were augmented by the device's code: for the same seed they had "
                     "other crops than the newer rows, so a difference between an old row and a new one is not paired")
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _cost(row: Row) -> dict[str, float]:
    return {"parameters": int(row["parameters"]), "matmul FLOPs": round(1e6 * float(row["matmul_mflops"]))}


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


# ---------------------------------------------------------------- pictures
# Variants -> their names in the pictures of README.md and docs/results.md.
PLAIN_NAMES = {"gkan": "group KAN", "relu2": "MLP, squared ReLU", "mlp": "MLP, GELU", "kan": "full-edge KAN, repaired",
               "ekan": "efficient-KAN", "kan-original": "full-edge KAN, original", "swiglu": "SwiGLU", "kat": "KAT",
               "silu": "MLP, SiLU", "mean-shape": "MLP, fixed mean of learned functions"}


def grouped(rows: list[Row]) -> dict[str, list[Row]]:
    """variant -> its rows, the lowest mean first."""
    by_variant = defaultdict(list)
    for row in rows:
        by_variant[row["variant"]].append(row)
    return dict(sorted(by_variant.items(), key=lambda item: statistics.mean(row["top1"] for row in item[1])))


def new_figure(**options):
    import matplotlib  # slow to import
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt, *plt.subplots(layout="constrained", **options)


def wrapped(variant: str) -> str:
    """A variant's name and changes in lines that leave room for the picture."""
    return textwrap.fill(", ".join(part.strip() for part in variant.split(",")), 44)


def plot(rows: list[Row], file: Path, title: str, plain: bool = False) -> None:
    """A row for each variant. plain: only those of `PLAIN_NAMES`, under these names."""
    if plain:
        rows = [{**row, "variant": PLAIN_NAMES[row["variant"]]} for row in rows if row["variant"] in PLAIN_NAMES]
    variants = grouped(rows)
    plt, figure, axes = new_figure(figsize=(8, 1.2 + 0.35 * len(variants)))
    for y, each in enumerate(variants.values()):
        values = [row["top1"] for row in each]
        axes.plot(values, [y] * len(values), "o", alpha=0.6)
        axes.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], "k-", linewidth=1.5)
    axes.set_yticks(range(len(variants)), [wrapped(name) for name in variants], fontsize="small")
    axes.set_xlabel("top-1 (%): a point for each seed, a bar at the mean")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_curves(rows: list[Row], file: Path, title: str) -> None:
    """Top-1 by epoch: mean and range over seeds, the best on top of the legend. Of each feed-forward the variant with the most
    seeds, among equals the best."""
    best: dict[str, tuple[str, list[Row]]] = {}         # feed-forward -> its variant
    for name, each in grouped(rows).items():
        if len(each) >= len(best.get(name.split(",")[0], ("", []))[1]):
            best[name.split(",")[0]] = name, each
    plt, figure, axes = new_figure(figsize=(8, 5))
    for name, each in sorted(best.values(), key=lambda item: -statistics.mean(row["top1"] for row in item[1])):
        curves = list(zip(*(map(float, row["top1_by_epoch"].split()) for row in each)))      # [epochs][seeds]
        epochs, (first, *changes) = range(1, len(curves) + 1), name.split(",")
        line, = axes.plot(epochs, [statistics.mean(values) for values in curves], linewidth=1.2,
                          label=wrapped(",".join([PLAIN_NAMES.get(first, first), *changes])) + f" (n={len(each)})")
        axes.fill_between(epochs, [min(values) for values in curves], [max(values) for values in curves], alpha=0.15,
                          color=line.get_color(), linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 (%): mean and range over seeds")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------- all of it
def report(results: Path, baseline: str) -> None:
    """Print a table for each setting, size, length and kind of device, write them to report.md, and draw their pictures."""
    rows = read_rows(results / "runs.csv")
    if not rows:
        raise UserError(f"{results} holds no finished run yet")
    versions = sorted({(row["torch"], row["timm"]) for row in rows})
    parts = ["Written by `benchmarks/accuracy.py report` from `runs.csv`: "
             + ", ".join(f"PyTorch {torch_version}, timm {timm_version}" for torch_version, timm_version in versions)
             + ". A difference is paired by seed, its 95% interval is Student's. Milliseconds a step are the median over seeds "
             "of each run's fastest epoch: on a CPU of one thread, on a machine that had other work; on a GPU an even share of "
             "the time of all models that were trained side by side."]
    for group in sorted({(row["setting"], row["size"], row["epochs"], kind(row)) for row in rows}):
        chosen = [row for row in rows if (row["setting"], row["size"], row["epochs"], kind(row)) == group]
        setting, size, epochs, device = group
        place = f"{setting}{'' if size == 'nano' else f', {size}'}, {epochs} epochs{'' if device == 'cpu' else ', GPU'}"
        reference = parse_variant(baseline, setting, epochs=epochs).text
        parts.append(f"## {place}, difference from {reference}\n\n{table(chosen, reference)}")
        stem = place.replace(",", "").replace(" ", "_")
        plot(chosen, results / f"{stem}.png", f"CIFAR-10, {place}")
        if setting == "long":
            plot_curves(chosen, results / f"{stem}_curves.png", f"CIFAR-10, {place}")
            parts.append(f"![Top-1 by epoch]({stem}_curves.png)")
        if group == ("scratch", "nano", RECIPE["epochs"], "cpu"):
            plot(chosen, results / "summary.png", f"CIFAR-10 from scratch, {epochs} epochs", plain=True)
    text = "\n\n".join(parts)
    print(text)
    (results / "report.md").write_text(f"# Accuracy\n\n{text}\n")
