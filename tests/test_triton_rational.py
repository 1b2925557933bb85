"""KAT's rational in Triton's interpreter, on a CPU, against float64 and autograd: see `interpreted`."""
import sys

import interpreted
import pytest
import torch

from vision_kan.kernels import rational_reference


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
        interpreted.assert_near(name, got, right, torch.float32 if name == "dC" else dtype)


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
QUICK = ("float32", "one-channel", "nan", "empty")


@pytest.mark.parametrize("name", interpreted.cases(CHECKS, QUICK))
def test_interpreted(name):
    interpreted.passes(__file__, CHECKS, QUICK, name)


if __name__ == "__main__":
    interpreted.main(CHECKS, sys.argv[1:])
