"""What main.py answers before it imports torch, which takes seconds: --help, a mistyped flag, a wrong value."""
import signal
import sys

from vision_kan.common import console
from vision_kan.common.launch import world_size_of_launch
from vision_kan.config.checks import check_flags
from vision_kan.config.resolve import parse_args


def answered(name: str) -> None:
    """Called at the top of main.py with its `__name__`, after `console.starting`: ends the process after --help or an error."""
    if name == "__main__":
        handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
        if code := console.exit_code(_refused):
            sys.exit(code)
        signal.signal(signal.SIGINT, handler)       # torch is imported next
        sys.excepthook = hook


def _refused() -> int:
    args = parse_args().args
    if not args.list_models and not args.resume:        # a checkpoint may still fill in missing values
        check_flags(args, world_size_of_launch())
    return 0
