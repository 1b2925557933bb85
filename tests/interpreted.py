"""Checks of the elementwise kernels in Triton's interpreter, on a CPU.

The interpreter is chosen when Triton is imported, so a file of such checks runs itself once in a process of its own, and each of
its tests reads what became of one check.
"""
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from helpers import ROOT

# Largest error allowed, relative to the largest value: float32 as computed, the others as rounded.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_near(name: str, got: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    """got is of this dtype and of the shape of `right` (float64), and as near to it as the dtype allows."""
    assert got.dtype == dtype and got.shape == right.shape, name
    bound = TOLERANCE[dtype] * max(1.0, right.abs().max().item())
    error = (got.double() - right).abs().max().item()       # NaN compares false
    assert error <= bound, f"{name}: error {error:.2e} over {bound:.2e}"


def main(checks: dict[str, Callable[[], None]], names: list[str]) -> None:
    """Run the checks of these names and print name -> error of those that fail, as JSON."""
    from vision_kan.kernels import triton_columns as ops

    def filled(*args):
        make = real(*args)
        return lambda: make().fill_(float("nan"))

    torch.set_num_threads(1)
    real, ops.allocator = ops.allocator, filled         # what is not written shows
    ops.FORWARD_PROGRAMS = ops.BACKWARD_PROGRAMS = 4 / 68       # of the device that stands in: few, as on much data
    failed = {}
    for name in names:
        try:
            torch.manual_seed(0)
            checks[name]()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed))


def cases(checks: dict[str, Callable[[], None]], quick: tuple[str, ...]) -> list:
    """The names for `pytest.mark.parametrize`; the others than `quick` take the interpreter most of a minute."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in checks]


def passes(file: str, checks: dict[str, Callable[[], None]], quick: tuple[str, ...], name: str) -> None:
    """Fails the test if the file's check of this name fails."""
    pytest.importorskip("triton", reason="Triton is not installed")
    failed = _failures(file, tuple(other for other in checks if (other in quick) == (name in quick)))
    assert name not in failed, failed[name]


@cache
def _failures(file: str, names: tuple[str, ...]) -> dict[str, str]:
    """name -> error, of checks run in one process."""
    done = subprocess.run([sys.executable, file, *names], capture_output=True, text=True, cwd=ROOT, timeout=240,
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
