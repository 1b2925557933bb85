"""Train a small group KAN vision transformer and its MLP twin on real handwritten digits, and compare them.

    python tools/quickstart.py [--seeds 0 1 2] [--output-dir runs/quickstart] [--epochs N]
"""
import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from itertools import chain, count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vision_kan.common import console

console.starting(__name__)
import timm
import torch

from tools.common import check_at_least_1, command, half_interval, make_folder, tool_parser
from tools.logs import read_log
from tools.plot_run import plot_runs
from vision_kan.common.errors import UserError
from vision_kan.config.parser import Parser
from vision_kan.models.cost import count_flops, count_parameters, twin_mismatch

TWINS = {"GKAN": "vit_nano_patch8_32_GKAN", "MLP": "vit_nano_patch8_32_ViT"}
STEP = re.compile(r"epoch \d+/(\d+) ")      # main.py's log line
TOP1 = re.compile(r"model: top-1 (\d+\.\d+)")
OUTPUT = ROOT / "runs" / "quickstart"


def prepare(folder: Path | None) -> Path:
    """Make and return an empty folder: `folder`, or else `OUTPUT` with the first free number. Raises UserError if `folder` is not
    empty."""
    numbered = (OUTPUT.with_name(f"{OUTPUT.name}_{number}") for number in count(2))
    chosen = folder or next(path for path in chain([OUTPUT], numbered) if not _taken(path))
    if _taken(chosen):
        raise UserError(f"--output-dir {folder} is not empty, and nothing is overwritten: choose a new folder")
    return make_folder(chosen)


