"""Run the whole program on hostile checkpoint files, each in its own process, by --resume FILE, --resume auto, --eval, --finetune
and --teacher-path in turn.

    python benchmarks/fuzz_checkpoints.py               # 1,000 files
    python benchmarks/fuzz_checkpoints.py --n 50 --seed 1 --verbose

A file must be refused in one sentence (exit code 2), or used only if that is right: a flipped bit is harmless if all values are
those of the good file; a run that starts from it must end well. With --resume auto the run must continue from the earlier good
file, and say so. No code may run: files with code make a folder or connect to a port. Exit code 1 if anything crashed, hung, ran
code, or took more than 4 GiB.
"""
import argparse
import collections
import multiprocessing
import os
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch
from e2e import QUICK, run, write_digits
from helpers import NANO, differences
from hostile_checkpoints import Hostile, hostile_files
from timing import machine

from vision_kan.checkpoints.read import load_file
from vision_kan.common.errors import UserError

WAYS = ("resume", "auto", "eval", "auto eval", "finetune", "teacher")
LIMIT_S, LIMIT_BYTES = 120, 4 * 2 ** 30
COLUMNS = ("refused", "fell back", "loaded", "ran code", "crashed", "hung")


class Ground:
    """A data set, a finished run of one epoch whose next epoch takes a second, and a port that nothing should connect to."""

    def __init__(self, folder: Path):
        self.folder, self.canary = folder, folder / "canary"
        self.data = write_digits(folder / "digits", train=6, val=2)
        self.quick = (*QUICK, "--data-path", self.data)
        (folder / "work").mkdir()
        code, text, _ = apart(lambda: run(*self.quick, "--epochs", 2, "--model-ema-decay", 0.9, "--output_dir", folder / "run"),
                              folder / "work")
        assert code == 0, text
        self.whole = (folder / "run/checkpoint_previous.pth").read_bytes()
        self.good = torch.load(folder / "run/checkpoint_previous.pth", weights_only=True)
        self.heard = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            connection, _ = self.server.accept()
            connection.close()
            self.heard += 1

    def words(self, way: str, hostile: Hostile, place: Path) -> tuple:
        """Write the file and return the command line that uses it."""
        if way.startswith("auto"):      # --resume auto reads .pth files only
            hostile.write(place / "checkpoint.pth")
            (place / "checkpoint_previous.pth").write_bytes(self.whole)
            auto = ("--resume", "auto", "--output_dir", place)
            return (*self.quick, *auto) if way == "auto" else \
                ("--eval", *auto, "--data-path", self.data, "--device", "cpu", "--num_workers", 0)
        file = hostile.write(place / f"hostile{hostile.suffix}")
        return {"resume": (*self.quick, "--resume", file), "finetune": (*self.quick, "--finetune", file, "--epochs", 1),
                "eval": ("--eval", "--resume", file, "--data-path", self.data, "--device", "cpu", "--num_workers", 0),
                "teacher": (*self.quick, "--epochs", 1, "--model", "deit_tiny_distilled_patch16_224_ViT", "--input-size", 32,
                            "--distillation-type", "hard", "--teacher-model", NANO, "--teacher-path", file)}[way]

    def outcome(self, way: str, hostile: Hostile) -> tuple[str, str, int]:
        """One of COLUMNS, the output, and the peak memory in bytes."""
        place = self.folder / "work"
        shutil.rmtree(place)
        place.mkdir()
        words, heard = self.words(way, hostile, place), self.heard
        code, text, peak = apart(lambda: run(*words), place)
        if self.canary.exists() or self.heard > heard or os.environ.get("HOSTILE"):
            shutil.rmtree(self.canary, ignore_errors=True)
            return "ran code", text, peak
        if code is None:
            return "hung", text, peak
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if code == 2 and len(errors) == 1 and "Traceback" not in text and not way.startswith("auto"):
            return "refused", text, peak
        if code == 0 and "Traceback" not in text:
            if "going on from the earlier" in text:
                return "fell back", text, peak
            wrong = self.not_right(way, hostile, place)
            return ("crashed", wrong, peak) if wrong else ("loaded", text, peak)
        return "crashed", f"exit code {code}: {text}", peak

    def not_right(self, way: str, hostile: Hostile, place: Path) -> str:
        """The reason why the file should not have been used, or ''."""
        if hostile.loads == "never":
            return f"taken by {way}"
        if hostile.loads == "any":
            return ""
        copy = hostile.write(self.folder / f"copy{hostile.suffix}")
        try:
            found = differences(load_file(copy), self.good)
            return f"changed at {found[:3]}" if found else ""
        except UserError as error:
            return f"taken by {way}, and now: {error}"
        finally:
            copy.unlink()


def apart(call, folder: Path) -> tuple[int | None, str, int]:
    """call() in a copy of this process: its exit code (None: it hung), what it wrote, its peak memory in bytes."""
    told = folder / "told.txt"
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, errors="backslashreplace") for n in (1, 2))
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2 ** 30, 16 * 2 ** 30))     # the machine must survive
        torch.set_num_threads(1)
        code = 99
        try:
            code = call()
        finally:
            sender.send((code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return None, told.read_text(errors="replace"), 0
    code, peak = receiver.recv() if receiver.poll() else (process.exitcode, 0)
    return code, told.read_text(errors="replace") if told.exists() else "", peak


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000, help="files (1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print the output for each file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, bad, highest = time.monotonic(), [], 0
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as scratch:
        ground = Ground(Path(scratch))
        files = hostile_files(ground.good, ground.canary, ground.port, args.seed, args.n)
        for number, hostile in enumerate(files):
            ways = [way for way in WAYS if hostile.suffix == ".pth" or not way.startswith("auto")]
            way = ways[number // 11 % len(ways)]        # every way with every kind
            outcome, text, peak = ground.outcome(way, hostile)
            counts[hostile.kind][outcome] += 1
            highest = max(highest, peak)
            said = " ".join(text.splitlines()[-3:])[-400:]
            if args.verbose:
                print(f"{number:5} {outcome:10} {way:10} {hostile.kind}: {hostile.what}: {said}", flush=True)
            if outcome not in COLUMNS[:3] or peak > LIMIT_BYTES:
                bad.append(f"{number} {outcome} {way} {hostile.kind}: {hostile.what}, {peak / 2 ** 20:.0f} MiB: {text[-1500:]}")
    print(machine())
    print(f"{'kind':32}{'files':>7}" + "".join(f"{column:>11}" for column in COLUMNS))
    total = collections.Counter()
    for kind, count in sorted(counts.items()):
        total += count
        print(f"{kind:32}{count.total():>7}" + "".join(f"{count[column]:>11}" for column in COLUMNS))
    print(f"{'all':32}{total.total():>7}" + "".join(f"{total[column]:>11}" for column in COLUMNS))
    print(f"seed {args.seed}, peak memory {highest / 2 ** 30:.2f} GiB, {time.monotonic() - start:.0f} s")
    print("\n".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
