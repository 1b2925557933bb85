"""The group KAN's op against its definition in fp64, on each of its paths on a CPU."""
import importlib
import math

import pytest
import torch
from helpers import every
from paths import BASES_BY_HAND, PATHS, error, exact_activation, gradients, saved, through
from torch.utils.checkpoint import checkpoint

from vision_kan.kernels import BASES, backend, native, rswaf_activation, rswaf_activation_reference

op = importlib.import_module("vision_kan.kernels.rswaf_activation")
# About three times the largest error of an output that was measured against fp64; gradients have 8 times that.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# first and last point, points, width of a bump
GRIDS = {
    "the models'": (-3.0, 3.0, 8, 6 / 7),
    "2 points": (-1.0, 1.0, 2, 0.5),
    "3 points": (-2.0, 2.0, 3, 2.0),
    "16 points": (-3.0, 3.0, 16, 0.4),
    "off centre": (-0.5, 3.0, 5, 0.33),
    "far off centre": (40.0, 44.0, 6, 0.8),
    "narrow bumps": (-2.0, 2.0, 8, 0.33),
    "wide bumps": (-1.0, 1.0, 5, 3.0),
    "the narrowest": (-1.0, 1.0, 16, 0.1),
}
UNEVEN = (-1.7, -1.5, 0.1, 2.3, 2.4)


def points_of(name):
    low, high, count, h = GRIDS[name]
    return tuple(torch.linspace(low, high, count, dtype=torch.float64).tolist()), h


def inputs(name, shape, groups, dtype=torch.float64, seed=0):
    """u over the grid and beyond it, c, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    low, high, count, _ = GRIDS[name]
    u = (low + high) / 2 + (high - low) * torch.randn(shape, generator=generator, dtype=torch.float64)
    c = torch.randn(groups, count, generator=generator, dtype=torch.float64)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return u.to(dtype).requires_grad_(), c.to(dtype).requires_grad_(), dy.to(dtype)


def tolerance(name, dtype):
    """The PyTorch path clamps its exponential where the furthest bump has fallen to 4 exp(-40 + the grid's width / h);
    and what is far from 0 has lost digits before it comes here."""
    low, high, _, h = GRIDS[name]
    return TOLERANCE[dtype] * max(1, abs(low + high) / h / 2) + 4 * math.exp((high - low) / h - 40)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("path", PATHS[:3])
def test_values_and_gradients_are_those_of_the_definition(path, name, dtype):
    if path == "native" and dtype == torch.float64:
        pytest.skip("the C++ kernels compute in float32")
    points, h = points_of(name)
    u, c, dy = inputs(name, (3, 50, 24), 8, dtype)
    with through(path):
        got = gradients(lambda: rswaf_activation(u, c, points, h), [u, c], dy)
    want = gradients(lambda: exact_activation(u, c, points, h), [u, c], dy.double())
    for a, b, factor in zip(got, want, (1, 8, 8), strict=True):
        assert a.dtype == dtype
        assert error(a, b) < factor * tolerance(name, dtype)


# A compilation takes seconds: one every time, the others with the slow tests.
EVERY_BASE = [pytest.param(path, base, dtype, marks=pytest.mark.slow if path == "compile" and (
                  base, dtype) != ("gelu", torch.float32) else ())
              for path in PATHS for dtype in (torch.float64, torch.float32, torch.bfloat16) for base in BASES_BY_HAND
              if not (path == "native" and dtype == torch.float64 or path == "compile" and dtype == torch.bfloat16)]


@pytest.mark.parametrize("path, base, dtype", EVERY_BASE, ids=str)
def test_every_base_with_a_scale(path, base, dtype):
    assert set(BASES_BY_HAND) == {"none", *BASES}
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (90, 21), 3, dtype)
    s = torch.tensor([0.5, 1.0, 1.5], dtype=dtype, requires_grad=True)
    leaves = [u, c] if base == "none" else [u, c, s]
    with through(path):
        got = gradients(lambda: rswaf_activation(u, c, points, h, base, s), leaves, dy)
    want = gradients(lambda: exact_activation(u, c, points, h, base, s), leaves, dy.double())
    assert all(error(a, b) < 8 * TOLERANCE[dtype] for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS[:2])
def test_half_precision_inputs_with_float32_coefficients(path, dtype):
    """As under autocast: only u and the result are rounded, and the coefficients' gradient is a float32 sum."""
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (400, 24), 8)
    u, dy, c = u.detach().to(dtype).requires_grad_(), dy.to(dtype), c.detach().float().requires_grad_()
    with through(path):
        y, du, dc = gradients(lambda: rswaf_activation(u, c, points, h), [u, c], dy)
    want = gradients(lambda: exact_activation(u, c, points, h), [u, c], dy.double())
    assert (y.dtype, du.dtype, dc.dtype) == (dtype, dtype, torch.float32)
    assert error(y, want[0]) < TOLERANCE[dtype] and error(du, want[1]) < TOLERANCE[dtype]
    assert error(dc, want[2]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_u_is_rounded_and_the_coefficients_are_not(dtype):
    points, h = points_of("the models'")
    u, c, _ = inputs("the models'", (400, 24), 8, torch.float32)
    with torch.autocast("cpu", dtype):
        y = rswaf_activation(u, c, points, h, "gelu")
        with torch.autocast("cpu", enabled=False):
            assert rswaf_activation(u, c, points, h).dtype == torch.float32
    assert torch.equal(y, rswaf_activation(u.to(dtype), c, points, h, "gelu")) and y.dtype == dtype


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("name", ["the models'", "2 points", "16 points", "off centre", "wide bumps"])
def test_gradcheck(name, groups):
    points, h = points_of(name)
    u, c, _ = inputs(name, (5, 6), groups)
    assert torch.autograd.gradcheck(lambda u, c: rswaf_activation(u, c, points, h), (u, c))


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (7, 1), (21, 45), (2, 3, 8), (2, 3, 5, 8), (8,), (130, 3), (2, 0, 8), (0, 8)])
@pytest.mark.parametrize("groups", [1, None], ids=["one group", "a group a channel"])
def test_shapes(path, shape, groups):
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", shape, groups or shape[-1], torch.float32)
    with through(path):
        got = gradients(lambda: rswaf_activation(u, c, points, h, "gelu"), [u, c], dy)
    want = gradients(lambda: exact_activation(u, c, points, h, "gelu"), [u, c], dy.double())
    assert got[0].shape == got[1].shape == shape
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert 0 not in shape or got[2].abs().max() == 0


