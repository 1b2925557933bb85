"""Loader processes: they ignore the signals that stop a run, and their errors become one sentence."""
import os
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from torch.utils.data import DataLoader

from vision_kan.common.errors import UserError, one_line
from vision_kan.common.interruption import STOPPING


def batches(loader: DataLoader) -> Iterator:
    """The loader's batches. Raises UserError if a loader process has died, or if the machine is out of memory, shared memory,
    open files or processes."""
    workers = _workers(getattr(loader, "_iterator", None))      # persistent ones of the previous epoch
    try:
        _check(workers)
        iterator = iter(loader) if workers else _start(loader)
        workers = _workers(iterator)
        while True:
            _check(workers)     # PyTorch itself checks only after waiting five seconds
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch
    except UserError:
        raise
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        _check(workers, error)
        if sentence := explain_machine_error(error):
            raise UserError(sentence) from error
        if workers:     # a dying worker loses its connection first: wait for its exit code
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join(1)
            _check(workers, error)
        raise


def _workers(iterator: Iterator | None) -> list[BaseProcess]:
    return getattr(iterator, "_workers", [])


def _start(loader: DataLoader) -> Iterator:
    """iter(loader). The signals that `start_worker` ignores are blocked while the workers start, so that a worker never receives
    them. The previous handler of SIGCHLD is restored, because PyTorch's raises an error wherever the training is at that moment,
    even while a file is written; `batches` raises it instead."""
    if getattr(loader, "worker_init_fn", None) is not start_worker or not loader.num_workers or os.name != "posix":
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def start_worker(number: int) -> None:
    """Set up a loader process. Launchers signal all processes of a run, but only the training process decides when to stop, and
    its current step still needs its batch: so the signals are ignored here."""
    for stopping in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(stopping, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):      # else SIGTERM keeps PyTorch's handler, which ends the process
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, name="SIGTERM", daemon=True).start()


def _obey_parent() -> None:
    """End this process at a SIGTERM from the training process, which Python sends when a program ends without closing its
    loaders. Ignore it from anyone else."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _check(workers: list[BaseProcess], error: Exception | None = None) -> None:
    """Raises UserError from `error` if one of these processes has ended."""
    for worker in workers:
        code = worker.exitcode
        if code is None:
            continue
        if code == -signal.SIGKILL:
            text = ("was killed, most likely because the memory was full: lower --num_workers or --batch-size, or give the "
                    "run more memory")
        elif code == -getattr(signal, "SIGBUS", 0):
            text = f"found no room in the shared memory: {MORE_SHARED_MEMORY}"
        else:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
            text = f"has ended unexpectedly ({how}): --num_workers 0 loads in the training process and shows where"
        raise UserError(f"loader process {worker.pid} {text}") from error


MORE_SHARED_MEMORY = "enlarge /dev/shm (docker run --ipc=host or --shm-size=16g), or lower --num_workers or --batch-size"
# Pattern of PyTorch's and the system's errors that the machine causes -> sentence with the remedy.
_MACHINE = {
    r"Too many open files|0 items of ancdata":
        "there are too many open files for the loader processes: raise the limit (ulimit -n 65536), or lower --num_workers",
    r"(open|mmap|resize|allocate).*(shared memory|/torch_)|shared memory limit|No space left on device":
        f"the shared memory has no room for the loader processes: {MORE_SHARED_MEMORY}",
    r"Pin memory thread exited":
        "the thread that receives the loader processes' batches has died, most often of too many open files: raise the limit "
        "(ulimit -n 65536), lower --num_workers, or add --no-pin-mem",
    r"Resource temporarily unavailable":
        "no more loader processes can be started: lower --num_workers, or raise the limit (ulimit -u)",
    r"MemoryError|[Cc]an(no|')t allocate memory":
        "there is not enough memory to load the images: lower --num_workers or --batch-size, or give the run more memory",
}


def explain_machine_error(error: Exception) -> str | None:
    """The sentence for an error that the machine causes, else None."""
    text = one_line(f"{type(error).__name__}: {error}", 1000, line=-1)      # a worker's error includes its traceback
    return next((sentence for pattern, sentence in _MACHINE.items() if re.search(pattern, text)), None)
