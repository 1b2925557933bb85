"""Accuracy of feed-forwards: KANs against their MLP twin, paired by seed, on CIFAR-10 images.

    python benchmarks/accuracy.py scratch  --data cifar10 --variants mlp gkan relu2 kan --seeds 0 1 2 3 4
    python benchmarks/accuracy.py transfer --data cifar10 --variants mlp gkan --seeds 0 1 2 3 4
    python benchmarks/accuracy.py long     --data cifar10 --variants mlp gkan,kan_lr_mult=5 swiglu kat --size nano
    python benchmarks/accuracy.py convert  --data cifar10 --seeds 0 1 2 3 4
    python benchmarks/accuracy.py --plan benchmarks/plans/gpu_15_minutes.yaml --data cifar10 --device cuda --seconds 780
    python benchmarks/accuracy.py report

`scratch` trains a small ViT (`vit_nano_patch8_32`: 32 px, patch 8, width 96, depth 4) from random weights, 4 epochs.
`transfer` trains the MLP ViT on classes 0-4, 4 epochs (`transfer-long`: 20), converts it, and fine-tunes every variant in the
same way on classes 5-9.
`long` trains with mixup, cutmix and drop path, 50 epochs on a CPU and 100 on a GPU.
`convert` turns the MLPs of finished `scratch --variants mlp` runs into full-edge KANs, without training.
A variant is a name and changes to it: `gkan,kan_groups=16,lr=2e-3` (trials/variants.py). For a given seed, what two variants
share has the same initial weights, and they get the same images in the same order. A plan is a file of stages (trials/plan.py).

Finished runs are rows of `runs.csv` in --results and are not run again; an unfinished one continues after its last checkpoint.
Models, optimizer, schedule, loss, step, augmentation and evaluation are main.py's. On a CPU each run is a process of one thread,
its model compiled where torch.compile works; on a GPU all runs are in one process (trials/side_by_side.py).
"""
import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vision_kan.common import console

console.starting(__name__)
import torch

from benchmarks.trials.conversion import convert
from benchmarks.trials.images import load_images
from benchmarks.trials.plan import Stage, read_plan
from benchmarks.trials.report import append, finished, report
from benchmarks.trials.side_by_side import train_side_by_side
from benchmarks.trials.training import Trial, begin, begin_transfer, train
from benchmarks.trials.variants import SETTINGS, SIZES, TRANSFERS, Run, parse_variant
from vision_kan.common.errors import EXIT_PREEMPTED, Preempted, UserError, one_line
from vision_kan.common.process import Process, choose_device

SEEDS = [0, 1, 2, 3, 4]


def run_alone(run: Run, data: Path, work: Path, results: Path, seconds: float = float("inf")) -> bool:
    """Do one run on this process's only thread and append it to the results. Returns whether it is finished."""
    torch.set_num_threads(1)
    deadline = time.monotonic() + seconds
    images, columns = load_images(data, work), {}
    if run.setting in TRANSFERS:
        begun = begin_transfer(run, images, work, Process(), deadline)
        if begun is None:
            return False
        trial, images, columns["step0_error"] = begun
    else:
        trial = begin(run, images, work, Process())
    if train(trial, images, deadline):
        append(results / "runs.csv", {**trial.columns(), **columns})
    return trial.done


def run_on_cpu(runs: list[Run], args: argparse.Namespace, deadline: float) -> list[str]:
    """--jobs runs at a time, a process each; they end with this one. Returns a sentence for each that failed."""
    failures: list[str] = []
    begun: list[subprocess.Popen] = []
    lock, stopped = threading.Lock(), threading.Event()

    def work(run: Run) -> None:
        log = run.folder(args.work_dir) / "log.txt"
        limit = [] if deadline == float("inf") else ["--seconds", str(deadline - time.monotonic())]
        with lock:
            if stopped.is_set() or time.monotonic() > deadline:
                return
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as stream:
                process = subprocess.Popen(
                    [sys.executable, __file__, run.setting, "--worker", "--data", str(args.data), "--variants", run.words,
                     "--seeds", str(run.seed), "--work-dir", str(args.work_dir), "--results", str(args.results), "--device",
                     "cpu", *limit], stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
            begun.append(process)
        code = process.wait()
        if stopped.is_set():
            return
        if code not in (0, EXIT_PREEMPTED):
            said = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            failures.append(f"{run}: {one_line(said[-1].removeprefix('error: '), 300)} (exit code {code}, see {log})")
        print(f"{ {0: 'done', EXIT_PREEMPTED: 'stopped'}.get(code, 'failed')}: {run}", flush=True)

    with ThreadPoolExecutor(args.jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)) as pool:
        try:
            list(pool.map(work, runs))
        except BaseException:
            with lock:
                stopped.set()
                for process in begun:       # has no effect on one that has ended
                    process.terminate()
            raise
    return failures


def run_on_gpu(runs: list[Run], args: argparse.Namespace, deadline: float) -> list[str]:
    def finish(trial: Trial) -> None:
        append(args.results / "runs.csv", trial.columns())
        print(f"done: {trial.run}", flush=True)

    return train_side_by_side(runs, load_images(args.data, args.work_dir), args.work_dir, Process(device=choose_device("cuda")),
                              finish, most=args.jobs or 12, deadline=deadline)


