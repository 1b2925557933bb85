"""The speed of a run: torch.compile, a profiler trace, and model FLOPs utilisation (MFU)."""
import os
import re
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from vision_kan.common.errors import UserError, one_line
from vision_kan.common.process import Process
from vision_kan.common.text import say


def compile_model(model: nn.Module, device: torch.device, **options) -> None:
    """Compile `model` in place, from its next call on. options: torch.compile's.

    Parameters, keys and copies (the moving average) stay those of the uncompiled module. Raises UserError if the compiler lacks
    something on this machine.
    """
    if options.get("backend", "inductor") == "inductor":
        missing = missing_for_compile(device.type)
        if missing:
            raise UserError(f"--compile needs {missing}, or leave the flag out")
    model.compile(**options)


def missing_for_compile(device_type: str) -> str:
    """What inductor, torch.compile's default backend, lacks on this machine and how to get it, or ''."""
    if device_type == "cuda":
        if find_spec("triton") is None:
            return "Triton on a GPU, which is not installed: pip install triton"
        if not (shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")):
            return "a C compiler for Triton, and there is none: install gcc, or name one in the variable CC"
    if device_type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compiler = os.environ.get("CXX", usual)
        if not shutil.which(compiler):
            return f"a C++ compiler on a CPU, and {compiler} is not found: install it, or name one in the variable CXX"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            return "Python's header files on a CPU, and Python.h is not found: install python3-dev"
    return ""


# ---------------------------------------------------------------- profiler
class StepProfiler:
    """Traces a few steps of the first epoch after a warm-up. Call it after each training step.

    It writes profile/trace.json.gz (Chrome's format) in `folder` and prints the operators that take the most time. The training
    goes on, and later calls do nothing.
    """
    WARM_UP, STEPS, ROWS = 10, 3, 10

    def __init__(self, folder: str | Path, steps_per_epoch: int, device: torch.device):
        self.path = Path(folder).expanduser() / "profile/trace.json.gz"
        self.on_gpu = device.type == "cuda"
        self.active = min(self.STEPS, max(1, steps_per_epoch - 1))
        discarded = int(steps_per_epoch > 1)        # the profiler makes its first step slow
        self.wait = max(0, min(self.WARM_UP, steps_per_epoch - self.active - discarded))
        self.step = 0
        self.first = self.wait + discarded + 1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profile: profile | None = profile(activities=activities, on_trace_ready=self._write, acc_events=True,
                               schedule=schedule(wait=self.wait, warmup=discarded, active=self.active, repeat=1))
        self.profile.start()

    def __call__(self) -> None:
        if self.profile is None:
            return
        self.step += 1
        self.profile.step()
        if self.step == self.first - 1 + self.active:
            self.profile.stop()
            self.profile = None

    def _write(self, profiled: profile) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            say(f"warning: --profile: {self.path} could not be written ({one_line(error)}): the training "
                "goes on", file=sys.stderr)
            return
        last = self.first + self.active - 1
        say(f"--profile: steps {self.first} to {last} are in {self.path}, for ui.perfetto.dev or chrome://tracing; "
            f"the training goes on\n{self._table(profiled)}")

    def _table(self, profiled: profile) -> str:
        """The operators with the largest self time, in ms per step, on the device that computes."""
        time_of = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        events = [event for event in profiled.key_averages() if not event.key.startswith("ProfilerStep")]
        total = sum(getattr(event, time_of) for event in events) or 1
        events.sort(key=lambda event: -getattr(event, time_of))
        lines = [f"{'operator':50}{'calls a step':>14}{'ms a step':>12}{'share':>8}"]
        for event in events[:self.ROWS]:
            own = getattr(event, time_of)
            lines.append(f"{event.key[:49]:50}{event.count / self.active:>14.1f}{own / 1e3 / self.active:>12.2f}"
                         f"{own / total:>8.1%}")
        return "\n".join(lines)


# ---------------------------------------------------------------- model FLOPs utilisation
# Pattern of a card's name -> nominal dense bfloat16/float16 tensor-core TFLOP/s, from the makers' data sheets. No program reaches
# them.
PEAK_TFLOPS = {
    r"\bA100\b": 312, r"\bH100 PCIe\b": 756, r"\bH100 80GB HBM3\b|\bH100[- ]SXM": 989, r"\bH200\b": 989,
    r"\bB200\b": 2250, r"\bL40S\b": 362, r"\bL4\b": 121, r"\bRTX 4090$": 165, r"\bRTX 3090$": 71, r"\bA10\b": 125,
    r"\bV100\b": 125, r"\bMI300X\b": 1307,
}


def peak_flops(device_name: str) -> float | None:
    """Nominal 16-bit FLOP/s of a card; None for one that is not in the table, and for a MIG slice."""
    if "MIG" in device_name:
        return None
    return next((tflops * 1e12 for pattern, tflops in PEAK_TFLOPS.items() if re.search(pattern, device_name)), None)


def ideal_rate(matmul_flops: int | None, process: Process, dtype: torch.dtype) -> float | None:
    """Training images/s of all processes at the cards' nominal peak; None if it is unknown, as in float32, for which the table
    has no figures.

    matmul_flops: of an image's forward pass; forward and backward pass together take three times that."""
    if not matmul_flops or process.device.type != "cuda" or dtype == torch.float32:
        return None
    peak = peak_flops(torch.cuda.get_device_name(process.device))
    return peak and peak * process.world_size / (3 * matmul_flops)
