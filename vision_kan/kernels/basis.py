"""FasterKAN's basis, the constants of the form that the CPU kernels use, and the other bases of group KANs.

    B_k(u) = 1 - tanh((u - g_k)/h)^2,    k = 1..G

It is the reflectional switch activation function of FasterKAN (A. Delis, 2024), an approximation of the B-splines
of Kolmogorov-Arnold networks (Liu et al., arXiv:2404.19756).
"""
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The forms with a single exponential hold if no grid point is further than this from the grid's middle, in units of h.
MAX_HALF_RANGE = 10.0
MAX_POINTS = 16         # largest grid that the C++ and Triton kernels support
BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u, "gelu": F.gelu, "silu": F.silu, "relu": F.relu, "relu2": lambda u: F.relu(u).square()}


def rswaf_basis(u: Tensor, grid: Tensor, h: float | Tensor) -> Tensor:
    """Basis values B_k(u) = 1 - tanh((u - g_k)/h)^2, shape [..., I] -> [..., I, G]."""
    return _rswaf((u.unsqueeze(-1) - grid) / h)


# ---------------------------------------------------------------- the bases of group KANs
Values = Iterable[Tensor]       # G tensors, each of u's shape


def _bumps(shape: Callable[[Tensor], Tensor]) -> Callable[..., Values]:
    """The same shape(z) at every grid point, z = (u - g_k)/h."""
    return lambda u, points, h: (shape((u - point) / h) for point in points)


def _size(z: Tensor) -> Tensor:
    """|z|. The second derivative of `abs` is wrong at 0, where even functions of it have one."""
    return torch.where(z < 0, -z, z)


def _rswaf(z: Tensor) -> Tensor:
    """1 - tanh(z)^2, which would lose its tails to cancellation; exp(+2|z|) would overflow at |u| = 1e4."""
    e = torch.exp(-2 * _size(z))        # in (0, 1]
    return 4 * e / (1 + e) ** 2


def _sech(z: Tensor) -> Tensor:
    e = torch.exp(-_size(z))            # cosh would overflow, and its gradient would be NaN
    return 2 * e / (1 + e * e)


def _bspline(z: Tensor) -> Tensor:
    """Cubic, with knots at distance h."""
    t = _size(z)
    return (F.relu(2 - t) ** 3 - 4 * F.relu(1 - t) ** 3) / 6


def _chebyshev(u: Tensor, points: Sequence[float], h: float) -> Values:
    """T_0 to T_{G-1} of tanh, which takes u into [-1, 1]; its argument is +-1 at the ends of a grid of spacing h."""
    x = torch.tanh(_from_middle(u, points, h))
    before, now = x, torch.ones_like(x)         # T_-1 = T_1
    for _ in points:
        yield now
        before, now = now, 2 * x * now - before


def _fourier(u: Tensor, points: Sequence[float], h: float) -> Values:
    """sin z, cos z, sin 2z, cos 2z, ...; z goes from -pi/2 to pi/2 over a grid of spacing h, so its ends are not tied."""
    z = _from_middle(u, points, h) * (math.pi / 2)
    for k in range(len(points)):
        yield torch.cos((k // 2 + 1) * z) if k % 2 else torch.sin((k // 2 + 1) * z)


def _from_middle(u: Tensor, points: Sequence[float], h: float) -> Tensor:
    """0 at the middle of the grid, 1 at (G - 1)/2 widths from it."""
    return (u - (points[0] + points[-1]) / 2) / (h * (len(points) - 1) / 2)


class Basis(NamedTuple):
    """A --kan-function.

    values: B_1(u), ..., B_G(u), each of u's shape, from u, the G grid points and the width h.
    flops: of one value.
    fades: whether B_k is a bump at grid point k, and small far from it."""
    values: Callable[[Tensor, Sequence[float], float], Values]
    flops: int
    fades: bool


FUNCTIONS = {
    "rswaf": Basis(_bumps(_rswaf), 5, True),            # subtract, divide, tanh, square, subtract from 1
    "gaussian": Basis(_bumps(lambda z: torch.exp(-z * z)), 5, True),            # FastKAN's (arXiv:2405.06721)
    "sech": Basis(_bumps(_sech), 6, True),
    "rational": Basis(_bumps(lambda z: 1 / (1 + z * z)), 5, True),
    "bspline": Basis(_bumps(_bspline), 12, True),       # KAN's (arXiv:2404.19756)
    "chebyshev": Basis(_chebyshev, 3, False),           # Chebyshev KAN's (arXiv:2405.07200)
    "fourier": Basis(_fourier, 2, False),
}


# ---------------------------------------------------------------- grids
def check_grid(low: float, high: float, points: int, h: float) -> None:
    """Raises ValueError for a uniform grid that is none."""
    if points < 2 or not low < high or not h > 0:
        raise ValueError(f"a grid needs at least 2 points, min < max and h > 0, got {points} points on [{low}, {high}] with "
                         f"h = {h}")


@functools.lru_cache(maxsize=256)
def pair_constants(points: tuple[float, ...], h: float) -> tuple[float, ...] | None:
    """Constants a, b, g, x, y, c of each pair of grid points, the outermost pair first; None for a grid without this form.

    Points at m + d and m - d are a pair; with z = 2(u - m)/h, s = exp(-|z|), w = s/(1 + s^2), T = tanh(z),
    p = exp(-2d/h)/4 and q = exp(2d/h)/4 the product of 1/B+ = p e^z + q e^-z + 1/2 and 1/B- = q e^z + p e^-z + 1/2
    is Q/w^2, their sum is (p + q)/w + 1 and their difference (q - p) T/w, so that

        B+ + B- = w (x + y w)/Q,    B+ - B- = w c T/Q,    Q = a + b w + g w^2,
        a = 1/16,  b = (p + q)/2,  g = p^2 + q^2 + 1/8,  x = p + q,  y = 1,  c = q - p,

    all divided by sqrt(g/16), which keeps a product of four Q within float32. With an odd number of points the middle one has
    B = w/(1/4 + w/2). The grid must be symmetric about its middle, as every uniform one is, with max |g_k - m|/h <=
    MAX_HALF_RANGE.
    """
    middle = (points[0] + points[-1]) / 2
    constants: list[float] = []
    for low, high in zip(points[:(len(points) + 1) // 2], reversed(points)):
        d = high - middle
        if abs(high + low - 2 * middle) > 1e-6 * (points[-1] - points[0]) or not 0 <= d <= MAX_HALF_RANGE * h:
            return None
        if low == high:
            constants += [0.25, 0.5, 0.0, 1.0, 0.0, 0.0]
            continue
        p, q = math.exp(-2 * d / h) / 4, math.exp(2 * d / h) / 4
        g = p * p + q * q + 0.125
        constants += [value / math.sqrt(g / 16) for value in (1 / 16, (p + q) / 2, g, p + q, 1.0, q - p)]
    return tuple(constants)
