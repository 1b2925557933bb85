"""The launch of several processes, known without torch."""
import os


def world_size_of_launch() -> int:
    """The number of processes that torchrun, or a launcher that sets the same variables, has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