@pytest.mark.parametrize("path", PATHS[:3])
def test_which_channels_share_a_function(path):
    """Neighbours: with 3 groups of 6 channels, 0 and 1, 2 and 3, 4 and 5."""
    points, h = points_of("2 points")
    c = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    with through(path):
        y = rswaf_activation(torch.full((1, 6), 0.3), c, points, h)
    left, right = (1 - math.tanh((0.3 - point) / h) ** 2 for point in points)
    assert y[0].tolist() == pytest.approx([left, left, right, right, 2 * left, 2 * left], rel=1e-5)


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("make", [
    lambda x: x.transpose(0, 1), lambda x: x.permute(1, 0, 2), lambda x: x.permute(2, 1, 0), lambda x: x[:, ::2],
    lambda x: x[..., ::2], lambda x: x[:, :1].expand(-1, 5, -1), lambda x: x.transpose(1, 2)])
def test_non_contiguous_inputs_and_gradients(path, make):
    points, h = points_of("the models'")
    base = torch.randn(4, 6, 8, requires_grad=True)
    u = make(base)
    assert not u.is_contiguous()
    c = torch.randn(2, 8, requires_grad=True)
    dy = torch.randn(u.shape[::-1]).permute(2, 1, 0)
    with through(path):
        got = gradients(lambda: rswaf_activation(u, c, points, h), [base, c], dy)
        total = torch.autograd.grad(rswaf_activation(u, c, points, h).sum(), base)[0]       # sum's gradient has strides 0
    want = gradients(lambda: exact_activation(u, c, points, h), [base, c], dy.double())
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert error(total, torch.autograd.grad(exact_activation(u, c, points, h).sum(), base)[0]) < 1e-5


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_inputs_of_1e4_stay_finite(path, name, dtype):
    if path == "native" and dtype == torch.float64:
        pytest.skip("the C++ kernels compute in float32")
    points, h = points_of(name)
    u = torch.tensor([1e4, -1e4, 3e3, -300.0, 0.0, 2.0], dtype=dtype).repeat(3, 1).requires_grad_()
    c = torch.full((1, len(points)), 5.0, dtype=dtype, requires_grad=True)
    with through(path):
        y, du, dc = gradients(lambda: rswaf_activation(u, c, points, h), [u, c], torch.full((3, 6), 100.0, dtype=dtype))
    assert y.isfinite().all() and du.isfinite().all() and dc.isfinite().all()
    assert y[:, :3].abs().max() < 1e-6 and du[:, :3].abs().max() < 1e-3     # no bump reaches there
    assert (y.double() - exact_activation(u, c, points, h)).abs().max() < 8 * max(1e-7, TOLERANCE[dtype]) * 5
    if dtype != torch.float16:      # whose range 1e8 is beyond
        for base in BASES:
            with through(path):
                y, du = gradients(lambda base=base: rswaf_activation(u, c, points, h, base), [u], torch.ones_like(u))
            assert y.isfinite().all() and du.isfinite().all()


