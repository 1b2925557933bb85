"""Loader processes: started deaf to signals, watched, their errors as sentences."""
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
    """The loader's batches. Raises UserError where a loader process has died, or where the machine is out of memory, shared
    memory, open files or processes."""
    workers = _workers(getattr(loader, "_iterator", None))      # of the epoch before
    try:
        _check(workers)
        iterator = iter(loader) if workers else _start(loader)
        workers = _workers(iterator)
        while True:
            _check(workers)     # at once: PyTorch looks when it has waited for five seconds
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch
    except UserError:
        raise
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        _check(workers, error)
        if sentence := machine_sentence(error):
            raise UserError(sentence) from error
        if workers:     # one may be about to die, its connection being the first to go
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join(1)
            _check(workers, error)
        raise


def _workers(iterator: Iterator | None) -> list[BaseProcess]:
    return getattr(iterator, "_workers", [])


def _start(loader: DataLoader) -> Iterator:
    """iter(loader). While its workers are started, the signals that `start_worker` ignores are blocked, so that a worker is
    born deaf to them. PyTorch's handler of SIGCHLD would raise an error wherever the training is at that moment, between
    two updates or while a file is written; the one from before is put back, and the error comes out of `batches`."""
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
    """The first thing that a loader process does. Launchers signal all processes of a run, but only the training process
    decides when to stop, and the step that it is in still needs its batch."""
    for stopping in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(stopping, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):      # else SIGTERM keeps PyTorch's handler, which ends the process
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, name="SIGTERM", daemon=True).start()


def _obey_parent() -> None:
    """SIGTERM from the training process ends this one: Python sends it where a program ends without closing its loaders, and
    waits. From anybody else it is ignored."""
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
            text = ("was killed, as a system does whose memory is full: lower --num_workers or --batch-size, or give the "
                    "run more memory")
        elif code == -getattr(signal, "SIGBUS", 0):
            text = f"found no room in the shared memory: {MORE_SHARED_MEMORY}"
        else:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
            text = f"has ended unexpectedly ({how}): --num_workers 0 loads in the training process and shows where"
        raise UserError(f"loader process {worker.pid} {text}") from error


MORE_SHARED_MEMORY = "enlarge /dev/shm (docker run --ipc=host or --shm-size=16g), or lower --num_workers or --batch-size"
# What PyTorch's and the system's errors say of the machine -> what helps.
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


def machine_sentence(error: Exception) -> str | None:
    """What helps where the error is the machine's and not the program's, else None."""
    text = one_line(f"{type(error).__name__}: {error}", 1000, line=-1)      # a worker's error comes with its whole traceback
    return next((sentence for pattern, sentence in _MACHINE.items() if re.search(pattern, text)), None)
