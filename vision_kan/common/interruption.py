"""Signals that ask a training to stop; it does so at the next step boundary."""
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from vision_kan.common import console

# Slurm's warning before the time limit is SIGUSR2 here, as in submitit, because NCCL uses SIGUSR1.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR2") if hasattr(signal, name))
UNREAD = int(getattr(signal, "SIGPIPE", 13))


class Interruption:
    """While it is entered, SIGTERM, SIGINT and SIGUSR2 only set `signal` to their number (0 before), and so does a reader of the
    output that leaves (`UNREAD`). The first SIGINT is answered on stderr if `speaks`. A second one raises KeyboardInterrupt; if
    the main thread does not respond, `on_repeat` is called and the process ends. Outside the main thread, where Python allows no
    handler, it does nothing.

    Python runs a handler only between two of its instructions, and a backward pass on a CPU may be an instruction of many
    seconds. So a thread, which the signal wakes, gives the answers."""
    GRACE_S = 2     # for the main thread to respond to the KeyboardInterrupt

    def __init__(self, on_repeat: Callable[[], None] = lambda: None, speaks: bool = True):
        self.on_repeat, self.speaks = on_repeat, speaks
        self.signal = 0
        self.interrupts = 0
        self.before: dict[int, Any] = {}
        self.left = threading.Event()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.receiver, self.sender = socket.socketpair()
            self.sender.setblocking(False)
            self.woken_before = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self._answer, name="interruption", daemon=True)
            self.thread.start()
            console.on_unread = lambda: self._note(UNREAD, None)
            self.before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.before:
            self.left.set()
            console.on_unread = None
            signal.set_wakeup_fd(self.woken_before)
            self.sender.shutdown(socket.SHUT_RDWR)      # ends the thread even if loader processes hold a copy
            self.thread.join()
            self.sender.close()
            self.receiver.close()
        self.before = {}

    def _note(self, number: int, frame) -> None:
        self.interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self.interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)        # a third one kills a process that is slow to end
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def _answer(self) -> None:
        interrupts = 0
        while number := self.receiver.recv(1):
            if number[0] != signal.SIGINT:
                continue
            interrupts += 1
            if interrupts == 1 and self.speaks:
                console.tell("stopping after this step; press Ctrl-C again to stop now")
            elif interrupts == 2 and not self.left.wait(self.GRACE_S):
                self.on_repeat()
                os._exit(console.EXIT_INTERRUPTED)


def name_of(number: int) -> str:
    """The name of a signal: "SIGTERM" for 15."""
    return "SIGPIPE" if number == UNREAD else signal.Signals(number).name
