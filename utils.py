"""What main.py and engine.py share: processes that stop together, deterministic kernels, progress bar and log lines."""
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from vision_kan.common.console import readers_may_leave
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process


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


def use_deterministic_kernels() -> None:
    """--deterministic: PyTorch takes deterministic kernels only, and an operation that has none raises an error.

    cuBLAS reads its variable when its first handle is made, so this comes before any work on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def progress(batches: Iterator, steps: int, title: str, process: Process) -> Iterator:
    """`batches` behind a progress bar, which is drawn on a terminal only."""
    return tqdm(batches, title, steps, leave=False, disable=not (process.is_main and sys.stderr.isatty()))


def tqdm_safe_print(text: str, process: Process) -> None:
    if process.is_main:
        with readers_may_leave():
            tqdm.write(text)
            sys.stdout.flush()
