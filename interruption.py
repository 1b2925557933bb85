"""Signals that ask a run to stop: noted at once, acted on at the next step boundary."""
import os
import signal
import threading

# Slurm's early warning is SIGUSR2 here as in submitit: SIGUSR1 is NCCL's.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR2") if hasattr(signal, name))


class Interruption:
    """While it is entered, SIGTERM, SIGINT and SIGUSR2 set `signal` (their number, 0 before) and do nothing else; a second
    SIGINT ends the process at once. Does nothing outside the main thread, where Python allows no handler."""

    def __init__(self):
        self.signal = 0
        self.before = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.signal = self.signal or number


def name_of(number: int) -> str:
    """"SIGTERM" of 15."""
    return signal.Signals(number).name
