"""The full-edge layer's Triton kernels in Triton's interpreter, against float64; and their approximate instructions."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = "TRITON_INTERPRET" in os.environ      # Triton reads it when it is imported: hence a process of its own
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")

# T, I, O, G, h
SHAPES = {"one": (1, 1, 1, 8, 0.33), "odd": (37, 21, 45, 8, 0.33), "two points": (70, 33, 17, 2, 0.7),
          "three": (19, 50, 70, 3, 0.5), "sixteen": (66, 9, 33, 16, 0.25), "even": (64, 32, 64, 8, 0.6)}
slow = pytest.mark.slow
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}      # of the largest element


def some(*names: str) -> list:
    """All shapes; those that are not named are for the slow tests."""
    return [pytest.param(name, marks=() if name in names else slow) for name in SHAPES]


@pytest.mark.skipif(INTERPRETED, reason="the outer process only")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=slow)])
def test_in_the_interpreter(which):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", which,
                           __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture
def ops(monkeypatch):
    from vision_kan.kernels import triton_linear

    monkeypatch.setattr(triton_linear, "_empty", lambda *shape, dtype, device: torch.full(
        shape, float("nan"), dtype=dtype, device=device))
    return triton_linear


def problem(shape, dtype, single_exp=True):
    """u, W, grid (not uniform), h, dy; u with values far from the grid."""
    tokens, inputs, outputs, points, h = shape
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-2, 2, points) + 0.1 * torch.rand(points, generator=generator)
    u = 1.5 * torch.randn(tokens, inputs, generator=generator)
    far = torch.tensor([1e4, -1e4, 300.0, -50.0, 5.0])
    u.view(-1)[1:1 + len(far)] = far[:max(0, u.numel() - 1)]
    weight = torch.randn(outputs, inputs * points, generator=generator)
    dy = torch.randn(tokens, outputs, generator=generator)
    return u, weight.to(dtype), grid, h if single_exp else torch.tensor(h), dy.to(dtype)


def reference(u, weight, grid, h, dy):
    """y, du, dW, dgrid, dh in float64 by autograd."""
    leaves = [torch.as_tensor(value).double().requires_grad_() for value in (u, weight, grid, h)]
    u, weight, grid, h = leaves
    basis = 1 - torch.tanh((u[..., None] - grid) / h) ** 2
    y = basis.flatten(1) @ weight.T
    return y.detach(), *torch.autograd.grad(y, leaves, dy.double())


def assert_near(value, expected, dtype, factor=1.0):
    assert value.isfinite().all()
    bound = factor * TOLERANCE[dtype] * max(float(expected.abs().max()), 1e-3)
    assert float((value.double() - expected).abs().max()) <= bound


@interpreted
# the interpreter's product knows no bfloat16
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=slow)])
@pytest.mark.parametrize("single_exp", [True, False])
@pytest.mark.parametrize("shape", some("odd"))
def test_forward_and_gradients(ops, shape, single_exp, dtype):
    u, weight, grid, h, dy = problem(SHAPES[shape], dtype, single_exp)
    y, du, dw, *_ = reference(u, weight, grid, h, dy)
    results = [(ops.forward(u, weight, grid, h, single_exp), ops.backward_u(dy, u, weight, grid, h, single_exp),
                ops.backward_weight(dy, u, weight, grid, h, single_exp)) for _ in range(2 if shape == "odd" else 1)]
    assert [value.dtype for value in results[0]] == [dtype, u.dtype, torch.float32]
    for value, expected in zip(results[0], (y, du, dw)):
        assert value.shape == expected.shape
        assert_near(value, expected, dtype, 4 if shape == "one" else 1)
    for value, again in zip(results[0], results[-1]):
        assert torch.equal(value, again)


@slow
@interpreted
def test_half_inputs(ops):
    u, weight, grid, h, dy = problem(SHAPES["odd"], torch.float16)
    u = u.half()
    y, du, dw, *_ = reference(u, weight, grid, h, dy)
    assert_near(ops.forward(u, weight, grid, h, True), y, torch.float16)
    assert ops.backward_u(dy, u, weight, grid, h, True).dtype == torch.float16
    assert_near(ops.backward_u(dy, u, weight, grid, h, True), du, torch.float16)
    assert_near(ops.backward_weight(dy, u, weight, grid, h, True), dw, torch.float16)


@slow
@interpreted
@pytest.mark.parametrize("shape", some("three"))
def test_grid_and_width(ops, shape):
    u, weight, grid, h, dy = problem(SHAPES[shape], torch.float32, single_exp=False)
    *_, dgrid, dh = reference(u, weight, grid, h, dy)
    grid_gradient, h_gradient = ops.backward_grid(dy, u, weight, grid, h, True, True)
    assert grid_gradient.shape == dgrid.shape and h_gradient.shape == ()
    assert_near(grid_gradient, dgrid, torch.float32, 10)
    assert_near(h_gradient, dh, torch.float32, 10)
    assert ops.backward_grid(dy, u, weight, grid, h, False, False) == (None, None)


@interpreted
def test_no_tokens(ops):
    u, weight, grid, h, dy = problem((0, 5, 7, 8, 0.33), torch.float32)
    assert ops.forward(u, weight, grid, h, True).shape == (0, 7)
    assert ops.backward_u(dy, u, weight, grid, h, True).shape == (0, 5)
    assert not ops.backward_weight(dy, u, weight, grid, h, True).any()
    assert not torch.stack([value.sum() for value in ops.backward_grid(dy, u, weight, grid, h, True, True)]).any()


@interpreted
def test_nan_stays(ops):
    """A NaN in u must reach the output: the loss scale of mixed precision and the check of the loss rely on it."""
    u, weight, grid, h, dy = problem(SHAPES["odd"], torch.float32)
    u[3, 4] = float("nan")
    y = ops.forward(u, weight, grid, h, True)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


@interpreted
@slow
def test_tokens_split(ops):
    """Enough tokens for several partial sums, the last of them short."""
    u, weight, grid, h, dy = problem((1100, 5, 7, 4, 0.5), torch.float32)
    device = ops.device_of(u)
    assert ops.choose("backward_weight", device, "float", 1100, 5, 7, 4)[1] > 1
    *_, dw, _, _ = reference(u, weight, grid, h, dy)
    assert_near(ops.backward_weight(dy, u, weight, grid, h, True), dw, torch.float32, 4)


@pytest.fixture
def written(ops, monkeypatch):
    """The basis written to memory for every size, in chunks of 256 tokens."""
    monkeypatch.setattr(ops, "WRITTEN_FORWARD_OUTPUTS", 1)
    monkeypatch.setattr(ops, "WRITTEN_BACKWARD_OUTPUTS", 1)
    monkeypatch.setattr(ops, "WRITTEN_BYTES", 1)
    return ops


@interpreted
@pytest.mark.parametrize("u_dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=slow)])
@pytest.mark.parametrize("shape", [*some("odd"), pytest.param("chunks", marks=slow)])
def test_basis_written(written, monkeypatch, shape, dtype, u_dtype):
    shape = (600, 3, 5, 8, 0.6) if shape == "chunks" else SHAPES[shape]
    u, weight, grid, h, dy = problem(shape, dtype)
    u = u.to(u_dtype)
    fused = []
    monkeypatch.setattr(written, "backward_u", lambda *args: fused.append(args))
    runs = [(written.forward(u, weight, grid, h, True), *written.backward(dy, u, weight, grid, h, True, True, True))
            for _ in range(2)]
    assert not fused
    assert [value.dtype for value in runs[0]] == [dtype, u_dtype, torch.float32]
    for value, again, expected in zip(*runs, reference(u, weight, grid, h, dy)[:3]):
        assert value.shape == expected.shape and torch.equal(value, again)
        rounded = max(dtype, value.dtype, key=lambda kind: TOLERANCE[kind])
        assert_near(value, expected, rounded, 4 if shape == SHAPES["one"] else 1)


@interpreted
def test_basis_written_keeps_nan_in_place_and_takes_no_tokens(written):
    u, weight, grid, h, dy = problem(SHAPES["odd"], torch.float16)
    u[3, 4] = float("nan")
    y, (du, _) = written.forward(u, weight, grid, h, True), written.backward(dy, u, weight, grid, h, True, True, True)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()
    assert torch.equal(du.isnan(), u.isnan())
    assert written.forward(u[:0], weight, grid, h, True).shape == (0, 45)
    du, dw = written.backward(dy[:0], u[:0], weight, grid, h, True, True, True)
    assert du.shape == (0, 21) and not dw.any()


@interpreted
def test_when_the_basis_is_written(ops):
    device = ops.device_of(torch.zeros(1))

    def chosen(outputs=768, dtype=torch.bfloat16, h=0.6, single_exp=True, backward=True):
        return ops.is_written(device, dtype, outputs, h, single_exp, backward)
    assert chosen() and chosen(192) and chosen(backward=False) and chosen(dtype=torch.float16)
    assert not (chosen(96) or chosen(384, backward=False) or chosen(dtype=torch.float32) or chosen(h=torch.tensor(0.6))
                or chosen(single_exp=False))
    u, weight, grid, h, dy = problem(SHAPES["odd"], torch.float16)
    for needs in ((True, False), (False, True)):        # a gradient alone is fused: nothing to share
        got = ops.backward(dy, u, weight, grid, h, True, *needs)
        assert [value is not None for value in got] == list(needs)


@interpreted
@pytest.mark.parametrize("memory, limit", [(2 ** 36, 2 ** 29), (2 ** 31, 2 ** 26)])
def test_chunks_of_the_written_basis_fit_the_device(ops, memory, limit):
    device = replace(ops.device_of(torch.zeros(1)), memory=memory)
    chunks = ops._row_chunks(device, 60_000, 6144, 2)
    assert [row for rows in chunks for row in (rows.start, rows.stop)][1:-1:2] == [rows.start for rows in chunks[1:]]
    assert (chunks[0].start, chunks[-1].stop) == (0, 60_000) and len(chunks) > 1
    assert all(0.9 * limit < (rows.stop - rows.start) * 6144 * 2 <= limit for rows in chunks[:-1])


@interpreted
@pytest.mark.parametrize("parts", [1, 2, pytest.param(3, marks=slow)])
def test_parts(ops, monkeypatch, parts):
    """Outputs in several accumulators, the last one cut."""
    monkeypatch.setitem(ops.forced, "forward", ops.Tile(32, 16 * parts if parts < 3 else 48, 32, 4, 2, parts=parts))
    ops.choose.cache_clear()
    u, weight, grid, h, dy = problem(SHAPES["odd"], torch.float32)
    assert_near(ops.forward(u, weight, grid, h, True), reference(u, weight, grid, h, dy)[0], torch.float32)
    ops.choose.cache_clear()


@interpreted
def test_every_device_has_tiles(ops):
    from vision_kan.kernels.triton_common import TARGETS
    for device in TARGETS.values():
        for op in ("forward", "backward_u", "backward_weight", "backward_grid"):
            for kind in ("half", "tf32", "float"):
                found = ops.tiles(op, device, kind)
                assert found and all(tile.n % tile.parts == 0 for tile in found)
                for shape in ((1, 1, 1, 8), (197, 192, 192, 8), (25216, 768, 768, 16)):
                    assert ops.choose(op, device, kind, *shape)[0] in found


@interpreted
def test_refuses_what_it_cannot_do(ops):
    u, weight, grid, h, _ = problem(SHAPES["odd"], torch.float32)
    with pytest.raises(TypeError, match="float64"):
        ops.forward(u, weight.double(), grid, h, True)
    with pytest.raises(ValueError, match="grid points"):
        ops.forward(u, weight, torch.linspace(-1, 1, 33), h, True)


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_error_of_the_approximate_instructions():
    """ex2.approx errs by 2^-22, rcp.approx by 2^-23, relatively (NVIDIA's PTX manual): what becomes of B and its
    rounding to bfloat16, every error at its worst in sign."""
    h, grid = 0.33, np.linspace(-2, 2, 8)
    u = np.linspace(-6, 6, 20_001, dtype=np.float32)
    scale, middle = np.float32(2 * np.log2(np.e) / h), np.float32(0)
    exact = 1 - np.tanh((u[:, None].astype(np.float64) - grid) / h) ** 2
    p, q = (0.25 * np.exp2(sign * grid * np.float64(scale)) for sign in (-1, 1))
    z = np.clip((u - middle) * scale, -60, 60)[:, None]
    worst = rounded = 0.0
    for signs in np.ndindex(2, 2, 2):
        up, down, last = (2 * sign - 1 for sign in signs)
        e = (np.exp2(z.astype(np.float64)) * (1 + up * 2.0 ** -22)).astype(np.float32)
        inverse = (np.exp2(-z.astype(np.float64)) * (1 + down * 2.0 ** -22)).astype(np.float32)
        d = p.astype(np.float32) * e + (q.astype(np.float32) * inverse + np.float32(0.5))
        b = ((1 / d.astype(np.float64)) * (1 + last * 2.0 ** -23)).astype(np.float32)
        worst = max(worst, np.abs(b - exact).max())
        rounded = max(rounded, np.abs(torch.from_numpy(b).bfloat16().double().numpy() - exact).max())
    assert worst < 1.5e-6
    assert rounded < 1.96e-3        # bfloat16 alone: 2^-9 = 1.953e-3
