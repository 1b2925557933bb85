"""KAT's rational on a GPU: one pass over u forward, and one for all gradients. Tiles, sums and launches: `triton_columns`.

    v = P(u)/Q(u),    P(u) = sum_{k=0..m} a_gk u^k,    Q(u) = 1 + sum_{k=1..n} b_gk |u|^k

    du = dv (P'(u) - v sign(u) Q'(|u|)) / Q        da_gk = sum dv u^k / Q        db_gk = -sum dv v |u|^k / Q
"""
import functools

import torch
import triton
import triton.language as tl

from vision_kan.kernels.triton_columns import (
    WARPS,
    ColumnsPlan,
    add_tile,
    choose_tile,
    first_tile,
    no_sums,
    row_total,
    store_total,
    tile_vectors,
)
from vision_kan.kernels.triton_common import AotCase, Device, Work, fast_reciprocal


# ---------------------------------------------------------------- kernels
@triton.jit
def _coefficients(c, group, mask, FIRST: tl.constexpr, END: tl.constexpr, G: tl.constexpr):
    own = ()
    for k in tl.static_range(FIRST, END):
        own = own + (tl.load(c + group * G + k, mask=mask, other=0.0),)
    return own


@triton.jit
def _polynomial(own, x, COUNT: tl.constexpr):
    """sum_k own[k] x^k, k < COUNT, by Horner's rule."""
    value = tl.zeros_like(x) + own[COUNT - 1]
    for k in tl.static_range(COUNT - 1):
        value = value * x + own[COUNT - 2 - k]
    return value


@triton.jit
def _slope(own, x, COUNT: tl.constexpr, FIRST: tl.constexpr):
    """The derivative of sum_k own[k] x^(k + FIRST), FIRST 0 or 1."""
    value = tl.zeros_like(x) + (COUNT - 1 + FIRST) * own[COUNT - 1]
    for k in tl.static_range(COUNT - 2 + FIRST):
        value = value * x + (COUNT - 2 - k + FIRST) * own[COUNT - 2 - k]
    return value


@triton.jit(do_not_specialize=["rows", "steps"])
def forward_kernel(u, c, v, rows, steps, vectors, per_group, G: tl.constexpr, ABOVE: tl.constexpr,
                   N: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, SHARED: tl.constexpr,
                   APPROX: tl.constexpr):
    """v. A program: LANES vectors wide, `steps` times UNROLL tiles of N/LANES rows high. ABOVE: the numerator's coefficients of
    a group's G."""
    ROWS: tl.constexpr = N // LANES
    row, vector, there, group = tile_vectors(vectors, per_group, N, LANES, VEC, SHARED)
    above = _coefficients(c, group, there[:, None], 0, ABOVE, G)
    below = _coefficients(c, group, there[:, None], ABOVE, G, G)
    start, offset, left = first_tile(rows, steps, row, vector, vectors, N, LANES, VEC, UNROLL)
    u += start
    v += start
    for _ in range(steps):
        for part in tl.static_range(UNROLL):
            mask = ((left > part * ROWS) & there)[:, None]
            at = offset + part * ROWS * vectors * VEC
            x = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
            size = tl.abs(x)
            r = fast_reciprocal(1.0 + size * _polynomial(below, size, G - ABOVE), APPROX)
            tl.store(v + at, (_polynomial(above, x, ABOVE) * r).to(v.dtype.element_ty), mask=mask)
        u += vectors * (VEC * ROWS * UNROLL)
        v += vectors * (VEC * ROWS * UNROLL)
        left -= ROWS * UNROLL


