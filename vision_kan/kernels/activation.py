"""A learned elementwise function for each group of channels, in any basis of `basis.FUNCTIONS`.

    v = s_g * base(u) + sum_k C[g, k] * B_k(u)

FasterKAN's bumps have kernels of their own (`rswaf_activation`). This is the way of all other bases: torch.compile on a GPU,
elsewhere PyTorch's operations on some rows at a time, so that only u and the parameters are kept for the backward pass.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_kan.kernels import backend
from vision_kan.kernels.backend import as_matrix, cast, check_groups, math_dtype, row_chunks
from vision_kan.kernels.basis import BASES, FUNCTIONS


def activation(u: Tensor, coefficients: Tensor, points: Sequence[float], h: float, base: str, scale: Tensor | None,
               function: str) -> Tensor:
    """s * base(u) + sum_k C[g, k] B_k(u), by the backend that `kernels.use` chose.

    Args:
        u: [..., I], any floating dtype; autocast rounds it to its dtype first. Computed in at least float32.
        coefficients: [groups, G]; group g has the channels g * I/groups to (g + 1) * I/groups - 1.
        points, h: the grid [G] and the width for the basis.
        base: "none" or a key of `BASES`.
        scale: s [groups]; None: 1.
        function: a key of `FUNCTIONS`.
    Returns: [..., I] in u's dtype.
    Raises: ValueError if the groups do not divide the channels.
    """
    check_groups(len(coefficients), u.shape[-1])
    u = cast(u, backend.autocast_dtype(u))
    name = backend.chosen()
    constants = tuple(points), h, base, function
    if name == "reference" or backend.intercepted(u, coefficients, scale):
        return _reference(u, coefficients, scale, constants)
    if name == "compile" or backend.resolve(name, u, len(points), *constants) == "compiled":
        return compiled(u, coefficients, scale, *constants)
    return _ByRows.apply(u, coefficients, scale, constants)


def activation_reference(u: Tensor, coefficients: Tensor, points: Sequence[float], h: float, base: str, scale: Tensor | None,
                         function: str) -> Tensor:
    """The same in PyTorch's operations, whose autograd keeps several arrays for each of the G basis functions."""
    x = u.to(math_dtype(u.dtype))
    each = u.shape[-1] // len(coefficients)
    c = coefficients.to(x.dtype).t().repeat_interleave(each, 1)        # [G, I]
    v = sum(c_k * value for c_k, value in zip(c, FUNCTIONS[function].values(x, points, h)))
    if base != "none":
        b = BASES[base](x)
        v = v + (b if scale is None else b * scale.to(x.dtype).repeat_interleave(each))
    return v.to(u.dtype)


def compiled(u: Tensor, coefficients: Tensor, scale: Tensor | None, *constants: Any) -> Tensor:
    """`activation_reference` through torch.compile. constants: points, a tuple, h, base, function."""
    return backend.compiled(_reference, constants)(u, coefficients, scale)


def _reference(u: Tensor, coefficients: Tensor, scale: Tensor | None, constants: tuple) -> Tensor:
    points, h, base, function = constants
    return activation_reference(u, coefficients, points, h, base, scale, function)


class _ByRows(torch.autograd.Function):
    """u as a matrix, some rows at a time; the backward pass computes the basis again."""

    @staticmethod
    def forward(ctx, u: Tensor, coefficients: Tensor, scale: Tensor | None, constants: tuple) -> Tensor:
        ctx.save_for_backward(u, coefficients, scale)
        ctx.constants = constants
        flat, v = as_matrix(u), torch.empty_like(u, memory_format=torch.contiguous_format)
        for rows in row_chunks(flat):
            as_matrix(v)[rows] = _reference(flat[rows], coefficients, scale, constants)
        return v

    @staticmethod
    def backward(ctx, dv: Tensor):
        u, coefficients, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad

        def gradients(*inputs: Tensor | None, dv: Tensor) -> list[Tensor | None]:
            return backend.gradients(lambda u, c, s: _reference(u, c, s, ctx.constants), inputs, needs, dv)

        if backend.differentiable_backward(dv):
            return *gradients(u, coefficients, scale, dv=dv), None
        # copies, which need gradients of their own; parameters in the computation's dtype, so that sums are not rounded
        flat, dv = as_matrix(u.detach()), as_matrix(dv)
        c, s = (None if parameter is None else parameter.detach().to(math_dtype(u.dtype)).requires_grad_(need)
                for parameter, need in ((coefficients, needs[1]), (scale, needs[2])))
        parts = [gradients(flat[rows].requires_grad_(needs[0]), c, s, dv=dv[rows]) for rows in row_chunks(flat) or [slice(0)]]
        du, dc, ds = ([part for part in column if part is not None] for column in zip(*parts))
        return (torch.cat(du).view(u.shape) if du else None, sum(dc).to(coefficients.dtype) if dc else None,
                sum(ds).to(scale.dtype) if ds else None, None)
