"""The full-edge FasterKAN layer in Triton: y = W vec(B(u)), with the basis computed inside its matrix product.

    y[t, o]  = sum_{i,k} W[o, i*G + k] B_k(u[t, i])             forward
    du[t, i] = sum_k (dy W)[t, (i, k)] dB_k/du(u[t, i])         backward_u
    dW[o, i*G + k] = sum_t dy[t, o] B_k(u[t, i])                backward_weight

Shapes: T tokens, I inputs, O outputs, G grid points, GP the next power of two.

Each is one matrix product with (k, i) as one axis, k first: so the threads that hold an input's values hold them for
all points, and one exponential serves them all. That order, zeros for the points G..GP-1 and zeros for the inputs and
outputs that fill up a tile are made once per call in a packed copy of the weight, [GP, IP, OP]; the products need no
masks for it.

Where 16-bit products are large another form is faster: the basis is written to memory once, a chunk of tokens at a time,
and cuBLAS multiplies (`is_written` chooses). Backward

    V = dy W,    du[t, i] = sum_k V[t, (i, k)] dB_k/du(u[t, i]),    dW = dy^T B

one pass over V gives du and leaves B in V's place.

Tiles are chosen by a count of work alone, so a call's result depends on nothing but its arguments and the device; no
atomics. Basis, sums and derivatives are float32; what enters a product is rounded to the product's dtype.
"""
# ruff: noqa: E741      I and O are the shapes' names
import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_kan.kernels.basis import MAX_POINTS
from vision_kan.kernels.triton_common import (
    SCALE,
    AotCase,
    Device,
    Work,
    device_of,
    fast_exp2,
    fast_reciprocal,
    grid_middle,
    load_width,
)

# ---------------------------------------------------------------- the basis inside a kernel
# A table of grid and width for the kernels, float32: 2 log2(e)/h, the middle, 2/h, 1/h, then g, p, q, [GP] each. It is loaded as
# blocks in the layout of their use, because a layout change of anything computed from a scalar would stay in the loop, through
# shared memory with barriers.
HEAD = tl.constexpr(4)


@triton.jit
def _write_table(grid, h, table, G: tl.constexpr, GP: tl.constexpr, H_TENSOR: tl.constexpr):
    width = load_width(h, H_TENSOR)
    middle = grid_middle(grid, G)
    scale = SCALE / width
    k = tl.arange(0, GP)
    # padding repeats the last point: it must not overflow, for its weight of zero would turn infinity into NaN
    g = tl.load(grid + tl.minimum(k, G - 1)).to(tl.float32)
    tl.store(table, scale)
    tl.store(table + 1, middle)
    tl.store(table + 2, 2.0 / width)
    tl.store(table + 3, 1.0 / width)
    tl.store(table + HEAD + k, g)
    tl.store(table + (HEAD + GP) + k, 0.25 * tl.exp2((middle - g) * scale))
    tl.store(table + (HEAD + 2 * GP) + k, 0.25 * tl.exp2((g - middle) * scale))


@triton.jit
def _row(table, ROW: tl.constexpr, GP: tl.constexpr):
    """g, p or q, [GP, 1, 1]."""
    return tl.load(table + (HEAD + ROW * GP) + tl.arange(0, GP))[:, None, None]


@triton.jit
def _exponentials(u, table, APPROX: tl.constexpr):
    """E and 1/E of the D form, in u's shape [M, N]."""
    one = tl.zeros((1, 1), tl.int32)
    z = (u.to(tl.float32) - tl.load(table + 1 + one)) * tl.load(table + one)
    # a NaN must not come out of the clamp as a number
    z = tl.maximum(z, -60.0, propagate_nan=tl.PropagateNan.ALL)
    z = tl.minimum(z, 60.0, propagate_nan=tl.PropagateNan.ALL)
    return fast_exp2(z, APPROX), fast_exp2(-z, APPROX)


@triton.jit
def _one_point(u, table, GP: tl.constexpr, APPROX: tl.constexpr, PURE: tl.constexpr):
    """x = 2 log2(e) (u - g_k)/h, e = 2^-|x| and 1/(1 + e), u [M, N] -> [GP, M, N]."""
    one = tl.zeros((1, 1, 1), tl.int32)
    x = (u.to(tl.float32)[None, :, :] - _row(table, 0, GP)) * tl.load(table + one)
    e = fast_exp2(-tl.abs(x), APPROX)
    return x, e, fast_reciprocal(1.0 + e, APPROX, PURE)


@triton.jit
def _values(u, table, GP: tl.constexpr, SINGLE_EXP: tl.constexpr, APPROX: tl.constexpr, PURE: tl.constexpr):
    """B_k(u), u [M, N] -> [M, GP * N]."""
    u = tl.trans(u)
    if SINGLE_EXP:
        e, inverse = _exponentials(u, table, APPROX)
        d = _row(table, 1, GP) * e[None, :, :] + (_row(table, 2, GP) * inverse[None, :, :] + 0.5)
        b = fast_reciprocal(d, APPROX, PURE)
    else:
        _, e, r = _one_point(u, table, GP, APPROX, PURE)
        b = (4.0 * e * r) * r
    # computed with the points outermost, which Triton's layouts then keep inside one thread
    return tl.trans(tl.reshape(b, (GP * u.shape[0], u.shape[1])))


