"""Under which keys other programs keep weights, and ours."""
import re
from collections.abc import Collection, Mapping

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn


def rename_keys(state: dict[str, Tensor], own: Collection[str] = ()) -> dict[str, Tensor]:
    """Keys of released Vision-KAN, DeiT and DeiT-III files, or of a wrapped model -> ours.

    The original kept an unused MLP beside each KAN: it is left behind.

    Args:
        own: the keys of the model that takes the weights, where it is known. One that it has is right as it is: CaiT and BEiT,
            for instance, call `gamma_1` what DeiT-III's own files call so and timm's DeiT-III `ls1.gamma`."""
    inside, outside = unwrapped(state)
    state = outside | inside
    released = any(".kan.layers." in key for key in state)
    out = {}
    for key, value in state.items():
        if released and ".mlp." in key:
            continue
        if key not in own:
            key = re.sub(r"gamma_([12])$", r"ls\1.gamma", key.replace(".kan.layers.", ".mlp.layers."))
        out[key] = value
    return out


def filter_state_dict(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for loading weights into a model of this project; an MLP's, too, into a group KAN."""
    own = model.state_dict()
    state = rename_keys(state, own)
    if not any(".mlp.phi" in key for key in state):
        state |= {key: value for key, value in own.items()
                  if ".mlp.phi" in key and key.rpartition(".mlp.phi")[0] + ".mlp.fc1.weight" in state}
    return checkpoint_filter_fn(state, model)       # type: ignore[arg-type]  # VisionTransformer's kin


# What other programs call the weights, and their average; DINO's teacher is the one that is used.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "teacher", "student", "module", "net")
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict")
# What wraps the names of a model's tensors: DataParallel, torch.compile, Lightning, DINO, lightly. In this order: where a file
# has a model and the teacher that it learns from, the model is meant.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "teacher.", "student.", "backbone.", "net.", "timm_model.")


def unwrapped(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's tensors without what wraps their names, and those that lay outside of it (a loss's, a projection head's)."""
    inside, outside = dict(state), dict[str, torch.Tensor]()
    while True:
        wrapper = next((w for w in _WRAPPERS if 3 * sum(str(key).startswith(w) for key in inside) >= len(inside) > 0), None)
        if wrapper is None:
            return inside, outside
        outside |= {key: value for key, value in inside.items() if not str(key).startswith(wrapper)}
        inside = {key.removeprefix(wrapper): value for key, value in inside.items() if str(key).startswith(wrapper)}
