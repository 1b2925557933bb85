"""The group KAN's activation on a GPU: one pass over u forward, and one for all gradients.

    v[t, c] = s[g] * base(u[t, c]) + sum_k C[g, k] * B_k(u[t, c]),    g = c // (channels / groups)

The memory traffic is GELU's, so the arithmetic must not take longer than it. On a grid that is symmetric about its middle m, as
every uniform one is, the points m + d and m - d share their denominator: with z = 2(u - m)/h, A = e^z + e^-z, S = e^z - e^-z,
kappa = cosh(2d/h), sigma = sinh(2d/h) and R = 1/(A + 2 kappa), from the product of two cosh,

    B+ = R^2 (8 + 4 kappa A + 4 sigma S)        B- = R^2 (8 + 4 kappa A - 4 sigma S)

and the middle point of an odd number is B+ with kappa = 1, sigma = 0. With P = C+ + C- and M = C+ - C- a pair adds

    R^2 (8 P + y A + w S) = y R + x R^2 + w S R^2,      y = 4 kappa P,  x = -8 sigma^2 P,  w = 4 sigma M

to v, because R A = 1 - 2 kappa R and 1 - kappa^2 = -sigma^2. Its derivative with respect to z, from dA/dz = S, dS/dz = A and
dR/dz = -S R^2, is S * (-2 R^2 (y/2 + R (x + w S))) + A * (w R^2). That is two exponentials per element and, as two pairs share a
reciprocal, one reciprocal per four points. Any other grid, or h far below its spacing, needs an exponential and a reciprocal per
point (`PAIRS` off).

Grid and width are compile-time constants, which become immediates. Tiles, sums and launches: `triton_columns`.
"""
import functools
import math

import torch
import triton
import triton.language as tl

from vision_kan.kernels.basis import BASES, MAX_POINTS, pair_constants
from vision_kan.kernels.triton_columns import (
    FINISH_BLOCK,
    WARPS,
    ColumnsPlan,
    add_tile,
    choose_tile,
    finish_kernel,
    first_tile,
    no_sums,
    row_total,
    store_total,
    tile_vectors,
)
from vision_kan.kernels.triton_common import AotCase, Device, Work, fast_exp2, fast_reciprocal

LOG2_E = tl.constexpr(math.log2(math.e))
ROOT = tl.constexpr(math.sqrt(0.5 * math.log2(math.e)))         # exp(-u^2/2) = 2^-(ROOT u)^2
DENSITY_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
TAIL_0, TAIL_1, TAIL_2, TAIL_3, TAIL_4, TAIL_5 = map(tl.constexpr, (
    0.004808242432773113, 0.08140655606985092, 0.31023338437080383, -0.2594813108444214, 0.49190667271614075,
    -0.1288735717535019))
# At |z| = 60 log(2) every B_k is below 2^-29, and squares of e^z are still far from the end of float32.
MAX_Z = tl.constexpr(60.0)


# ---------------------------------------------------------------- base functions
@triton.jit
def _normal_tail(u, APPROX: tl.constexpr):
    """exp(-u^2/2), and 1 - Phi(|u|) of the normal distribution to within 1e-7: a fit of ours to erfcx. The exact erf
    compiles to thirty instructions, with a branch."""
    root = u * ROOT
    e = fast_exp2(-(root * root), APPROX)
    t = fast_reciprocal(1.0 + 0.32 * tl.abs(u), APPROX)
    p = TAIL_4 + TAIL_5 * t
    p = TAIL_3 + p * t
    p = TAIL_2 + p * t
    p = TAIL_1 + p * t
    return e, e * (TAIL_0 + p * t)


@triton.jit
def _base(u, BASE: tl.constexpr, APPROX: tl.constexpr):
    if BASE == "gelu":
        _, tail = _normal_tail(u, APPROX)
        return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) - tl.abs(u) * tail
    elif BASE == "silu":
        return u * fast_reciprocal(1.0 + fast_exp2(u * -LOG2_E, APPROX), APPROX)
    elif BASE == "relu":
        return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif BASE == "relu2":
        positive = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive
    else:
        return u


