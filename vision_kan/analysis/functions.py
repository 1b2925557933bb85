"""The learned functions of a model, exact from its weights."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faster_kan import FasterKANLayer
from models_kan import FunctionLayer
from vision_kan.common.errors import UserError
from vision_kan.kernels import BASES, rswaf_basis
from vision_kan.layers.efficient_kan import EfficientKANLayer, bspline_basis
from vision_kan.layers.group_kan import GroupActivation

EdgeLayer = FasterKANLayer | EfficientKANLayer


# ---------------------------------------------------------------- the functions, exact from the weights
def function_layers(model: nn.Module) -> dict[str, FunctionLayer]:
    """The modules with learned functions by name, in the order of the blocks; empty for an MLP."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FunctionLayer)}


def grid_of(layer: FunctionLayer) -> Tensor:
    """The points [G] between which the layer's basis is complete, in increasing order, float64 on the CPU."""
    if isinstance(layer, EfficientKANLayer):
        points = layer.grid[layer.spline_order:layer.num_grids + 1]
    else:
        points = layer.rbf.grid if isinstance(layer, FasterKANLayer) else torch.tensor(layer.points)
    return points.detach().double().cpu().sort().values     # learned ones may have passed each other


def group_functions(phi: GroupActivation, u: Tensor) -> tuple[Tensor, Tensor]:
    """The base [N], and each group's function [groups, N], of u [N]."""
    groups = len(phi.coefficients)
    with torch.no_grad():
        values = phi.reference_forward(u.to(phi.coefficients.device)[:, None].expand(-1, groups))
    return BASES[phi.base](u), values.T.cpu()


def edge_basis(layer: EdgeLayer, u: Tensor) -> Tensor:
    """[..., K]: the basis functions of an edge at u [...], the base branch's silu(u) last where the layer has one."""
    with torch.no_grad():
        if isinstance(layer, EfficientKANLayer):
            return torch.cat([bspline_basis(u, layer.grid.to(u), layer.spline_order), F.silu(u).unsqueeze(-1)], -1)
        h = layer.rbf.h.to(u) if isinstance(layer.rbf.h, Tensor) else layer.rbf.h
        basis = rswaf_basis(u, layer.rbf.grid.to(u), h)
        return basis if layer.base_linear is None else torch.cat([basis, F.silu(u).unsqueeze(-1)], -1)


def edge_weights(layer: EdgeLayer) -> Tensor:
    """W [O, I, K], float64 on the CPU."""
    with torch.no_grad():
        if isinstance(layer, EfficientKANLayer):
            parts = [layer.spline_weight * layer.spline_scaler.unsqueeze(-1), layer.base_weight.unsqueeze(-1)]
        else:
            parts = [layer.spline_linear.weight.unflatten(1, (layer.in_features, -1))]
            parts += [] if layer.base_linear is None else [layer.base_linear.weight.unsqueeze(-1)]
        return torch.cat(parts, -1).double().cpu()


def chosen_layers(model: nn.Module, names: Sequence[str] = ()) -> dict[str, FunctionLayer]:
    """The layers with learned functions that the names begin ("blocks.3", "blocks.3.mlp.phi2"); all without names. Raises
    UserError for a name that fits none."""
    layers = function_layers(model)
    for name in names:
        if not any(_below(layer, name) for layer in layers):
            raise UserError(f"--layer {name} is no layer with learned functions: this model has "
                            f"{', '.join(layers) if len(layers) <= 4 else ', '.join([*list(layers)[:3], '...'])}"
                            if layers else f"--layer {name}: this model has no learned functions")
    return {layer: module for layer, module in layers.items() if not names or any(_below(layer, name) for name in names)}


def _below(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")
