"""Checks of a checkpoint before a model is built or resumed from it: it may come from anyone."""
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from models_kan import ModelSpec, options_of, register
from vision_kan.checkpoints.checkpoint import Checkpoint, is_plain
from vision_kan.checkpoints.layouts import rename_keys
from vision_kan.common.errors import UserError, one_line
from vision_kan.models.infer import infer_model, load_exactly

# The state that an optimizer keeps for each parameter.
_REQUIRED_STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq")}
_SAME_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")       # as the parameter
_ELEMENTWISE_OPTIMIZERS = (*_REQUIRED_STATE, torch.optim.SGD)       # all their state is per weight
_BLOCKWISE = ("absmax", "qmap")     # bitsandbytes: a scale per block of 8-bit values, and the 256 values of the code


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turns nearly any error inside into a UserError that names `what`: weights of arbitrary shapes cause all kinds."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{what} does not describe or fit a model ({type(error).__name__}: {one_line(error)}): get it from its "
                        "source again, or name another") from error


# ---------------------------------------------------------------- the model
def spec_from_model_args(checkpoint: Checkpoint) -> ModelSpec | None:
    """The model that `model_args` describes, or None without them. If their name is unknown, the model is inferred from
    the weights (`kan_of_weights`). Raises UserError for arguments that this program never saves."""
    stored = checkpoint.state.get("model_args")
    if stored is None:
        return None
    name = stored.get("name") if isinstance(stored, Mapping) else None
    if not isinstance(name, str) or not register(name) or checkpoint.spec is None:
        if "optimizer" not in checkpoint.state and (spec := kan_of_weights(checkpoint)):       # a run names its own model
            return spec
        raise UserError(f"checkpoint {checkpoint.path}: its model_args name no model that timm or this program knows "
                        f"({ascii(name)[:60]}): get it from its source again, or take its weights with --finetune")
    return checkpoint.spec


def kan_of_weights(checkpoint: Checkpoint) -> ModelSpec | None:
    """The model of weights with learned functions, of this program or in a layout that it knows; None for other weights."""
    try:
        with as_user_error(f"checkpoint {checkpoint.path}"):
            spec = infer_model(checkpoint.weights(), {})
    except UserError:
        return None
    return spec if options_of(spec.name) else None