def run_stages(stages: list[Stage], args: argparse.Namespace) -> list[str]:
    """Returns a sentence for each run or stage that failed."""
    deadline = time.monotonic() + args.seconds
    failures = []
    if args.device == "cuda" and any(stage.setting in TRANSFERS for stage in stages):
        raise UserError(f"--device cuda: {' and '.join(TRANSFERS)} run on a CPU, give --device cpu")
    count = len(load_images(args.data, args.work_dir)["train"])
    for stage in stages:
        most = count // 2 if stage.setting in TRANSFERS else count
        for text in (text for entry in stage.variants for text in entry):
            if (batch_size := stage.parsed(text, "cpu").recipe["batch_size"]) > most:
                raise UserError(f"variant {text}: a batch of {batch_size} is more than the {most} training images of --data "
                                f"{args.data}: give batch_size={most} or less")
    for number, stage in enumerate(stages, 1):
        on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()
                                           and stage.setting not in TRANSFERS)
        rows = finished(args.results)
        try:
            runs = [run for run in stage.runs("cuda" if on_gpu else "cpu", rows) if run.key not in rows]
        except UserError as error:      # it needs runs that have failed
            failures.append(f"stage {number}: {error}")
            continue
        if runs:
            print(f"stage {number} of {len(stages)}: {len(runs)} runs on {'a GPU' if on_gpu else 'a CPU'}", flush=True)
            failures += (run_on_gpu if on_gpu else run_on_cpu)(runs, args, deadline)
        left = number < len(stages) or not {run.key for run in runs} <= finished(args.results).keys()
        if left and time.monotonic() > deadline:
            print(f"stopped after {args.seconds:g} s: the same command continues", flush=True)
            break
    return failures


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="?", choices=[*SETTINGS, "convert", "report"])
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a file of stages, in place of setting, variants, seeds, size "
                        "and epochs")
    parser.add_argument("--data", type=Path, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--variants", nargs="+", metavar="V")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: 0 1 2 3 4")
    parser.add_argument("--size", choices=SIZES, help="where a variant does not say size=; default: nano")
    parser.add_argument("--epochs", type=int, metavar="N", help="where a variant does not say epochs=; default: 4, of long 50 on "
                        "a CPU and 100 on a GPU")
    parser.add_argument("--baseline", default="mlp", metavar="V", help="the variant to compare the others with")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: on a CPU one for each core, on a GPU 12")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N",
                        help="stop after the epoch that ends past this time, with everything saved")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "accuracy", help="checkpoints and logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """Of the plan or the command line. Raises UserError."""
    if args.plan:
        for name in ("setting", "variants", "seeds", "size", "epochs"):
            if getattr(args, name) is not None:
                flag = name if name == "setting" else f"--{name}"
                raise UserError(f"--plan and {flag}: the plan says that, leave it out of the command")
        return read_plan(args.plan)
    if not args.variants:
        raise UserError("give --variants, or --plan FILE")
    stage = Stage(args.setting, [[text] for text in args.variants], args.seeds or SEEDS, args.size or "nano", args.epochs)
    for text in args.variants:
        stage.parsed(text, "cpu")
    return [stage]


def command(args: argparse.Namespace) -> int:
    if args.setting == "report":
        report(args.results, args.baseline)
        return 0
    if not args.setting and not args.plan:
        raise UserError(f"give --plan FILE or one of {', '.join((*SETTINGS, 'convert', 'report'))}")
    for name, value in (("epochs", args.epochs), ("jobs", args.jobs)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if not args.worker and not args.seconds >= 0:
        raise UserError(f"--seconds {args.seconds:g} must be at least 0")
    if any(seed < 0 for seed in args.seeds or ()):
        raise UserError("--seeds must be whole numbers from 0 on")
    if not args.data:
        raise UserError("give --data FOLDER, with train/CLASS and val/CLASS")
    if args.setting == "convert":
        convert(args.seeds or SEEDS, args.data, args.work_dir, args.results)
        return 0
    if args.worker:
        run = Run(args.setting, parse_variant(args.variants[0], args.setting), args.seeds[0])
        return 0 if run_alone(run, args.data, args.work_dir, args.results, args.seconds) else EXIT_PREEMPTED
    stages = stages_of(args)
    parse_variant(args.baseline)
    try:
        args.results.mkdir(parents=True, exist_ok=True)
        open(args.results / "runs.csv", "a").close()
    except OSError as error:
        raise UserError(f"--results {args.results} cannot be written to ({error.strerror}): choose another folder") from error
    before = signal.signal(signal.SIGTERM, stop)
    try:
        failures = run_stages(stages, args)
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            raise Preempted(str(interrupt)) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if failures:
        print("error: " + "; ".join(failures), file=sys.stderr)
    if finished(args.results):
        report(args.results, args.baseline)
    return 1 if failures else 0


def stop(number: int, frame) -> NoReturn:
    """SIGTERM. An Exception would be taken for a failure of the run that it meets."""
    raise KeyboardInterrupt("SIGTERM: the same command continues after each run's last saved epoch")


def main(argv: list[str] | None = None) -> int:
    return console.exit_code(lambda: command(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
