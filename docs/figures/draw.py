"""Draws the figures of docs/layer.md: python docs/figures/draw.py"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from faster_kan import fit_basis
from vision_kan.kernels import BASES, rswaf_basis

GRIDS = {"original: [-2, 2], h 0.33": (-2.0, 2.0, 0.33), "covering: [-3, 3], h the spacing": (-3.0, 3.0, 6 / 7)}


def basis(picture: Path) -> None:
    """The bumps of both grids, their sum, and the distribution of a LayerNorm's outputs."""
    u = torch.linspace(-5, 5, 1001)
    density = torch.exp(-u ** 2 / 2)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (title, (low, high, h)) in zip(axes, GRIDS.items()):
        bumps = rswaf_basis(u, torch.linspace(low, high, 8), h)
        axis.fill_between(u, density, color="grey", alpha=0.2, label="density of the inputs")
        axis.plot(u, bumps, linewidth=1)
        axis.plot(u, bumps.sum(1), color="black", linestyle="--", linewidth=1.2, label="sum of the bumps")
        inside = (u >= low) & (u <= high)
        total = bumps.sum(1)[inside]
        outside = 2 * torch.distributions.Normal(0, 1).cdf(torch.tensor(low)).item()
        axis.set_title(f"{title}: sum {total.min():.2f} to {total.max():.2f}, {outside:.2%} of the inputs outside", fontsize=9)
        axis.set_xlabel("u")
    axes[0].set_ylabel("B_k(u)")
    axes[1].legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def fits(picture: Path) -> None:
    """Least-squares fits of GELU by eight bumps on each grid, for a standard normal input."""
    u = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (title, (low, high, h)) in zip(axes, GRIDS.items()):
        grid = torch.linspace(low, high, 8, dtype=torch.float64)
        a, error = fit_basis(BASES["gelu"], grid, h)
        axis.plot(u, BASES["gelu"](u), color="black", linestyle="--", label="GELU")
        axis.plot(u, rswaf_basis(u, grid, h) @ a, label="eight bumps")
        axis.axvspan(low, high, color="grey", alpha=0.15, label="grid")
        axis.set_title(f"{title}: error {float(error):.1%}", fontsize=9)
        axis.set_xlabel("u")
        axis.set_ylim(-1.5, 5)
    axes[0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    basis(HERE / "basis.png")
    fits(HERE / "fits.png")
