"""What the end-to-end tests share: small data sets on disk, runs in this process and in others."""
import atexit
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
from helpers import NANO, ROOT, scalars
from PIL import Image
from sklearn.datasets import load_digits

import engine
import main as program
from vision_kan.common import peers

# A run of a second: no warm-up that would outlast it, no worker processes.
QUICK = ("--device", "cpu", "--num_workers", "0", "--model", NANO, "--batch-size", "16", "--warmup-epochs", "0",
         "--no-repeated-aug")
# For runs of one process and of several that are compared. Plain SGD keeps a rounding error small; what is drawn for each
# process rather than for each image is off.
ALIKE = ("--opt", "momentum", "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--unscale-lr", "--lr", "0.1",
         "--model-ema-decay", "0.8", "--dist-eval")
TIMES = ("epoch_seconds", "img_per_s", "mfu", "memory_mib")
LINE = re.compile(r"(model|model_ema): top-1 (\d+\.\d\d) top-5 (\d+\.\d\d) \((\d+) images\)")


# ---------------------------------------------------------------- data
@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


def write_digits(folder: Path, train: int = 16, val: int = 8, classes: int = 3, size: int = 32,
                 names: list[str] | None = None) -> Path:
    """train/NAME/*.png and val/NAME/*.png with `train` and `val` real handwritten digits of each class."""
    images, targets = _digits()
    for number, name in enumerate(names or [f"digit{c}" for c in range(classes)]):
        chosen = np.flatnonzero(targets == number % 10)
        for half, some in (("train", chosen[:train]), ("val", chosen[train:train + val])):
            (folder / half / name).mkdir(parents=True)
            for index in some:
                image = Image.fromarray(images[index]).resize((size, size), Image.Resampling.BICUBIC)
                image.convert("RGB").save(folder / half / name / f"{index}.png")
    return folder


# ---------------------------------------------------------------- runs
def run(*argv) -> int:
    """The real program in this process."""
    return program.main([str(word) for word in argv])


class Run:
    """The real program in a process of its own, forked quickly from a server that has imported everything."""

    def __init__(self, folder: Path, *argv, environment: dict[str, str] | None = None, cwd: Path | None = None,
                 file_limit: int | None = None, call=program.main):
        name = f"process{len(list(folder.glob('process*.out')))}"
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        self.out.touch()
        _start_server()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_child,
            args=(call, [str(word) for word in argv], self.out, self.err, environment or {}, cwd, file_limit,
                  multiprocessing.get_start_method()))
        self.process.start()
        atexit.register(self.kill)      # a failed test must not leave it behind

    def wait(self, timeout: float = 100) -> int:
        """The exit code; -SIGNAL where a signal ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {self.out.read_text()}{self.err.read_text()}")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def launch(folder: Path, *argv, processes: int = 2, call=program.main, own: dict[int, tuple] | None = None) -> list[Run]:
    """The program in `processes` processes with the variables of torchrun; own: rank -> further words for that process."""
    port = free_port()
    return [Run(folder, *argv, *(own or {}).get(rank, ()), call=call, environment={
        "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(processes)]


def _start_server() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main", "sklearn.model_selection", "torch.utils.tensorboard"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _child(call, argv: list[str], out: Path, err: Path, environment: dict[str, str], cwd: Path | None,
           file_limit: int | None, start_method: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored where the tests run in the background
    os.environ.update(environment)
    os.chdir(cwd or "/")
    multiprocessing.set_start_method(start_method, force=True)      # of its own workers, as anywhere else
    torch.set_num_threads(1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(call(argv))


def command_line(*argv, cwd: Path | None = None, module: tuple[str, ...] = (), timeout: float = 200,
                 **environment: str) -> subprocess.CompletedProcess:
    """`python main.py ...`, or `python -m MODULE ... main.py ...`, as a user types it."""
    words = [sys.executable, *(["-m", *module] if module else []), str(ROOT / "main.py"), *map(str, argv)]
    return subprocess.run(words, check=False, cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Enough(BaseException):
    """`recording` has enough batches."""


@contextlib.contextmanager
def recording(first: int | None = None) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record each batch of a training in this process: images and targets as they enter mixup, and the loss.

    first: end the program with `Enough` after this many batches."""
    record = {"images": [], "targets": [], "losses": []}
    real = engine.train_one_epoch

    def note(criterion, inputs, loss) -> None:
        record["losses"].append(loss.detach().clone())
        if len(record["losses"]) == first:
            raise Enough

    def train_one_epoch(training, loader, hooks):
        mixup = training.mixup

        def watched(images, targets):
            record["images"].append(images.clone())
            record["targets"].append(targets.clone())
            return mixup(images, targets) if mixup else (images, targets)

        hook = training.criterion.register_forward_hook(note)
        try:
            return real(replace(training, mixup=watched), loader, hooks)
        finally:
            hook.remove()

    engine.train_one_epoch = train_one_epoch
    try:
        yield record
    finally:
        engine.train_one_epoch = real


