"""Least squares with a ridge, from Gram matrices."""
import torch
from torch import Tensor


def add_ridge(gram: Tensor, ridge: float, free: int = 0) -> Tensor:
    """Gram matrices [..., P, P] with ridge times the mean of their diagonal added to it. This keeps coefficients bounded if
    columns are nearly dependent or zero. free: number of columns at the end, such as a constant, that get no ridge."""
    size = gram.shape[-1] - free
    mean = gram.diagonal(dim1=-2, dim2=-1)[..., :size].mean(-1, keepdim=True).clamp_min(1e-12)
    penalty = torch.zeros_like(gram)
    penalty.diagonal(dim1=-2, dim2=-1)[..., :size] = ridge * mean
    return gram + penalty


def ridge_solve(gram: Tensor, moments: Tensor, ridge: float, free: int = 0, left: bool = True) -> Tensor:
    """Coefficients x with R x = moments [..., P, N], R = `add_ridge(gram)`; with left=False x R = moments [..., N, P]."""
    return torch.linalg.solve(add_ridge(gram, ridge, free), moments, left=left)
