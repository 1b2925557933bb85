"""This process: its place in the group, its device, its memory."""
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vision_kan.common.device_names import DEVICE_NAME, NOT_A_DEVICE
from vision_kan.common.errors import UserError
from vision_kan.common.launch import launch_number

try:
    import resource
except ImportError:         # Windows
    resource = None         # type: ignore[assignment]


@dataclass(frozen=True)
class Process:
    """This process's place in the group, and its device."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def cores() -> int:
    """The number of cores that this process may use: its share of the machine's if a launcher has started several here. Raises
    UserError."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // launch_number("LOCAL_WORLD_SIZE", 1))


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory so far, in MiB: of the tensors on a GPU; on a CPU of this process; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if device.type != "cpu" or resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)        # bytes there, KiB elsewhere


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`--device`: auto is CUDA if there is a GPU, else MPS, else the CPU. Raises UserError if the device does not exist."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if not DEVICE_NAME.fullmatch(name):
        raise UserError(f"--device {name} {NOT_A_DEVICE}")
    device = torch.device(name)
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or index >= count:
            raise UserError(f"--device {name}: this process needs GPU {index}, and PyTorch sees {count} of them; use "
                            "--device cpu, or start fewer processes")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU that PyTorch can use; use --device cpu")
    return device


def exact_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def gather_number(number: Tensor, process: Process) -> list[float]:
    """The scalar of each process, on all of them. A collective."""
    numbers = [number]
    if process.world_size > 1:
        numbers = [torch.empty_like(number) for _ in range(process.world_size)]
        dist.all_gather(numbers, number)
    return [value.item() for value in numbers]


def mean_over_processes(mean: Tensor, process: Process) -> float:
    """The mean of a scalar over the processes. A collective."""
    if process.world_size > 1:
        dist.all_reduce(mean)
        mean = mean / process.world_size
    return mean.item()
