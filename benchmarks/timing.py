"""Shared by the speed benchmarks: steps timed in turn, bytes kept for the backward pass, a description of the machine."""
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def time_in_turn(steps: dict[str, Callable[[], None]], repeats: int, warmup: int = 1,
                 least_seconds: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each step, timed in turn so that a slow moment of the machine affects all of them.

    least_seconds: continue after `repeats` turns until every step has been timed for this long."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    turn = 0
    while turn < repeats + warmup or min(map(sum, seconds.values())) < least_seconds:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
        turn += 1
    return seconds


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def ratios(seconds: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Median of the ratios of steps that were timed in the same turn, and the quartiles."""
    each = [a / b for a, b in zip(seconds, reference)]
    return statistics.median(each), quantile(each, 0.25), quantile(each, 0.75)


def saved_bytes(model: nn.Module | None, step: Callable[[], None]) -> int:
    """Bytes of the distinct storages that a step keeps for its backward pass, without the model's parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())} if model else set()
    kept: dict[int, torch.Tensor] = {}      # holds the tensors, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def machine() -> str:
    """Processor, threads and versions, for the head of a table."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        name = {key.strip(): value.strip() for key, value in lines.items()}.get("model name", name)
    capability = torch.backends.cpu.get_cpu_capability()
    return (f"{name} ({capability}, {os.cpu_count()} cores), Python {platform.python_version()}, "
            f"PyTorch {torch.__version__}")