@pytest.mark.parametrize("path", PATHS[:3])
def test_infinities_and_nan_of_the_input_are_not_hidden(path):
    points, h = points_of("the models'")
    with through(path):
        y = rswaf_activation(torch.tensor([[math.inf, math.nan, 0.0, 1.0]]), torch.randn(2, 8), points, h, "gelu")
    assert y.isfinite().tolist() == [[False, False, True, True]]


def test_a_grid_that_is_not_symmetric_takes_the_pytorch_path():
    u, c, dy = torch.randn(30, 8, requires_grad=True), torch.randn(2, 5, requires_grad=True), torch.randn(30, 8)
    assert backend.resolve("auto", u, 5, UNEVEN, 0.5, "gelu") == "chunked"
    got = gradients(lambda: rswaf_activation(u, c, UNEVEN, 0.5, "gelu"), [u, c], dy)
    want = gradients(lambda: exact_activation(u, c, UNEVEN, 0.5, "gelu"), [u, c], dy.double())
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("limit", [1, 7 * 8, 3 * 8 - 1, 30 * 8, 10 ** 9])
def test_chunks_do_not_change_the_result(limit, monkeypatch):
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (2, 15, 8), 4)
    whole = gradients(lambda: rswaf_activation(u, c, points, h, "gelu"), [u, c], dy)
    monkeypatch.setattr(backend, "CHUNK_INPUTS", limit)
    chunked = gradients(lambda: rswaf_activation(u, c, points, h, "gelu"), [u, c], dy)
    assert error(chunked[0], whole[0]) < 1e-15 and error(chunked[1], whole[1]) < 1e-15      # vector or scalar exp
    assert error(chunked[2], whole[2]) < 1e-14          # a sum in another order


def test_chunks_cover_all_rows_and_hold_to_the_limit(monkeypatch):
    monkeypatch.setattr(backend, "CHUNK_INPUTS", 20)
    seen = []
    real = op._exponentials

    def watched(u, *args):
        seen.append(tuple(u.shape))
        return real(u, *args)

    monkeypatch.setattr(op, "_exponentials", watched)
    points, h = points_of("2 points")
    with through("chunked"):
        rswaf_activation(torch.zeros(5, 9), torch.zeros(3, 2), points, h)
        rswaf_activation(torch.zeros(3, 50), torch.zeros(1, 2), points, h)      # a row that is larger than a chunk
    assert seen == [(2, 9), (2, 9), (1, 9), (1, 50), (1, 50), (1, 50)]


