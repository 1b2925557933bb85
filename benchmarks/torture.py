"""Kill a run of two processes again and again, resume it, and compare it with an uninterrupted one.

    python benchmarks/torture.py                    # 100 kills
    python benchmarks/torture.py --kills 6          # a minute

It runs the whole program with gloo processes on real images (DIGITS) with every augmentation, mixup and dropout. SIGKILL and
SIGTERM alternate, at random moments from the start of the processes on, and hit one of them or both; the other must end by
itself, and `--resume auto` must continue. When a run is finished, its weights, average, optimizer, schedule, best figures, log
lines and TensorBoard scalars are compared with the uninterrupted run's, bit for bit, and the next round begins. At the end there
is a negative control: a resume with a wrong position in the epoch's order must be detected.

Prints each kill, then the sums; exit code 1 if a round differs, a process hangs, or the control is not detected.
"""
import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch
from e2e import Run, launch, left
from helpers import differences
from timing import machine

from vision_kan.common.errors import EXIT_PREEMPTED

FLAGS = ("--device", "cpu", "--num_workers", "1", "--data-set", "DIGITS", "--model", "vit_nano_patch8_32_GKAN", "--batch-size",
         "64", "--warmup-epochs", "1", "--lr", "1e-3", "--unscale-lr", "--drop", "0.1", "--drop-path", "0.1",
         "--model-ema-decay", "0.95", "--dist-eval", "--print-freq", "1", "--save-interval-steps", "4", "--keep", "3",
         "--dist-timeout", "20")
ENDS_WITHIN_S = 60      # for the processes that a kill leaves; more is a hang


@dataclass
class Figures:
    kills: dict[str, int] = field(default_factory=lambda: {"SIGKILL": 0, "SIGTERM": 0})
    to: dict[str, int] = field(default_factory=dict)
    resumes: int = 0
    fresh: int = 0              # launches without a checkpoint to resume
    preempted: int = 0
    lost: list[int] = field(default_factory=list)       # steps repeated after each kill
    ends: list[float] = field(default_factory=list)     # seconds until the last process had ended
    hung: int = 0
    rounds: int = 0
    unequal: list[str] = field(default_factory=list)


def start(folder: Path, output: Path, flags: tuple[str, ...], processes: int) -> list[Run]:
    folder.mkdir(parents=True, exist_ok=True)
    return launch(folder, *flags, "--output_dir", output, "--resume", "auto", processes=processes)


def wait(runs: list[Run], seconds: float) -> list[int] | None:
    """Exit codes; None for a process that is still running after the time."""
    deadline = time.monotonic() + seconds
    for run in runs:
        run.process.join(max(0., deadline - time.monotonic()))
    if any(run.process.is_alive() for run in runs):
        for run in runs:
            run.kill()
        return None
    return [run.process.exitcode for run in runs]


def reached(run: Run, steps: int) -> int:
    """Steps, counted from the first epoch, that rank 0 has printed."""
    done = 0
    for line in run.out.read_text(errors="replace").splitlines():
        words = line.split()
        if line.startswith("epoch ") and len(words) > 3 and words[2] == "step" and "/" in words[3]:
            done = int(words[1].split("/")[0]) * steps + int(words[3].split("/")[0])
    return done


