"""Process group, safe save and load, what a run leaves in its output folder. No models, no flag parsing."""
import datetime
import errno
import hashlib
import json
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
SAFETENSORS_KEY = "vision_kan"      # of a .safetensors file's metadata: JSON of what a checkpoint says beside weights


class UserError(Exception):
    """Bad input or environment. Its text is one sentence that names the flag, file or key and
    the remedy; the program prints it without a traceback and exits with code 2."""


class TrainingFailed(Exception):
    """The run cannot go on (exit code 1); its text is one sentence that says why and what was kept."""


def exit_code(program: Callable[[], int]) -> int:
    """What `program` returns, or after an error, told in one sentence: 2 for bad input or environment, 1 where the
    training failed, 130 where it was interrupted. Leaves the process group."""
    try:
        return program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except TrainingFailed as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except torch.OutOfMemoryError:
        print("stopped: out of GPU memory: lower --batch-size (and raise --grad-accum), or add --grad-checkpointing",
              file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped: interrupted; --resume auto goes on from the last checkpoint", file=sys.stderr, flush=True)
        return 130
    finally:
        end_process()


# ---------------------------------------------------------------- process group
@dataclass(frozen=True)
class Process:
    """This process's place in the group and the device that it computes on."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def say(*words, **kwargs) -> None:
    """Print on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, **{"flush": True, **kwargs})


def world_size_of_launch() -> int:
    """Processes that torchrun (or a launcher that sets the same variables) has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`--device`: auto is CUDA where there is a GPU, else MPS, else the CPU. UserError if it isn't there."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device: use auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not supported: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or index >= count:
            raise UserError(f"--device {name}: this process needs GPU {index}, and PyTorch sees {count} of them; use "
                            "--device cpu, or start fewer processes")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU that PyTorch can use; use --device cpu")
    return device


def init_process(device_name: str, dist_url: str = "env://") -> Process:
    """Join the process group where a launcher started several processes: NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ:
        return Process(device=choose_device(device_name))
    rank, world_size = int(os.environ["RANK"]), world_size_of_launch()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(device_name, local_rank)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=dist_url,
                                rank=rank, world_size=world_size)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the {world_size} processes cannot meet at --dist_url {dist_url} "
                        f"({str(error).splitlines()[0]}): check MASTER_ADDR, MASTER_PORT and the firewall") from error
    return Process(rank, world_size, local_rank, device)


def end_process() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def main_process_first(process: Process) -> Iterator[None]:
    """The others of a machine wait until its first process has gone through."""
    if process.world_size > 1 and process.local_rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if process.world_size > 1 and process.local_rank == 0:
            dist.barrier()


@contextmanager
def stop_together(process: Process) -> Iterator[None]:
    """A UserError of any process inside is raised on all of them: none waits for one that has left."""
    error = None
    try:
        yield
    except UserError as e:
        error = str(e)
    if process.world_size > 1:
        errors = [None] * process.world_size
        dist.all_gather_object(errors, error)
        error = next(filter(None, errors), None)
    if error:
        raise UserError(error)


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators from a hash of `key`, e.g. (seed, epoch, step, rank):
    the random numbers of a step then depend on nothing that happened before it."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:2])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


