"""Training curves of one or several runs, and the functions that their KANs have learned, as a PNG.

    python tools/plot_run.py FOLDER [FOLDER ...] [--output picture.png]
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoints import load_file
from faster_kan import rswaf_basis
from group_kan import BASES
from utils import UserError

EDGES = 6       # of each layer that is shown
GROUPS = 8      # likewise


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.txt, one an epoch; a last line that a kill cut off is left out.

    UserError where there is no log, no finished epoch, or something else."""
    log = folder / "log.txt"
    if not log.is_file():
        raise UserError(f"{folder} holds no log.txt: name the --output_dir of a run")
    lines, records = log.read_text().splitlines(), []
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


def kan_layers(state: dict[str, torch.Tensor]) -> list[str]:
    """Key prefixes of a checkpoint's KAN layers, in the order of the blocks; empty for an MLP."""
    return _with_ending(state, ".spline_linear.weight")


def activations(state: dict[str, torch.Tensor]) -> list[str]:
    """Key prefixes of a checkpoint's learned activations, in the order of the blocks; empty for any but a group KAN."""
    return _with_ending(state, ".coefficients")


def _with_ending(state: dict[str, torch.Tensor], ending: str) -> list[str]:
    return [key.removesuffix(ending) for key in state if key.endswith(ending)]


def _width(grid: torch.Tensor, h: float | None) -> float:
    """The width of a bump; None: the grid's spacing."""
    return float(grid[-1] - grid[0]) / (len(grid) - 1) if h is None else h


def edge_functions(state: dict[str, torch.Tensor], layer: str, h: float | None, u: torch.Tensor,
                   count: int = EDGES) -> dict[str, torch.Tensor]:
    """The strongest edges of a layer, {"input -> output": phi(u)}, each of u's shape [N].

    phi_oi(u) = sum_k W[o, i*G + k] B_k(u), exact from the weights; strength is its deviation over `u`."""
    grid = state[f"{layer}.rbf.grid"]
    weight = state[f"{layer}.spline_linear.weight"].unflatten(1, (-1, len(grid)))       # [O, I, G]
    basis = rswaf_basis(u, grid, state.get(f"{layer}.rbf.h", _width(grid, h)))                        # [N, G]
    centred = basis - basis.mean(0)
    strength = torch.einsum("oig,gh,oih->oi", weight, centred.T @ centred / len(u), weight)
    chosen = strength.flatten().topk(min(count, strength.numel())).indices
    edges = [divmod(int(index), weight.shape[1]) for index in chosen]
    return {f"{i} → {o}": basis @ weight[o, i] for o, i in edges}


def group_functions(state: dict[str, torch.Tensor], phi: str, h: float | None, base: str,
                    u: torch.Tensor) -> dict[str, torch.Tensor]:
    """The base function under "base" and each group's, {"0": phi(u)}, each of u's shape [N], exact from the weights.

    h None: the spacing of the grid, as in the model. The functions on the block's input, phi1, have base u itself."""
    grid = state[f"{phi}.grid"]
    basis = rswaf_basis(u, grid, _width(grid, h))       # [N, G]
    y = BASES["identity" if phi.endswith(".phi1") else base](u)
    scale = state.get(f"{phi}.scale", torch.ones(len(state[f"{phi}.coefficients"])))
    return {"base": y} | {str(group): s * y + basis @ c for group, (s, c) in enumerate(
        zip(scale, state[f"{phi}.coefficients"]))}


def draw_groups(axes: Axes, state: dict[str, torch.Tensor], phi: str, h: float | None, base: str) -> None:
    """The base dashed, above it up to `GROUPS` groups' functions, those that differ most from it."""
    grid = state[f"{phi}.grid"]
    u = torch.linspace(float(grid[0]) - 1, float(grid[-1]) + 1, 401)
    functions = group_functions(state, phi, h, base, u)
    start = functions.pop("base")
    furthest = sorted(functions, key=lambda group: -float((functions[group] - start).square().mean()))[:GROUPS]
    for group in sorted(furthest, key=int):
        axes.plot(u, functions[group], label=group, linewidth=1.2)
    axes.plot(u, start, "--", color="black", linewidth=1.2, label="base")
    for point in grid.tolist():
        axes.axvline(point, color="grey", linewidth=0.5, alpha=0.5)
    shown = "" if len(functions) <= GROUPS else f", {GROUPS} of {len(functions)}, those furthest from the base"
    axes.set_title(f"{phi}: the groups' functions{shown}", fontsize=9)
    axes.set_xlabel("input u (lines: grid points)")
    axes.set_ylabel("learned activation φ(u)")
    axes.legend(fontsize=7, title="group", title_fontsize=7, ncols=2)


def draw_edges(axes: Axes, state: dict[str, torch.Tensor], layer: str, h: float | None) -> None:
    grid = state[f"{layer}.rbf.grid"]
    u = torch.linspace(float(grid[0]) - 1, float(grid[-1]) + 1, 401)
    for label, phi in edge_functions(state, layer, h, u).items():
        axes.plot(u, phi, label=label, linewidth=1.2)
    for point in grid.tolist():
        axes.axvline(point, color="grey", linewidth=0.5, alpha=0.5)
    axes.set_title(f"{layer}: strongest edges", fontsize=9)
    axes.set_xlabel("normalised input u (lines: grid points)")
    axes.set_ylabel("edge function φ(u)")
    axes.legend(fontsize=7, title="input → output", title_fontsize=7)


def plot_runs(folders: list[Path], picture: Path) -> Path:
    """Draw loss and top-1 of all runs over the epochs, below them functions of the first KAN among them."""
    logs = {name: read_log(folder) for name, folder in zip(names_of(folders), folders)}
    checkpoints = [load_file(folder / "checkpoint.pth") for folder in folders if (folder / "checkpoint.pth").is_file()]
    kan = next((c for c in checkpoints if kan_layers(c["model"]) or activations(c["model"])), None)
    layers = (kan_layers(kan["model"]) or activations(kan["model"])) if kan else []
    shown = layers if len(layers) <= 4 else [*layers[:2], *layers[-2:]]
    rows = 1 + -(-len(shown) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.6 * rows), squeeze=False, layout="constrained")
    draw_curve(axes[0, 0], logs, "test_loss", "loss", dashed="train_loss")
    draw_curve(axes[0, 1], logs, "test_acc1", "top-1 (%)")
    if kan:
        state, options = kan["model"], (kan.get("model_args") or {"kwargs": {}})["kwargs"]
        for axis, layer in zip(axes[1:].flat, shown):
            if activations(state):
                draw_groups(axis, state, layer, options.get("kan_h"), options.get("kan_base", "gelu"))
            else:       # the original's width, unless an option says otherwise
                spacing = options.get("kan_basis") == "covering"
                draw_edges(axis, state, layer, options.get("kan_h", None if spacing else 0.33))
        for axis in list(axes[1:].flat)[len(shown):]:
            axis.remove()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folders of runs")
    parser.add_argument("--output", type=Path, help="the picture (default: curves.png in the first folder)")
    args = parser.parse_args(argv)
    try:
        print(plot_runs(args.folders, args.output or args.folders[0] / "curves.png"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