@triton.jit
def _slopes(u, table, GP: tl.constexpr, SINGLE_EXP: tl.constexpr, APPROX: tl.constexpr):
    """h/2 dB_k/du, u [M, N] -> [M, GP, N]."""
    if SINGLE_EXP:
        e, inverse = _exponentials(u, table, APPROX)
        pe = _row(table, 1, GP) * e[None, :, :]
        qe = _row(table, 2, GP) * inverse[None, :, :]
        r = fast_reciprocal(pe + qe + 0.5, APPROX)
        slope = ((qe - pe) * r) * r
    else:
        x, e, r = _one_point(u, table, GP, APPROX, True)
        slope = (4.0 * e * r) * r * ((1.0 - e) * r)
        slope = tl.where(x > 0, -slope, slope)
    return tl.permute(slope, (1, 0, 2))


# ---------------------------------------------------------------- kernels
@triton.jit
def table_kernel(grid, h, table, G: tl.constexpr, GP: tl.constexpr, H_TENSOR: tl.constexpr):
    _write_table(grid, h, table, G, GP, H_TENSOR)


@triton.jit
def pack_kernel(w_p, grid, h, out_p, table, I, IP, O, OP, G: tl.constexpr, GP: tl.constexpr, BO: tl.constexpr,
                BN: tl.constexpr, H_TENSOR: tl.constexpr):
    """W [O, I*G] -> [GP, IP, OP], zeros outside; and the table, to save a launch."""
    pid = tl.program_id(0)
    if pid == 0:
        _write_table(grid, h, table, G, GP, H_TENSOR)
    blocks = tl.cdiv(OP, BO)
    o = pid % blocks * BO + tl.arange(0, BO)
    n = pid // blocks * BN + tl.arange(0, BN)           # i*GP + k: contiguous in W where GP = G
    i = n // GP
    k = n % GP
    w = tl.load(w_p + o[:, None].to(tl.int64) * (I * G) + (i * G + k)[None, :],
                mask=(o < O)[:, None] & ((i < I) & (k < G))[None, :], other=0.0)
    tl.store(out_p + (k * IP + i)[:, None].to(tl.int64) * OP + o[None, :], tl.trans(w),
             mask=(i < IP)[:, None] & (o < OP)[None, :])


