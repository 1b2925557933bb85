"""Growth of a training step's time and memory with tokens, width, depth and batch, for `_ViT`, `_GKAN` and `_KAN`.

    python benchmarks/scaling.py [--quick] [--device cpu|cuda] [--repeats R]

A step is forward, cross-entropy and backward of a small ViT on random images. Saved bytes are those of the tensors that autograd
keeps for the backward pass, each storage counted once, without parameters; on a GPU also the peak memory. The exponent is the
slope of a straight line through log cost against log size: 1 is linear. In theory the matrix products of attention and of the
layers are quadratic in tokens and width, everything else is linear; saved bytes are linear in all four. It also measures images/s
of one process and of two under DistributedDataParallel (gloo), one thread each. Prints tables and writes
benchmarks/results/scaling.csv.
"""
import argparse
import csv
import math
import os
import platform
import socket
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import quantile, saved_bytes, time_in_turn

RESULTS = Path(__file__).resolve().parent / "results/scaling.csv"
SUFFIXES = ("ViT", "GKAN", "KAN")
BASE = {"img_size": 64, "embed_dim": 96, "depth": 4, "batch": 4}       # 4 pixel patches: 256 tokens and the class's
AXES = {"tokens": ("img_size", (32, 64, 128)), "width": ("embed_dim", (96, 192, 384)), "depth": ("depth", (2, 4, 8)),
        "batch": ("batch", (2, 4, 8))}
QUICK_BASE = {"img_size": 16, "embed_dim": 24, "depth": 1, "batch": 2}
QUICK_AXES = {"tokens": ("img_size", (8, 16)), "width": ("embed_dim", (24, 48)), "depth": ("depth", (1, 2)),
              "batch": ("batch", (1, 2))}
FIELDS = ("axis", "model", "size", "img_size", "embed_dim", "depth", "batch", "processes", "seconds", "p20", "p80",
          "saved_bytes", "peak_bytes", "img_per_s", "n", "device", "torch")


def build(suffix: str, shape: dict[str, int], device: torch.device) -> nn.Module:
    """hdim_kan of the full-edge KAN is half the width, as in the small models: the MLP's parameters."""
    options = {"hdim_kan": shape["embed_dim"] // 2} if suffix == "KAN" else {}
    torch.manual_seed(0)
    return timm.create_model(f"vit_nano_patch4_32_{suffix}", num_classes=10, img_size=shape["img_size"],
                             embed_dim=shape["embed_dim"], depth=shape["depth"], **options).to(device)


def step_of(model: nn.Module, shape: dict[str, int], device: torch.device) -> Callable[[], None]:
    images = torch.randn(shape["batch"], 3, shape["img_size"], shape["img_size"], device=device)
    targets = torch.randint(10, (shape["batch"],), device=device)

    def step() -> None:
        F.cross_entropy(model(images), targets).backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Slope of the least-squares line through log cost against log size."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in costs]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def sweep(axis: str, base: dict, key: str, values: tuple[int, ...], device: torch.device, repeats: int) -> list[dict]:
    """A row for each model and size along one axis."""
    rows = []
    for value in values:
        shape = {**base, key: value}
        models = {suffix: build(suffix, shape, device) for suffix in SUFFIXES}
        steps = {suffix: step_of(model, shape, device) for suffix, model in models.items()}
        seconds = time_in_turn(steps, repeats)
        for suffix, model in models.items():
            peak = ""
            kept = saved_bytes(model, steps[suffix])
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                steps[suffix]()
                peak = torch.cuda.max_memory_allocated(device) - before
            middle = statistics.median(seconds[suffix])
            rows.append({"axis": axis, "model": suffix, **shape, "processes": 1,
                         "size": model.patch_embed.num_patches + 1 if axis == "tokens" else value,
                         "seconds": middle, "p20": quantile(seconds[suffix], 0.2), "p80": quantile(seconds[suffix], 0.8),
                         "saved_bytes": kept, "peak_bytes": peak, "img_per_s": shape["batch"] / middle})
    return rows


# ---------------------------------------------------------------- processes
def _process(rank: int, port: int, shape: dict, repeats: int, queue) -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    models = {suffix: build(suffix, shape, cpu) for suffix in SUFFIXES}
    if rank == 0:           # alone, while the other one waits
        queue.put(time_in_turn({suffix: step_of(model, shape, cpu) for suffix, model in models.items()}, repeats))
    dist.barrier()
    seconds = time_in_turn({suffix: step_of(DistributedDataParallel(model), shape, cpu) for suffix, model in models.items()},
                           repeats)
    if rank == 0:
        queue.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


def processes(shape: dict, repeats: int, start_method: str = "spawn") -> list[dict]:
    """A row for each model and one or two processes: images/s of all processes, with `shape["batch"]` images in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context(start_method).SimpleQueue()
    mp.start_processes(_process, (port, shape, repeats, queue), 2, start_method=start_method)
    rows = []
    for world_size in (1, 2):
        for suffix, values in queue.get().items():
            middle = statistics.median(values)
            rows.append({"axis": "processes", "model": suffix, "size": world_size, **shape, "processes": world_size,
                         "seconds": middle, "p20": quantile(values, 0.2), "p80": quantile(values, 0.8),
                         "saved_bytes": "", "peak_bytes": "", "img_per_s": world_size * shape["batch"] / middle})
    return rows


# ---------------------------------------------------------------- the program
def table(rows: list[dict], device: torch.device) -> str:
    lines = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        chosen = [row for row in rows if row["axis"] == axis]
        lines.append(f"\n{axis:10}{'size':>7}" + "".join(f"{s + ' ms':>12}{'range':>18}{'saved MB':>10}" for s in SUFFIXES))
        for size in dict.fromkeys(row["size"] for row in chosen):
            line = f"{'':10}{size:>7}"
            for row in (row for row in chosen if row["size"] == size):
                spread = f"[{1e3 * row['p20']:.1f}, {1e3 * row['p80']:.1f}]"
                kept = f"{row['saved_bytes'] / 1e6:.2f}" if row["saved_bytes"] != "" else ""
                line += f"{1e3 * row['seconds']:>12.1f}{spread:>18}{kept:>10}"
            lines.append(line)
        of_model = {s: [row for row in chosen if row["model"] == s] for s in SUFFIXES}
        if axis == "processes":
            lines.append(f"{'':10}images/s  " + "; ".join(f"{s} " + ", ".join(
                f"{row['img_per_s']:.1f} with {row['size']}" for row in of_model[s]) for s in SUFFIXES))
            continue
        keys = ["seconds", "saved_bytes"] + (["peak_bytes"] if device.type == "cuda" else [])
        lines += [f"{'':10}exponent of {key}: " + ", ".join(
            f"{s} {exponent([r['size'] for r in of_model[s]], [r[key] for r in of_model[s]]):.2f}" for s in SUFFIXES)
            for key in keys]
    return "\n".join(lines)


def main(argv: list[str] | None = None, start_method: str = "spawn") -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and two sizes an axis: a test of the program")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    base, axes = (QUICK_BASE, QUICK_AXES) if args.quick else (BASE, AXES)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    rows = []

    def add(new: list[dict], device_name: str) -> None:
        """Write the rows after each axis, so that an interrupted run keeps the finished ones."""
        rows.extend({**row, "n": args.repeats, "device": device_name, "torch": torch.__version__} for row in new)
        print(table(new, device), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for axis, (key, values) in axes.items():
            add(sweep(axis, base, key, values, device, args.repeats), where)
        add(processes(base, args.repeats, start_method), f"{platform.machine()}, {os.cpu_count()} cores")
    finally:
        torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    main()
