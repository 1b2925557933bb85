"""Compare runs: a table of their results and of the flags in which they differ, and their curves as a PNG.

    python tools/runs.py FOLDER [FOLDER ...] [--sort KEY] [--csv FILE] [--output PICTURE]

A FOLDER is the --output_dir of a run, or a folder that contains such folders at any depth. Unfinished and failed runs are shown
too.
"""
import argparse
import csv
import io
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tools.common import command, save_picture, tool_parser
from tools.logs import draw_curve, drawable, names_of, read_log
from vision_kan.common.errors import UserError
from vision_kan.common.files import STATUS, atomic_write
from vision_kan.common.text import say, warn
from vision_kan.config.flags import FLAGS
from vision_kan.config.parser import Parser
from vision_kan.config.recipes import load_recipe

LOG, ARGS = "log.txt", "args.yaml"
DIFFERENT = {dest for dest, flag in FLAGS.items() if flag.scope != "run"} | {"finetune", "teacher_path", "compile", "kan_backend"}
SAME_COLOURS = 10       # of matplotlib's cycle


@dataclass(frozen=True)
class Run:
    """A run's folder and its content; empty for what is missing."""
    folder: Path
    records: list[dict[str, Any]]       # of log.txt
    status: dict[str, Any]              # status.json
    flags: dict[str, Any]               # dest -> value, of args.yaml

    def best(self, key: str) -> float | None:
        return max((record[key] for record in self.records if isinstance(record.get(key), (int, float))), default=None)

    def last(self, key: str) -> Any:
        return self.records[-1].get(key) if self.records else None

    @property
    def epochs(self) -> int:
        return self.records[-1]["epoch"] + 1 if self.records else 0

    @property
    def state(self) -> str:
        """The state in status.json; "killed" for one that says "running" while its process on this machine is gone."""
        state = str(self.status.get("state", "unknown"))
        if state == "running" and self.status.get("host") == socket.gethostname() and not _alive(self.status.get("pid")):
            return "killed"
        return state

    @property
    def images_per_second(self) -> float | None:
        """The training's mean over all epochs."""
        known = [record for record in self.records if record.get("img_per_s") and record.get("epoch_seconds")]
        seconds = sum(record["epoch_seconds"] for record in known)
        return sum(record["img_per_s"] * record["epoch_seconds"] for record in known) / seconds if seconds else None

    @property
    def hours(self) -> float | None:
        """Duration of the training, without evaluations."""
        known = [record["epoch_seconds"] for record in self.records if "epoch_seconds" in record]
        return sum(known) / 3600 if known else None


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, ValueError, TypeError):
        return False
    except PermissionError:     # it is another user's
        pass
    return True


@dataclass(frozen=True)
class Column:
    title: str
    value: Callable[[Run], Any]
    text: Callable[[Any], str] = str        # formats the value
    falling: bool = False                   # --sort begins with the largest


COLUMNS = {
    "model": Column("model", lambda run: run.flags.get("model")),
    "parameters": Column("parameters", lambda run: run.last("n_parameters"), "{:,}".format),
    "epochs": Column("epochs", lambda run: run.epochs, falling=True),
    "top1": Column("best top-1", lambda run: run.best("test_acc1"), "{:.2f}".format, falling=True),
    "ema_top1": Column("EMA", lambda run: run.best("ema_test_acc1"), "{:.2f}".format, falling=True),
    "train_loss": Column("train loss", lambda run: run.last("train_loss"), "{:.4f}".format),
    "test_loss": Column("test loss", lambda run: run.last("test_loss"), "{:.4f}".format),
    "img_per_s": Column("img/s", lambda run: run.images_per_second, "{:,.0f}".format, falling=True),
    "hours": Column("hours", lambda run: run.hours, "{:.2f}".format),
    "status": Column("status", lambda run: run.state),
}


# ---------------------------------------------------------------- reading
def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders with a run's log or status, at and below the given ones, by name. Raises UserError for one without any."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: name the --output_dir of runs, or a folder of such")
        inside = sorted({path.parent for name in (LOG, STATUS) for path in folder.rglob(name)})
        if not inside:
            raise UserError(f"{folder} holds no run (no {LOG} and no {STATUS}, at any depth): check the path")
        found += inside
    return list({folder.resolve(): folder for folder in found}.values())


def read_run(folder: Path) -> Run:
    """Read a run's folder. A part that cannot be read is reported on stderr and left empty."""
    records: list[dict[str, Any]] = []
    status: Any = {}
    flags: dict[str, Any] = {}
    if (folder / LOG).is_file() and (folder / LOG).stat().st_size:
        try:
            records = read_log(folder)
        except UserError as error:
            warn(str(error))
    if (folder / STATUS).is_file():
        try:
            status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            warn(f"{folder / STATUS} cannot be read ({error})")
    if (folder / ARGS).is_file():
        try:
            flags = load_recipe(str(folder / ARGS))
        except UserError as error:
            say(f"warning: the flags of {folder} cannot be read: {str(error).removeprefix('--config ')}", file=sys.stderr)
    return Run(folder, records, status if isinstance(status, dict) else {}, flags)


