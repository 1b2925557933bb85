"""Train a small KAN vision transformer and its MLP twin on real handwritten digits, and compare them.

    python tools/quickstart.py [--seeds 0 1 2] [--output-dir runs/quickstart] [--epochs N]
"""
import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import timm
import torch

import main as program
import models_kan
from tools.plot_run import plot_runs, read_log

TWINS = {"KAN": "vit_nano_patch8_32_KAN", "MLP": "vit_nano_patch8_32_ViT"}
MARK = ".quickstart"        # the folder is ours to replace


def prepare(folder: Path) -> None:
    """An empty folder: what an earlier quickstart left there is replaced, anything else is refused."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (folder / MARK).exists():
            sys.exit(f"error: --output-dir {folder} holds something else than an earlier quickstart: choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def train(name: str, seed: int, folder: Path, extra: list[str]) -> dict[str, float]:
    """One run of `recipes/quickstart_*.yaml`: {"top1", "seconds", "img_per_s"}, seconds of everything."""
    recipe = ROOT / "recipes" / f"quickstart_{name.lower()}.yaml"
    start = time.perf_counter()
    code = program.main(["--config", str(recipe), "--output_dir", str(folder), "--seed", str(seed), *extra])
    if code:
        sys.exit(code)
    log = read_log(folder)
    return {"top1": log[-1]["test_acc1"], "seconds": time.perf_counter() - start,
            "img_per_s": statistics.median(record["img_per_s"] for record in log)}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A line for each twin: top-1 (mean and deviation over the seeds), size, cost."""
    lines = [f"{'':5}{'top-1 (%)':>16}{'parameters':>13}{'matmul MFLOPs':>15}{'elementwise':>13}{'seconds':>9}{'img/s':>8}"]
    models = {name: timm.create_model(model, num_classes=10) for name, model in TWINS.items()}
    for name, runs in results.items():
        top1 = [run["top1"] for run in runs]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        flops = models_kan.count_flops(models[name])
        seconds, rate = (statistics.mean(run[key] for run in runs) for key in ("seconds", "img_per_s"))
        lines.append(f"{name:5}{statistics.mean(top1):>{16 - len(spread)}.2f}{spread}"
                     f"{models_kan.count_parameters(models[name]):>13,}{flops.matmul / 1e6:>15.2f}"
                     f"{flops.elementwise / 1e6:>13.2f}{seconds:>9.0f}{rate:>8.0f}")
    mismatch = models_kan.twin_mismatch(*models.values())
    return "\n".join(lines + ([mismatch] if mismatch else []))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    args = parser.parse_args(argv)
    extra = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    prepare(args.output_dir)
    start = time.perf_counter()
    results = {name: [train(name, seed, args.output_dir / f"{name}_seed{seed}", extra) for seed in args.seeds]
               for name in TWINS}
    picture = plot_runs([args.output_dir / f"{name}_seed{args.seeds[0]}" for name in TWINS],
                        args.output_dir / "quickstart.png")
    print(f"\n{len(args.seeds)} seed(s), {torch.get_num_threads()} threads, PyTorch {torch.__version__}, last epoch\n")
    print(table(results))
    print(f"\n{time.perf_counter() - start:.0f} s together. In {args.output_dir}: a folder for each run with log.txt, "
          f"checkpoint.pth, args.yaml and TensorBoard events, and the picture {picture.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
