"""The learned functions of a model, computed exactly from its weights."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_kan.common.errors import UserError
from vision_kan.layers.function_layer import FunctionLayer, function_layers


def group_functions(layer: FunctionLayer, u: Tensor) -> tuple[Tensor, Tensor]:
    """The base [N] and the function of each group [groups, N] at u [N], on the CPU."""
    basis = layer.basis(u.double())
    return basis[:, -1].to(u), (layer.exact_weights()[0] @ basis.T).to(u)


def deviations(weights: Tensor, matrix: Tensor) -> Tensor:
    """[O, I]: the standard deviation of each function sum_k W[o, i, k] B_k, for basis functions with the covariance `matrix`
    [I, K, K]; with second moments in place of covariances, the root mean square."""
    return torch.einsum("oik,ikl,oil->oi", weights, matrix, weights).clamp(min=0).sqrt()


def chosen_layers(model: nn.Module, names: Sequence[str] = ()) -> dict[str, FunctionLayer]:
    """The layers with learned functions at or below these names ("blocks.3", "blocks.3.mlp.phi2"); all without names. Raises
    UserError for a name without such a layer."""
    layers = function_layers(model)
    for name in names:
        if not any(_below(layer, name) for layer in layers):
            raise UserError(f"--layer {name} is not a layer with learned functions: this model has "
                            f"{', '.join(layers) if len(layers) <= 4 else ', '.join([*list(layers)[:3], '...'])}"
                            if layers else f"--layer {name}: this model has no learned functions")
    return {layer: module for layer, module in layers.items() if not names or any(_below(layer, name) for name in names)}


def _below(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")
