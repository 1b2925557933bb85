"""How fast a run is and could be: torch.compile, a profiler trace, and model FLOPs utilisation (MFU)."""
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
    """Let `model` run through torch.compile from its next call on; options are torch.compile's.

    In place: parameters, keys and copies (the moving average) are those of the plain module.
    Raises UserError where what the compiler needs is missing.
    """
    if options.get("backend", "inductor") == "inductor":
        missing = _missing_for_compile(device.type)
        if missing:
            raise UserError(f"--compile needs {missing}, or leave the flag out")
    model.compile(**options)


def _missing_for_compile(device_type: str) -> str:
    """What torch.compile's own backend lacks on this machine and how to get it, or ''."""
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
    """Called after each training step: a trace of a few of the first epoch's steps, once they are warm.

    Writes profile/trace.json.gz (Chrome's format) in `folder` and prints the operators that take most of the time;
    the training goes on, and the later calls do nothing.
    """
    WARM_UP, STEPS, ROWS = 10, 3, 10

    def __init__(self, folder: str | Path, steps_per_epoch: int, device: torch.device):
        self.path = Path(folder).expanduser() / "profile/trace.json.gz"
        self.on_gpu = device.type == "cuda"
        self.active = min(self.STEPS, max(1, steps_per_epoch - 1))
        settle = int(steps_per_epoch > 1)      # a recorded step that is thrown away: the profiler's own start is slow
        self.wait = max(0, min(self.WARM_UP, steps_per_epoch - self.active - settle))
        self.step = 0
        self.first = self.wait + settle + 1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profile: profile | None = profile(activities=activities, on_trace_ready=self._write, acc_events=True,
                               schedule=schedule(wait=self.wait, warmup=settle, active=self.active, repeat=1))
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
        """The operators with the largest time of their own, ms a step on the device that computes."""
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
# Nominal dense bfloat16/float16 tensor-core TFLOP/s of a card, by a pattern of its name. The makers' figures: no
# program reaches them.
PEAK_TFLOPS = {
    r"\bA100\b": 312, r"\bH100 PCIe\b": 756, r"\bH100 80GB HBM3\b|\bH100[- ]SXM": 989, r"\bH200\b": 989,
    r"\bB200\b": 2250, r"\bL40S\b": 362, r"\bL4\b": 121, r"\bRTX 4090$": 165, r"\bRTX 3090$": 71, r"\bA10\b": 125,
    r"\bV100\b": 125, r"\bMI300X\b": 1307,
}


def peak_flops(device_name: str) -> float | None:
    """Nominal 16-bit FLOP/s of a card; None for one that is not in the table, and for a part of one (MIG)."""
    if "MIG" in device_name:
        return None
    return next((tflops * 1e12 for pattern, tflops in PEAK_TFLOPS.items() if re.search(pattern, device_name)), None)


def ideal_rate(matmul_flops: int | None, process: Process, dtype: torch.dtype) -> float | None:
    """Training images/s of all processes together at the cards' nominal peak, or None where that is not known.

    matmul_flops: of an image's forward pass; forward and backward together are three times that. In float32 a card
    computes with other units than those of the table: None."""
    if not matmul_flops or process.device.type != "cuda" or dtype == torch.float32:
        return None
    peak = peak_flops(torch.cuda.get_device_name(process.device))
    return peak and peak * process.world_size / (3 * matmul_flops)
