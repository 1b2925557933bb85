"""The group KAN's activation in Triton's interpreter, on a CPU, against float64 and autograd: see `interpreted`."""
import sys

import interpreted
import pytest
import torch

from vision_kan.kernels import BASES, rswaf_basis

UNIFORM = tuple(torch.linspace(-3, 3, 8, dtype=torch.float64).tolist())
H = 6 / 7


# ---------------------------------------------------------------- in the interpreter
def plan(u, c, scale, points, h, base):
    from vision_kan.kernels.triton_activation import Plan
    return Plan(u.dtype, u.shape, u.device, c.shape, scale is not None, points, h, base)


def reference(u, c, scale, points, h, base, dv):
    """v, du, dC, dscale in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (u, c, torch.ones(len(c)) if scale is None else scale)]
    x, c, s = leaves
    spread = x.shape[1] // len(c)
    grid = torch.tensor(points, dtype=torch.float64)
    v = (rswaf_basis(x, grid, h) * c.repeat_interleave(spread, 0)).sum(-1)
    if base != "none":
        v = v + BASES[base](x) * s.repeat_interleave(spread)
    v.backward(dv.double())
    return v.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def check(rows=21, channels=48, groups=3, points=UNIFORM, h=H, base="gelu", scaled=False, dtype=torch.float32,
          spread=2.0, u=None, cdtype=torch.float32) -> None:
    torch.manual_seed(rows + channels)
    u = (torch.randn(rows, channels) * spread if u is None else u).to(dtype)
    dv = torch.randn(u.shape).to(dtype)
    c = torch.randn(groups, len(points)).to(cdtype)
    scale = torch.randn(groups) if scaled else None
    kernel = plan(u, c, scale, points, h, base)
    v = kernel.forward(u, c, scale)
    gradients = kernel.backward(dv, u, c, scale)
    want = reference(u, c, scale, points, h, base, dv)
    for name, got, right in zip(("v", "du", "dC", "dscale"), (v, *gradients), want):
        if got is None:
            assert name == "dscale" and scale is None
            continue
        interpreted.assert_near(name, got, right, torch.float32 if name in ("dC", "dscale") else dtype)


def far() -> None:
    """|u| to 1e4: finite, and the base alone."""
    u = torch.tensor([[-1e4, -300.0, -40.0, 40.0, 300.0, 1e4]])
    for base in ("none", "identity", "gelu", "silu", "relu", "relu2"):
        check(groups=1, base=base, scaled=True, u=u)
    check(groups=1, base="none", u=u, points=(-2.0, 0.5, 3.0))
    check(groups=1, base="gelu", dtype=torch.bfloat16, u=u)


def not_a_number() -> None:
    """NaN stays NaN, and in its own place."""
    u = torch.zeros(3, 4)
    u[1, 2] = float("nan")
    for base in ("none", "gelu", "relu"):
        for points in (UNIFORM, (-2.0, 0.5, 3.0)):
            c = torch.ones(2, len(points))
            kernel = plan(u, c, None, points, H, base)
            v, (du, *_) = kernel.forward(u, c, None), kernel.backward(torch.ones_like(u), u, c, None)
            assert torch.equal(v.isnan(), u.isnan()) and torch.equal(du.isnan(), u.isnan())


def empty() -> None:
    u, c, scale = torch.zeros(0, 12), torch.ones(3, 8), torch.ones(3)
    kernel = plan(u, c, scale, UNIFORM, H, "gelu")
    assert kernel.forward(u, c, scale).shape == (0, 12)
    du, dc, ds = kernel.backward(u, u, c, scale)
    assert du.shape == (0, 12) and torch.equal(dc, torch.zeros(3, 8)) and torch.equal(ds, torch.zeros(3))


def twice() -> None:
    u, dv, c, scale = torch.randn(75, 64), torch.randn(75, 64), torch.randn(2, 8), torch.randn(2)
    kernel = plan(u, c, scale, UNIFORM, H, "gelu")
    runs = [(kernel.forward(u, c, scale), *kernel.backward(dv, u, c, scale)) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def not_contiguous() -> None:
    u, dv, c = torch.randn(48, 21).t(), torch.randn(48, 21).t(), torch.randn(3, 8)
    kernel = plan(u, c, None, UNIFORM, H, "gelu")
    rows = [kernel.forward(u.contiguous(), c, None), *kernel.backward(dv.contiguous(), u.contiguous(), c, None)[:2]]
    assert all(map(torch.equal, rows, [kernel.forward(u, c, None), *kernel.backward(dv, u, c, None)[:2]]))


def refused() -> None:
    u, c = torch.zeros(3, 12), torch.ones(3, 8)
    for wrong in ((u.double(), c, UNIFORM, "gelu"), (u, torch.ones(5, 8), UNIFORM, "gelu"),
                  (u, c, UNIFORM[:5], "gelu"), (u, c, UNIFORM, "tanh"), (u, torch.ones(3, 17), (0.0,) * 17, "gelu")):
        try:
            plan(wrong[0], wrong[1], None, wrong[2], H, wrong[3])
        except ValueError:
            continue
        raise AssertionError(f"accepted {[w.shape if hasattr(w, 'shape') else w for w in wrong]}")


def approximate() -> None:
    """With errors as large as those of NVIDIA's approximate instructions, which the interpreter does not have."""
    from triton import language as tl

    from vision_kan.kernels import triton_activation as ops
    exact = ops.fast_exp2, ops.fast_reciprocal

    def rough(function, error):
        return lambda x, approx: function(x, approx) * (1.0 + error * tl.where(tl.sin(1e3 * x) > 0.0, 1.0, -1.0))

    ops.fast_exp2, ops.fast_reciprocal = rough(exact[0], 2.0 ** -22), rough(exact[1], 2.0 ** -23)
    try:
        check(scaled=True)
        check(points=grid_of(16), h=4 / 15)
        check(h=0.301, spread=3.0, base="silu")
    finally:
        ops.fast_exp2, ops.fast_reciprocal = exact


