"""A process and its terminal: Ctrl-C and missing packages during imports, exit codes, characters that the output's encoding
lacks, and a reader that has left (`| head`). Imports nothing that takes time."""
import codecs
import io
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from vision_kan.common.errors import EXIT_BAD_INPUT, EXIT_FAILED, Preempted, TrainingFailed, UserError

EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141        # 128 + SIGINT and SIGPIPE, as shells count
# Set by a training: called when nobody reads the output any more, in place of an error, so that it can save first.
on_unread: Callable[[], None] | None = None


def starting(name: str) -> None:
    """Call it in the first lines of a program with its `__name__`: until `guarded` takes over, Ctrl-C and a missing package end
    it with one line in place of a traceback. Importing PyTorch takes seconds."""
    if name != "__main__":
        return
    sys.excepthook = _not_imported
    # a script's background jobs ignore SIGINT, and keep doing so
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _not_imported(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not isinstance(error, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {sys.executable} has no module {error.name}: take the Python of .venv, which `make venv` sets up, or install "
          "requirements.txt", file=sys.stderr, flush=True)
    os._exit(EXIT_BAD_INPUT)        # Python itself would exit with 1


def _end(number: int, frame) -> None:
    tell("stopped: interrupted")
    os._exit(EXIT_INTERRUPTED)


def tell(line: str) -> None:
    """Write a line to stderr from a signal handler or another thread, where `print` is not reentrant."""
    try:
        start = os.linesep if os.isatty(2) else ""      # after the ^C that a terminal shows
        os.write(2, f"{start}{line}{os.linesep}".encode(errors="backslashreplace"))
    except OSError:
        pass


def guarded(program: Callable[[], int]) -> int:
    """Run program() with Ctrl-C as KeyboardInterrupt and streams that accept every character. Returns its exit code, or silently
    `EXIT_UNREAD` if nobody reads its output."""
    if sys.excepthook is _not_imported:
        sys.excepthook = sys.__excepthook__
    starts = signal.getsignal(signal.SIGINT) is _end
    if starts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)
    try:
        try:
            return program()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):       # a failed write shows here, not when Python exits
                stream.flush()
    except BrokenPipeError:
        if not silence():
            raise
        return EXIT_UNREAD
    finally:
        if starts:      # everything is done: Ctrl-C would only change the exit code while Python exits
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def exit_code(program: Callable[[], int]) -> int:
    """Run program(), `guarded`. For an error that is for the user (`ending`), print its sentence on stderr and return its exit
    code."""
    def ended() -> int:
        try:
            return program()
        except (Exception, KeyboardInterrupt) as error:
            if (end := ending(error)) is None:
                raise
            print(end[1], file=sys.stderr, flush=True)
            return end[0]

    return guarded(ended)


def ending(error: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence of an error that is for the user; None for any other, which should show its traceback."""
    if isinstance(error, UserError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, (TrainingFailed, Preempted)):
        return error.exit_code, f"stopped: {error}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, f"stopped: {str(error) or 'interrupted'}"
    if type(error).__name__ == "OutOfMemoryError":      # torch's; torch may not be imported
        return EXIT_FAILED, "stopped: out of GPU memory: lower --batch-size (and raise --grad-accum), or add --grad-checkpointing"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return EXIT_FAILED, "stopped: out of memory: lower --batch-size (and raise --grad-accum), or take a smaller --model"
    return None


# ---------------------------------------------------------------- characters
ESCAPE = "vision_kan.escape"


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs: escape characters that the encoding lacks as JSON does, so that printed JSON stays valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end


codecs.register_error(ESCAPE, _escaped)


# ---------------------------------------------------------------- readers
@contextmanager
def readers_may_leave() -> Iterator[None]:
    """For printing: if the reader has left, calls `on_unread` during a training, else raises BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        if on_unread is None or not silence():
            raise
        on_unread()


def silence() -> bool:
    """Redirect the standard streams whose reader has left to the null device. Returns whether there are any."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (OSError, ValueError, AttributeError):      # a stream in memory
            continue
        if _unread(stream, number):
            found = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
    return found


def _unread(stream, number: int) -> bool:
    try:
        stream.flush()
    except OSError:
        return True
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()        # flushing shows nothing if the buffer is empty
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
