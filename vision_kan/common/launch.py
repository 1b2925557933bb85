"""The launch of several processes, known without torch."""
import os

from vision_kan.common.errors import UserError


def launch_number(name: str, least: int = 0) -> int:
    """The launcher's variable of this name; `least` if there is none. Raises UserError if it is not a whole number from `least`
    on."""
    text = os.environ.get(name, str(least))
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"the environment variable {name} is {text!r}, not a whole number from {least} on: correct what sets it "
                        f"(torchrun and other launchers do), or 'unset {name}'")
    return number


def world_size_of_launch() -> int:
    """The number of processes that torchrun, or a launcher that sets the same variables, has started. Raises UserError."""
    return launch_number("WORLD_SIZE", 1) if "RANK" in os.environ else 1