@triton.jit(do_not_specialize=["rows", "steps"])
def backward_kernel(dv, u, c, du, partial, rows, steps, vectors, per_group, G: tl.constexpr, ABOVE: tl.constexpr,
                    N: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, SHARED: tl.constexpr,
                    APPROX: tl.constexpr):
    """du, and partial[program, k, vector or column]: the sums over the program's rows for dC[., k]."""
    ROWS: tl.constexpr = N // LANES
    row, vector, there, group = tile_vectors(vectors, per_group, N, LANES, VEC, SHARED)
    above = _coefficients(c, group, there[:, None], 0, ABOVE, G)
    below = _coefficients(c, group, there[:, None], ABOVE, G, G)
    sums = no_sums(G, N, VEC, SHARED)
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
            size = tl.abs(x)
            r = fast_reciprocal(1.0 + size * _polynomial(below, size, G - ABOVE), APPROX)
            v = _polynomial(above, x, ABOVE) * r
            power = g * r                                                   # times u^k, k = 0 .. m
            falls = v * _slope(below, size, G - ABOVE, 1)
            falls = tl.where(x > 0.0, falls, tl.where(x < 0.0, -falls, 0.0))
            d = power * (_slope(above, x, ABOVE, 0) - falls)
            tl.store(du + at, d.to(du.dtype.element_ty), mask=mask)
            lower = -power * v                                              # times |u|^k, k = 1 .. n
            shares = ()
            for _k in tl.static_range(ABOVE):
                shares = shares + (power,)
                power = power * x
            for _k in tl.static_range(G - ABOVE):
                lower = lower * size
                shares = shares + (lower,)
            sums = add_tile(sums, shares, G, N, VEC, SHARED)
        dv += vectors * (VEC * ROWS * UNROLL)
        u += vectors * (VEC * ROWS * UNROLL)
        du += vectors * (VEC * ROWS * UNROLL)
        left -= ROWS * UNROLL
    for k in tl.static_range(G):
        store_total(partial, row_total(sums[k], N, LANES, VEC, SHARED), k, vectors, G, LANES, VEC, SHARED)


# ---------------------------------------------------------------- launches
class Plan(ColumnsPlan):
    """The op and its gradients, computed in float32, for one size and device.

    Args:
        dtype, shape, where: of u [..., C]: float32, float16 or bfloat16; its device.
        coefficients: their shape [groups, m + 1 + n]. degree: m.
    Raises: ValueError as `ColumnsPlan`.
    """

    def __init__(self, dtype: torch.dtype, shape: torch.Size, where: torch.device, coefficients: torch.Size, degree: int):
        super().__init__(dtype, shape, where, coefficients, False, (forward_kernel, backward_kernel),
                         {"G": coefficients[1], "ABOVE": degree + 1}, wide=True)


# ---------------------------------------------------------------- ahead of time
def aot_cases(device: Device) -> list[AotCase]:
    """The cases to compile: KAT's degrees, each size of element, and a function for each channel. The sums are added by
    `rswaf_activation`'s last kernel."""
    cases = []
    for dtype, per_group in (("bf16", 96), ("fp32", 96), ("bf16", 4), ("bf16", 1)):
        item = 4 if dtype == "fp32" else 2
        tile = choose_tile(device, item, 8 * per_group, 8)
        words = f"{dtype} 5/4 {tile['N']}x{tile['VEC']}{'' if tile['SHARED'] else ' each'}"
        sizes = {"rows": "i32", "steps": "i32", "vectors": "i32", "per_group": "i32"}
        for name, kernel, others in (("forward", forward_kernel, ("v",)), ("backward", backward_kernel, ("dv", "du"))):
            signature = {tensor: f"*{dtype}" for tensor in ("u", *others)} | {"c": "*fp32"}
            cases.append(AotCase(
                f"rational.{name}", words, kernel, signature | ({"partial": "*fp32"} if name == "backward" else {}) | sizes,
                {"G": 10, "ABOVE": 6, "APPROX": device.approx, **tile}, num_warps=WARPS, num_stages=1,
                quick=dtype == "bf16" and per_group == 96, vector=int(tile["VEC"]) * item,
                work=functools.partial(_work, item=item, arrays=1 + len(others))))
    return cases


def _work(tokens: int, width: int, *, item: int, arrays: int) -> Work:
    return Work(specials=float(tokens * width), bytes=float(item * arrays * tokens * width))