# ---------------------------------------------------------------- what a run left
def checkpoint(folder: Path, name: str = "checkpoint.pth") -> dict:
    return torch.load(folder / name, map_location="cpu", weights_only=True)


def log(folder: Path, times: bool = False) -> list[dict]:
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in record.items() if times or key not in TIMES} for record in records]


def left(folder: Path) -> dict:
    """What an interruption must not change in a run's folder: checkpoints without the paths and intervals in their flags, log
    lines, TensorBoard's scalars."""
    files = {path.name: checkpoint(folder, path.name) for path in folder.glob("*.pth") if "previous" not in path.name}
    for saved in files.values():
        for key in ("output_dir", "resume", "num_workers", "save_interval_steps"):
            saved["args"].pop(key)
    return {"files": files, "log": log(folder),
            "scalars": {tag: points for tag, points in scalars(folder).items() if tag not in TIMES}}


def close(a: dict, b: dict) -> None:
    """The weights and averages of two checkpoints are equal to rounding."""
    for key in ("model", "model_ema"):
        for name, value in a[key].items():
            torch.testing.assert_close(value, b[key][name], rtol=1e-3, atol=2e-5, msg=f"{key} {name}")


def evaluation(text: str) -> dict[str, tuple[str, str, int]]:
    """The last lines of an evaluation: "model" and "model_ema" -> top-1, top-5, images."""
    lines = {}
    for line in text.splitlines()[-2:]:
        match = LINE.fullmatch(line)
        if match:
            lines[match[1]] = (match[2], match[3], int(match[4]))
    return lines


def refusal(capsys, *argv) -> str:
    """The one error on stderr of a run in this process that ends with exit code 2."""
    capsys.readouterr()
    code = run(*argv)
    out, err = capsys.readouterr()
    assert code == 2, f"exit code {code}: {out}{err}"
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], err
    assert "Traceback" not in err
    return errors[0].removeprefix("error: ")


# ---------------------------------------------------------------- processes, and where they are
def finish(runs: list[Run], code: int = 0, timeout: float = 100) -> list[str]:
    """Outputs of processes that all end with `code`."""
    codes = [run.wait(timeout) for run in runs]
    assert codes == [code] * len(runs), [(run.out.read_text(), run.err.read_text()) for run in runs]
    return [run.out.read_text() for run in runs]


def at(monkeypatch, where: str, act) -> None:
    """Call `act` when the program marks that it reaches `where`, for example "the update of step 2 of epoch 1"."""
    def mark(doing: str) -> None:
        if doing == where:
            act()

    monkeypatch.setattr(peers, "progress", mark)


def trained(data: Path, out: Path, way: str, *more, teacher: Path | str = "") -> int:
    """Two epochs of three steps of 16 images."""
    return run(*QUICK, "--epochs", 2, "--data-path", data, "--lr", 1e-2, "--unscale-lr", "--model-ema-decay", 0.8, "--output_dir",
               out, "--print-freq", 2, *way.format(teacher=teacher).split(), *more)
