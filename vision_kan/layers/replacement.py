"""KANs in the place of the MLPs that a model of any architecture has."""
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from vision_kan.layers.feed_forward import ChannelMLP
from vision_kan.layers.function_layer import FunctionLayer


def replace_mlps(model: nn.Module, layer: Callable[..., nn.Module]) -> int:
    """Replace every `timm.layers.Mlp` of linear maps, with as many outputs as inputs, by a KAN. A gated one (`SwiGLU`, `GluMlp`)
    keeps its maps, and a learned function takes the place of its gate's activation.

    Args:
        layer: the KAN's constructor, such as `GroupKAN` or `functools.partial(FasterKAN, hdim=96)`, called as timm calls an
            `mlp_layer`. A group KAN takes over the MLP's weights, so that the model's outputs stay; others begin untrained.
    Returns: the number of MLPs replaced; warns if there are none.
    Raises: ValueError that names the module if the layer does not fit it; nothing is replaced then.
    """
    found: dict[nn.Module, nn.Module] = {}      # the replaced module -> what takes its place
    mlps = mlps_of(model)
    for where, mlp in mlps.items():
        try:
            if isinstance(mlp, Mlp):
                found[mlp] = _in_place_of(mlp, layer)
            else:
                found[mlp.act] = _gate(mlp, layer)
        except (TypeError, ValueError) as error:
            shape = " x ".join(map(str, _widths(mlp)))
            raise ValueError(f"{where or 'the model itself'} ({shape}): {error}") from error
    if not mlps:
        warnings.warn(f"nothing was replaced: {type(model).__name__} has {nothing_to_replace(model)}", stacklevel=2)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():     # one MLP may be used in several places
            if child in found:
                setattr(parent, name, found[child])
    return len(mlps)


def mlps_of(model: nn.Module) -> dict[str, Any]:
    """name -> MLP that `replace_mlps` replaces, in the order of the model's modules: with as many outputs as inputs, unlike those
    that compute position biases."""
    return {where: mlp for where, mlp in model.named_modules()
            if (type(mlp) in (Mlp, GluMlp) and isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.norm, nn.Identity)
                or type(mlp) is SwiGLU) and mlp.fc2.out_features == _widths(mlp)[0]}


def nothing_to_replace(model: nn.Module) -> str:
    """What a model without such MLPs has instead, after "has"."""
    others = other_mlps(model)
    return "no MLP of timm.layers with linear maps" + (f" ({', '.join(others)} are left as they are)" if others else "")


def other_mlps(model: nn.Module) -> list[str]:
    """The types of the MLPs without learned functions."""
    return sorted({type(module).__name__ for module in model.modules() if "mlp" in type(module).__name__.lower()
                   and not any(isinstance(part, FunctionLayer) for part in module.modules())})


def _widths(mlp: Any) -> tuple[int, int]:
    """Inputs and hidden units; a gate's activation is applied to as many."""
    if isinstance(mlp, SwiGLU):
        return mlp.fc1_g.in_features, mlp.fc1_g.out_features
    return mlp.fc1.in_features, mlp.fc1.out_features // (2 if isinstance(mlp, GluMlp) else 1)


def _in_place_of(mlp: Mlp, layer: Callable[..., nn.Module]) -> nn.Module:
    fc1: Any = mlp.fc1
    fc2: Any = mlp.fc2
    kan: Any = layer(in_features=fc1.in_features, hidden_features=fc1.out_features, out_features=fc2.out_features,
                     act_layer=partial(getattr, mlp, "act"), norm_layer=None,
                     bias=(fc1.bias is not None, fc2.bias is not None), drop=(mlp.drop1.p, mlp.drop2.p),
                     device=fc1.weight.device, dtype=fc1.weight.dtype)
    if getattr(kan, "HOLDS_MLP", False) and kan.fc1.weight.shape == fc1.weight.shape:
        kan.load_state_dict(mlp.state_dict(), strict=False)
    return kan.train(mlp.training)


def _gate(mlp: Any, layer: Callable[..., nn.Module]) -> nn.Module:
    """The learned function of a layer's hidden units, begun as the gate's activation."""
    hidden, weight = _widths(mlp)[1], mlp.fc2.weight
    kan = layer(in_features=hidden, hidden_features=hidden, act_layer=partial(getattr, mlp, "act"), device=weight.device,
                dtype=weight.dtype)
    if not isinstance(kan, ChannelMLP):
        raise ValueError(f"{type(kan).__name__} has no function of single channels for a gate: choose a group KAN or KAT")
    if kan.fc1.out_features != hidden:
        raise ValueError("a gated MLP keeps its hidden width")
    return kan.functions[1].train(mlp.training)
