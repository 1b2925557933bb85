"""Errors whose text is for the user, and exit codes."""

# 75 is EX_TEMPFAIL of sysexits.h, "try again": stopped from outside, with everything kept that a resume needs.
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_PREEMPTED = 1, 2, 75


class UserError(Exception):
    """Bad input or environment. Its text is one sentence that names the flag, file or key and
    the remedy; the program prints it without a traceback."""
    exit_code = EXIT_BAD_INPUT


class UnreadableData(UserError):
    """Too many consecutive images cannot be read, or a stream is not what it is said to be."""

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


def one_line(error: BaseException | str, most: int = 150, line: int = 0) -> str:
    """One line of an error's message or of a text, by default the first, of printable characters; the error's type where it has
    no message. most: characters."""
    lines = str(error).strip().splitlines() or ["" if isinstance(error, str) else type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[line].strip()[:most])
