"""A run's output folder: log lines, TensorBoard events, flags, versions, checkpoints."""
import datetime
import errno
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from vision_kan.checkpoints.read import CHECKPOINT
from vision_kan.checkpoints.write import save_checkpoint, saved_checkpoints
from vision_kan.common import console, peers
from vision_kan.common.console import EXIT_INTERRUPTED
from vision_kan.common.errors import EXIT_FAILED, Preempted, TrainingFailed, UserError
from vision_kan.common.files import STATUS, write_text
from vision_kan.common.process import Process
from vision_kan.common.text import to_json, warn
from vision_kan.run import tracking

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from vision_kan.training.state import TrainState


INTERRUPTED = "SIGINT twice: ended at once, nothing is saved since the last checkpoint"


def versions() -> dict[str, str]:
    """Versions of Python, the main packages, the platform and CUDA."""
    from importlib.metadata import version
    packages = {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform(),
            "cuda": torch.version.cuda or "none" if torch.cuda.is_available() else "none"}


def git_commit() -> str:
    """The commit of this code, with `-dirty` if the files differ from it, or 'unknown'."""
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], timeout=10,
                                cwd=Path(__file__).parent, capture_output=True, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"


class RunFolder:
    """The files of one run: `log.txt` (a JSON object per line), TensorBoard events, `args.yaml`, `run.yaml`, checkpoints. It does
    nothing without a folder and on ranks other than 0.

    A failed write (disk full, folder gone) gives a warning and does not end the training: `failed` holds the last reason until a
    checkpoint is written.

    `status.json` is the state of the run, because torchrun hides its exit code: {"state": "running" | "finished" | "preempted" |
    "failed", "epoch", "step", "reason", "exit_code", "processes", "host", "pid", "time"}.

    keep: number of checkpoints, besides the best ones.
    save_minutes: between checkpoints within an epoch; 0: none.
    track: the `tracking.SERVICES` to report to, under the project `track_project`."""

    RETRY_S = 60    # between attempts to write a checkpoint

    def __init__(self, folder: str, process: Process, keep: int = 2, save_minutes: float = 0, track: Sequence[str] = (),
                 track_project: str = ""):
        self.folder_name, self.keep, self.save_minutes = folder, keep, save_minutes
        self.saved_at = time.monotonic()
        self.folder = Path(folder).expanduser() if folder and process.is_main else None
        self.process = process
        self.failed = ""
        self.board: SummaryWriter | None = None
        self.unwritten = ""     # lines that could not be written to log.txt yet
        self.ended_by = ""      # why a run finishes before its last epoch
        self.track, self.track_project = track, track_project
        self.trackers: list[tracking.Tracker] = []
        if self.folder:
            tracking.check(track)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
            except OSError as error:
                raise UserError(f"--output_dir {folder} cannot be written to ({error.strerror}): "
                                "choose another folder") from error

    def holds_another_run(self, resumed: str) -> bool:
        """Whether the folder has a checkpoint of another run than this one. resumed: the file that this run resumes from; '': a
        new run."""
        if not self.folder or not saved_checkpoints(self.folder):
            return False
        return not resumed or Path(resumed).expanduser().resolve().parent != self.folder.resolve()

    def start(self, args_yaml: str, argv: list[str], epoch: int, step: int = 0) -> None:
        """Record flags, command and versions, and remove the log lines of epochs that are trained again."""
        if not self.folder:
            return
        resumed = bool(epoch or step)
        launch: dict[str, Any] = {
            "run_id": resumed and _run_id(self.folder) or uuid.uuid4().hex,
            "command": shlex.join([Path(sys.executable).name, "main.py", *argv]),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "first_epoch": epoch,
            "first_step": step, "commit": git_commit(), "processes": self.process.world_size,
            "device": str(self.process.device), "versions": versions()}
        with self._warn_on_os_error("args.yaml, run.yaml and log.txt"):
            for leftover in self.folder.glob(".checkpoint*.tmp"):     # left by a kill while saving
                leftover.unlink(missing_ok=True)
            for path in saved_checkpoints(self.folder):
                if path.is_dir():       # it would block every checkpoint
                    warn(f"the folder {path} is renamed to {path.name}.folder")
                    path.rename(f"{path}.folder")
            log = self.folder / "log.txt"
            if log.exists():
                kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _epoch_of(line) < epoch]
                write_text(log, "".join(line + "\n" for line in kept))
            write_text(self.folder / "args.yaml", args_yaml)
            with open(self.folder / "run.yaml", "a" if resumed else "w", encoding="utf-8") as file:
                yaml.safe_dump([launch], file, sort_keys=False)
        if self.track:
            about = tracking.About(launch["run_id"], self.folder.resolve().name, self.track_project, self.folder,
                                   yaml.safe_load(args_yaml), launch)
            self.trackers = [tracking.Tracker(name, about) for name in dict.fromkeys(self.track)]

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to log.txt, and report its numbers to TensorBoard and the trackers at the record's epoch."""
        if not self.folder:
            return
        numbers = {re.sub(r"^(train|test|ema_test)_", r"\1/", key): value for key, value in record.items()
                   if key != "epoch" and isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(record["epoch"], numbers)
        self.unwritten += to_json(record) + "\n"
        self._append_unwritten()
        if self.unwritten:
            return

        def scalars(board: "SummaryWriter") -> None:
            for key, value in numbers.items():
                board.add_scalar(key, value, record["epoch"])

        self.events(record["epoch"], scalars)

    def events(self, epoch: int, write: Callable[["SummaryWriter"], None]) -> None:
        """Call `write` with the TensorBoard writer. epoch: the first one that it writes."""
        if not self.folder:
            return
        with self._warn_on_os_error("the TensorBoard events"):
            board, self.board = self.board or self._open_board(epoch), None     # a failed writer is not used again
            write(board)
            board.flush()
            self.board = board

    def _open_board(self, epoch: int) -> "SummaryWriter":
        assert self.folder is not None
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        def hook(failure: threading.ExceptHookArgs) -> None:
            # TensorBoard's thread dies if the disk is full. The next call raises the same error, which becomes a warning.
            if not issubclass(failure.exc_type, OSError):
                threading.__excepthook__(failure)

        threading.excepthook = hook
        # TensorBoard reads the files in the order of their names, which begin with the time in seconds: avoid a second file
        # with the same one
        while any(f".tfevents.{int(time.time())}." in path.name for path in self.folder.glob("events.out.*")):
            time.sleep(0.05)
        return SummaryWriter(str(self.folder), purge_step=epoch)

    def save(self, checkpoint: dict[str, Any], also: tuple[str, ...] = ()) -> None:
        """Write a checkpoint, also under the names `also`. `failed` says whether it could be written."""
        if self.folder:
            with self._warn_on_os_error(CHECKPOINT):
                save_checkpoint(checkpoint, self.folder, also, self.keep)
            self.saved_at = time.monotonic()

    def wants_saving(self) -> bool:
        """Whether a checkpoint within the epoch is due: by the clock, or because the last one could not be written."""
        if not self.folder:
            return False
        since = time.monotonic() - self.saved_at
        return bool(self.failed) and since > self.RETRY_S or bool(self.save_minutes) and since > 60 * self.save_minutes

    def status(self, state: str, epoch: int, step: int, reason: str = "", exit_code: int | None = None) -> None:
        """Replace status.json; a failed write gives a warning as for any file."""
        if not self.folder:
            return
        record = {"state": state, "epoch": epoch, "step": step, "reason": reason, "exit_code": exit_code,
                  "processes": self.process.world_size, "host": socket.gethostname(), "pid": os.getpid(),
                  "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        with self._warn_on_os_error(STATUS):
            write_text(self.folder / STATUS, to_json(record, indent=1) + "\n")

    def finished(self, epoch: int, reason: str = "") -> None:
        """Set status.json to finished, if a kill prevented that after the last checkpoint."""
        try:
            state = json.loads((self.folder / STATUS).read_text(encoding="utf-8"))["state"] if self.folder else "finished"
        except (OSError, ValueError, KeyError, TypeError):
            state = ""
        if state != "finished":
            self.status("finished", epoch, 0, reason, exit_code=0)

    @contextmanager
    def reporting_status(self, state: "TrainState") -> Iterator[None]:
        """Keep status.json up to date with the training inside, however it ends. A collective that fails because a process is
        gone raises TrainingFailed, which names the process."""
        def end(how: str, reason: str, exit_code: int) -> None:
            self.status(how, state.epoch, state.step, reason, exit_code)
            for tracker in self.trackers:
                tracker.finish(how, exit_code)

        def failed(reason: str) -> None:
            self.status("failed", state.epoch, state.step, reason, EXIT_FAILED)

        peers.on_loss(failed)
        try:
            self.status("running", state.epoch, state.step)
            yield
        except (UserError, TrainingFailed, Preempted) as error:
            end("preempted" if isinstance(error, Preempted) else "failed", str(error), error.exit_code)
            raise
        except KeyboardInterrupt:
            end("preempted", INTERRUPTED, EXIT_INTERRUPTED)
            raise KeyboardInterrupt(INTERRUPTED) from None
        except Exception as error:
            lost = peers.lost(error)
            end("failed", str(lost or error) or type(error).__name__, EXIT_FAILED)
            if lost is None:
                raise
            raise lost from error
        else:
            end("finished", self.ended_by, 0)

    def interrupted(self, state: "TrainState") -> None:
        """Report a second SIGINT as `reporting_status` does. Called from another thread, because the main thread does not
        respond."""
        console.tell(f"stopped: {INTERRUPTED}")
        self.status("preempted", state.epoch, state.step, INTERRUPTED, EXIT_INTERRUPTED)

    def stopped_by(self, signal: str, state: "TrainState") -> str:
        """A sentence that says what is saved of a run stopped by a signal."""
        if not self.folder_name:
            return f"{signal}: without --output_dir nothing is kept"
        if self.failed:
            return f"{signal}: {self.failed}; --resume auto goes on from the checkpoint before"
        self._append_unwritten()
        lacks = f"; log.txt lacks these lines:\n{self.unwritten.rstrip()}" if self.unwritten else ""
        return f"{signal}: saved, --resume auto goes on after step {state.step} of epoch {state.epoch}{lacks}"

    def _append_unwritten(self) -> None:
        if self.folder and self.unwritten:
            with self._warn_on_os_error("log.txt"):
                _append(self.folder / "log.txt", self.unwritten)
                self.unwritten = ""

    def close(self) -> None:
        """Write what log.txt still lacks, and close the TensorBoard events. `failed` says whether all could be written."""
        self._append_unwritten()
        if self.board:
            with self._warn_on_os_error("the TensorBoard events"):
                self.board.close()
        self.board = None

    @contextmanager
    def _warn_on_os_error(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = f"{what} could not be written to {self.folder} ({error.strerror or error})"
            warn(f"{self.failed}: the training goes on, free some space or mount the folder again")
        else:
            if what == CHECKPOINT:
                self.failed = ""


def _run_id(folder: Path) -> str:
    """The id of the run in this folder, from its last launch, or ''."""
    try:
        return yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))[-1]["run_id"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, IndexError):
        return ""


def _epoch_of(line: str) -> float:
    """The epoch of a log line; infinity for a truncated line."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _append(path: Path, text: str) -> None:
    data = text.encode()
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):        # the disk is full: a truncated line would spoil the next one
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