@pytest.mark.parametrize("path", PATHS[:2])
def test_backward_keeps_u_and_the_parameters_only(path):
    points, h = points_of("the models'")
    u, c, _ = inputs("the models'", (4, 250, 24), 8, torch.float32)
    s = torch.ones(8, requires_grad=True)
    with through(path):
        storages, _ = saved(lambda: rswaf_activation(u, c, points, h, "gelu", s))
    assert storages == {t.untyped_storage().data_ptr(): 4 * t.numel() for t in (u, c, s)}
    reference, largest = saved(lambda: rswaf_activation_reference(u, c, points, h, "gelu", s))
    assert largest == u.numel() and sum(reference.values()) > 30 * 4 * u.numel()     # what it is there for
    with torch.no_grad():
        assert saved(lambda: rswaf_activation(u, c, points, h)) == ({}, 0)


@pytest.mark.parametrize("path", PATHS[:2])
def test_two_runs_are_bit_equal_with_any_number_of_threads(path):
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (1000, 48), 8, torch.float32)
    with through(path):
        runs = []
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            runs.append(gradients(lambda: rswaf_activation(u, c, points, h, "gelu"), [u, c], dy))
    torch.set_num_threads(1)
    for other in runs[1:] if path == "native" else runs[1:2]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("path", PATHS[:2])
def test_used_twice_in_one_graph(path):
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (40, 24), 8, torch.float32)
    with through(path):
        got = gradients(lambda: rswaf_activation(rswaf_activation(u, c, points, h, "gelu"), c, points, h), [u, c], dy)
    want = gradients(lambda: exact_activation(exact_activation(u, c, points, h, "gelu"), c, points, h), [u, c], dy.double())
    assert all(error(a, b) < 5e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (40, 24), 8, torch.float32)

    def function(u, c):
        return rswaf_activation(u, c, points, h, "gelu")

    plain = gradients(lambda: function(u, c), [u, c], dy)
    y = checkpoint(function, u, c, use_reentrant=reentrant)
    y.backward(dy)
    assert all(torch.equal(a, b) for a, b in zip(plain, (y, u.grad, c.grad), strict=True))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("path", every(2, ["auto", "chunked"]))
def test_opcheck(path, scaled, monkeypatch):
    if path == "chunked":
        monkeypatch.setattr(native, "library", lambda points, base=None: None)
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (6, 16), 4, torch.float32)
    s = torch.ones(4, requires_grad=True) if scaled else None
    for x in (u, u.detach().to(torch.bfloat16).requires_grad_(), torch.randn(16, 6).t().requires_grad_()):
        torch.library.opcheck(op._activation, (x, c, s, list(points), h, "gelu", "auto"))
    torch.library.opcheck(op._activation_grad, (dy, *(None if t is None else t.detach() for t in (u, c, s)), list(points), h,
                                                "gelu", "auto"))


def test_frozen_parameters_and_inputs():
    points, h = points_of("the models'")
    u, c, dy = inputs("the models'", (40, 24), 8, torch.float32)
    both = gradients(lambda: rswaf_activation(u, c, points, h), [u, c], dy)
    assert torch.equal(gradients(lambda: rswaf_activation(u, c.detach(), points, h), [u], dy)[1], both[1])
    assert torch.equal(gradients(lambda: rswaf_activation(u.detach(), c, points, h), [c], dy)[1], both[2])


@pytest.mark.parametrize("change, words", [
    (dict(c=torch.zeros(5, 8)), "5 groups do not divide 24 channels"),
    (dict(base="tanh"), "base tanh is not one of none, identity, gelu"),
    (dict(c=torch.zeros(8, 7)), "7 coefficients per group need the same number of grid points"),
    (dict(h=0.2), "at most 10 h from their middle; got 8 and h = 0.2")])
def test_what_is_refused(change, words):
    points, h = points_of("the models'")
    given = {"c": torch.zeros(8, 8), "h": h, "base": "none"} | change
    with pytest.raises(ValueError, match=words):
        rswaf_activation(torch.zeros(3, 24), given["c"], points, given["h"], given["base"])
