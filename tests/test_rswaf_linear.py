"""The full-edge layer's op against its definition in fp64, on each of its paths on a CPU."""
import importlib
import math

import pytest
import torch
from helpers import every
from paths import PATHS, error, exact_linear, gradients, saved, through
from torch.utils.flop_counter import FlopCounterMode

from faster_kan import RSWAFGrid
from vision_kan.kernels import backend, native, rswaf_basis, rswaf_linear, rswaf_linear_reference

op = importlib.import_module("vision_kan.kernels.rswaf_linear")
# About three times the largest error of an output that was measured against fp64; gradients have 8 times that.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GRIDS = {
    "2 points": torch.tensor([-1.0, 1.0]),
    "original": torch.linspace(-2, 2, 8),
    "16 points": torch.linspace(-2, 2, 16),
    "uneven": torch.tensor([-1.7, -1.5, 0.1, 2.3, 2.4]),
    "uneven and off centre": torch.tensor([0.5, 0.6, 3.0]),
}


def inputs(shape, n_out, dtype=torch.float32, n_grid=8, h=0.6, seed=0):
    """u over the grid and beyond it, weight, grid, h and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    u = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(n_out, shape[-1] * n_grid, generator=generator, dtype=torch.float64) / 4
    dy = torch.randn(*shape[:-1], n_out, generator=generator, dtype=torch.float64)
    return (u.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(),
            torch.linspace(-2, 2, n_grid, dtype=torch.promote_types(dtype, torch.float32)), h, dy.to(dtype))


@pytest.mark.parametrize("n_grid, h", [(2, 0.5), (3, 2.0), (8, 0.33), (8, 4 / 7), (16, 0.2)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", PATHS[:3])
def test_values_and_gradients_are_those_of_the_definition(path, dtype, n_grid, h):
    if path == "native" and dtype in (torch.float64, torch.float16):
        pytest.skip("the C++ kernels compute in float32, from and to float32 and bfloat16")
    u, weight, grid, _, dy = inputs((3, 11, 21), 45, dtype, n_grid)
    with through(path):
        got = gradients(lambda: rswaf_linear(u, weight, grid, h, True), [u, weight], dy)
    want = gradients(lambda: exact_linear(u, weight, grid, h), [u, weight], dy.double())
    clamped = 1e-9 if n_grid == 16 and path == "chunked" else 0     # its exponential, at 2^60, for the widest of grids
    for a, b, factor in zip(got, want, (1, 8, 8), strict=True):
        assert a.dtype == dtype and error(a, b) < factor * (TOLERANCE[dtype] + clamped)


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("shape, n_out", [((1, 1), 1), ((1, 24), 3), ((7, 1), 2), ((21, 45), 1), ((2, 3, 8), 5),
                                          ((700, 150), 9), ((8,), 4), ((2, 0, 8), 3), ((0, 8), 3)])
def test_shapes(path, shape, n_out):
    u, weight, grid, h, dy = inputs(shape, n_out)
    with through(path):
        got = gradients(lambda: rswaf_linear(u, weight, grid, h, True), [u, weight], dy)
    want = gradients(lambda: exact_linear(u, weight, grid, h), [u, weight], dy.double())
    assert got[0].shape == (*shape[:-1], n_out)
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert 0 not in shape or got[2].abs().max() == 0


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("make", [lambda x: x.transpose(0, 1), lambda x: x.permute(2, 1, 0), lambda x: x[..., ::2],
                                  lambda x: x[:, :1].expand(-1, 5, -1)])
def test_non_contiguous_inputs_and_gradients(path, make):
    base = torch.randn(4, 6, 8, requires_grad=True)
    u = make(base)
    _, weight, grid, h, dy = inputs(u.shape, 6)
    dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    with through(path):
        got = gradients(lambda: rswaf_linear(u, weight, grid, h, True), [base, weight], dy)
        total = torch.autograd.grad(rswaf_linear(u, weight, grid, h, True).sum(), base)[0]
    want = gradients(lambda: exact_linear(u, weight, grid, h), [base, weight], dy.double())
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert error(total, torch.autograd.grad(exact_linear(u, weight, grid, h).sum(), base)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS[:2])
def test_autocast_rounds_the_basis_and_the_weight_only(path, dtype):
    """float32 u and parameters, products in 16 bits; a backward pass inside autocast is the one outside."""
    if path == "native" and dtype == torch.float16:
        pytest.skip("the C++ kernels know float32 and bfloat16")
    u, weight, grid, h, dy = inputs((400, 24), 16)
    want = gradients(lambda: exact_linear(u, weight, grid, h), [u, weight], dy.double())
    with through(path):
        with torch.autocast("cpu", dtype):
            y = rswaf_linear(u, weight, grid, h, True)
            inside = torch.autograd.grad(y, [u, weight], dy.to(dtype), retain_graph=True)
        outside = torch.autograd.grad(y, [u, weight], dy.to(dtype))
    assert y.dtype == dtype and all(g.dtype == torch.float32 for g in inside)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert all(error(a, b) < TOLERANCE[dtype] for a, b in zip((y, *outside), want, strict=True))


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_1e4_stay_finite(path, dtype):
    u = torch.tensor([1e4, -1e4, 1e3, -30.0, 0.0, 2.0], dtype=dtype).repeat(3, 1).requires_grad_()
    _, weight, grid, h, dy = inputs((3, 6), 5, dtype)
    with through(path):
        got = gradients(lambda: rswaf_linear(u, weight, grid, h, True), [u, weight], dy)
    want = gradients(lambda: exact_linear(u, weight, grid, h), [u, weight], dy.double())
    assert all(a.isfinite().all() and error(a, b) < 8 * TOLERANCE[dtype] for a, b in zip(got, want, strict=True))
    assert got[1][:, :3].abs().max() < 1e-4         # no bump reaches there, so no slope


@pytest.mark.parametrize("path", PATHS[:2])
def test_backward_keeps_u_and_the_parameters_only(path):
    u, weight, grid, h, _ = inputs((500, 24), 16)
    with through(path):
        storages, _ = saved(lambda: rswaf_linear(u, weight, grid, h, True))
    assert storages == {t.untyped_storage().data_ptr(): 4 * t.numel() for t in (u, weight, grid)}
    with torch.no_grad():
        assert saved(lambda: rswaf_linear(u, weight, grid, h, True)) == ({}, 0)


@pytest.mark.parametrize("path", PATHS[:2])
def test_two_runs_are_bit_equal(path):
    u, weight, grid, h, dy = inputs((1000, 24), 16)
    with through(path):
        runs = [gradients(lambda: rswaf_linear(u, weight, grid, h, True), [u, weight], dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("path", PATHS[:2])
def test_used_twice_in_one_graph(path):
    u, weight, grid, h, dy = inputs((40, 6), 6)
    with through(path):
        got = gradients(lambda: rswaf_linear(rswaf_linear(u, weight, grid, h, True), weight, grid, h, True), [u, weight], dy)
    want = gradients(lambda: exact_linear(exact_linear(u, weight, grid, h), weight, grid, h), [u, weight], dy.double())
    assert all(error(a, b) < 5e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("path", PATHS[:2])
def test_frozen_parameters_and_inputs(path):
    u, weight, grid, h, dy = inputs((40, 24), 16)
    with through(path):
        both = gradients(lambda: rswaf_linear(u, weight, grid, h, True), [u, weight], dy)
        only_u = gradients(lambda: rswaf_linear(u, weight.detach(), grid, h, True), [u], dy)
        only_weight = gradients(lambda: rswaf_linear(u.detach(), weight, grid, h, True), [weight], dy)
    assert torch.equal(only_u[1], both[1]) and error(only_weight[1], both[2]) < 1e-6


def test_which_inputs_the_kernels_take():
    """What they do not know is computed by the PyTorch path, to the same result."""
    u, weight, grid, h, dy = inputs((40, 6), 5)
    want = gradients(lambda: exact_linear(u, weight, grid, h), [u, weight], dy.double())
    for form in (False, True):
        got = gradients(lambda form=form: rswaf_linear(u, weight, grid, h, form), [u, weight], dy)
        assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    if native.compiler():
        def how(u=u, grid=grid, h=h, single_exp=True, dtype=torch.float32):
            return op._path(u, grid, h, single_exp, dtype, "auto")[0]
        assert how() == how(u=u.bfloat16(), dtype=torch.bfloat16) == how(dtype=torch.bfloat16) == "native"
        assert {how(single_exp=False), how(u=u.double()), how(dtype=torch.float16), how(h=torch.tensor(h)),
                how(grid=torch.tensor([0.0, 0.1, 2.0])), how(grid=torch.linspace(-2, 2, 17))} == {"chunked"}


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize("path", every(2, ["auto", "chunked"]))
def test_opcheck(path, learn, monkeypatch):
    if path == "chunked":
        monkeypatch.setattr(native, "library", lambda points, base=None: None)
    u, weight, grid, h, dy = inputs((6, 5), 4)
    width = torch.tensor(h, requires_grad=True) if learn else None
    constants = (width, 0.0 if learn else h, not learn)
    grid.requires_grad_(learn)
    for x, dtype in ((u, torch.float32), (u, torch.bfloat16), (torch.randn(5, 6).t().requires_grad_(), torch.float32)):
        torch.library.opcheck(op._linear, (x, weight, grid, *constants, dtype, "auto"))
    for needs in ((True, True, learn, learn), (False, True, False, False), (True, False, False, False)):
        torch.library.opcheck(op._linear_grad, (dy, *(None if t is None else t.detach() for t in (u, weight, grid, width)),
                                                *constants[1:], torch.float32, "auto", *needs))


@pytest.mark.parametrize("needs, times", [((True, True), 3), ((True, False), 2), ((False, True), 2)])
def test_pytorchs_counter_knows_the_flops(needs, times):
    u, weight, grid, h, _ = inputs((2, 50, 24), 16)
    u.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    with FlopCounterMode(display=False) as counter:
        rswaf_linear(u, weight, grid, h, True).sum().backward()
    assert counter.get_total_flops() == times * 2 * 100 * 24 * 8 * 16


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match="40 columns does not fit 6 inputs and 8 grid points"):
        rswaf_linear(torch.zeros(3, 6), torch.zeros(4, 40), torch.linspace(-2, 2, 8), 0.5)


def test_column_order_is_input_then_grid_point():
    u = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    grid = torch.linspace(-2, 2, 8, dtype=torch.float64)
    for i in range(2):
        for k in range(8):
            weight = torch.zeros(1, 16, dtype=torch.float64)
            weight[0, i * 8 + k] = 1
            bump = 1 - math.tanh((float(u[0, i]) - float(grid[k])) / 0.33) ** 2
            assert float(rswaf_linear(u, weight, grid, 0.33, True)) == pytest.approx(bump, rel=1e-9)


@pytest.mark.parametrize("learn", ["u, W", "u, W, grid", "u, W, h", "u, W, grid, h", "W", "u", "grid", "h"])
@pytest.mark.parametrize("grid", every(2, GRIDS))
@pytest.mark.parametrize("h", every(2, [0.33, 1.2]))
def test_gradcheck(learn, grid, h):
    torch.manual_seed(1)
    tensors = {
        "u": torch.randn(4, 3, dtype=torch.float64),
        "W": torch.randn(2, 3 * GRIDS[grid].numel(), dtype=torch.float64),
        "grid": GRIDS[grid].double(),
        "h": torch.tensor(h, dtype=torch.float64),
    }
    for key in learn.split(", "):
        tensors[key].requires_grad_()
    for one_exponential in (True, False):
        assert torch.autograd.gradcheck(
            lambda u, w, g, hh, form=one_exponential: rswaf_linear(
                u, w, g, hh if hh.requires_grad else float(hh), form), tuple(tensors.values()))


def test_gradcheck_of_a_wide_grid():
    rbf = RSWAFGrid(-30, 30, 6, 0.7, dtype=torch.float64)
    assert not rbf.single_exp
    u = (torch.randn(5, 2, dtype=torch.float64) * 15).requires_grad_()
    weight = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, w: rswaf_linear(u, w, rbf.grid, 0.7, rbf.single_exp), (u, weight))


@pytest.mark.parametrize("single_exp", [True, False])
def test_both_forms_are_the_same_function_far_outside_the_grid_too(single_exp):
    u = torch.linspace(-40, 40, 4001, dtype=torch.float64)[:, None].requires_grad_()
    grid, weight = torch.linspace(-2, 2, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    y, want = rswaf_linear(u, weight, grid, 0.33, single_exp), exact_linear(u, weight, grid, 0.33)
    assert (y - want).abs().max() < 1e-11       # absolute: 1 - tanh^2 has no tails to be compared with
    for a, b in zip(torch.autograd.grad(y.sum(), u), torch.autograd.grad(want.sum(), u), strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize("single_exp", [True, False])
@pytest.mark.parametrize("limit", [1, 7 * 6 * 8, 10 ** 9])
def test_chunks_do_not_change_the_result(limit, single_exp, learn, monkeypatch):
    u, weight, grid, h, dy = inputs((20, 6), 5, torch.float64)
    h = torch.tensor(h, dtype=torch.float64)
    leaves = [u, weight, grid.requires_grad_(), h.requires_grad_()] if learn else [u, weight]
    whole = gradients(lambda: rswaf_linear(u, weight, grid, h if learn else h.item(), single_exp), leaves, dy)
    monkeypatch.setitem(backend.CHUNK_VALUES, "cpu", limit)
    monkeypatch.setattr(op, "LEAST_TOKENS", 1)
    chunked = gradients(lambda: rswaf_linear(u, weight, grid, h if learn else h.item(), single_exp), leaves, dy)
    assert all(error(a, b) < 1e-13 for a, b in zip(chunked, whole, strict=True))


def test_chunks_cover_all_tokens_and_hold_to_the_limit(monkeypatch):
    monkeypatch.setitem(backend.CHUNK_VALUES, "cpu", 100)
    monkeypatch.setattr(op, "LEAST_TOKENS", 1)
    sizes = []
    basis = op._Basis

    def watched(u, *args):
        out = basis(u, *args)
        sizes.append(out.values.numel())
        return out

    monkeypatch.setattr(op, "_Basis", watched)
    u, weight, grid, h, _ = inputs((5, 6), 5, torch.float64)
    rswaf_linear(u, weight, grid, h, True)          # 48 values a token
    assert sizes == [96, 96, 48]
    monkeypatch.setattr(op, "LEAST_TOKENS", 3)
    rswaf_linear(u, weight, grid, h, True)
    assert sizes[3:] == [144, 96]


def test_the_reference_is_the_definition_with_all_of_its_tails():
    u, grid = torch.linspace(-5, 5, 101, dtype=torch.float64)[:, None], torch.tensor([-1.0, 1.0]).double()
    weight = torch.randn(2, 2, dtype=torch.float64)
    assert error(rswaf_linear_reference(u, weight, grid, 0.4), exact_linear(u, weight, grid, 0.4)) < 1e-13
    far = torch.tensor([[30.0]])
    tail = rswaf_basis(far, torch.tensor([0.0]), 1.0)
    assert float(tail) == pytest.approx(4 * math.exp(-60), rel=1e-5)        # 1 - tanh^2 is 0 here
