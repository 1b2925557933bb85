"""FasterKAN's basis: the reference, and the constants of the form that the CPU kernels use.

    B_k(u) = 1 - tanh((u - g_k)/h)^2,    k = 1..G

It is the reflectional switch activation function of FasterKAN (A. Delis, 2024), an approximation of the B-splines
of Kolmogorov-Arnold networks (Liu et al., arXiv:2404.19756).
"""
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# The forms with a single exponential hold if no grid point is further than this from the grid's middle, in units of h.
MAX_HALF_RANGE = 10.0
MAX_POINTS = 16         # largest grid that the C++ and Triton kernels support
BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u, "gelu": F.gelu, "silu": F.silu, "relu": F.relu, "relu2": lambda u: F.relu(u).square()}


def rswaf_basis(u: Tensor, grid: Tensor, h: float | Tensor) -> Tensor:
    """Basis values B_k(u) = 1 - tanh((u - g_k)/h)^2, shape [..., I] -> [..., I, G].

    Computed as 4e/(1+e)^2 with e = exp(-2|u - g|/h), because 1 - tanh^2 loses its tails to cancellation and exp(+2|u - g|/h)
    overflows at |u| = 1e4."""
    z = (u.unsqueeze(-1) - grid) / h                    # [..., I, G]
    e = torch.exp(-2 * z.abs())                         # in (0, 1]
    return 4 * e / (1 + e) ** 2


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
