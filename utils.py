"""Errors and exit codes, devices, process group, seeds. No models, no flag parsing."""
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from console import readers_may_leave

# 75 is EX_TEMPFAIL of sysexits.h, "try again": stopped from outside, with everything kept that a resume needs.
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_PREEMPTED = 1, 2, 75


class UserError(Exception):
    """Bad input or environment. Its text is one sentence that names the flag, file or key and
    the remedy; the program prints it without a traceback."""
    exit_code = EXIT_BAD_INPUT


class UnreadableData(UserError):
    """So many images in a row cannot be read that going on makes no sense, or a stream is not what it is said to be."""

    # Not in datasets.py, where it is raised: loader processes send it by its module's name, which may have come to mean Hugging
    # Face's package.
    def __init__(self, text: str):
        # A DataLoader raises a worker's exception again with the whole traceback as its text.
        super().__init__(text.strip().rsplit(f"{type(self).__name__}: ", 1)[-1])


class TrainingFailed(Exception):
    """The run cannot go on; its text is one sentence that says why and what was kept."""
    exit_code = EXIT_FAILED


class Preempted(Exception):
    """The run was asked to stop from outside; its text says by what and what was kept."""

    def __init__(self, text: str, exit_code: int = EXIT_PREEMPTED):
        super().__init__(text)
        self.exit_code = exit_code


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
        with readers_may_leave():
            print(*words, **{"flush": True, **kwargs})


def printable(name: str, most: int = 100_000) -> str:
    """A file's name, or its end, on one line, in characters that any stream can write."""
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= most else f"...{name[3 - most:]}"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON for a UTF-8 file. Letters stay letters; of a file's name, bytes that are not UTF-8 are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")     # which is how JSON escapes a lone surrogate, too


def one_or_two(sides: Sequence[Any]) -> Any:
    """Height and width as `args.input_size` has them: one number for a square, else a list of two. `timm.layers.to_2tuple` gives
    both again."""
    return sides[0] if all(type(side) is int and side == sides[0] for side in sides) else list(sides)


def shown_size(size: int | Sequence[int], between: str = " ") -> str:
    """A size as --input-size takes it, or with another text between height and width."""
    return between.join(map(str, [size] if isinstance(size, int) else size))


def cores() -> int:
    """That this process may use: its part of the machine's, where a launcher has started several here."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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
        errors: list[str | None] = [None] * process.world_size
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


def use_deterministic_kernels() -> None:
    """--deterministic: PyTorch takes deterministic kernels only, and an operation that has none raises an error.

    cuBLAS reads its variable when its first handle is made, so this comes before any work on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
