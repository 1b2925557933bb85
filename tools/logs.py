"""Reading and drawing the logs of runs. Does not import torch."""
import json
from pathlib import Path

from matplotlib.axes import Axes

from vision_kan.common.errors import UserError

CURVES = ("train_loss", "test_loss", "test_acc1")
NUMBERS = (*CURVES, "ema_test_acc1", "n_parameters", "img_per_s", "epoch_seconds", "memory_mib")    # that tools compute with


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.txt, one per epoch. A last line that was cut off is left out.

    Raises UserError if there is no log, it cannot be read, it has no finished epoch, or a line of something else."""
    log = folder / "log.txt"
    try:
        if not log.is_file():
            raise UserError(f"{folder} holds no log.txt: name the --output_dir of a run")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{log} cannot be read ({error.strerror}): check its disk and permissions") from error
    records: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            record = {**json.loads(line), "epoch": int(json.loads(line)["epoch"])}
            if wrong := [key for key in NUMBERS if not isinstance(record.get(key, 0), (int, float))]:
                raise TypeError(f"{wrong[0]} is not a number")
            records.append(record)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if number < len(lines) or not records:
                raise UserError(f"{log} line {number} is not an epoch of a training: name the --output_dir of a "
                                "run") from error
    if not records:
        raise UserError(f"{log} holds no finished epoch yet: wait for the first one")
    return records


def drawable(records: list[dict]) -> list[dict]:
    """The records that have all of `CURVES`."""
    return [record for record in records if all(key in record for key in CURVES)]


def names_of(folders: list[Path]) -> list[str]:
    """The shortest names that tell the folders apart, for a legend."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def draw_curve(axes: Axes, logs: dict[str, list[dict]], key: str, label: str, dashed: str | None = None) -> None:
    """Draw `key` of every run over its epochs. dashed: a second key, in the same colour."""
    for name, records in logs.items():
        line, = axes.plot([r["epoch"] + 1 for r in records], [r[key] for r in records], label=name, marker=".",
                          markersize=3)
        if dashed:
            axes.plot([r["epoch"] + 1 for r in records], [r[dashed] for r in records], "--", color=line.get_color(),
                      label=f"{name} (training)")
    label_curves(axes, label)


def label_curves(axes: Axes, label: str) -> None:
    """Name the axes of curves over the epochs, whose ticks are whole numbers."""
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)     # type: ignore[call-arg]  # of matplotlib's stubs
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
