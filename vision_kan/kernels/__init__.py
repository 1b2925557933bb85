"""The ops of the KAN layers, one per file: a reference in PyTorch, C++ kernels for CPUs, Triton kernels for GPUs.

Nothing here depends on models. `use` chooses the backend, see `kernels.backend`.
"""
from vision_kan.kernels.activation import activation, activation_reference
from vision_kan.kernels.backend import BACKENDS, check_groups, chosen, describe, exporting, use
from vision_kan.kernels.basis import BASES, FUNCTIONS, MAX_HALF_RANGE, check_grid, rswaf_basis
from vision_kan.kernels.rational import rational, rational_reference
from vision_kan.kernels.rswaf_activation import rswaf_activation, rswaf_activation_reference
from vision_kan.kernels.rswaf_linear import rswaf_linear, rswaf_linear_reference

__all__ = ["BACKENDS", "BASES", "FUNCTIONS", "MAX_HALF_RANGE", "activation", "activation_reference", "check_grid", "check_groups",
           "chosen", "describe", "exporting", "rational", "rational_reference", "rswaf_activation", "rswaf_activation_reference",
           "rswaf_basis", "rswaf_linear", "rswaf_linear_reference", "use"]