# ---------------------------------------------------------------- reading checkpoints
def load_file(path: str | Path) -> dict[str, Any]:
    """A checkpoint (.pth and the like) or .safetensors file, on the CPU. Never runs code of the file.

    Besides tensors and plain types only `argparse.Namespace` is let in, which DeiT and the original Vision-KAN
    put under `args`. Raises UserError for anything else."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}: check the path")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(SAFETENSORS_KEY, "{}"))
                return {**about, "model": {key: file.get_tensor(key) for key in file.keys()}}
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")     # what matters raises
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):        # torch does not look at the checksums that it wrote
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} has a wrong checksum")
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except Exception as error:      # a damaged archive makes the reader raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise UserError(f"checkpoint {path} holds more than tensors and plain values ({refused.group(1)}): refused, "
                            "since reading it could run its code; get it from its source again") from error
        wordy = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))      # behind an essay on the flag
        reason = wordy.group(1) if wordy else (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"checkpoint {path} cannot be read, it is damaged or no checkpoint ({reason}): "
                        "copy or download it again") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary of weights")
    return checkpoint


def fetch(location: str) -> Path:
    """A local path for `location`: a file, or a URL that is downloaded once, whole or not at all.

    DeiT's URLs end in the first digits of the file's SHA-256 (`name-a1311bcf.pth`), which is checked."""
    url = urlparse(location)
    if url.scheme not in ("http", "https", "file"):
        return Path(location).expanduser()
    if url.scheme == "file":
        return Path(unquote(url.path))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(url.path).name
    digest = re.search(r"-([a-f0-9]{8,64})\.[^.]+$", name)
    # no hash in the name: two servers may offer different files under one name
    target = folder / (name if digest else f"{hashlib.sha256(location.encode()).hexdigest()[:12]}-{name}")
    if target.is_file():
        return target
    say(f"downloading {location} to {target}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(location, target, digest.group(1) if digest else "")
    except (HTTPException, OSError, ValueError) as error:       # URLError is an OSError
        reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
        raise UserError(f"{location} cannot be downloaded ({reason}): check the address and the connection, or "
                        "download it elsewhere and give the file") from error
    return target


def _download(location: str, target: Path, digest: str) -> None:
    """`torch.hub.download_url_to_file` would keep what comes before a connection breaks off."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with urlopen(Request(location, headers={"User-Agent": "torch.hub"}), timeout=60) as response, \
                open(temporary, "wb") as file:
            shutil.copyfileobj(response, file, 2 ** 20)
            missing = response.length       # counts down from Content-Length, None without one
        if missing:
            raise OSError(f"the connection broke off {missing} bytes before the end")
        with open(temporary, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if not actual.startswith(digest):
            raise UserError(f"{location} is not the file that its name promises (its SHA-256 is {actual}): nothing "
                            "was kept, check the address")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint was written with, as a dict; empty where it has none."""
    args = checkpoint.get("args") or {}
    args = vars(args) if isinstance(args, Namespace) else args
    return dict(args) if isinstance(args, Mapping) else {}


def weights_of(checkpoint: Mapping[str, Any], path: str | Path, key: str = "model") -> dict[str, torch.Tensor]:
    """The state dict under `key` (also under DeiT-like names, or the checkpoint itself when it is a bare one)."""
    for name in (key, "state_dict"):
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    state = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"checkpoint {path} holds no weights (no key 'model'): it has "
                        f"{', '.join(map(repr, list(checkpoint)[:5])) or 'nothing'}")
    return state


# ---------------------------------------------------------------- writing checkpoints
def save_checkpoint(checkpoint: dict[str, Any], folder: Path, also: tuple[str, ...] = ()) -> None:
    """Write `checkpoint.pth`, keep the one before as `checkpoint_previous.pth`, and give the new file the names
    in `also`. A kill or a full disk at any moment leaves the earlier files whole. Raises OSError."""
    path = folder / CHECKPOINT
    handle, temporary = tempfile.mkstemp(prefix=".checkpoint-", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:       # torch's zip writer hides the reason
                raise OSError(errno.ENOSPC, f"writing failed ({str(error).splitlines()[0][:80]})") from error
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        for name in also:
            _link(temporary, folder / name)
        if path.exists():
            _link(path, folder / PREVIOUS)
        os.replace(temporary, path)
        _sync_folder(folder)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _link(source: str | Path, target: Path) -> None:
    """A second name for a file, put in place in one step; a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def plain(value: Any) -> Any:
    """`value` with tuples, mappings and numpy numbers as plain types, so that any program loads a checkpoint
    with `torch.load(weights_only=True)` and no allow-list."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.Tensor, str, int, float, bool, type(None))):
        return value
    return str(value)


# ---------------------------------------------------------------- output folder
def versions() -> dict[str, str]:
    from importlib.metadata import version
    packages = {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else "none"}


def git_commit() -> str:
    """The commit of this code, with `-dirty` where the files differ from it, or 'unknown'."""
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], timeout=10,
                                cwd=Path(__file__).parent, capture_output=True, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"


class RunFolder:
    """`log.txt` (a JSON object a line), TensorBoard events, `args.yaml` and `run.yaml` of one run; the checkpoints
    are beside them. Does nothing without a folder and on ranks other than 0.

    A write that fails (disk full, folder gone) is told once a time and does not end the training:
    `failed` holds the last reason until a later write succeeds."""

    def __init__(self, folder: str, process: Process):
        self.folder = Path(folder).expanduser() if folder and process.is_main else None
        self.process = process
        self.failed = ""
        self.board = None
        self.unwritten = ""     # lines of log.txt that had no room yet
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
            except OSError as error:
                raise UserError(f"--output_dir {folder} cannot be written to ({error.strerror}): "
                                "choose another folder") from error

    def holds_another_run(self, resumed: str) -> bool:
        """Whether a checkpoint is here that is not of the run that goes on from the file `resumed` ('': a new run)."""
        if not self.folder or not (self.folder / CHECKPOINT).exists():
            return False
        return not resumed or Path(resumed).expanduser().resolve().parent != self.folder.resolve()

    def start(self, args_yaml: str, argv: list[str], epoch: int) -> None:
        """Record flags, command and versions; take back the log lines of epochs that will be done again."""
        if not self.folder:
            return
        launch = {"command": shlex.join([Path(sys.executable).name, "main.py", *argv]), "started":
                  datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "first_epoch": epoch,
                  "commit": git_commit(), "processes": self.process.world_size, "device": str(self.process.device),
                  "versions": versions()}
        with self._tolerant("args.yaml, run.yaml and log.txt"):
            for leftover in self.folder.glob(".checkpoint-*.tmp"):     # of a kill while saving
                leftover.unlink(missing_ok=True)
            log = self.folder / "log.txt"
            if log.exists():
                kept = [line for line in log.read_text().splitlines() if _epoch_of(line) < epoch]
                _write_whole(log, "".join(line + "\n" for line in kept))
            _write_whole(self.folder / "args.yaml", args_yaml)
            with open(self.folder / "run.yaml", "a" if epoch else "w") as file:
                yaml.safe_dump([launch], file, sort_keys=False)

    def log(self, record: dict[str, Any]) -> None:
        """One line of log.txt, and its numbers as TensorBoard scalars at the record's epoch."""
        if not self.folder:
            return
        self.unwritten += json.dumps(record) + "\n"
        with self._tolerant("log.txt"):
            _append_whole(self.folder / "log.txt", self.unwritten)
            self.unwritten = ""
        if self.unwritten:
            return
        with self._tolerant("the TensorBoard events"):
            board, self.board = self.board or self._open_board(record["epoch"]), None     # a writer that failed is dead
            for key, value in record.items():
                if key != "epoch" and isinstance(value, (int, float)):
                    board.add_scalar(re.sub(r"^(train|test|ema_test)_", r"\1/", key), value, record["epoch"])
            board.flush()
            self.board = board

    def _open_board(self, epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        def hook(failure: threading.ExceptHookArgs) -> None:
            # TensorBoard's thread dies of a full disk; its next call raises the same here, to be told in a sentence
            if not issubclass(failure.exc_type, OSError):
                threading.__excepthook__(failure)

        threading.excepthook = hook
        return SummaryWriter(str(self.folder), purge_step=epoch)

    def save(self, checkpoint: dict[str, Any], also: tuple[str, ...] = ()) -> None:
        if self.folder:
            with self._tolerant(CHECKPOINT):
                save_checkpoint(checkpoint, self.folder, also)

    def close(self) -> None:
        if self.board:
            with self._tolerant("the TensorBoard events"):
                self.board.close()
        self.board = None

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = f"{what} could not be written to {self.folder} ({error.strerror or error})"
            say(f"warning: {self.failed}: the training goes on, free some space or mount the folder again",
                file=sys.stderr)
        else:
            if what == CHECKPOINT:
                self.failed = ""


def _epoch_of(line: str) -> float:
    """The epoch of a log line; one that a kill cut off counts as never written."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _append_whole(path: Path, text: str) -> None:
    data = text.encode()
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):        # the disk is full now: half a line would spoil the next one
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