def differing_flags(runs: Sequence[Run]) -> list[str]:
    """Flags of model, data and training, without `COLUMNS`, whose values differ among the runs with known flags."""
    known = [run.flags for run in runs if run.flags]
    return [dest for dest in FLAGS if dest in DIFFERENT and dest not in COLUMNS
            and len({json.dumps(flags.get(dest)) for flags in known}) > 1]


def sort_runs(runs: Sequence[Run], names: dict[Path, str], key: str) -> list[Run]:
    """Sorted by a column, the best first, or by name; runs without a value last."""
    if key == "name":
        return sorted(runs, key=lambda run: names[run.folder])
    column = COLUMNS[key]
    known = [run for run in runs if column.value(run) is not None]
    return [*sorted(known, key=column.value, reverse=column.falling), *(run for run in runs if column.value(run) is None)]


# ---------------------------------------------------------------- writing
def _words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(_words, value)) if isinstance(value, list) else "-" if value in (None, "") else str(value)


def table(runs: Sequence[Run], names: dict[Path, str]) -> str:
    """A line for each run, and below them why some failed or stopped."""
    different = differing_flags(runs)
    lines = [["run", *(column.title for column in COLUMNS.values()), "flags that differ"]]
    for run in runs:
        values = [column.value(run) for column in COLUMNS.values()]
        cells = ["-" if value is None else column.text(value) for value, column in zip(values, COLUMNS.values())]
        if "epochs" in run.flags:
            cells[list(COLUMNS).index("epochs")] += f"/{run.flags['epochs']}"
        flags = ", ".join(f"{dest} {_words(run.flags.get(dest))}" for dest in different) if run.flags else "-"
        lines.append([names[run.folder], *cells, flags])
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = {0, 1, len(COLUMNS), len(COLUMNS) + 1}
    text = ["  ".join(cell.ljust(width) if place in left else cell.rjust(width)
                      for place, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
    reasons = [f"{names[run.folder]}: {run.state}: {run.status['reason']}" for run in runs if run.status.get("reason")]
    return "\n".join([*text, *reasons])


def sheet(runs: Sequence[Run], names: dict[Path, str]) -> str:
    """The table as CSV, in full precision, with a column for each flag that differs."""
    different, out = differing_flags(runs), io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["run", *COLUMNS, "reason", *different])
    for run in runs:
        writer.writerow([names[run.folder], *(column.value(run) for column in COLUMNS.values()), run.status.get("reason", ""),
                         *(_words(run.flags[dest]) if dest in run.flags else "" for dest in different)])
    return out.getvalue()


def plot(runs: Sequence[Run], names: dict[Path, str], picture: Path) -> None:
    """Draw loss and top-1 over the epochs of all runs with a finished epoch."""
    logs = {names[run.folder]: complete for run in runs if (complete := drawable(run.records))}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for axis, key, label, dashed in ((axes[0], "test_loss", "loss (dashed: training)", "train_loss"),
                                     (axes[1], "test_acc1", "top-1 (%)", None)):
        if len(logs) > SAME_COLOURS:
            axis.set_prop_cycle(color=plt.get_cmap("turbo")([n / (len(logs) - 1) for n in range(len(logs))]))
        draw_curve(axis, logs, key, label, dashed)
        if axis.get_legend():
            axis.get_legend().remove()
    handles, labels = axes[1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(handles), 4), fontsize=8)
    save_picture(figure, picture)
    plt.close(figure)


def arguments() -> Parser:
    parser = tool_parser("runs.py", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, or folders of runs")
    parser.add_argument("--sort", default="name", choices=["name", *COLUMNS], metavar="KEY",
                        help=f"order of the lines: name (default), {', '.join(COLUMNS)}; the best first")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the table, with a column for each flag that differs")
    parser.add_argument("--output", type=Path, metavar="PICTURE", help="the curves (default: runs.png in the first FOLDER)")
    return parser


def run(own: argparse.Namespace, _: list[str]) -> int:
    runs = [read_run(folder) for folder in find_runs(own.folders)]
    names = dict(zip((run.folder for run in runs), names_of([run.folder for run in runs])))
    runs = sort_runs(runs, names, own.sort)
    say(table(runs, names))
    picture = own.output or own.folders[0] / "runs.png"
    if own.csv:
        with atomic_write(own.csv) as file:
            file.write_text(sheet(runs, names), encoding="utf-8")
        say(own.csv)
    plot(runs, names, picture)
    say(picture)
    return 0


main = command(arguments, run)

if __name__ == "__main__":
    sys.exit(main())