def _taken(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def train(seed: int, output_dir: Path, extra: list[str]) -> dict[str, dict[str, float]]:
    """Train both twins by `recipes/quickstart_*.yaml`. Returns name -> {"top1", "images", "seconds", "img_per_s"}, with the total
    seconds.

    They train side by side, each on half of the cores: conditions are equal, and on a busy machine one thread is faster than two
    that wait for each other. It prints a line for each epoch that both have finished; their own output goes to NAME_seedN.txt."""
    threads = max(1, torch.get_num_threads() // 2)
    seconds: dict[str, float] = {}
    failures: dict[int, str] = {}
    children: list[subprocess.Popen] = []
    stopped, unread = threading.Event(), threading.Event()
    epochs = "?"
    finished: dict[str, list[str]] = {name: [] for name in TWINS}
    lock, begin = threading.Lock(), time.perf_counter()

    def follow(name: str, line: str) -> None:
        nonlocal epochs
        if step := STEP.match(line):
            epochs = step[1]
        if found := TOP1.match(line):
            with lock:
                finished[name].append(found[1])
                number = len(finished[name])
                if number == min(map(len, finished.values())) and not stopped.is_set():
                    print(f"seed {seed}  epoch {number:>{len(epochs)}}/{epochs}  top-1 (%) "
                          + "  ".join(f"{twin} {top1[number - 1]:>6}" for twin, top1 in finished.items())
                          + f"  {time.perf_counter() - begin:.0f} s", flush=True)

    def stop() -> None:
        stopped.set()
        for child in children:
            child.terminate()

    def run(name: str) -> None:
        command = [sys.executable, str(ROOT / "main.py"), "--config", str(ROOT / f"recipes/quickstart_{name.lower()}.yaml"),
                   "--output_dir", str(output_dir / f"{name}_seed{seed}"), "--seed", str(seed), *extra]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
                                        "PYTHONIOENCODING": "utf-8"})
        children.append(process)
        if stopped.is_set():
            process.terminate()
        lines: list[str] = []
        with open(output_dir / f"{name}_seed{seed}.txt", "w", encoding="utf-8") as file:
            for line in process.stdout or ():
                print(line, end="", file=file, flush=True)
                lines.append(line)
                try:
                    follow(name, line)
                except BrokenPipeError:
                    unread.set()
                    stop()
        if code := process.wait():
            failures[code] = f"{name}:\n{''.join(lines[-5:])}the full output is in {file.name}"
        seconds[name] = time.perf_counter() - start

    runs = [threading.Thread(target=run, args=(name,)) for name in TWINS]
    try:
        for thread in runs:
            thread.start()
        for thread in runs:
            thread.join()
    except KeyboardInterrupt:
        stop()
        for thread in runs:
            thread.join()
        raise
    if unread.is_set():
        raise BrokenPipeError
    for code, last in failures.items():
        print(last, file=sys.stderr)
        sys.exit(code)
    logs = {name: read_log(output_dir / f"{name}_seed{seed}") for name in TWINS}
    return {name: {"top1": log[-1]["test_acc1"], "images": log[-1]["test_images"], "seconds": seconds[name],
                   "img_per_s": statistics.median(record["img_per_s"] for record in log)} for name, log in logs.items()}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A line for each twin: top-1 (mean and deviation over the seeds), size, cost."""
    lines = [f"{'':6}{'top-1 (%)':>16}{'parameters':>13}{'matmul MFLOPs':>15}{'elementwise':>13}{'seconds':>9}{'img/s':>8}"]
    models = {name: timm.create_model(model, num_classes=10) for name, model in TWINS.items()}
    for name, runs in results.items():
        top1 = [run["top1"] for run in runs]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        flops = count_flops(models[name])
        seconds, rate = (statistics.mean(run[key] for run in runs) for key in ("seconds", "img_per_s"))
        lines.append(f"{name:6}{statistics.mean(top1):>{16 - len(spread)}.2f}{spread}"
                     f"{count_parameters(models[name]):>13,}{flops.matmul / 1e6:>15.2f}"
                     f"{flops.elementwise / 1e6:>13.2f}{seconds:>9.0f}{rate:>8.0f}")
    mismatch = twin_mismatch(*models.values())
    return "\n".join(lines + ([mismatch] if mismatch else []))


def conclusion(results: dict[str, list[dict[str, float]]]) -> str:
    """What may be concluded from the table, and what may not."""
    kan, mlp = ([run["top1"] for run in runs] for runs in results.values())
    images, n = results["GKAN"][0]["images"], len(kan)
    differences = [a - b for a, b in zip(kan, mlp)]
    mean = statistics.mean(differences)
    if n == 1:
        half = 196 * math.sqrt(sum(p * (1 - p) for p in (kan[0] / 100, mlp[0] / 100)) / images)
        text = (f"GKAN - MLP: {mean:+.2f} points of top-1, one seed, {images} test images (one image is {100 / images:.2f} "
                f"points; the choice of images alone is worth ± {half:.2f}, 95%). One seed does not show which is better: "
                "--seeds 0 1 2 3 4 pairs five.")
    else:
        half = half_interval(differences)
        better = "GKAN" if mean > 0 else "MLP"
        verdict = "no difference is shown" if abs(mean) <= half else f"{better} is better on these digits"
        text = (f"GKAN - MLP: {mean:+.2f} points of top-1, 95% interval [{mean - half:+.2f}, {mean + half:+.2f}] (Student's t, "
                f"{n} seeds, paired, {images} test images): {verdict}.")
    about = ("Both have about the same parameters and matrix products; the learned functions cost elementwise operations. Digits "
             "are easy: nearly any model learns them. So this shows that the training works, not which feed-forward is better on "
             "photographs; for that see docs/results.md (CIFAR-10).")
    return "\n".join(textwrap.fill(part, 110) for part in (text, about))


def arguments() -> Parser:
    parser = tool_parser("quickstart.py", __doc__)
    parser.add_argument("--output-dir", type=Path, metavar="DIR",
                        help="a new folder for both runs (default: runs/quickstart, or runs/quickstart_2 and so on)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="train both with each seed")
    parser.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's")
    return parser


def run(args: argparse.Namespace, _: list[str]) -> int:
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))} names one twice: name each once")
    extra = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    if args.epochs is not None:
        check_at_least_1(args, "epochs")
    args.output_dir = prepare(args.output_dir)
    start = time.perf_counter()
    by_seed = [train(seed, args.output_dir, extra) for seed in args.seeds]
    results = {name: [runs[name] for runs in by_seed] for name in TWINS}
    picture = plot_runs([args.output_dir / f"{name}_seed{args.seeds[0]}" for name in TWINS],
                        args.output_dir / "quickstart.png", with_inputs=True)
    print(f"\n{len(args.seeds)} seed(s), side by side with {max(1, torch.get_num_threads() // 2)} thread(s) each, "
          f"PyTorch {torch.__version__}, last epoch\n")
    print(f"{table(results)}\n\n{conclusion(results)}")
    print(f"\n{time.perf_counter() - start:.0f} s in total. In {args.output_dir}: a folder for each run with log.txt, "
          f"checkpoint.pth, args.yaml and TensorBoard events, the output of each (.txt), and the picture {picture.name}")
    return 0


main = command(arguments, run)

if __name__ == "__main__":
    sys.exit(main())
