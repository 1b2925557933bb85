"""The cost of each op on a CPU, against other ways to compute it.

    python benchmarks/kernels.py [--tokens 197 3152 25216] [--widths 192 384 768] [--dtypes float32 bfloat16] [--threads 1]

rswaf_linear, d inputs to d outputs, 8 grid points:
    ours       the op, by the backend chosen here
    original   1 - tanh^2 in eager PyTorch, as in Vision-KAN
    compiled   the reference through torch.compile
    products   its matrix products only, for a given basis
    mlp        d -> 4d -> d with GELU: the same parameters and FLOPs
rswaf_activation with GELU, [T, 4d], 8 groups of 8 points: ours, original, compiled, gelu (the fixed function).

It times the forward pass, and a training step (forward and all gradients), all ways in turn. Ratios to ours are medians over
turns; MB are what a step keeps for its backward pass. A way that needs more than --max-gb is left out. Prints a table; rows go to
benchmarks/results/kernels.csv.
"""
import argparse
import csv
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import machine, quantile, ratios, saved_bytes, time_in_turn
from vision_kan import kernels

POINTS, H = tuple(torch.linspace(-3, 3, 8, dtype=torch.float64).tolist()), 6 / 7
FIELDS = ("op", "tokens", "width", "dtype", "threads", "way", "part", "ms", "p25", "p75", "beside_ours", "n", "saved_mb",
          "machine")


def original_linear(u: Tensor, weight: Tensor, grid: Tensor) -> Tensor:
    return F.linear((1 - torch.tanh((u[..., None] - grid) / H).square()).flatten(-2), weight)


def original_activation(u: Tensor, c: Tensor, grid: Tensor) -> Tensor:
    basis = 1 - torch.tanh((u[..., None] - grid) / H).square()
    return F.gelu(u) + (basis * c.repeat_interleave(u.shape[-1] // len(c), 0)).sum(-1)


def linear_ways(tokens: int, width: int, dtype: torch.dtype, compiled: bool) -> dict[str, tuple[Callable, list[Tensor]]]:
    """way -> (function of the leaves, leaves)."""
    grid = torch.tensor(POINTS, dtype=torch.float32)
    u = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(width, 8 * width) / width ** 0.5).requires_grad_()
    mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    ways = {"ours": (lambda u, w: kernels.rswaf_linear(u, w, grid, H, True), [u, weight]),
            "original": (lambda u, w: original_linear(u, w, grid), [u, weight])}
    if compiled:
        plain = torch.compile(lambda u, w: kernels.rswaf_linear_reference(u, w, grid, H), dynamic=False)
        ways["compiled"] = (plain, [u, weight])
    # the operand is given: without the cost of computing a basis
    ways["products"] = (F.linear, [torch.rand(tokens, 8 * width).requires_grad_(), weight])
    ways["mlp"] = (lambda u, *_: mlp(u), [u, *mlp.parameters()])
    return ways


def activation_ways(tokens: int, width: int, dtype: torch.dtype, compiled: bool) -> dict[str, tuple[Callable, list[Tensor]]]:
    grid = torch.tensor(POINTS, dtype=torch.float32)
    u = torch.randn(tokens, 4 * width, dtype=dtype, requires_grad=True)
    c = torch.randn(8, 8, requires_grad=True)
    ways = {"ours": (lambda u, c: kernels.rswaf_activation(u, c, POINTS, H, "gelu"), [u, c]),
            "original": (lambda u, c: original_activation(u, c, grid), [u, c])}
    if compiled:
        plain = torch.compile(lambda u, c: kernels.rswaf_activation_reference(u, c, POINTS, H, "gelu"), dynamic=False)
        ways["compiled"] = (plain, [u, c])
    ways["gelu"] = (F.gelu, [u])
    return ways


def steps_of(function: Callable, leaves: list[Tensor], dtype: torch.dtype, out_features: int
             ) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return function(*leaves)

    def inference() -> None:
        with torch.no_grad():
            forward()

    dy = torch.randn(len(leaves[0]), out_features).to(dtype)

    def step() -> None:
        y = forward()
        torch.autograd.grad(y, leaves, dy.to(y.dtype))

    return inference, step


def measure(op: str, tokens: int, width: int, dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    make, inputs, outputs = {"rswaf_linear": (linear_ways, width, width),
                             "rswaf_activation": (activation_ways, 4 * width, 4 * width)}[op]
    torch.manual_seed(0)
    torch.compiler.reset()          # else torch.compile gives up on a function after too many shapes
    ways = make(tokens, width, dtype, not args.no_compile and shutil.which("g++") is not None)
    if 4 * tokens * inputs * 8 * 5 > args.max_gb * 1e9:         # arrays of the basis that eager code holds at once
        ways.pop("original")
    runs = {way: steps_of(function, leaves, dtype, outputs) for way, (function, leaves) in ways.items()}
    rows = []
    for part, which in (("forward", 0), ("training step", 1)):
        seconds = time_in_turn({way: run[which] for way, run in runs.items()}, args.repeats, warmup=2)
        for way, values in seconds.items():
            kept = saved_bytes(None, runs[way][1]) if which else 0
            rows.append({"op": op, "tokens": tokens, "width": width, "dtype": str(dtype).removeprefix("torch."),
                         "threads": args.threads, "way": way, "part": part, "ms": round(1e3 * statistics.median(values), 3),
                         "p25": round(1e3 * quantile(values, 0.25), 3), "p75": round(1e3 * quantile(values, 0.75), 3),
                         "beside_ours": round(ratios(values, seconds["ours"])[0], 3), "n": len(values),
                         "saved_mb": round(kept / 1e6, 2), "machine": machine()})
    return rows


def line(rows: list[dict]) -> str:
    first = rows[0]
    cells = " | ".join(f"{row['way']} {row['ms']:.4g} ({row['beside_ours']:.2f})" for row in rows)
    return (f"| {first['op']} | {first['tokens']} | {first['width']} | {first['dtype']} | {first['part']} | {cells} |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=["rswaf_linear", "rswaf_activation"],
                        choices=["rswaf_linear", "rswaf_activation"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 3152, 25216])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384, 768])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--max-gb", type=float, default=4.0, help="memory limit of a single way")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/kernels.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{machine()}; {args.threads} thread(s), n={args.repeats}; ms and, in brackets, times ours\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for op in args.ops:
            for dtype in args.dtypes:
                for width in args.widths:
                    for tokens in args.tokens:
                        rows = measure(op, tokens, width, getattr(torch, dtype), args)
                        writer.writerows(rows)
                        file.flush()
                        for part in ("forward", "training step"):
                            print(line([row for row in rows if row["part"] == part]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