def grid_of(n: int) -> tuple[float, ...]:
    return tuple(torch.linspace(-2, 2, n, dtype=torch.float64).tolist())


CHECKS = {
    **{f"{base}-float32": lambda base=base: check(base=base, scaled=True)
       for base in ("none", "identity", "gelu", "silu", "relu", "relu2")},
    **{f"{base}-{dtype}": lambda base=base, dtype=dtype: check(base=base, dtype=getattr(torch, dtype))
       for base in ("none", "gelu", "relu2") for dtype in ("float16", "bfloat16")},
    **{f"points-{n}": lambda n=n: check(points=grid_of(n), h=4 / (n - 1), scaled=True) for n in (2, 3, 5, 8, 13, 16)},
    "off-centre": lambda: check(points=tuple(x + 1.5 for x in UNIFORM)),
    "symmetric-not-uniform": lambda: check(points=(-3.0, -1.0, 0.0, 1.0, 3.0), h=0.7),
    "not-uniform": lambda: check(points=(-2.5, -1.0, 0.1, 0.4, 3.0), h=0.7, scaled=True),
    "not-uniform-16-bit": lambda: check(points=(-2.5, -1.0, 0.1, 0.4, 3.0), h=0.7, dtype=torch.bfloat16),
    "narrow": lambda: check(h=0.1, spread=3.0),                 # beyond what the pairs' form holds for
    "nearly-narrow": lambda: check(h=0.301, spread=3.0),
    "one-value": lambda: check(rows=1, channels=1, groups=1),
    "one-channel": lambda: check(rows=37, channels=1, groups=1, scaled=True),
    "odd": lambda: check(rows=37, channels=45, groups=5, scaled=True),
    "group-a-channel": lambda: check(groups=48, scaled=True),
    "many-columns": lambda: check(rows=3, channels=160, groups=8),
    "many-rows": lambda: check(rows=150, channels=64, groups=2, scaled=True),     # several tiles a program
    "groups-of-24": lambda: check(rows=75, channels=192, groups=8, dtype=torch.bfloat16, scaled=True),
    "groups-of-4": lambda: check(groups=12, dtype=torch.bfloat16),     # 8 bytes a vector
    "groups-of-6": lambda: check(groups=8, dtype=torch.bfloat16, scaled=True),
    "coefficients-bfloat16": lambda: check(cdtype=torch.bfloat16),
    "approximate": approximate,
    "far": far, "nan": not_a_number, "empty": empty, "twice": twice,
    "not-contiguous": not_contiguous, "refused": refused}
QUICK = ("gelu-float32", "points-5", "not-uniform", "one-channel", "nan", "refused")


# ---------------------------------------------------------------- the tests
@pytest.mark.parametrize("name", interpreted.cases(CHECKS, QUICK))
def test_interpreted(name):
    interpreted.passes(__file__, CHECKS, QUICK, name)


if __name__ == "__main__":
    interpreted.main(CHECKS, sys.argv[1:])