def meta_model(spec: ModelSpec, tensors: int, what: str) -> nn.Module:
    """The model on the meta device, without values. Raises UserError if it cannot be built, and as soon as it has far more
    parameters than `tensors`: a hostile description could take hours to build."""
    left = {"parameters": 2 * tensors + 100, "modules": 50 * tensors + 1000}

    def count(kind: str) -> Callable:
        def hook(*_) -> None:
            left[kind] -= 1
            if left[kind] < 0:
                raise ValueError(f"it would have more {kind} than there are weights")
        return hook

    hooks = [torch_module.register_module_parameter_registration_hook(count("parameters")),
             torch_module.register_module_module_registration_hook(count("modules"))]
    try:
        with as_user_error(what), torch.device("meta"):
            return timm.create_model(spec.name, **spec.kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def check_weights(spec: ModelSpec, checkpoint: Checkpoint, key: str = "model", what: str = "") -> nn.Module:
    """The model of `spec` on the meta device, after checking that all weights under `key` fit it in shape and type.

    what: names the weights in messages. Raises UserError that names the first tensor that does not fit."""
    state, what = checkpoint.weights(key), what or f"{key} in checkpoint {checkpoint.path}"
    if not spec.kwargs:         # another timm model, known by name only: the number of classes is that of its head
        cfg = get_pretrained_cfg(spec.name)
        heads = cfg and cfg.classifier or ()
        sizes = [state[f"{head}.weight"].shape[0] for head in ([heads] if isinstance(heads, str) else heads)
                 if f"{head}.weight" in state and state[f"{head}.weight"].ndim]
        spec = ModelSpec(spec.name, {"num_classes": sizes[0]}) if sizes else spec
    model = meta_model(spec, len(state), what)
    with as_user_error(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")     # torch warns that copying to the meta device does nothing, as intended here
        load_exactly(model, state, what)
    own = model.state_dict()
    for name, value in rename_keys(state, own).items():
        if value.is_floating_point() != own[name].is_floating_point() or value.is_complex():
            raise UserError(f"{what} does not fit the model: {name} is of type {str(value.dtype).removeprefix('torch.')} where "
                            f"the model has {str(own[name].dtype).removeprefix('torch.')}: get it from its source again")
    return model


# ---------------------------------------------------------------- the state of a run
def check_optimizer(optimizer: torch.optim.Optimizer, stored: Any) -> None:
    """Raises UserError for a stored state with which the first step of `optimizer` would fail or spoil the weights."""
    reason = _optimizer_misfit(optimizer, stored)
    if reason:
        raise UserError(f"the checkpoint's optimizer state does not fit ({reason}): resume with the flags it was "
                        "trained with, or start a new run from its weights with --finetune")


def _optimizer_misfit(optimizer: torch.optim.Optimizer, stored: Any) -> str:
    groups, state = (stored.get("param_groups"), stored.get("state")) if isinstance(stored, Mapping) else (None, None)
    if not isinstance(groups, list) or not isinstance(state, Mapping) or not all(isinstance(g, Mapping) for g in groups):
        return "it has no groups or no state"
    own = optimizer.param_groups
    if len(groups) != len(own):
        return f"it has {len(groups)} groups of parameters instead of {len(own)}"
    seen = set()
    for number, (group, theirs) in enumerate(zip(own, groups)):
        members = theirs.get("params")
        if not isinstance(members, list) or len(members) != len(group["params"]):
            return f"group {number} has other parameters"
        for key, value in group.items():
            if key not in ("params", "param_names") and key in theirs and not same_kind(value, theirs[key]):
                return f"{key} of group {number} is of another kind"
        for member, parameter in zip(members, group["params"]):
            if not isinstance(member, int) or member in seen:
                return f"group {number} has other parameters"
            seen.add(member)
            reason = _moments_misfit(optimizer, state.get(member), parameter) if member in state else ""
            if reason:
                return f"{reason} of parameter {member}"
    if not state.keys() <= seen:
        return "it has a state of other parameters"
    return ""


def _moments_misfit(optimizer: torch.optim.Optimizer, kept: Any, parameter: Tensor) -> str:
    if not isinstance(kept, Mapping):
        return "no state"
    required = (*_REQUIRED_STATE.get(type(optimizer), ()), *(["max_exp_avg_sq"] if optimizer.defaults.get("amsgrad") else []))
    for key in required:
        if kept and not isinstance(kept.get(key), Tensor):
            return f"no {key}"
    for key, value in kept.items():
        if isinstance(value, Tensor):
            if value.is_complex() or not value.to(torch.float32).isfinite().all():
                return f"{key} is not finite"
            same_shape = value.ndim == parameter.ndim > 0 and not key.startswith(_BLOCKWISE) or key in _SAME_SHAPE
            if type(optimizer) not in _ELEMENTWISE_OPTIMIZERS and _is_reduced(value, parameter):
                same_shape = False
            if same_shape and value.shape != parameter.shape or key == "step" and value.numel() != 1:
                return f"{key} has shape {tuple(value.shape)} instead of {tuple(parameter.shape)}"
        elif isinstance(value, str) or isinstance(value, (int, float)) and not math.isfinite(value):
            return f"{key} is not a number"
    return ""


def _is_reduced(value: Tensor, parameter: Tensor) -> bool:
    """Whether it is one number for the whole parameter, as in NovoGrad, or one per row or column, as in Adafactor."""
    return value.ndim == 0 or value.ndim == parameter.ndim and all(n in (1, m) for n, m in zip(value.shape, parameter.shape))


def same_kind(own: Any, theirs: Any) -> bool:
    """Whether a stored setting may replace `own`: both are numbers, or switches, or lists of equal length. A dtype is stored by
    its name."""
    if isinstance(theirs, Tensor):
        return False
    if isinstance(own, torch.dtype):
        return theirs == str(own)
    if own is None or theirs is None or isinstance(own, bool) or isinstance(theirs, bool):
        return all(value is None or isinstance(value, bool) for value in (own, theirs)) or \
            None in (own, theirs) and is_plain(theirs)
    if isinstance(own, (int, float)):
        return isinstance(theirs, (int, float)) and not math.isnan(theirs) and (math.isfinite(theirs) or not math.isfinite(own))
    if isinstance(own, (list, tuple)):
        return isinstance(theirs, (list, tuple)) and len(own) == len(theirs) and all(map(same_kind, own, theirs))
    if isinstance(own, Mapping):
        return isinstance(theirs, Mapping) and theirs.keys() <= own.keys() and \
            all(same_kind(own[key], value) for key, value in theirs.items())
    return isinstance(theirs, type(own))


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def check_scaler(checkpoint: Checkpoint) -> None:
    """Raises UserError if the state of float16's loss scaler is unusable. An empty one is fine: scaling was off."""
    stored = checkpoint.state.get("scaler")
    keys = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    if stored and not (isinstance(stored, Mapping) and all(_is_finite_number(stored.get(key)) for key in keys)):
        raise UserError(f"checkpoint {checkpoint.path}: its 'scaler' is not a GradScaler state: get it from its source again")
