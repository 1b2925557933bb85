"""Errors whose message is for the user, and exit codes."""

# 75 is EX_TEMPFAIL of sysexits.h, "try again": stopped from outside, with everything saved that a resume needs.
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_PREEMPTED = 1, 2, 75


class UserError(Exception):
    """Bad input or environment. The message is one sentence that names the flag, file or key and the remedy; the program prints
    it without a traceback."""
    exit_code = EXIT_BAD_INPUT


class UnreadableData(UserError):
    """Too many consecutive images cannot be read, or a stream is not as declared."""

    def __init__(self, text: str):
        # A DataLoader re-raises a worker's exception with its whole traceback as the message.
        super().__init__(text.strip().rsplit(f"{type(self).__name__}: ", 1)[-1])


class TrainingFailed(Exception):
    """The run cannot continue. The message is one sentence that says why and what was kept."""
    exit_code = EXIT_FAILED


class Preempted(Exception):
    """The run was asked to stop from outside. The message says by what, and what was kept."""

    def __init__(self, text: str, exit_code: int = EXIT_PREEMPTED):
        super().__init__(text)
        self.exit_code = exit_code


def one_line(error: BaseException | str, most: int = 150, line: int = 0) -> str:
    """One line of an error's message or of a text, in printable characters; the error's type if it has no message.

    most: maximum number of characters. line: index of the line."""
    lines = str(error).strip().splitlines() or ["" if isinstance(error, str) else type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[line].strip()[:most])
