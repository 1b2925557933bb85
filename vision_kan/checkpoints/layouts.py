"""Keys of checkpoints: those of other programs, renamed to ours."""
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vision_kan.common.text import one_or_two
from vision_kan.layers.feed_forward import beginnings


def rename_keys(state: dict[str, Tensor], own: Collection[str] = ()) -> dict[str, Tensor]:
    """Rename the keys of released Vision-KAN, DeiT and DeiT-III files, or of a wrapped model, to ours.

    Drops the unused MLP that the original kept beside each KAN.

    own: the keys of the model that takes the weights, if known; these are never renamed. CaiT and BEiT, for instance, have a
        `gamma_1`, which in DeiT-III's files means timm's `ls1.gamma`."""
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
    """timm's hook for loading weights into a model of this project. A group KAN and KAT accept an MLP's weights, too."""
    own = model.state_dict()
    state = rename_keys(state, own)
    state |= {key: own[key] for key in beginnings(model, state)}
    return checkpoint_filter_fn(state, model)       # type: ignore[arg-type]  # VisionTransformer's kin


# The keys of other programs for the weights and for their average. Of DINO's two models the teacher is used.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "teacher", "student", "module", "net")
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict")
# Prefixes of DataParallel, torch.compile, Lightning, DINO and lightly. The order matters: of a model and its teacher, the model
# is taken.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "teacher.", "student.", "backbone.", "net.", "timm_model.")


def unwrapped(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's tensors without the prefixes of `_WRAPPERS`, and the tensors outside the model (of a loss, a projection head)."""
    inside, outside = dict(state), dict[str, torch.Tensor]()
    while True:
        wrapper = next((w for w in _WRAPPERS if 3 * sum(str(key).startswith(w) for key in inside) >= len(inside) > 0), None)
        if wrapper is None:
            return inside, outside
        outside |= {key: value for key, value in inside.items() if not str(key).startswith(wrapper)}
        inside = {key.removeprefix(wrapper): value for key, value in inside.items() if str(key).startswith(wrapper)}


def args_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The flags under `args` as a dict; empty without any."""
    args = content.get("args") or {}
    args = vars(args) if isinstance(args, Namespace) else args
    return dict(args) if isinstance(args, Mapping) else {}


def in_our_layout(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A file's content under this program's keys: `model`, `model_ema`, and `args` that name the model. A file of this program
    stays unchanged.

    Returns: the content, and a clause that says which weights were chosen, or '' if there was no choice."""
    if "results" in content and "model_args" not in content:        # another program's results, of any kind
        content = {name: value for name, value in content.items() if name != "results"}

    def holds_tensors(value: object) -> bool:
        return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())

    key = next((key for key in _WEIGHTS if holds_tensors(content.get(key))), None)
    if key is None and not holds_tensors(content):
        return content, ""          # `Checkpoint.weights` reports that there are none
    state = {name: value for name, value in (content if key is None else content[key]).items() if isinstance(value, Tensor)}
    inside, outside = unwrapped(state)
    if key == "model" and not outside and inside.keys() == state.keys() and "state_dict_ema" not in content:
        return content, ""
    note = ""
    if key in ("teacher", "student") or outside:
        left_out = f"; left out: {len(outside)} tensors, such as {next(iter(outside))!a}" if outside else ""
        note = f"its weights are {len(inside)} tensors" + (f" under {key!r}" if key else "") + left_out
    # without the weights that were not chosen, which would stay in memory
    rest = {name: value for name, value in content.items() if name not in (*_WEIGHTS, *_AVERAGES, *(() if key else state))}
    average = next((name for name in _AVERAGES if holds_tensors(content.get(name))), None)
    ours = {**rest, "model": inside}
    if average:
        ours["model_ema"] = unwrapped(content[average])[0]
    args = args_of(content)
    if isinstance(content.get("arch"), str):        # from timm's train.py
        args.setdefault("model", content["arch"])
    sizes = [one_or_two(size[-2:]) if isinstance(size, (list, tuple)) and size else size
             for size in map(args.get, ("input_size", "img_size"))]
    args["input_size"] = sizes[0] or sizes[1]
    return {**ours, "args": {name: value for name, value in args.items() if value is not None}}, note
