"""KAT's rational in Triton's interpreter, on a CPU, against float64 and autograd.

The interpreter is chosen when Triton is imported, so this file runs itself once in a process of its own, and each test
reads what became of one check.
"""
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vision_kan.kernels import rational_reference  # noqa: E402

# Largest error allowed, relative to the largest value: float32 as computed, the others as rounded.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def plan(u, c, degree):
    from vision_kan.kernels.triton_rational import Plan
    return Plan(u.dtype, u.shape, u.device, c.shape, degree)


def check(rows=21, channels=48, groups=3, degree=5, below=4, dtype=torch.float32, u=None) -> None:
    torch.manual_seed(rows + channels)
    u = (torch.randn(rows, channels) * 2 if u is None else u).to(dtype)
    dv, c = torch.randn(u.shape).to(dtype), torch.randn(groups, degree + 1 + below)
    c[:, degree + 1:].abs_()
    kernel = plan(u, c, degree)
    leaves = [tensor.double().requires_grad_() for tensor in (u, c)]
    exact = rational_reference(*leaves, degree)
    exact.backward(dv.double())
    for name, got, right in zip(("v", "du", "dC"), (kernel.forward(u, c), *kernel.backward(dv, u, c)),
                                (exact.detach(), *(leaf.grad for leaf in leaves))):
        kind = torch.float32 if name == "dC" else dtype
        bound = TOLERANCE[kind] * max(1.0, right.abs().max().item())
        error = (got.double() - right).abs().max().item()       # NaN compares false
        assert got.dtype == kind and error <= bound, f"{name}: error {error:.2e} over {bound:.2e}"


def not_a_number() -> None:
    """NaN stays NaN, and in its own place."""
    u, c = torch.zeros(3, 4), torch.ones(2, 10)
    u[1, 2] = float("nan")
    kernel = plan(u, c, 5)
    v, (du, *_) = kernel.forward(u, c), kernel.backward(torch.ones_like(u), u, c)
    assert torch.equal(v.isnan(), u.isnan()) and torch.equal(du.isnan(), u.isnan())


def empty() -> None:
    u, c = torch.zeros(0, 12), torch.ones(3, 10)
    kernel = plan(u, c, 5)
    du, dc, _ = kernel.backward(u, u, c)
    assert kernel.forward(u, c).shape == du.shape == (0, 12) and torch.equal(dc, torch.zeros(3, 10))


def twice() -> None:
    u, dv, c = torch.randn(75, 64), torch.randn(75, 64), torch.rand(2, 10)
    kernel = plan(u, c, 5)
    runs = [(kernel.forward(u, c), *kernel.backward(dv, u, c)[:2]) for _ in range(2)]
    assert all(map(torch.equal, *runs))


CHECKS = {
    "float32": check, "float16": lambda: check(dtype=torch.float16), "bfloat16": lambda: check(dtype=torch.bfloat16),
    "other-degrees": lambda: check(degree=3, below=2), "one-below": lambda: check(degree=1, below=1),
    "group-a-channel": lambda: check(groups=48), "one-channel": lambda: check(channels=1, groups=1),
    "odd": lambda: check(rows=37, channels=45, groups=5), "many-rows": lambda: check(rows=150, channels=64, groups=2),
    "at-0": lambda: check(groups=1, u=torch.zeros(3, 8)),
    "far": lambda: check(groups=1, u=torch.tensor([[-1e4, -40.0, 40.0, 1e4]])),
    "nan": not_a_number, "empty": empty, "twice": twice}


# The others take the interpreter most of a minute.
QUICK = ("float32", "one-channel", "nan", "empty")


def main(names: list[str]) -> None:
    from vision_kan.kernels import triton_columns as ops

    def filled(*args):
        make = real(*args)
        return lambda: make().fill_(float("nan"))

    real, ops.allocator = ops.allocator, filled         # what is not written shows
    ops.FORWARD_PROGRAMS = ops.BACKWARD_PROGRAMS = 4 / 68       # of the device that stands in: few, as on much data
    failed = {}
    for name in names:
        try:
            torch.manual_seed(0)
            CHECKS[name]()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed))


@cache
def failures(quick: bool) -> dict[str, str]:
    """name -> error of the checks in `QUICK`, or of all others, run in one process."""
    names = [name for name in CHECKS if (name in QUICK) == quick]
    done = subprocess.run([sys.executable, __file__, *names], check=False, capture_output=True, text=True, cwd=ROOT, timeout=240,
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHECKS])
def test_interpreted(name):
    pytest.importorskip("triton", reason="Triton is not installed")
    failed = failures(name in QUICK)
    assert name not in failed, failed[name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
