"""What main.py answers before it imports torch, which takes seconds: --help, a mistyped flag, a wrong value."""
import signal
import sys

from vision_kan.common import console


def answered(name: str) -> None:
    """Called at the top of main.py with its `__name__`: ends the process after --help or an error. Until
    `console.guarded` takes over, Ctrl-C and a missing package end it with one line (`console.starting`)."""
    console.starting(name)
    if name != "__main__":
        return
    # here, because they import packages
    from vision_kan.common.launch import world_size_of_launch
    from vision_kan.config.checks import check_flags
    from vision_kan.config.resolve import parse_args

    def refused() -> int:
        args = parse_args().args
        if not args.list_models:
            check_flags(args, world_size_of_launch(), complete=not args.resume)
        return 0

    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    if code := console.exit_code(refused):
        sys.exit(code)
    signal.signal(signal.SIGINT, handler)       # torch is imported next
    sys.excepthook = hook