@triton.jit
def _base_slope(u, BASE: tl.constexpr, APPROX: tl.constexpr):
    if BASE == "gelu":
        e, tail = _normal_tail(u, APPROX)
        sign = u.to(tl.int32, bitcast=True) & -2147483648       # Phi(|u|) - 1/2 takes it by one instruction
        half = ((0.5 - tail).to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        return u * (DENSITY_0 * e) + (half + 0.5)
    elif BASE == "silu":
        gate = fast_reciprocal(1.0 + fast_exp2(u * -LOG2_E, APPROX), APPROX)
        return gate * (1.0 + u * (1.0 - gate))
    elif BASE == "relu":
        return tl.where(u > 0.0, 1.0, 0.0)
    elif BASE == "relu2":
        return 2.0 * tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.full(u.shape, 1.0, tl.float32)


# ---------------------------------------------------------------- the points
# RATE = 2/(h log(2)), SHIFT = -m RATE, PER_H = 2/h. GRID: 2 kappa and sigma of each pair, the innermost first; for any
# other grid -g RATE of each point.
@triton.jit
def _hyperbolic(u, RATE: tl.constexpr, SHIFT: tl.constexpr, APPROX: tl.constexpr):
    """A and S."""
    z = tl.clamp(u * RATE + SHIFT, -MAX_Z, MAX_Z, propagate_nan=tl.PropagateNan.ALL)
    e = fast_exp2(z, APPROX)
    inverse = fast_exp2(-z, APPROX)
    return e + inverse, e - inverse


@triton.jit
def _reciprocals(a, GRID: tl.constexpr, PAIRED: tl.constexpr, APPROX: tl.constexpr):
    """R of every pair, two from one reciprocal."""
    all_r = ()
    for j in tl.static_range(0, PAIRED - 1, 2):
        d0 = a + GRID[2 * j]
        d1 = a + GRID[2 * j + 2]
        r = fast_reciprocal(d0 * d1, APPROX)
        all_r = all_r + (r * d1, r * d0)
    if PAIRED % 2 == 1:
        all_r = all_r + (fast_reciprocal(a + GRID[2 * PAIRED - 2], APPROX),)
    return all_r


@triton.jit
def _single(u, RATE: tl.constexpr, SHIFT: tl.constexpr, APPROX: tl.constexpr):
    """z log2(e), B_k, and q with dB_k/dz = -sign(z) q B_k, z = 2(u - g_k)/h, from an exponential of its own."""
    z = u * RATE + SHIFT
    e = fast_exp2(-tl.abs(z), APPROX)
    r = fast_reciprocal(1.0 + e, APPROX)
    return z, (4.0 * e) * (r * r), (1.0 - e) * r


@triton.jit
def _coefficients(c, group, mask, G: tl.constexpr, PAIRS: tl.constexpr):
    """P and M of each pair, the innermost first; or every C[group, k]."""
    own = ()
    if PAIRS:
        for j in tl.static_range((G + 1) // 2):
            high = tl.load(c + group * G + (G // 2 + j), mask=mask, other=0.0)
            if G % 2 == 1 and j == 0:
                own = own + (high, 0.0 * high)
            else:
                low = tl.load(c + group * G + ((G - 1) // 2 - j), mask=mask, other=0.0)
                own = own + (high + low, high - low)
    else:
        for k in tl.static_range(G):
            own = own + (tl.load(c + group * G + k, mask=mask, other=0.0),)
    return own


# ---------------------------------------------------------------- kernels
@triton.jit(do_not_specialize=["rows", "steps"])
def forward_kernel(u, c, scale, v, rows, steps, vectors, per_group,
                   G: tl.constexpr, BASE: tl.constexpr, PAIRS: tl.constexpr, SCALED: tl.constexpr,
                   RATE: tl.constexpr, SHIFT: tl.constexpr, PER_H: tl.constexpr, GRID: tl.constexpr,
                   N: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, SHARED: tl.constexpr,
                   APPROX: tl.constexpr):
    """v. A program: LANES vectors wide, `steps` times UNROLL tiles of N/LANES rows high."""
    PAIRED: tl.constexpr = (G + 1) // 2
    ROWS: tl.constexpr = N // LANES
    row, vector, there, group = tile_vectors(vectors, per_group, N, LANES, VEC, SHARED)
    own = _coefficients(c, group, there[:, None], G, PAIRS)
    if SCALED:
        s = tl.load(scale + group, mask=there[:, None], other=0.0)
    weights = ()                # 8 P, y and w of each pair: y A costs what x R does, and cancels less
    if PAIRS:
        for j in tl.static_range(PAIRED):
            weights = weights + (8.0 * own[2 * j], (2.0 * GRID[2 * j]) * own[2 * j],
                                 (4.0 * GRID[2 * j + 1]) * own[2 * j + 1])
    start, offset, left = first_tile(rows, steps, row, vector, vectors, N, LANES, VEC, UNROLL)
    u += start
    v += start
    for _ in range(steps):
        for part in tl.static_range(UNROLL):
            mask = ((left > part * ROWS) & there)[:, None]
            at = offset + part * ROWS * vectors * VEC
            x = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
            y = tl.zeros_like(x)
            if PAIRS:
                a, sinh = _hyperbolic(x, RATE, SHIFT, APPROX)
                all_r = _reciprocals(a, GRID, PAIRED, APPROX)
                for j in tl.static_range(PAIRED):
                    r = all_r[j]
                    y += (r * r) * (weights[3 * j] + weights[3 * j + 1] * a + weights[3 * j + 2] * sinh)
            else:
                for k in tl.static_range(G):
                    _, basis, _ = _single(x, RATE, GRID[k], APPROX)
                    y += own[k] * basis
            if BASE != "none":
                b = _base(x, BASE, APPROX)
                if SCALED:
                    y += s * b
                else:
                    y += b
            tl.store(v + at, y.to(v.dtype.element_ty), mask=mask)
        u += vectors * (VEC * ROWS * UNROLL)
        v += vectors * (VEC * ROWS * UNROLL)
        left -= ROWS * UNROLL


@triton.jit(do_not_specialize=["rows", "steps"])
def backward_kernel(dv, u, c, scale, du, partial, rows, steps, vectors, per_group,
                    G: tl.constexpr, BASE: tl.constexpr, PAIRS: tl.constexpr, SCALED: tl.constexpr,
                    RATE: tl.constexpr, SHIFT: tl.constexpr, PER_H: tl.constexpr, GRID: tl.constexpr,
                    N: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, SHARED: tl.constexpr,
                    APPROX: tl.constexpr):
    """du, and partial[program, k, vector or column]: the sums over the program's rows for dC[., k], after them that for
    the scale. In the loop a pair's two are of dv times R^2 (1 + kappa A/2) and times R^2 S."""
    PAIRED: tl.constexpr = (G + 1) // 2
    ROWS: tl.constexpr = N // LANES
    SUMS: tl.constexpr = G + (1 if SCALED else 0)
    TERMS: tl.constexpr = (2 * PAIRED if PAIRS else G) + (1 if SCALED else 0)
    row, vector, there, group = tile_vectors(vectors, per_group, N, LANES, VEC, SHARED)
    own = _coefficients(c, group, there[:, None], G, PAIRS)
    if SCALED:
        s = tl.load(scale + group, mask=there[:, None], other=0.0)
    weights = ()                # y/2, x and w times -2 PER_H, and w PER_H, of each pair
    if PAIRS:
        for j in tl.static_range(PAIRED):
            w = (4.0 * PER_H * GRID[2 * j + 1]) * own[2 * j + 1]
            weights = weights + ((-2.0 * PER_H * GRID[2 * j]) * own[2 * j],
                                 (16.0 * PER_H * GRID[2 * j + 1] * GRID[2 * j + 1]) * own[2 * j], -2.0 * w, w)
    sums = no_sums(TERMS, N, VEC, SHARED)
    start, offset, left = first_tile(rows, steps, row, vector, vectors, N, LANES, VEC, UNROLL)
    dv += start
    u += start
    du += start
    for _ in range(steps):
        for part in tl.static_range(UNROLL):
            mask = ((left > part * ROWS) & there)[:, None]
            at = offset + part * ROWS * vectors * VEC
            x = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(dv + at, mask=mask, other=0.0).to(tl.float32)       # 0 beyond the last row: adds nothing
            shares = ()
            if PAIRS:
                a, sinh = _hyperbolic(x, RATE, SHIFT, APPROX)
                all_r = _reciprocals(a, GRID, PAIRED, APPROX)
                g_a, g_s = g * a, g * sinh
                with_s, with_a = tl.zeros_like(x), tl.zeros_like(x)         # factors of S and of A in the slope
                for j in tl.static_range(PAIRED):
                    r = all_r[j]
                    r2 = r * r
                    with_s += r2 * (weights[4 * j] + r * (weights[4 * j + 1] + weights[4 * j + 2] * sinh))
                    with_a += r2 * weights[4 * j + 3]
                    shares = shares + (r2 * (g + (0.25 * GRID[2 * j]) * g_a), r2 * g_s)
                d = g_s * with_s + g_a * with_a
            else:
                slope = tl.zeros_like(x)
                for k in tl.static_range(G):
                    z, basis, q = _single(x, RATE, GRID[k], APPROX)
                    slope -= (own[k] * basis) * tl.where(z < 0.0, -q, q)
                    shares = shares + (g * basis,)
                d = g * (PER_H * slope)
            if BASE != "none":
                b = _base_slope(x, BASE, APPROX)
                if SCALED:
                    b = s * b
                d += g * b
            tl.store(du + at, d.to(du.dtype.element_ty), mask=mask)
            if SCALED:
                if BASE == "none":
                    shares = shares + (tl.zeros_like(g),)
                else:
                    shares = shares + (g * _base(x, BASE, APPROX),)
            sums = add_tile(sums, shares, TERMS, N, VEC, SHARED)
        dv += vectors * (VEC * ROWS * UNROLL)
        u += vectors * (VEC * ROWS * UNROLL)
        du += vectors * (VEC * ROWS * UNROLL)
        left -= ROWS * UNROLL
    if PAIRS:
        for j in tl.static_range(PAIRED):
            even = 8.0 * row_total(sums[2 * j], N, LANES, VEC, SHARED)
            odd = (4.0 * GRID[2 * j + 1]) * row_total(sums[2 * j + 1], N, LANES, VEC, SHARED)
            store_total(partial, even + odd, G // 2 + j, vectors, SUMS, LANES, VEC, SHARED)
            if G % 2 == 0 or j > 0:
                store_total(partial, even - odd, (G - 1) // 2 - j, vectors, SUMS, LANES, VEC, SHARED)
    else:
        for k in tl.static_range(G):
            store_total(partial, row_total(sums[k], N, LANES, VEC, SHARED), k, vectors, SUMS, LANES, VEC, SHARED)
    if SCALED:
        scales = row_total(sums[TERMS - 1], N, LANES, VEC, SHARED)
        store_total(partial, scales, G, vectors, SUMS, LANES, VEC, SHARED)


# ---------------------------------------------------------------- choices of the launchers
def _grid_constants(points: tuple[float, ...], h: float) -> dict[str, object]:
    """Constexprs of the grid, which include whether its points are computed in pairs."""
    middle = (points[0] + points[-1]) / 2
    rate = 2 / (h * math.log(2))
    pairs = pair_constants(points, h) is not None       # for the same grids as on a CPU
    if pairs:
        halves = [2 * (g - middle) / h for g in points[len(points) // 2:]]
        grid = [value for z in halves for value in (2 * math.cosh(z), math.sinh(z))]
    else:
        grid = [-g * rate for g in points]
    return {"PAIRS": pairs, "RATE": rate, "SHIFT": -middle * rate, "PER_H": 2 / h, "GRID": tuple(grid)}


class Plan(ColumnsPlan):
    """The op and its gradients, computed in float32, for one size, device and grid: what does not depend on the data.

    Args:
        dtype, shape, where: of u [..., C]: float32, float16 or bfloat16; its device.
        coefficients: their shape [groups, G], 2 <= G <= 16.
        scaled: whether there is a scale [groups].
        points: the G grid points, ascending.
        h: width of a bump.
        base: "none" or a key of `BASES`.
    Raises: ValueError for what the kernels don't support.
    """

    def __init__(self, dtype: torch.dtype, shape: torch.Size, where: torch.device, coefficients: torch.Size, scaled: bool,
                 points: tuple[float, ...], h: float, base: str):
        g = coefficients[1]
        if not 2 <= g <= MAX_POINTS or g != len(points) or base not in ("none", *BASES):
            raise ValueError(f"no kernel for {g} coefficients, {len(points)} points and base {base}")
        constants = _grid_constants(points, h)
        super().__init__(dtype, shape, where, coefficients, scaled, (forward_kernel, backward_kernel),
                         {"G": g, "BASE": base, "SCALED": scaled, **constants}, wide=g <= 8 or bool(constants["PAIRS"]))


# ---------------------------------------------------------------- ahead of time
def aot_cases(device: Device) -> list[AotCase]:
    """The cases to compile: each size of element with the costliest base and a scale, for 8 and 16 points; 8 points also with a
    cheap base, and with a function for each channel; and the form for any grid. fp16 compiles as bf16 does, and fewer points or
    another base need fewer resources."""
    variants = [(dtype, g, "gelu", True, True, 96) for dtype in ("bf16", "fp32") for g in (8, 16)]
    variants += [("bf16", 8, base, True, False, 96) for base in ("gelu", "identity")]
    variants += [("bf16", 8, "gelu", True, True, per_group) for per_group in (4, 1)]
    variants += [("bf16", g, "gelu", False, True, 96) for g in (8, 16)]
    finish = AotCase("rswaf_activation.finish", f"{FINISH_BLOCK} G8 scale", finish_kernel, {
        "partial": "*fp32", "dc": "*fp32", "dscale": "*fp32", "splits": "i32", "columns": "i32", "per_group": "i32"},
        {"G": 8, "SUMS": 9, "BLOCK": FINISH_BLOCK}, num_warps=WARPS, num_stages=1, quick=True)
    return [case for variant in variants for case in _cases(device, *variant)] + [finish]


def _cases(device: Device, dtype: str, g: int, base: str, pairs: bool, scaled: bool, per_group: int) -> list[AotCase]:
    item = 4 if dtype == "fp32" else 2
    spread = 0.0 if pairs else 0.1          # moves a point, so that the grid is not symmetric
    constants = _grid_constants((*(float(k) for k in range(g - 1)), g - 1 + spread, ), 1.0)
    tile = choose_tile(device, item, 8 * per_group, 8, g <= 8 or pairs)
    words = (f"{dtype} G{g} {base}{' scale' if scaled else ''} {'pairs' if pairs else 'any grid'} "
             f"{tile['N']}x{tile['VEC']}{'' if tile['SHARED'] else ' each'}")
    quick = dtype == "bf16" and g == 8 and base == "gelu" and pairs and scaled and per_group == 96
    sizes = {"rows": "i32", "steps": "i32", "vectors": "i32", "per_group": "i32"}
    constexprs = {"G": g, "BASE": base, "SCALED": scaled, "APPROX": device.approx, **constants, **tile}
    cases = []
    for name in ("forward", "backward"):
        tensors = {"u": f"*{dtype}", "c": "*fp32", "scale": "*fp32"}
        tensors |= {"v": f"*{dtype}"} if name == "forward" else {"dv": f"*{dtype}", "du": f"*{dtype}", "partial": "*fp32"}
        cases.append(AotCase(
            f"rswaf_activation.{name}", words, forward_kernel if name == "forward" else backward_kernel, tensors | sizes,
            constexprs, num_warps=WARPS, num_stages=1, quick=quick, vector=int(tile["VEC"]) * item,
            work=functools.partial(_work, specials=_specials(g, base, pairs, name == "backward"), item=item,
                                   arrays=2 if name == "forward" else 3)))
    return cases


def _specials(g: int, base: str, pairs: bool, gradients: bool) -> float:
    """Special functions per element."""
    of_base = {"gelu": 2, "silu": 2}.get(base, 0)
    return of_base + (2 + ((g + 1) // 2 + 1) // 2 if pairs else 2 * g)


def _work(tokens: int, width: int, *, specials: float, item: int, arrays: int) -> Work:
    return Work(specials=specials * tokens * width, bytes=float(item * arrays * tokens * width))
