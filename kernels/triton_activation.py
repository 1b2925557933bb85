"""The group KAN's activation on a GPU: one pass over u forward, one pass for every gradient.

    v[t, c] = s[g] * base(u[t, c]) + sum_k C[g, k] * B_k(u[t, c]),    g = c // (channels / groups)

GELU's memory traffic, if the arithmetic keeps out of its way. On a grid that is symmetric about its middle m (every
uniform one is) the points m + d and m - d share their denominator: with z = 2(u - m)/h, A = e^z + e^-z,
S = e^z - e^-z, kappa = cosh(2d/h), sigma = sinh(2d/h) and R = 1/(A + 2 kappa), from the product of two cosh,

    B+ = R^2 (8 + 4 kappa A + 4 sigma S)        B- = R^2 (8 + 4 kappa A - 4 sigma S)

and the middle point of an odd number is B+ with kappa = 1, sigma = 0. So with x = 8 (C+ + C-), y = 4 kappa (C+ + C-)
and w = 4 sigma (C+ - C-) a pair adds R^2 (x + y A + w S) to v, and dA/dz = S, dS/dz = A, dR/dz = -S R^2 give its
derivative. Two exponentials an element and, as two pairs share a reciprocal, one reciprocal for four points.
Any other grid, or h far below its spacing, takes an exponential and a reciprocal a point (`PAIRS` off).

A program owns a block of columns, whose coefficients stay in registers, and some rows; each thread owns its columns
alone, so the sums for dC are the thread's own until the program's last step. They go to an array of partial sums,
one write for each program, column and point, which is then added in a fixed order.
"""
import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.basis import BASES, MAX_POINTS, pair_constants
from kernels.triton_common import AotCase, Device, Work, device_of, fast_exp2, fast_reciprocal

PROGRAMS_PER_PROCESSOR = 12.0   # a few times what fits at once: 7 forward, 3 backward
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}

LOG2_E = tl.constexpr(math.log2(math.e))
DENSITY_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
TAIL_0, TAIL_1, TAIL_2, TAIL_3, TAIL_4, TAIL_5 = map(tl.constexpr, (
    0.004808242432773113, 0.08140655606985092, 0.31023338437080383, -0.2594813108444214, 0.49190667271614075,
    -0.1288735717535019))
# At |z| = 60 log(2) every B_k is below 2^-29, and squares of e^z are still far from the end of float32.
MAX_Z = tl.constexpr(60.0)


# ---------------------------------------------------------------- base functions
@triton.jit
def _normal_tail(v, APPROX: tl.constexpr):
    """exp(-v^2/2), and 1 - Phi(v) of the normal distribution to within 1e-7, v >= 0: a fit of ours to erfcx. The exact
    erf compiles to thirty instructions, with a branch."""
    e = fast_exp2((v * v) * (-0.5 * LOG2_E), APPROX)
    t = fast_reciprocal(1.0 + 0.32 * v, APPROX)
    p = TAIL_4 + TAIL_5 * t
    p = TAIL_3 + p * t
    p = TAIL_2 + p * t
    p = TAIL_1 + p * t
    return e, e * (TAIL_0 + p * t)


