"""Shared by the kernels of learned elementwise functions, one for each group of channels: tiles, sums over the rows, plans.

A tile is [N, VEC]: N vectors of VEC neighbouring columns, of 16 bytes if the groups allow it. Only axis 1 is contiguous, so every
version of Triton gives a thread one whole vector. If VEC divides the columns of a group (`SHARED`), a thread keeps one set of
coefficients and sums for all its columns, else one for each. A program owns some columns and walks down some rows; the sums for
the coefficients' gradients stay in the thread until the program's last step. They go to an array of partial sums, which a second
kernel adds in a fixed order: without atomics, with the same bits on every run.
"""
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_kan.kernels.backend import cast, check_groups
from vision_kan.kernels.triton_common import Device, Launch, allocator, device_at

WARPS = 4
# Programs per multiprocessor. 8 (forward) and 7 (backward) fit at a time; more are faster, because they do not end at the same
# time. Measured on an H100, rswaf_activation, 25,216 x 768, bf16, forward + backward: 127 us with 8 and 7, 117 with 16, 118 with
# 24 and with 32.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 24.0, 16.0
FINISH_BLOCK = 1024
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# ---------------------------------------------------------------- inside kernels
@triton.jit
def tile_vectors(vectors, per_group, N: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SHARED: tl.constexpr):
    """Of the N vectors of a tile: row in the tile, number in the row, whether there is such a number, and the group of
    each, [N, 1], or of its columns, [N, VEC]. per_group: vectors in a group if SHARED, else columns."""
    n = tl.arange(0, N)
    vector = tl.program_id(0) * LANES + n % LANES
    if SHARED:
        group = (vector // per_group)[:, None]
    else:
        group = (vector[:, None] * VEC + tl.arange(0, VEC)[None, :]) // per_group
    return n // LANES, vector, vector < vectors, group


@triton.jit
def first_tile(rows, steps, row, vector, vectors, N: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
               UNROLL: tl.constexpr):
    """A program's first element; from there the offsets of its first tile [N, VEC]; and the rows from each vector's on [N]."""
    first = tl.program_id(1) * (steps * (N // LANES * UNROLL))
    offset = ((row * vectors + vector) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    return first.to(tl.int64) * vectors * VEC, offset, rows - first - row


@triton.jit
def no_sums(COUNT: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr, SHARED: tl.constexpr):
    sums = ()
    for _k in tl.static_range(COUNT):
        if SHARED:
            sums = sums + (tl.zeros((N,), tl.float32),)
        else:
            sums = sums + (tl.zeros((N, VEC), tl.float32),)
    return sums


@triton.jit
def add_tile(sums, shares, COUNT: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr, SHARED: tl.constexpr):
    """Each sum, and its shares [N, VEC] of one tile."""
    new = ()
    for k in tl.static_range(COUNT):
        if SHARED:
            new = new + (_add_row(sums[k], shares[k], N, VEC),)
        else:
            new = new + (sums[k] + shares[k],)
    return new


@triton.jit
def _add_2(total, x):
    first, second = tl.split(x)
    return total + first + second


@triton.jit
def _add_4(total, x, N: tl.constexpr):
    first, second = tl.split(tl.reshape(x, (N, 2, 2)))
    return _add_2(_add_2(total, first), second)


@triton.jit
def _add_row(total, x, N: tl.constexpr, VEC: tl.constexpr):
    """total [N] + the sum of x [N, VEC] over its columns, one after the other: what made x becomes part of an FMA, and
    nothing leaves the thread, which tl.sum does not promise."""
    if VEC == 4:
        return _add_4(total, x, N)
    else:
        first, second = tl.split(tl.reshape(x, (N, 4, 2)))
        return _add_4(_add_4(total, first, N), second, N)


@triton.jit
def row_total(x, N: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SHARED: tl.constexpr):
    """A program's sum over its rows, [LANES] or [LANES, VEC]."""
    if SHARED:
        return tl.sum(tl.reshape(x, (N // LANES, LANES)), 0)
    else:
        return tl.sum(tl.reshape(x, (N // LANES, LANES, VEC)), 0)


@triton.jit
def store_total(partial, total, k, vectors, SUMS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
                 SHARED: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * SUMS + k
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    if SHARED:
        tl.store(partial + row * vectors + lane, total, mask=lane < vectors)
    else:
        column = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
        tl.store(partial + row * vectors * VEC + column, total, mask=(lane < vectors)[:, None])


@triton.jit(do_not_specialize=["splits"])
def finish_kernel(partial, dc, dscale, splits, columns, per_group, G: tl.constexpr, SUMS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """partial [splits, sums, columns] -> dC [groups, G] and dscale [groups]. A program: one sum of a group."""
    group, k = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits * per_group, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = (i // per_group).to(tl.int64) * SUMS + k
        total += tl.load(partial + row * columns + group * per_group + i % per_group, mask=i < splits * per_group,
                         other=0.0)
    if k < G:
        tl.store(dc + group * G + k, tl.sum(total, 0))
    else:
        tl.store(dscale + group, tl.sum(total, 0))


# ---------------------------------------------------------------- launches
def choose_tile(device: Device, itemsize: int, channels: int, groups: int, wide_fits: bool = True) -> dict[str, int | bool]:
    """Constexprs of a tile. wide_fits: whether vectors of 16 bytes leave enough registers."""
    per_group, warp = channels // groups, 64 if device.backend == "hip" else 32
    wide = 16 // itemsize
    if not wide_fits:
        wide = 2 if device.family == "tcgen05" else min(wide, 4)
    while wide > 4 and per_group % wide:
        wide //= 2
    shared = wide >= 4 and per_group % wide == 0
    if not shared:
        wide = 2 if channels % 2 == 0 else 1
    vectors = channels // wide
    # best are 128 bytes of a row, because narrow programs leave few partial sums; more if fewer lanes are idle then
    lanes = min((8, 16, 32, 4), key=lambda lanes: -(-vectors // lanes) * lanes)
    return {"N": warp * WARPS, "LANES": lanes, "VEC": wide, "UNROLL": 1 if shared else 8 // wide, "SHARED": shared}


class ColumnsPlan:
    """v and the gradients of a function of each group of channels, computed in float32, for one size and device: what does not
    depend on the data.

    Args:
        dtype, shape, where: of u [..., C]: float32, float16 or bfloat16; its device.
        coefficients: their shape [groups, G]. scaled: whether there is a scale [groups].
        kernels: forward, with u, c (scale,) v first, and backward, with dv, u, c (scale,) du, partial first.
        constants: their constexprs, "G" among them. wide: whether vectors of 16 bytes leave enough registers.
    Raises: ValueError for another dtype, or groups that do not divide the channels.
    """

    def __init__(self, dtype: torch.dtype, shape: torch.Size, where: torch.device, coefficients: torch.Size, scaled: bool,
                 kernels: tuple[Any, Any], constants: dict[str, object], wide: bool):
        groups, g = coefficients
        if dtype not in TYPES:
            raise ValueError(f"u must be of float32, float16 or bfloat16, got {dtype}")
        check_groups(groups, shape[-1])
        forward_kernel, backward_kernel = kernels
        self.takes_scale = "scale" in forward_kernel.arg_names
        rows, channels, sums = math.prod(shape[:-1]), shape[-1], g + scaled
        device = device_at(where)
        tile = choose_tile(device, dtype.itemsize, channels, groups, wide)
        vectors = channels // tile["VEC"]
        columns = vectors if tile["SHARED"] else channels
        blocks = -(-vectors // tile["LANES"])
        tiles = -(-rows // (tile["N"] // tile["LANES"] * tile["UNROLL"]))

        def steps_and_splits(programs: float) -> tuple[int, int]:
            most = max(1, min(tiles, int(programs * device.processors) // max(1, blocks)))
            steps = -(-tiles // most)
            return steps, -(-tiles // max(1, steps))

        values = {"rows": rows, "vectors": vectors, "per_group": columns // groups, "APPROX": device.approx,
                  **constants, **tile}
        self.index = where.index                    # of the GPU, which must be the current one for launches and memory
        self.forward_launch: Launch | None = None   # None: nothing to compute
        self.backward_launch: Launch | None = None
        steps, splits = steps_and_splits(BACKWARD_PROGRAMS)
        self.like_u = allocator(shape, dtype, where)
        self.like_c = allocator(coefficients, torch.float32, where)
        self.like_scale = allocator((groups,), torch.float32, where) if scaled else None
        self.partial = allocator((splits, sums, columns), torch.float32, where)
        if rows * channels == 0:
            return
        self.backward_launch = Launch(backward_kernel, (blocks, splits, 1), values | {"steps": steps}, WARPS)
        size = splits * columns // groups
        self.finish = Launch(finish_kernel, (groups, sums, 1), values | {
            "splits": splits, "columns": columns, "SUMS": sums,
            "BLOCK": min(FINISH_BLOCK, max(32, 1 << (size - 1).bit_length()))}, WARPS)
        steps, splits = steps_and_splits(FORWARD_PROGRAMS)
        self.forward_launch = Launch(forward_kernel, (blocks, splits, 1), values | {"steps": steps}, WARPS)

    def forward(self, u: Tensor, coefficients: Tensor, scale: Tensor | None = None) -> Tensor:
        """v [..., C] in u's dtype."""
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                return self.forward(u, coefficients, scale)
        v = self.like_u()
        if self.forward_launch is not None:
            u, c = u.contiguous(), cast(coefficients, torch.float32).contiguous()
            s = c if scale is None else cast(scale, torch.float32).contiguous()
            parameters = (c, s) if self.takes_scale else (c,)
            self.forward_launch((u.data_ptr() | c.data_ptr() | s.data_ptr()) % 16 == 0, u, *parameters, v)
        return v

    def backward(self, dv: Tensor, u: Tensor, coefficients: Tensor, scale: Tensor | None = None
                 ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients from dv [..., C]: du [..., C] in u's dtype, dC [groups, G] and dscale [groups] (None without a scale) in
        float32. The same bits on every run."""
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                return self.backward(dv, u, coefficients, scale)
        du, dc = self.like_u(), self.like_c()
        ds = None if self.like_scale is None else self.like_scale()
        if self.backward_launch is not None:
            dv, u, c = cast(dv, u.dtype).contiguous(), u.contiguous(), cast(coefficients, torch.float32).contiguous()
            s = c if scale is None else cast(scale, torch.float32).contiguous()
            partial = self.partial()
            parameters = (c, s) if self.takes_scale else (c,)
            self.backward_launch((dv.data_ptr() | u.data_ptr() | c.data_ptr() | s.data_ptr()) % 16 == 0, dv, u, *parameters, du,
                                 partial)
            self.finish(True, partial, dc, dc if ds is None else ds)
        else:                           # sums over no rows
            dc.zero_()
            ds = None if ds is None else ds.zero_()
        return du, dc, ds