def saved(output: Path, steps: int) -> int:
    """The same of the newest checkpoint."""
    file = output / "checkpoint.pth"
    if not file.exists():
        return 0
    checkpoint = torch.load(file, weights_only=True)
    return (checkpoint["epoch"] + 1) * steps + checkpoint["step"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and targets of the kills")
    args = parser.parse_args(argv)
    chance, figures = random.Random(args.seed), Figures()
    flags = (*FLAGS, "--epochs", str(args.epochs))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        begun = time.monotonic()
        codes = wait(start(work / "peace", work / "peace" / "out", flags, args.processes), 600)
        if codes != [0] * args.processes:
            print(f"the uninterrupted run failed: exit codes {codes}\n{(work / 'peace/process0.err').read_text()}")
            return 1
        length = time.monotonic() - begun
        expected = left(work / "peace" / "out")
        steps = len((work / "peace/process0.out").read_text().split("epoch 0/")) - 1
        print(f"uninterrupted: {args.epochs} epochs of {steps} steps, {length:.1f} s", flush=True)
        kills = 0
        while kills < args.kills or figures.rounds == 0:
            home = work / f"round{figures.rounds}"
            output = home / "out"
            launches = 0
            while True:
                runs = start(home / f"launch{launches}", output, flags, args.processes)
                launches += 1
                had = (output / "checkpoint.pth").exists()
                figures.resumes, figures.fresh = figures.resumes + had, figures.fresh + (not had)
                if kills >= args.kills:
                    codes = wait(runs, 20 * length + 60)
                    break
                moment = chance.uniform(0, 0.2 * length)
                if all_ended(runs, moment):
                    codes = [run.process.exitcode for run in runs]
                    break
                name = "SIGKILL" if kills % 2 == 0 else "SIGTERM"
                whom = chance.choice([[0], [1 % args.processes], list(range(args.processes))])
                for rank in whom:
                    if runs[rank].process.is_alive():
                        os.kill(runs[rank].process.pid, getattr(signal, name))
                hit = time.monotonic()
                codes = wait(runs, ENDS_WITHIN_S)
                kills += 1
                figures.kills[name] += 1
                label = "all" if len(whom) == args.processes else f"process {whom[0]}"
                figures.to[label] = figures.to.get(label, 0) + 1
                figures.ends.append(time.monotonic() - hit)
                if codes is None:
                    figures.hung += 1
                else:
                    figures.preempted += codes == [EXIT_PREEMPTED] * args.processes
                lost = max(0, reached(runs[0], steps) - saved(output, steps))
                figures.lost.append(lost)
                print(f"kill {kills}: {name} to {label} after {moment:.2f} s; ended {figures.ends[-1]:.1f} s later with {codes}, "
                      f"{lost} steps lost, {saved(output, steps)} of {steps * args.epochs} saved", flush=True)
                if codes == [0] * args.processes:
                    break
            if codes != [0] * args.processes:
                print(f"the round did not come to its end: exit codes {codes}\n{runs[0].err.read_text()}")
                return 1
            different = differences(expected, left(output))
            figures.rounds += 1
            figures.unequal += [f"round {figures.rounds}: {path}" for path in different]
            print(f"round {figures.rounds}: {'equal' if not different else f'DIFFERENT in {different[:5]}'}", flush=True)
        noticed = control(work / "control", expected, flags, args.processes, length)
    print(machine())
    print(f"{args.kills} kills ({figures.kills['SIGKILL']} SIGKILL, {figures.kills['SIGTERM']} SIGTERM; "
          f"{', '.join(f'{count} to {label}' for label, count in sorted(figures.to.items()))}), {figures.resumes} resumes, "
          f"{figures.fresh} fresh starts, {figures.preempted} times all processes saved and left with {EXIT_PREEMPTED}")
    lost, ends = figures.lost or [0], figures.ends or [0.0]
    print(f"lost steps a kill: mean {statistics.mean(lost):.2f}, largest {max(lost)}; the last process ended "
          f"{statistics.median(ends):.1f} s after the kill (median), {max(ends):.1f} s at most; {figures.hung} hung")
    equal = figures.rounds - len({line.partition(":")[0] for line in figures.unequal})
    print(f"{figures.rounds} runs through, {equal} of them equal to the uninterrupted one bit by bit; negative control "
          f"{'noticed' if noticed else 'NOT NOTICED'}; {time.monotonic() - begin:.0f} s")
    return int(bool(figures.unequal or figures.hung or not noticed))


def all_ended(runs: list[Run], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(run.process.is_alive() for run in runs):
            return True
        time.sleep(0.01)
    return False


def control(home: Path, expected: dict, flags: tuple[str, ...], processes: int, length: float) -> bool:
    """Whether the comparison notices a resume that skips a batch."""
    output = home / "out"
    runs = start(home / "first", output, flags, processes)
    while not (output / "checkpoint.pth").exists():
        time.sleep(0.01)
    for run in runs:
        run.kill()
    file = output / "checkpoint.pth"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["step"] += 1
    checkpoint["position"] += 64 * processes
    torch.save(checkpoint, file)
    codes = wait(start(home / "second", output, flags, processes), 20 * length + 60)
    return codes == [0] * processes and bool(differences(expected, left(output)))


if __name__ == "__main__":
    sys.exit(main())