@triton.jit
def _base(u, BASE: tl.constexpr, APPROX: tl.constexpr):
    if BASE == "gelu":
        _, tail = _normal_tail(tl.abs(u), APPROX)
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
        e, tail = _normal_tail(tl.abs(u), APPROX)
        return tl.where(u < 0.0, tail, 1.0 - tail) + u * (DENSITY_0 * e)
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
# The table [3 + 2 n] in fp32: rate = 2/(h log(2)), -m * rate, 2/h, then of each pair 2 kappa and 4 sigma, or of each
# point -g * rate and nothing. It is read once a program: a store in the loop would have it read again.
@triton.jit
def _own(c, table, group, mask, G: tl.constexpr, PAIRS: tl.constexpr):
    """What the loop over rows needs for a block of columns: 2 kappa, x, y, w of each pair, or -g * rate, C[group, k]
    of each point."""
    own = ()
    if PAIRS:
        for j in tl.static_range((G + 1) // 2):
            high = tl.load(c + group * G + (G - 1 - j), mask=mask, other=0.0)
            if 2 * j == G - 1:
                total, difference = high, 0.0 * high
            else:
                low = tl.load(c + group * G + j, mask=mask, other=0.0)
                total, difference = high + low, high - low
            two_kappa = tl.load(table + (3 + 2 * j))
            own = own + (two_kappa, 8.0 * total, (2.0 * two_kappa) * total, tl.load(table + (4 + 2 * j)) * difference)
    else:
        for k in tl.static_range(G):
            own = own + (tl.load(table + (3 + 2 * k)), tl.load(c + group * G + k, mask=mask, other=0.0))
    return own


@triton.jit
def _start(u, rate, shift, APPROX: tl.constexpr):
    """A and S."""
    z = tl.clamp(u * rate + shift, -MAX_Z, MAX_Z, propagate_nan=tl.PropagateNan.ALL)
    e = fast_exp2(z, APPROX)
    inverse = fast_exp2(-z, APPROX)
    return e + inverse, e - inverse


@triton.jit
def _reciprocals(a, own, N: tl.constexpr, APPROX: tl.constexpr):
    """R of every pair, two from one reciprocal."""
    all_r = ()
    for j in tl.static_range(0, N - 1, 2):
        d0 = a + own[4 * j]
        d1 = a + own[4 * j + 4]
        r = fast_reciprocal(d0 * d1, APPROX)
        all_r = all_r + (r * d1, r * d0)
    if N % 2 == 1:
        all_r = all_r + (fast_reciprocal(a + own[4 * N - 4], APPROX),)
    return all_r


@triton.jit
def _single(u, rate, shift, APPROX: tl.constexpr):
    """z log2(e), B_k, and q with dB_k/dz = -sign(z) q B_k, z = 2(u - g_k)/h, from an exponential of its own."""
    z = u * rate + shift
    e = fast_exp2(-tl.abs(z), APPROX)
    r = fast_reciprocal(1.0 + e, APPROX)
    return z, (4.0 * e) * (r * r), (1.0 - e) * r


@triton.jit
def _spline(u, own, rate, shift, G: tl.constexpr, PAIRS: tl.constexpr, APPROX: tl.constexpr):
    y = tl.zeros_like(u)
    if PAIRS:
        a, s = _start(u, rate, shift, APPROX)
        all_r = _reciprocals(a, own, (G + 1) // 2, APPROX)
        for j in tl.static_range((G + 1) // 2):
            r = all_r[j]
            y += (r * r) * (own[4 * j + 1] + own[4 * j + 2] * a + own[4 * j + 3] * s)
    else:
        for k in tl.static_range(G):
            _, basis, _ = _single(u, rate, own[2 * k], APPROX)
            y += own[2 * k + 1] * basis
    return y


# ---------------------------------------------------------------- kernels
# A tile is [STEP, WARPS, COLS]: of each of its rows a warp holds COLS neighbouring columns, VEC of them a thread,
# and STEP rows of it lie in the same thread.
@triton.jit
def _columns(channels, COLS: tl.constexpr, VEC: tl.constexpr):
    """Channels [1, 1, COLS] of a program, and which of them exist."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    return tl.max_contiguous(tl.multiple_of(cols, VEC), VEC)[None, None, :], (cols < channels)[None, None, :]


@triton.jit
def _rows(STEP: tl.constexpr, WARPS: tl.constexpr):
    return (tl.arange(0, STEP)[:, None] * WARPS + tl.arange(0, WARPS)[None, :])[:, :, None]


@triton.jit
def forward_kernel(u, c, scale, table, v, rows, channels, per_group, steps,
                   G: tl.constexpr, BASE: tl.constexpr, PAIRS: tl.constexpr, SCALED: tl.constexpr,
                   STEP: tl.constexpr, WARPS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
                   APPROX: tl.constexpr):
    cols, there = _columns(channels, COLS, VEC)
    group = cols // per_group
    own = _own(c, table, group, there, G, PAIRS)
    rate, shift = tl.load(table), tl.load(table + 1)
    if SCALED:
        s = tl.load(scale + group, mask=there, other=0.0)
    row = _rows(STEP, WARPS)
    offset = row * channels + cols
    first = tl.program_id(1) * (steps * (STEP * WARPS))
    u += first.to(tl.int64) * channels
    v += first.to(tl.int64) * channels
    left = rows - first
    for _ in range(steps):
        mask = (row < left) & there
        x = tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
        y = _spline(x, own, rate, shift, G, PAIRS, APPROX)
        if BASE != "none":
            b = _base(x, BASE, APPROX)
            if SCALED:
                y += s * b
            else:
                y += b
        tl.store(v + offset, y.to(v.dtype.element_ty), mask=mask)
        u += channels * (STEP * WARPS)
        v += channels * (STEP * WARPS)
        left -= STEP * WARPS


@triton.jit
def backward_kernel(dv, u, c, scale, table, du, partial, rows, channels, per_group, steps,
                    G: tl.constexpr, BASE: tl.constexpr, PAIRS: tl.constexpr, SCALED: tl.constexpr,
                    NEED_U: tl.constexpr, NEED_C: tl.constexpr,
                    STEP: tl.constexpr, WARPS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
                    APPROX: tl.constexpr):
    """du, and partial[program, k, channel]: the sums over the program's rows, that for the scale after the points."""
    N: tl.constexpr = (G + 1) // 2
    SUMS: tl.constexpr = (2 * N if PAIRS else G) + (1 if SCALED else 0)
    cols, there = _columns(channels, COLS, VEC)
    group = cols // per_group
    own = _own(c, table, group, there, G, PAIRS)
    rate, shift = tl.load(table), tl.load(table + 1)
    if SCALED:
        s = tl.load(scale + group, mask=there, other=0.0)
    row = _rows(STEP, WARPS)
    offset = row * channels + cols
    first = tl.program_id(1) * (steps * (STEP * WARPS))
    start = first.to(tl.int64) * channels
    u += start
    dv += start
    du += start
    left = rows - first
    minus = ()                      # -2 x, -2 y, -2 w of each pair
    for j in tl.static_range(N if PAIRS else 0):
        minus = minus + (-2.0 * own[4 * j + 1], -2.0 * own[4 * j + 2], -2.0 * own[4 * j + 3])
    sums = ()                       # of a pair: R^2 (1 + kappa A/2) and R^2 S
    for _k in tl.static_range(SUMS if NEED_C else 0):
        sums = sums + (tl.zeros((WARPS, COLS), tl.float32),)
    per_h = tl.load(table + 2)
    for _ in range(steps):
        mask = (row < left) & there
        x = tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dv + offset, mask=mask, other=0.0).to(tl.float32)       # 0 beyond the tail: adds nothing
        shares = ()
        if PAIRS:
            a, sinh = _start(x, rate, shift, APPROX)
            all_r = _reciprocals(a, own, N, APPROX)
            in_a, in_s = tl.zeros_like(x), tl.zeros_like(x)     # factors of dA/dz and of dS/dz
            g_a, g_s = g * (0.25 * a), g * sinh
            for j in tl.static_range(N):
                r = all_r[j]
                r2 = r * r
                if NEED_U:
                    in_a += r2 * (own[4 * j + 2] + r * (minus[3 * j] + minus[3 * j + 1] * a + minus[3 * j + 2] * sinh))
                    in_s += r2 * minus[3 * j + 2]
                if NEED_C:
                    shares = shares + (r2 * (g + own[4 * j] * g_a), r2 * g_s)
            slope = per_h * (sinh * in_a + a * (-0.5 * in_s))
        else:
            slope = tl.zeros_like(x)
            for k in tl.static_range(G):
                z, basis, q = _single(x, rate, own[2 * k], APPROX)
                if NEED_U:
                    slope -= (own[2 * k + 1] * basis) * tl.where(z < 0.0, -q, q)
                if NEED_C:
                    shares = shares + (g * basis,)
            slope *= per_h
        if NEED_U:
            if BASE != "none":
                b = _base_slope(x, BASE, APPROX)
                if SCALED:
                    slope += s * b
                else:
                    slope += b
            tl.store(du + offset, (g * slope).to(du.dtype.element_ty), mask=mask)
        if NEED_C:
            if SCALED:
                if BASE == "none":
                    shares = shares + (tl.zeros_like(g),)
                else:
                    shares = shares + (g * _base(x, BASE, APPROX),)
            new = ()
            for k in tl.static_range(SUMS):
                new = new + (sums[k] + tl.sum(shares[k], 0),)
            sums = new
        u += channels * (STEP * WARPS)
        dv += channels * (STEP * WARPS)
        du += channels * (STEP * WARPS)
        left -= STEP * WARPS
    if NEED_C:
        flat = tl.program_id(0) * COLS + tl.arange(0, COLS)
        partial += tl.program_id(1).to(tl.int64) * (G + (1 if SCALED else 0)) * channels
        if PAIRS:
            for j in tl.static_range(N):
                even = 8.0 * tl.sum(sums[2 * j], 0)
                odd = tl.load(table + (4 + 2 * j)) * tl.sum(sums[2 * j + 1], 0)
                tl.store(partial + (G - 1 - j) * channels + flat, even + odd, mask=flat < channels)
                if 2 * j != G - 1:
                    tl.store(partial + j * channels + flat, even - odd, mask=flat < channels)
        else:
            for k in tl.static_range(G):
                tl.store(partial + k * channels + flat, tl.sum(sums[k], 0), mask=flat < channels)
        if SCALED:
            tl.store(partial + G * channels + flat, tl.sum(sums[SUMS - 1], 0), mask=flat < channels)


# ---------------------------------------------------------------- what the launchers choose
def _tile(device: Device, points: int, pairs: bool, gradients: bool) -> dict[str, int]:
    """Constexprs of a tile: two columns a thread, whose coefficients and sums it keeps, and as many rows at once as
    registers allow."""
    lanes = 64 if device.backend == "hip" else 32
    return {"STEP": 4 if not gradients or points <= 8 else 2 if pairs else 1, "WARPS": 4, "COLS": 2 * lanes, "VEC": 2}


def _steps(device: Device, tile: dict[str, int], rows: int, channels: int) -> tuple[int, tuple[int, int]]:
    """How many tiles a program takes, one below the other, and the grid: enough programs to fill the device, few
    enough that reading the coefficients and writing partial sums cost little."""
    blocks = triton.cdiv(channels, tile["COLS"])
    tiles = triton.cdiv(rows, tile["STEP"] * tile["WARPS"])
    programs = max(1, min(tiles, int(PROGRAMS_PER_PROCESSOR * device.processors) // blocks))
    steps = triton.cdiv(tiles, programs)
    return steps, (blocks, triton.cdiv(tiles, steps))


@functools.lru_cache(maxsize=256)
def _table(points: tuple[float, ...], h: float, device: torch.device) -> tuple[Tensor, bool]:
    """The kernels' table and whether the points are taken in pairs. Kept, so that only a grid's first call copies to the
    device: that one cannot be part of a CUDA graph."""
    middle = (points[0] + points[-1]) / 2
    pairs = pair_constants(points, h) is not None       # the same grids as on a CPU
    rate = 2 / (h * math.log(2))
    values = [rate, -middle * rate, 2 / h]
    if pairs:
        for g in points[:len(points) // 2 - 1:-1]:
            d = g - middle
            values += [2 * math.cosh(2 * d / h), 4 * math.sinh(2 * d / h)]
    else:
        for g in points:
            values += [-g * rate, 0.0]
    return torch.tensor(values, dtype=torch.float32, device=device), pairs


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _arguments(u: Tensor, coefficients: Tensor, scale: Tensor | None, points: tuple[float, ...], h: float,
               base: str) -> tuple[dict, dict, Tensor]:
    """Runtime arguments and constexprs that both kernels take, checked; and the table."""
    groups, g = coefficients.shape
    if u.dim() != 2 or not u.is_contiguous() or u.dtype not in TYPES:
        raise ValueError(f"u must be a contiguous matrix of float32, float16 or bfloat16, got {list(u.shape)} {u.dtype}")
    if not 2 <= g <= MAX_POINTS or g != len(points) or base not in ("none", *BASES):
        raise ValueError(f"no kernel for {g} coefficients, {len(points)} points and base {base}")
    if groups == 0 or u.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide {u.shape[1]} channels")
    table, pairs = _table(tuple(points), float(h), u.device)
    c = coefficients.to(torch.float32).contiguous()
    arguments = {"c": c, "scale": c if scale is None else scale.to(torch.float32).contiguous(), "table": table,
                 "rows": u.shape[0], "channels": u.shape[1], "per_group": u.shape[1] // groups}
    constexprs = {"G": g, "BASE": base, "PAIRS": pairs, "SCALED": scale is not None}
    return arguments, constexprs, table


def _guard(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


# ---------------------------------------------------------------- launchers
def forward(u: Tensor, coefficients: Tensor, scale: Tensor | None, points: tuple[float, ...], h: float,
            base: str) -> Tensor:
    """v [T, C] in u's dtype.

    Args:
        u: [T, C], contiguous, float32, float16 or bfloat16; computed in float32.
        coefficients: [groups, G], 2 <= G <= 16. scale: [groups], or None for 1.
        points: the G grid points, ascending. h: width of a bump. base: of `BASES`.
    """
    device = device_of(u)
    arguments, constexprs, _ = _arguments(u, coefficients, scale, points, h, base)
    v = _empty(*u.shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return v
    tile = _tile(device, len(points), constexprs["PAIRS"], False)
    steps, grid = _steps(device, tile, *u.shape)
    with _guard(u):
        forward_kernel[grid](u=u, v=v, steps=steps, **arguments, **constexprs, **tile, APPROX=device.approx,
                             num_warps=tile["WARPS"], num_stages=1)
    return v


def backward(dv: Tensor, u: Tensor, coefficients: Tensor, scale: Tensor | None, points: tuple[float, ...], h: float,
             base: str, need_u: bool = True, need_c: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from dv [T, C]: du [T, C] in u's dtype (None unless need_u), dC [groups, G] and dscale [groups] in
    float32 (None unless need_c; dscale None without a scale). The same bits on every run."""
    device = device_of(u)
    arguments, constexprs, table = _arguments(u, coefficients, scale, points, h, base)
    groups, g = coefficients.shape
    dv = dv.contiguous()
    if dv.shape != u.shape or dv.dtype not in TYPES:
        raise ValueError(f"dv must be of u's shape {list(u.shape)} and floating, got {list(dv.shape)} {dv.dtype}")
    du = _empty(*u.shape, dtype=u.dtype, device=u.device) if need_u else None
    sums = g + (scale is not None)
    total: Tensor | None
    if u.numel() == 0:
        total = torch.zeros(groups, sums, dtype=torch.float32, device=u.device)
    else:
        tile = _tile(device, g, constexprs["PAIRS"], True)
        steps, grid = _steps(device, tile, *u.shape)
        partial = _empty(grid[1], sums, u.shape[1], dtype=torch.float32, device=u.device) if need_c else None
        if need_u or need_c:
            with _guard(u):
                backward_kernel[grid](dv=dv, u=u, du=du if need_u else u, partial=partial if need_c else table,
                                      steps=steps, **arguments, **constexprs, NEED_U=need_u, NEED_C=need_c, **tile,
                                      APPROX=device.approx, num_warps=tile["WARPS"], num_stages=1)
        total = None if partial is None else partial.view(grid[1], sums, groups, -1).sum((0, 3)).t()    # [groups, sums]
    if total is None or not need_c:
        return du, None, None
    return du, total[:, :g].contiguous(), total[:, g].contiguous() if scale is not None else None


# ---------------------------------------------------------------- ahead of time
def aot_cases(device: Device) -> list[AotCase]:
    """Every tile with each size of element, with the costliest base and a scale; 8 points also without a base's cost, and
    the form for any grid. fp16 compiles as bf16 does, and fewer points or another base need less of everything."""
    variants = [(dtype, g, "gelu", True, True) for dtype in ("bf16", "fp32") for g in (8, 16)]
    variants += [("bf16", 8, "identity", True, False)]
    variants += [("bf16", g, "gelu", False, True) for g in (8, 16)]
    return [case for variant in variants for case in _cases(device, *variant)]


def _cases(device: Device, dtype: str, g: int, base: str, pairs: bool, scaled: bool) -> list[AotCase]:
    item = 4 if dtype == "fp32" else 2
    words = f"{dtype} G{g} {base}{' scale' if scaled else ''} {'pairs' if pairs else 'any grid'}"
    quick = dtype == "bf16" and g == 8 and base == "gelu" and pairs
    shared = {"c": "*fp32", "scale": "*fp32", "table": "*fp32", "rows": "i32", "channels": "i32", "per_group": "i32",
              "steps": "i32"}
    constexprs = {"G": g, "BASE": base, "PAIRS": pairs, "SCALED": scaled, "APPROX": device.approx}
    cases = []
    for name, needs in (("forward", None), ("backward", (True, True)), ("backward_u", (True, False)),
                        ("backward_c", (False, True))):
        if needs is not None and needs != (True, True) and not (quick and scaled):
            continue
        tile = _tile(device, g, pairs, needs is not None)
        signature = {"u": f"*{dtype}", **shared}
        values = constexprs | tile
        if needs is None:
            signature["v"] = f"*{dtype}"
        else:
            signature |= {"dv": f"*{dtype}", "du": f"*{dtype}", "partial": "*fp32"}
            values |= {"NEED_U": needs[0], "NEED_C": needs[1]}
        cases.append(AotCase(
            f"rswaf_activation.{name}", words, forward_kernel if needs is None else backward_kernel, signature, values,
            num_warps=tile["WARPS"], num_stages=1, divisible=("channels",), quick=quick and scaled,
            work=functools.partial(_work, specials=_specials(g, base, pairs, needs is not None),
                                   item=item, arrays=2 + (needs is not None and needs[0]))))
    return cases


def _specials(g: int, base: str, pairs: bool, gradients: bool) -> float:
    """Special functions an element."""
    of_base = {"gelu": 1 + gradients, "silu": 2}.get(base, 0)
    return of_base + (2 + ((g + 1) // 2 + 1) // 2 if pairs else 2 * g)


def _work(tokens: int, width: int, *, specials: float, item: int, arrays: int) -> Work:
    return Work(specials=specials * tokens * width, bytes=float(item * arrays * tokens * width))
