"""Least squares with a ridge, from Gram matrices."""
import torch
from torch import Tensor


def ridged(gram: Tensor, ridge: float, free: int = 0) -> Tensor:
    """Gram matrices [..., P, P] with ridge times the mean of their diagonal added to it, which keeps coefficients bounded where
    columns are nearly dependent or nothing arrives. free: this many columns at the end, such as a constant, get none."""
    size = gram.shape[-1] - free
    mean = gram.diagonal(dim1=-2, dim2=-1)[..., :size].mean(-1, keepdim=True).clamp_min(1e-12)
    penalty = torch.zeros_like(gram)
    penalty.diagonal(dim1=-2, dim2=-1)[..., :size] = ridge * mean
    return gram + penalty


def ridge_solve(gram: Tensor, moments: Tensor, ridge: float, free: int = 0, left: bool = True) -> Tensor:
    """Coefficients x with `ridged(gram) x = moments` [..., P, N], or x ridged(gram) = moments [..., N, P] with left=False."""
    return torch.linalg.solve(ridged(gram, ridge, free), moments, left=left)
