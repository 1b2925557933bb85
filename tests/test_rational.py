"""KAT's rational op against its definition in fp64, on each of its paths on a CPU."""
import pytest
import torch
from helpers import every
from paths import error

from vision_kan import kernels
from vision_kan.kernels import native, rational, rational_reference

# About three times the largest error of an output that was measured against fp64; gradients have 8 times that.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
WAYS = ["auto", "chunked", "reference"]


@pytest.fixture(autouse=True)
def again():
    before = kernels.chosen()
    yield
    kernels.use(before)


def choose(way: str, monkeypatch) -> None:
    kernels.use("reference" if way == "reference" else "auto")
    if way == "chunked":
        monkeypatch.setattr(native, "rational_library", lambda *degrees: None)


def problem(dtype=torch.float32, shape=(5, 7, 48), groups=3, degree=5, below=4):
    torch.manual_seed(0)
    u, dv = (torch.randn(shape).to(dtype) for _ in range(2))
    c = torch.randn(groups, degree + 1 + below, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    c[:, degree + 1:].abs_()
    return u.requires_grad_(), c.requires_grad_(), dv


def exact(u, c, dv, degree=5):
    """v, du, dc in fp64, straight from the definition."""
    x, k = (tensor.detach().double().requires_grad_() for tensor in (u, c))
    own = k.repeat_interleave(x.shape[-1] // len(k), 0)
    above = sum(own[:, n] * x ** n for n in range(degree + 1))
    below = 1 + sum(own[:, degree + n] * x.abs() ** n for n in range(1, k.shape[1] - degree))
    v = above / below
    return v.detach(), *torch.autograd.grad(v, (x, k), dv.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_value_and_gradients(way, dtype, monkeypatch):
    choose(way, monkeypatch)
    u, c, dv = problem(dtype)
    v = rational(u, c)
    assert v.dtype == dtype and v.shape == u.shape
    got = (v, *torch.autograd.grad(v, (u, c), dv))
    for value, right, factor in zip(got, exact(u, c, dv), (1, 8, 8)):
        kind = dtype if value.shape == u.shape else c.dtype
        assert error(value, right) < factor * TOLERANCE[kind if way != "reference" else dtype]


@pytest.mark.parametrize("degree, below", every(2, [(5, 4), (1, 1), (3, 2), (2, 6)]))
@pytest.mark.parametrize("shape, groups", [((33, 45), 5), ((1, 1), 1), ((300, 16), 16), ((0, 8), 2), ((2, 3, 4, 8), 1)])
def test_shapes_and_degrees(shape, groups, degree, below):
    u, c, dv = problem(shape=shape, groups=groups, degree=degree, below=below)
    v = rational(u, c, degree)
    for value, right in zip((v, *torch.autograd.grad(v, (u, c), dv)), exact(u, c, dv, degree)):
        assert value.shape == right.shape
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_in_its_place(way, monkeypatch):
    choose(way, monkeypatch)
    u, c, dv = problem(shape=(9, 12))
    with torch.no_grad():
        u[2, 5] = float("nan")
    v = rational(u, c)
    du, dc = torch.autograd.grad(v, (u, c), dv)
    assert torch.equal(v.isnan(), u.isnan()) and torch.equal(du.isnan(), u.isnan()) and dc[1].isnan().all()


@pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
def test_the_kernel_computes_it_and_gives_the_same_bits_twice(monkeypatch):
    called = []
    real = native.rational
    monkeypatch.setattr(native, "rational", lambda *args: called.append(1) or real(*args))
    u, c, dv = problem(shape=(300, 96))
    runs = []
    for _ in range(2):
        v = rational(u, c)
        runs.append((v.detach(), *torch.autograd.grad(v, (u, c), dv)))
    assert called == [1, 1] and all(map(torch.equal, *runs))


@pytest.mark.parametrize("way", every(2, ["auto", "chunked"]))
def test_opcheck(way, monkeypatch):
    choose(way, monkeypatch)
    u, c, _ = problem(shape=(6, 12))
    torch.library.opcheck(torch.ops.vision_kan.rational.default, (u, c, 5, "auto"))


def test_second_derivatives_and_transforms():
    u, c, _ = problem(torch.float64, (3, 6))
    assert torch.autograd.gradcheck(rational, (u, c)) and torch.autograd.gradgradcheck(rational, (u, c))
    slope = torch.func.grad(lambda x: rational(x, c.detach()).sum())(u.detach())
    v = rational(u, c)
    torch.testing.assert_close(slope, torch.autograd.grad(v.sum(), u)[0])


def test_autocast_rounds_the_input():
    u, c, _ = problem()
    with torch.autocast("cpu", torch.bfloat16):
        v = rational(u, c)
    assert v.dtype == torch.bfloat16 and torch.equal(v, rational(u.bfloat16(), c))


def test_compiled_is_one_graph():
    u, c, dv = problem(shape=(6, 12))
    compiled = torch.compile(rational, fullgraph=True, backend="aot_eager")
    v = compiled(u, c)
    assert torch.equal(v, rational(u, c))
    assert all(map(torch.equal, torch.autograd.grad(v, (u, c), dv), torch.autograd.grad(rational(u, c), (u, c), dv)))


@pytest.mark.parametrize("shape, groups, degree, words", [
    ((4, 10), 3, 5, "3 groups do not divide 10 channels"), ((4, 12), 3, 9, "leave none for the denominator")])
def test_what_cannot_be_is_a_sentence(shape, groups, degree, words):
    with pytest.raises(ValueError, match=words):
        rational(torch.zeros(shape), torch.zeros(groups, 10), degree)


def test_the_reference_is_the_definition():
    u, c, dv = problem(torch.float64)
    v = rational_reference(u, c)
    for value, right in zip((v, *torch.autograd.grad(v, (u, c), dv)), exact(u, c, dv)):
        torch.testing.assert_close(value, right)