@triton.jit
def sum_kernel(part_p, out_p, S, I, O, G: tl.constexpr, BN: tl.constexpr):
    """[S, O, G, I] -> [O, I*G], summed over S in order. A block: BN elements."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    size = tl.cast(O, tl.int64) * I * G
    mask = at < size
    n = at % (I * G)                                    # i*G + k
    part = part_p + (at - n + n % G * I + n // G)
    total = tl.zeros((BN,), tl.float32)
    for _ in range(S):
        total += tl.load(part, mask=mask, other=0.0)
        part += size
    tl.store(out_p + at, total, mask=mask)


@triton.jit
def forward_kernel(u_p, w_p, table, y_p, T, I, IP, O, OP, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, PARTS: tl.constexpr, BI: tl.constexpr, SINGLE_EXP: tl.constexpr,
                   APPROX: tl.constexpr, PURE: tl.constexpr, PRECISION: tl.constexpr):
    """u [T, I], w [GP, IP, OP] -> y [T, O]. A block: BM tokens, PARTS * BN outputs from one basis value, BI inputs
    with all their points a step."""
    pid = tl.program_id(0)
    columns = tl.cdiv(O, BN * PARTS)
    t = pid // columns * BM + tl.arange(0, BM)
    o = pid % columns * (BN * PARTS) + tl.arange(0, BN)
    i = tl.arange(0, BI)
    n = tl.arange(0, GP * BI)
    in_t = (t < T)[:, None]
    u_at = u_p + t[:, None].to(tl.int64) * I + i[None, :]
    w_at = w_p + (n // BI * IP + n % BI)[:, None] * OP + o[None, :]
    acc0 = tl.zeros((BM, BN), tl.float32)
    acc1 = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN), tl.float32)
    for i0 in range(0, I, BI):
        u = tl.load(u_at + i0, mask=in_t & (i0 + i < I)[None, :], other=0.0)
        a = _values(u, table, GP, SINGLE_EXP, APPROX, PURE).to(w_p.dtype.element_ty)
        w = w_at + i0 * OP
        acc0 = tl.dot(a, tl.load(w), acc0, input_precision=PRECISION)
        if PARTS > 1:
            acc1 = tl.dot(a, tl.load(w + BN), acc1, input_precision=PRECISION)
        if PARTS > 2:
            acc2 = tl.dot(a, tl.load(w + 2 * BN), acc2, input_precision=PRECISION)
    y_at = y_p + t[:, None].to(tl.int64) * O + o[None, :]
    tl.store(y_at, acc0.to(y_p.dtype.element_ty), mask=in_t & (o < O)[None, :])
    if PARTS > 1:
        tl.store(y_at + BN, acc1.to(y_p.dtype.element_ty), mask=in_t & (o + BN < O)[None, :])
    if PARTS > 2:
        tl.store(y_at + 2 * BN, acc2.to(y_p.dtype.element_ty), mask=in_t & (o + 2 * BN < O)[None, :])


@triton.jit
def backward_u_kernel(dy_p, u_p, w_p, table, out_p, T, I, IP, O, OP, G: tl.constexpr, GP: tl.constexpr,
                      BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, TO_GRID: tl.constexpr,
                      SINGLE_EXP: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr):
    """dy [T, O], u [T, I], w [GP, IP, OP] -> du [T, I]: the product dy W, its columns (k, i), then the slopes.

    TO_GRID: out [blocks, 2, GP] instead, a block's sums of dL/dB_k dB_k/du and of the same times (u - g_k)/h."""
    pid = tl.program_id(0)
    columns = tl.cdiv(I, BI)
    i0 = pid % columns * BI
    t = pid // columns * BM + tl.arange(0, BM)
    o = tl.arange(0, BO)
    n = tl.arange(0, GP * BI)
    in_t = (t < T)[:, None]
    dy_at = dy_p + t[:, None].to(tl.int64) * O + o[None, :]
    w_at = w_p + (n // BI * IP + i0 + n % BI)[None, :] * OP + o[:, None]
    acc = tl.zeros((BM, GP * BI), tl.float32)
    for o0 in range(0, O, BO):
        dy = tl.load(dy_at + o0, mask=in_t & (o0 + o < O)[None, :], other=0.0)
        acc = tl.dot(dy, tl.load(w_at + o0), acc, input_precision=PRECISION)
    i = i0 + tl.arange(0, BI)
    at = t[:, None].to(tl.int64) * I + i[None, :]
    inside = in_t & (i < I)[None, :]
    u = tl.load(u_p + at, mask=inside, other=0.0)
    slope = _slopes(u, table, GP, SINGLE_EXP, APPROX) * tl.reshape(acc, (BM, GP, BI))
    if TO_GRID:
        slope *= tl.load(table + 2)
        distance = (u.to(tl.float32)[:, None, :] - tl.permute(_row(table, 0, GP), (1, 0, 2))) * tl.load(table + 3)
        k = tl.arange(0, GP)
        out = out_p + pid.to(tl.int64) * (2 * GP) + k
        tl.store(out, tl.sum(tl.sum(slope, 2), 0))
        tl.store(out + GP, tl.sum(tl.sum(slope * distance, 2), 0))
    else:
        tl.store(out_p + at, (tl.sum(slope, 1) * tl.load(table + 2)).to(out_p.dtype.element_ty), mask=inside)


@triton.jit
def backward_weight_kernel(dy_p, u_p, table, part_p, T, STEPS, I, O, G: tl.constexpr, GP: tl.constexpr,
                           BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, SINGLE_EXP: tl.constexpr,
                           APPROX: tl.constexpr, PURE: tl.constexpr, PRECISION: tl.constexpr):
    """dy [T, O], u [T, I] -> part [S, O, G, I] float32, each over STEPS * BT tokens. A block: BO outputs, BI inputs
    with all their points, BT tokens a step."""
    pid = tl.program_id(0)
    columns = tl.cdiv(I, BI)
    blocks = columns * tl.cdiv(O, BO)
    split = pid // blocks
    i0 = pid % columns * BI
    i = i0 + tl.arange(0, BI)
    o = pid % blocks // columns * BO + tl.arange(0, BO)
    acc = tl.zeros((BO, GP * BI), tl.float32)
    for step in range(STEPS):
        t = (split * STEPS + step) * BT + tl.arange(0, BT)
        in_t = (t < T)[:, None]
        u = tl.load(u_p + t[:, None].to(tl.int64) * I + i[None, :], mask=in_t & (i < I)[None, :], other=0.0)
        dy = tl.load(dy_p + t[:, None].to(tl.int64) * O + o[None, :], mask=in_t & (o < O)[None, :], other=0.0)
        b = _values(u, table, GP, SINGLE_EXP, APPROX, PURE).to(dy_p.dtype.element_ty)
        acc = tl.dot(tl.trans(dy), b, acc, input_precision=PRECISION)
    n = tl.arange(0, GP * BI)
    k = n // BI
    i = i0 + n % BI
    part = part_p + ((split * O + o)[:, None].to(tl.int64) * G + k[None, :]) * I + i[None, :]
    tl.store(part, acc, mask=(o < O)[:, None] & ((k < G) & (i < I))[None, :])


# The basis written to memory, with columns in the weight's order i*G + k, so that nothing has to be packed. A tile [N, GP] has an
# input with all its points for each thread: 16 bytes at a time for 8 points in 16 bits. With more inputs in a tile, Triton would
# load them in another layout than it stores the basis, and change layouts through shared memory.
@triton.jit
def _terms(u, table, p, q, APPROX: tl.constexpr):
    """p_k E and q_k/E [N, GP] of inputs u [N, 1]."""
    e, inverse = _exponentials(u, table, APPROX)
    return p * e, q * inverse


@triton.jit(do_not_specialize=["size"])
def basis_kernel(u_p, table, out_p, size, G: tl.constexpr, GP: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
                 APPROX: tl.constexpr):
    """u [size] -> B [size, G]. A block: PARTS times N inputs."""
    first = tl.program_id(0).to(tl.int64) * (N * PARTS) + tl.arange(0, N)[:, None]
    k = tl.arange(0, GP)[None, :]
    p, q = tl.load(table + (HEAD + GP) + k), tl.load(table + (HEAD + 2 * GP) + k)
    for part in tl.static_range(PARTS):
        n = first + part * N
        u = tl.load(u_p + n, mask=n < size, other=0.0)
        pe, qe = _terms(u, table, p, q, APPROX)
        b = fast_reciprocal(pe + qe + 0.5, APPROX)
        tl.store(out_p + n * G + k, b.to(out_p.dtype.element_ty), mask=(n < size) & (k < G))


@triton.jit(do_not_specialize=["size"])
def pull_kernel(v_p, u_p, table, du_p, size, G: tl.constexpr, GP: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
                APPROX: tl.constexpr):
    """V [size, G]: dL/dB in, B out; du [size] = sum_k dL/dB_k dB_k/du. A block: PARTS times N inputs."""
    first = tl.program_id(0).to(tl.int64) * (N * PARTS) + tl.arange(0, N)[:, None]
    k = tl.arange(0, GP)[None, :]
    p, q = tl.load(table + (HEAD + GP) + k), tl.load(table + (HEAD + 2 * GP) + k)
    per_h = tl.load(table + 2)
    for part in tl.static_range(PARTS):
        n = first + part * N
        u = tl.load(u_p + n, mask=n < size, other=0.0)
        at, mask = v_p + n * G + k, (n < size) & (k < G)
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        pe, qe = _terms(u, table, p, q, APPROX)
        b = fast_reciprocal(pe + qe + 0.5, APPROX)
        tl.store(at, b.to(v_p.dtype.element_ty), mask=mask)
        slope = tl.sum(v * ((qe - pe) * (b * b)), 1, keep_dims=True) * per_h
        tl.store(du_p + n, slope.to(du_p.dtype.element_ty), mask=n < size)


# ---------------------------------------------------------------- tiles
@dataclass(frozen=True)
class Tile:
    """A block's product, [m, k] @ [k, n], in `parts` products of n/parts columns each.

    forward: m tokens, n outputs, k = points * inputs. backward_u: m tokens, n = points * inputs, k outputs.
    backward_weight: m outputs, n = points * inputs, k tokens. The number of inputs is n / points (k / points in `forward`).
    pure: let Triton repeat the basis in every thread that reads it (see `fast_reciprocal`): right where the warps of a
    warpgroup's product split only its rows."""
    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    pure: bool = False

    def shared(self, itemsize: int, family: str) -> int:
        """Bytes of shared memory, an upper bound: both operands in every stage. `benchmarks/aot.py` checks it."""
        return (self.stages - (family == "mma")) * self.k * (self.m + self.n) * itemsize


# Tiles by op, kind of product and family of matrix instructions; the small tile at the end is for few tokens or few outputs.
# All compile without spills and without serialised products: `python benchmarks/aot.py`.
TILES: dict[tuple[str, str], list[Tile]] = {
    ("forward", "wgmma"): [Tile(128, 256, 64, 8, 3, pure=True), Tile(128, 128, 64, 8, 3, pure=True),
                           Tile(64, 128, 64, 4, 3, pure=True)],
    ("forward", "mma"): [Tile(128, 256, 64, 8, 3), Tile(128, 192, 64, 8, 3, parts=3), Tile(128, 128, 64, 8, 3),
                         Tile(64, 64, 64, 4, 3)],
    ("forward", "tcgen05"): [Tile(128, 128, 64, 8, 3, pure=True), Tile(64, 64, 64, 4, 3, pure=True)],
    ("forward", "mfma"): [Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)],
    ("forward", "float"): [Tile(64, 64, 32, 8, 2)],
    ("forward", "tf32"): [Tile(128, 128, 32, 8, 3, pure=True)],
    ("backward_u", "wgmma"): [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)],
    ("backward_u", "mma"): [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)],
    ("backward_u", "tcgen05"): [Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)],
    ("backward_u", "mfma"): [Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)],
    ("backward_u", "float"): [Tile(64, 64, 32, 8, 2)],
    ("backward_weight", "wgmma"): [Tile(256, 128, 64, 8, 3, pure=True), Tile(128, 128, 64, 8, 3, pure=True),
                                   Tile(64, 64, 64, 4, 3, pure=True)],
    ("backward_weight", "mma"): [Tile(128, 128, 64, 8, 3, pure=True), Tile(64, 64, 64, 4, 3, pure=True)],
    ("backward_weight", "tcgen05"): [Tile(128, 64, 64, 4, 3, pure=True), Tile(64, 128, 64, 8, 3, pure=True)],
    ("backward_weight", "mfma"): [Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)],
    ("backward_weight", "float"): [Tile(64, 64, 32, 8, 2)],
}
# Before 3.6 Triton keeps too much of the widest two `mma` tiles in registers (compiled with 3.3).
SPILLS_WIDE = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
# Columns at which the matrix unit takes as long as the special functions for the basis: narrower tiles are not faster.
BALANCE = {"wgmma": 160, "tcgen05": 160}
BALANCE_OTHER = 128
# For benchmarks: op -> the tile to use, whatever its cost.
forced: dict[str, Tile] = {}


