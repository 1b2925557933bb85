"""Train a small group KAN vision transformer and its MLP twin on real handwritten digits, and compare them.

    python tools/quickstart.py [--seeds 0 1 2] [--output-dir runs/quickstart] [--epochs N]
"""
import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import timm
import torch

import models_kan
from tools.plot_run import plot_runs, read_log

TWINS = {"GKAN": "vit_nano_patch8_32_GKAN", "MLP": "vit_nano_patch8_32_ViT"}
MARK = ".quickstart"        # the folder is ours to replace


def prepare(folder: Path) -> None:
    """An empty folder: what an earlier quickstart left there is replaced, anything else is refused."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (folder / MARK).exists():
            sys.exit(f"error: --output-dir {folder} holds something else than an earlier quickstart: choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def train(seed: int, output_dir: Path, extra: list[str]) -> dict[str, dict[str, float]]:
    """Both twins by `recipes/quickstart_*.yaml`: name -> {"top1", "seconds", "img_per_s"}, seconds of everything.

    They train side by side, each on half of the cores: equal conditions for both, and on a machine that is busy
    otherwise too, one thread that waits for no other is faster than two that do."""
    threads = max(1, torch.get_num_threads() // 2)
    seconds, failures = {}, []

    def run(name: str) -> None:
        command = [sys.executable, str(ROOT / "main.py"), "--config", str(ROOT / f"recipes/quickstart_{name.lower()}.yaml"),
                   "--output_dir", str(output_dir / f"{name}_seed{seed}"), "--seed", str(seed), *extra]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"})
        for line in process.stdout or ():
            print(f"{name} | {line}", end="", flush=True)
        if process.wait():
            failures.append(process.returncode)
        seconds[name] = time.perf_counter() - start

    runs = [threading.Thread(target=run, args=(name,)) for name in TWINS]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    if failures:
        sys.exit(failures[0])
    logs = {name: read_log(output_dir / f"{name}_seed{seed}") for name in TWINS}
    return {name: {"top1": log[-1]["test_acc1"], "seconds": seconds[name],
                   "img_per_s": statistics.median(record["img_per_s"] for record in log)} for name, log in logs.items()}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A line for each twin: top-1 (mean and deviation over the seeds), size, cost."""
    lines = [f"{'':6}{'top-1 (%)':>16}{'parameters':>13}{'matmul MFLOPs':>15}{'elementwise':>13}{'seconds':>9}{'img/s':>8}"]
    models = {name: timm.create_model(model, num_classes=10) for name, model in TWINS.items()}
    for name, runs in results.items():
        top1 = [run["top1"] for run in runs]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        flops = models_kan.count_flops(models[name])
        seconds, rate = (statistics.mean(run[key] for run in runs) for key in ("seconds", "img_per_s"))
        lines.append(f"{name:6}{statistics.mean(top1):>{16 - len(spread)}.2f}{spread}"
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
    by_seed = [train(seed, args.output_dir, extra) for seed in args.seeds]
    results = {name: [runs[name] for runs in by_seed] for name in TWINS}
    picture = plot_runs([args.output_dir / f"{name}_seed{args.seeds[0]}" for name in TWINS],
                        args.output_dir / "quickstart.png")
    print(f"\n{len(args.seeds)} seed(s), side by side with {max(1, torch.get_num_threads() // 2)} thread(s) each, "
          f"PyTorch {torch.__version__}, last epoch\n")
    print(table(results))
    print(f"\n{time.perf_counter() - start:.0f} s together. In {args.output_dir}: a folder for each run with log.txt, "
          f"checkpoint.pth, args.yaml and TensorBoard events, and the picture {picture.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
