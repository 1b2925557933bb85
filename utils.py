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
    """On each machine the first process runs the block, then the others do."""
    if process.world_size > 1 and process.local_rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if process.world_size > 1 and process.local_rank == 0:
            dist.barrier()


@contextmanager
def stop_together(process: Process) -> Iterator[None]:
    """A UserError of any process inside is raised on all of them, so that none waits for one that has left."""
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
    """--deterministic: PyTorch uses deterministic kernels only, and an operation without one raises an error.

    Call it before any work on a GPU, because cuBLAS reads its variable when it creates its first handle."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def progress(batches: Iterator, steps: int, title: str, process: Process) -> Iterator:
    """`batches` with a progress bar, which appears on a terminal only."""
    return tqdm(batches, title, steps, leave=False, disable=not (process.is_main and sys.stderr.isatty()))


def tqdm_safe_print(text: str, process: Process) -> None:
    """Print a line in rank 0, without breaking the progress bar."""
    if process.is_main:
        with readers_may_leave():
            tqdm.write(text)
            sys.stdout.flush()