def tiles(op: str, device: Device, kind: str) -> list[Tile]:
    """The candidates of an op ("forward", "backward_u", "backward_weight", "backward_grid") on a device.

    kind: "half" (16-bit products), "tf32" or "float" (products in full float32)."""
    if op == "backward_grid":
        return [Tile(64, 64, 64, 4, 2) if kind == "half" else Tile(64, 64, 32, 8, 2)]
    if kind != "half":
        return TILES[op, "tf32" if kind == "tf32" and (op, "tf32") in TILES else "float"]
    return [tile for tile in TILES[op, device.family] if tile.shared(2, device.family) <= device.shared
            and not (SPILLS_WIDE and (op, device.family) == ("forward", "mma") and tile.n > 128)]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded_points(points: int) -> int:
    return 1 << max(0, points - 1).bit_length()


@functools.lru_cache(4096)
def choose(op: str, device: Device, kind: str, tokens: int, inputs: int, outputs: int, points: int) -> tuple[Tile, int]:
    """The candidate with the least work on the busiest processor, the first of equals; and the number of parts into which the
    tokens of `backward_weight` are split (1 for other ops)."""
    padded = _padded_points(points)
    best: Any = None
    best_cost = None
    for tile in [forced[op]] if op in forced else tiles(op, device, kind):
        if op == "forward":
            blocks = _cdiv(tokens, tile.m) * _cdiv(outputs, tile.n)
            splits = [(1, tile.m * max(tile.n, BALANCE.get(device.family, BALANCE_OTHER)))]
        elif op == "backward_weight":
            # k tokens cost a block m n k multiplications; each split writes and reads m n sums more, at a memory rate
            # that is worth about 64 of them each
            blocks = _cdiv(outputs, tile.m) * _cdiv(inputs, tile.n // padded)
            rows = max(tile.m, BALANCE.get(device.family, BALANCE_OTHER))
            splits = [(s, rows * tile.n * (_cdiv(_cdiv(tokens, tile.k), s) * tile.k + 64))
                      for s in range(1, min(64, _cdiv(tokens, tile.k)) + 1)]
        else:
            blocks = _cdiv(tokens, tile.m) * _cdiv(inputs, tile.n // padded)
            splits = [(1, tile.m * tile.n)]
        for split, work in splits:
            cost = _cdiv(blocks * split, device.processors) * work
            if best_cost is None or cost < best_cost:
                best, best_cost = (tile, split), cost
    return best


# ---------------------------------------------------------------- fused, or the basis written
# Measured on one H200, 25,216 tokens, bf16, d inputs and outputs, microseconds fused / written: forward 65 / 67 at d = 192,
# 153 / 154 at 384, 520 / 452 at 768; with backward 226 / 208, 725 / 481, 2188 / 1343. A chunk of tokens is as large as
# memory allows, because smaller ones cost more: 310 MB hold all tokens of the last. These stay fused: few outputs, for which
# writing the basis costs more than the product; float32, which would write twice as much; trained grids. (Triton 3.6 computes the
# basis for a fused dW twice: 96 special functions per step where 3.8 takes 40.)
WRITTEN_FORWARD_OUTPUTS, WRITTEN_BACKWARD_OUTPUTS = 385, 192
WRITTEN_BYTES = 2 ** 29         # of one chunk's basis, and no more than this share of a device's memory
WRITTEN_SHARE = 32
WRITTEN_INPUTS, WRITTEN_WARPS = 512, 4      # of a block
LEAST_TOKENS = 256


def is_written(device: Device, dtype: torch.dtype, outputs: int, h: float | Tensor, single_exp: bool, backward: bool) -> bool:
    """Whether the basis is written to memory, which is faster for some sizes."""
    least = WRITTEN_BACKWARD_OUTPUTS if backward else WRITTEN_FORWARD_OUTPUTS
    return _kind(dtype, device) == "half" and outputs >= least and single_exp and not isinstance(h, Tensor)


def _written_block(device: Device, points: int) -> dict[str, Any]:
    """Constexprs and warps of the two kernels."""
    inputs = (64 if device.backend == "hip" else 32) * WRITTEN_WARPS
    return {"G": points, "GP": _padded_points(points), "N": inputs, "PARTS": max(1, WRITTEN_INPUTS // inputs),
            "APPROX": device.approx}


def _row_chunks(device: Device, tokens: int, columns: int, itemsize: int) -> list[slice]:
    limit = min(WRITTEN_BYTES, device.memory // WRITTEN_SHARE)
    step = max(LEAST_TOKENS, limit // (columns * itemsize))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _written_forward(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, y: Tensor) -> Tensor:
    device, points = device_of(u), grid.numel()
    block = _written_block(device, points)
    with _guard(u):
        table = _table(grid, h, points)
        for rows in _row_chunks(device, len(u), weight.shape[1], weight.element_size()):
            part = u[rows]
            basis = _empty(len(part), weight.shape[1], dtype=weight.dtype, device=u.device)
            basis_kernel[(_cdiv(part.numel(), block["N"] * block["PARTS"]),)](
                part, table, basis, part.numel(), **block, num_warps=WRITTEN_WARPS)
            torch.mm(basis, weight.t(), out=y[rows])
    return y


def _written_backward(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor) -> tuple[Tensor, Tensor]:
    """du [T, I] in u's dtype, dW [O, I*G] float32."""
    device, points = device_of(u), grid.numel()
    block = _written_block(device, points)
    du = _empty(*u.shape, dtype=u.dtype, device=u.device)
    dw: Tensor | None = None
    with _guard(u):
        table = _table(grid, h, points)
        for rows in _row_chunks(device, len(u), weight.shape[1], weight.element_size()):
            part, values = u[rows], dy[rows] @ weight
            pull_kernel[(_cdiv(part.numel(), block["N"] * block["PARTS"]),)](
                values, part, table, du[rows], part.numel(), **block, num_warps=WRITTEN_WARPS)
            new = _product_float32(dy[rows].t(), values)
            dw = new if dw is None else dw.add_(new)
    return du, weight.new_zeros(weight.shape, dtype=torch.float32) if dw is None else dw


def _product_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit matrices, summed in float32, and returned in it where PyTorch can: on NVIDIA's GPUs."""
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32) if torch.version.cuda else (a @ b).float()


# ---------------------------------------------------------------- launchers
def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for a kernel to fill. All come from here, so that tests can fill them with NaN."""
    return torch.empty(*shape, dtype=dtype, device=device)         # PyTorch reads numbers faster than a tuple of them


def _guard(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _kind(dtype: torch.dtype, device: Device) -> str:
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    if dtype != torch.float32:
        raise TypeError(f"the Triton kernels multiply in float16, bfloat16 or float32, not {dtype}")
    return "tf32" if device.backend == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "float"


def _precision(op: str, kind: str, device: Device) -> str:
    # fifth-generation tensor cores read no transposed TF32 operand: Triton 3.8 fails to compile it
    refused = op == "backward_weight" and device.family == "tcgen05"
    return "tf32" if kind == "tf32" and not refused else "ieee"


def _width(h: float | Tensor) -> dict:
    return {"h": h if isinstance(h, Tensor) else float(h), "H_TENSOR": isinstance(h, Tensor)}


def _table(grid: Tensor, h: float | Tensor, points: int) -> Tensor:
    """The table of grid and width, by a launch of its own."""
    padded = _padded_points(points)
    table = _empty(HEAD.value + 3 * padded, dtype=torch.float32, device=grid.device)
    table_kernel[(1,)](grid, table=table, G=points, GP=padded, **_width(h), num_warps=1)
    return table


PACK_OUTPUTS, PACK_COLUMNS, SUM_BLOCK = 64, 64, 1024


def _pack(weight: Tensor, grid: Tensor, h: float | Tensor, inputs_to: int, outputs_to: int) -> tuple[Tensor, Tensor]:
    """W [O, I*G] as [GP, IP, OP], IP and OP the next multiples of the last arguments; and the table."""
    points, padded = grid.numel(), _padded_points(grid.numel())
    outputs, inputs = weight.shape[0], weight.shape[1] // points
    rows, columns = _cdiv(inputs, inputs_to) * inputs_to, _cdiv(outputs, outputs_to) * outputs_to
    if padded * rows * columns >= 2 ** 31:
        raise ValueError(f"a weight of {tuple(weight.shape)} is beyond the kernels' 32-bit offsets")
    packed = _empty(padded, rows, columns, dtype=weight.dtype, device=weight.device)
    table = _empty(HEAD.value + 3 * padded, dtype=torch.float32, device=weight.device)
    blocks = _cdiv(columns, PACK_OUTPUTS) * _cdiv(padded * rows, PACK_COLUMNS)
    pack_kernel[(blocks,)](weight, grid, out_p=packed, table=table, I=inputs, IP=rows, O=outputs, OP=columns, G=points,
                           GP=padded, BO=PACK_OUTPUTS, BN=PACK_COLUMNS, **_width(h), num_warps=4)
    return packed, table


def _check_grid(grid: Tensor) -> tuple[int, int]:
    if not 1 <= grid.numel() <= MAX_POINTS:
        raise ValueError(f"the Triton kernels take up to {MAX_POINTS} grid points, got {grid.numel()}")
    return grid.numel(), _padded_points(grid.numel())


def forward(u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool) -> Tensor:
    """u [T, I], weight [O, I*G] in the product's dtype, grid [G], h a number or a 0-d tensor -> y [T, O] in weight's
    dtype. All contiguous."""
    (tokens, inputs), outputs, device = u.shape, weight.shape[0], device_of(u)
    points, padded = _check_grid(grid)
    kind = _kind(weight.dtype, device)
    y = _empty(tokens, outputs, dtype=weight.dtype, device=u.device)
    if y.numel() == 0:
        return y
    if inputs and is_written(device, weight.dtype, outputs, h, single_exp, backward=False):
        return _written_forward(u, weight, grid, h, y)
    tile, _ = choose("forward", device, kind, tokens, inputs, outputs, points)
    depth = tile.k // padded
    with _guard(u):
        packed, table = _pack(weight, grid, h, max(16, depth), tile.n)
        blocks = _cdiv(tokens, tile.m) * _cdiv(outputs, tile.n)
        forward_kernel[(blocks,)](
            u, packed, table, y, tokens, inputs, packed.shape[1], outputs, packed.shape[2], G=points, GP=padded,
            BM=tile.m, BN=tile.n // tile.parts, PARTS=tile.parts, BI=depth, SINGLE_EXP=single_exp,
            APPROX=device.approx, PURE=tile.pure, PRECISION=_precision("forward", kind, device), num_warps=tile.warps,
            num_stages=tile.stages)
    return y


def backward(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool, need_u: bool,
             need_weight: bool) -> tuple[Tensor | None, Tensor | None]:
    """dy [T, O], the rest as in `forward` -> du [T, I] in u's dtype and dW [O, I*G] float32, None if not needed. The bits are the
    same on every run."""
    if need_u and need_weight and u.numel() and is_written(device_of(u), weight.dtype, len(weight), h, single_exp, backward=True):
        _check_grid(grid)
        return _written_backward(dy.to(weight.dtype), u, weight, grid, h)
    return (backward_u(dy, u, weight, grid, h, single_exp) if need_u else None,
            backward_weight(dy, u, weight, grid, h, single_exp) if need_weight else None)


def _backward_u(op: str, dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor,
                single_exp: bool) -> Tensor:
    """du [T, I]; for the op "backward_grid" the blocks' sums [blocks, 2, GP]."""
    (tokens, inputs), outputs, device = u.shape, weight.shape[0], device_of(u)
    points, padded = _check_grid(grid)
    kind, to_grid, dy = _kind(weight.dtype, device), op == "backward_grid", dy.to(weight.dtype)
    if u.numel() == 0:
        return u.new_zeros(1, 2, padded, dtype=torch.float32) if to_grid else _empty(
            tokens, inputs, dtype=u.dtype, device=u.device)
    tile, _ = choose(op, device, kind, tokens, inputs, outputs, points)
    width = tile.n // padded
    blocks = _cdiv(tokens, tile.m) * _cdiv(inputs, width)
    with _guard(u):
        packed, table = _pack(weight, grid, h, max(16, width), max(16, tile.k))
        out = (_empty(blocks, 2, padded, dtype=torch.float32, device=u.device) if to_grid
               else _empty(tokens, inputs, dtype=u.dtype, device=u.device))
        backward_u_kernel[(blocks,)](
            dy, u, packed, table, out, tokens, inputs, packed.shape[1], outputs, packed.shape[2], G=points, GP=padded,
            BM=tile.m, BI=width, BO=tile.k, TO_GRID=to_grid, SINGLE_EXP=single_exp, APPROX=device.approx,
            PRECISION=_precision(op, kind, device), num_warps=tile.warps, num_stages=tile.stages)
    return out


def backward_u(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, single_exp: bool) -> Tensor:
    """dy [T, O], the rest as in `forward` -> du [T, I] in u's dtype."""
    return _backward_u("backward_u", dy, u, weight, grid, h, single_exp)


def backward_weight(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor,
                    single_exp: bool) -> Tensor:
    """dy [T, O], u [T, I] -> dW [O, I*G] float32. weight: only its dtype counts, which the product takes."""
    dy = dy.to(weight.dtype)
    (tokens, inputs), outputs, device = u.shape, dy.shape[1], device_of(u)
    points, padded = _check_grid(grid)
    kind = _kind(dy.dtype, device)
    if tokens * inputs * outputs == 0:
        return u.new_zeros(outputs, inputs * points, dtype=torch.float32)
    tile, splits = choose("backward_weight", device, kind, tokens, inputs, outputs, points)
    steps, width = _cdiv(_cdiv(tokens, tile.k), splits), tile.n // padded
    splits = _cdiv(tokens, steps * tile.k)              # none without tokens
    with _guard(u):
        table = _table(grid, h, points)
        part = _empty(splits, outputs, points, inputs, dtype=torch.float32, device=u.device)
        blocks = _cdiv(outputs, tile.m) * _cdiv(inputs, width) * splits
        backward_weight_kernel[(blocks,)](
            dy, u, table, part, tokens, steps, inputs, outputs, G=points, GP=padded, BO=tile.m, BI=width, BT=tile.k,
            SINGLE_EXP=single_exp, APPROX=device.approx, PURE=tile.pure,
            PRECISION=_precision("backward_weight", kind, device), num_warps=tile.warps, num_stages=tile.stages)
        dw = _empty(outputs, inputs * points, dtype=torch.float32, device=u.device)
        sum_kernel[(_cdiv(dw.numel(), SUM_BLOCK),)](part, dw, splits, inputs, outputs, G=points, BN=SUM_BLOCK,
                                                    num_warps=4)
    return dw


def backward_grid(dy: Tensor, u: Tensor, weight: Tensor, grid: Tensor, h: float | Tensor, need_grid: bool,
                  need_h: bool) -> tuple[Tensor | None, Tensor | None]:
    """dL/dgrid [G] and dL/dh (0-d), float32, or None if not needed; arguments as in `backward_u`.

    dB/dg = -dB/du, dB/dh = -dB/du (u - g)/h. It uses one exponential per point, which is valid for every grid."""
    sums = _backward_u("backward_grid", dy, u, weight, grid, h, False).sum(0, dtype=torch.float64)
    return (-sums[0, :grid.numel()].float() if need_grid else None,
            -sums[1, :grid.numel()].sum().float() if need_h else None)


# ---------------------------------------------------------------- compiled ahead of time
def _work(op: str, tile: Tile, family: str, tokens: int, width: int) -> Work:
    """For 8 points and bfloat16: a basis value costs a reciprocal and a quarter for its input's two exponentials, as
    counted in compiled code; where the basis is an operand in `mma.sync`'s layout each thread computes the exponentials
    of every value it holds (3.0 in all)."""
    values = tokens * width * 8
    flops, packed = 2.0 * values * width, 2.0 * width * width * 8
    row = 2.0 * tokens * width
    times = {"forward": _cdiv(width, tile.n), "backward_u": 1, "backward_weight": _cdiv(width, tile.m)}[op]
    each = 3.0 if family == "mma" and op != "backward_u" else 1.25
    return Work(flops, each * values * times, (2 if op != "backward_u" else 3) * row + packed)


def _case(op: str, tile: Tile, device: Device, kind: str, dtype: str, u: str, points: int, single_exp: bool,
          quick: bool) -> AotCase:
    padded = _padded_points(points)
    constexprs = {"G": points, "GP": padded, "SINGLE_EXP": single_exp, "APPROX": device.approx,
                  "PRECISION": _precision(op, kind, device)}
    tensors = {"dy_p": f"*{dtype}", "u_p": f"*{u}", "w_p": f"*{dtype}", "table": "*fp32"}
    sizes: tuple[str, ...] = ("T", "I", "IP", "O", "OP")
    if op == "forward":
        fn, out = forward_kernel, {"y_p": f"*{dtype}"}
        constexprs |= {"BM": tile.m, "BN": tile.n // tile.parts, "PARTS": tile.parts, "BI": tile.k // padded,
                       "PURE": tile.pure}
    elif op == "backward_weight":
        fn, out, sizes = backward_weight_kernel, {"part_p": "*fp32"}, ("T", "STEPS", "I", "O")
        constexprs |= {"BO": tile.m, "BI": tile.n // padded, "BT": tile.k, "PURE": tile.pure}
    else:
        to_grid = op == "backward_grid"
        fn, out = backward_u_kernel, {"out_p": "*fp32" if to_grid else f"*{u}"}
        constexprs |= {"BM": tile.m, "BI": tile.n // padded, "BO": tile.k, "TO_GRID": to_grid}
    signature = {name: kind for name, kind in (tensors | out | dict.fromkeys(sizes, "i32")).items()
                 if name in fn.arg_names}
    parts = f" in {tile.parts}" if tile.parts > 1 else ""
    text = f"{tile.m}x{tile.n}{parts}x{tile.k} G{points} {u}-{dtype}{'' if single_exp else ' each'}"
    if kind == "tf32":
        text += " tf32"
    return AotCase(f"rswaf_linear.{op}", text, fn, signature, constexprs, tile.warps, tile.stages,
                   tensor_cores=kind != "float" or device.backend == "hip",
                   divisible=tuple(name for name in sizes if name not in ("T", "STEPS")), quick=quick,
                   work=functools.partial(_work, op, tile, device.family) if op != "backward_grid" and kind == "half" else None)


def aot_cases(device: Device) -> list[AotCase]:
    """Every tile on 8 points in bfloat16, u in float32 as autocast leaves it; the first tile also with 16 points
    and u in bfloat16, and with an exponential a point; float32 and TF32 products; the two copies."""
    cases = []
    for op in ("forward", "backward_u", "backward_weight"):
        candidates = tiles(op, device, "half")
        cases += [_case(op, tile, device, "half", "bf16", "fp32", 8, True, tile is candidates[0])
                  for tile in candidates]
        cases.append(_case(op, candidates[0], device, "half", "bf16", "bf16", 16, True, False))
        cases.append(_case(op, candidates[0], device, "half", "bf16", "fp32", 8, False, False))
        for kind in ("float", "tf32") if _precision(op, "tf32", device) == "tf32" and device.backend == "cuda" else (
                "float",):
            cases += [_case(op, tile, device, kind, "fp32", "fp32", 8, True, False)
                      for tile in tiles(op, device, kind)]
    for kind, dtype in (("half", "bf16"), ("float", "fp32")):
        cases += [_case("backward_grid", tile, device, kind, dtype, "fp32", 8, False, False)
                  for tile in tiles("backward_grid", device, kind)]
    for dtype, points in (("bf16", 8), ("fp16", 8), ("bf16", 5), ("bf16", 16)):
        values = _written_block(device, points)
        text = f"{WRITTEN_INPUTS} G{points} fp32-{dtype}"
        cases.append(AotCase("rswaf_linear.basis", text, basis_kernel, {
            "u_p": "*fp32", "table": "*fp32", "out_p": f"*{dtype}", "size": "i32"}, values, WRITTEN_WARPS, 3,
            quick=points == 8 and dtype == "bf16"))
        cases.append(AotCase("rswaf_linear.pull", text, pull_kernel, {
            "v_p": f"*{dtype}", "u_p": "*fp32", "table": "*fp32", "du_p": "*fp32", "size": "i32"}, values, WRITTEN_WARPS, 3,
            quick=points == 8 and dtype == "bf16"))
    cases.append(AotCase("rswaf_linear.pack", f"{PACK_OUTPUTS}x{PACK_COLUMNS} G8 bf16", pack_kernel, {
        "w_p": "*bf16", "grid": "*fp32", "h": "fp32", "out_p": "*bf16", "table": "*fp32", "I": "i32", "IP": "i32",
        "O": "i32", "OP": "i32"}, {"G": 8, "GP": 8, "BO": PACK_OUTPUTS, "BN": PACK_COLUMNS, "H_TENSOR": False}, 4, 3,
        divisible=("I", "IP", "O", "OP")))
    cases.append(AotCase("rswaf_linear.sum", f"{SUM_BLOCK} G8", sum_kernel, {
        "part_p": "*fp32", "out_p": "*fp32", "S": "i32", "I": "i32", "O": "i32"}, {"G": 8, "BN": SUM_BLOCK}, 4, 3,
        divisible=("I", "O")))
    return cases
