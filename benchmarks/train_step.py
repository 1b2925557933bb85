"""The cost of a whole training step with each feed-forward on a CPU, against its MLP twin.

    python benchmarks/train_step.py [--model deit_tiny_patch16_224] [--batch-size 8] [--threads 1] [--dtype float32]

A step is forward, cross-entropy, backward and AdamW on random images. The models take steps in turn, and a ratio is the median
over turns of the time relative to the twin's in the same turn. "original" is the full-edge KAN as Vision-KAN computes it: 1 -
tanh^2 in eager PyTorch. Bytes kept for the backward pass are those of one image; the peak is the growth of a process with only
this model during three steps (--no-peak leaves it out). Prints a table; rows go to benchmarks/results/train_step.csv.
"""
import argparse
import csv
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import timm
import torch
from torch import nn
from torch.nn import functional as F

import models_kan  # noqa: F401  registers the models with timm
from benchmarks.timing import machine, quantile, ratios, saved_bytes, time_in_turn
from faster_kan import FasterKANLayer
from vision_kan import kernels
from vision_kan.models.cost import count_parameters

FIELDS = ("model", "variant", "dtype", "threads", "batch", "ms", "p25", "p75", "ratio", "ratio_p25", "ratio_p75", "n",
          "saved_mb_per_image", "peak_mb", "parameters", "machine")


def variants(model: str) -> dict[str, tuple[str, dict]]:
    """name -> timm model and options: the twin first, then KANs of equal parameters and FLOPs, and full-edge twice as wide."""
    width = timm.create_model(f"{model}_ViT", depth=1).embed_dim
    return {"mlp": (f"{model}_ViT", {}), "gkan": (f"{model}_GKAN", {}),
            "gkan-without-phi1": (f"{model}_GKAN", {"kan_input_phi": False}), "kat": (f"{model}_KAT", {}),
            f"kan-{width // 2}": (f"{model}_KAN", {"hdim_kan": width // 2}),
            f"kan-{width}": (f"{model}_KAN", {"hdim_kan": width}),
            f"original-{width // 2}": (f"{model}_KAN", {"hdim_kan": width // 2}),
            f"original-{width}": (f"{model}_KAN", {"hdim_kan": width})}


def original_forward(layer: FasterKANLayer, x: torch.Tensor) -> torch.Tensor:
    """Vision-KAN's layer: autograd keeps an array [..., I, G] for every operation."""
    u = layer.layernorm(x)
    basis = 1 - torch.tanh((u[..., None] - layer.rbf.grid) / layer.rbf.h).square()
    return F.linear(basis.flatten(-2), layer.spline_linear.weight)


def build(model: str, variant: str) -> nn.Module:
    name, options = variants(model)[variant]
    torch.manual_seed(0)
    net = timm.create_model(name, **options)
    for layer in net.modules() if variant.startswith("original") else ():
        if isinstance(layer, FasterKANLayer):
            layer.forward = original_forward.__get__(layer)
    return net


def step_of(net: nn.Module, batch_size: int, dtype: torch.dtype) -> Callable[[], None]:
    size = net.patch_embed.img_size
    images, targets = torch.randn(batch_size, 3, *size), torch.randint(net.num_classes, (batch_size,))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(args: argparse.Namespace) -> None:
    """The growth in bytes of a new process that runs the step."""
    step = step_of(build(args.model, args.worker), args.batch_size, getattr(torch, args.dtype))
    gc.collect()
    before = _memory("VmRSS")
    for _ in range(3):
        step()
    print(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    """Bytes of this program in memory now (VmRSS) or at most so far (VmHWM; getrusage's also knows its parent's)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


def measure(args: argparse.Namespace, names: list[str]) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    nets = {name: build(args.model, name) for name in names}
    steps = {name: step_of(net, args.batch_size, dtype) for name, net in nets.items()}
    seconds = time_in_turn(steps, args.repeats, warmup=2)
    rows = []
    for name, net in nets.items():
        kept = saved_bytes(net, steps[name]) / args.batch_size
        grown = None
        if not args.no_peak:
            command = [sys.executable, __file__, "--worker", name, "--model", args.model, "--batch-size",
                       str(args.batch_size), "--threads", str(args.threads), "--dtype", args.dtype, "--backend", args.backend]
            grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e6
        middle, low, high = ratios(seconds[name], seconds[names[0]])
        rows.append({"model": args.model, "variant": name, "dtype": args.dtype, "threads": args.threads,
                     "batch": args.batch_size, "ms": round(1e3 * statistics.median(seconds[name]), 1),
                     "p25": round(1e3 * quantile(seconds[name], 0.25), 1), "p75": round(1e3 * quantile(seconds[name], 0.75), 1),
                     "ratio": round(middle, 3), "ratio_p25": round(low, 3), "ratio_p75": round(high, 3),
                     "n": len(seconds[name]), "saved_mb_per_image": round(kept / 1e6, 2),
                     "peak_mb": "" if grown is None else round(grown, 1),
                     "parameters": count_parameters(net), "machine": machine()})
    return rows


def table(rows: list[dict]) -> str:
    first = rows[0]
    lines = [f"{first['model']}, batch {first['batch']}, {first['dtype']}, {first['threads']} thread(s), n={first['n']}; "
             f"{first['machine']}", "",
             "| feed-forward | ms a step (quartiles) | beside the MLP (quartiles) | MB kept an image | peak MB | parameters |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['variant']} | {row['ms']} ({row['p25']}-{row['p75']}) | {row['ratio']:.2f} "
                     f"({row['ratio_p25']:.2f}-{row['ratio_p75']:.2f}) | {row['saved_mb_per_image']} | {row['peak_mb']} | "
                     f"{row['parameters']:,} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a size, without the feed-forward's suffix")
    parser.add_argument("--variants", nargs="+", help="rows of the table; the others are compared with the first")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--backend", default="auto", choices=kernels.BACKENDS)
    parser.add_argument("--no-peak", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/train_step.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    kernels.use(args.backend)
    if args.worker:
        peak(args)
        return 0
    known = variants(args.model)
    names = args.variants or list(known)
    if set(names) - set(known):
        parser.error(f"--variants: choose among {', '.join(known)}")
    rows = measure(args, names)
    print(table(rows))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    new = not args.output.exists()
    with open(args.output, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
