"""Checkpoints as they are read: ours, and those of other programs in our layout."""
import json
import math
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vision_kan.checkpoints import untrusted
from vision_kan.checkpoints.layouts import _AVERAGES, _WEIGHTS, unwrapped
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.text import one_or_two, say

# A folder of timm's layout, and where it may have its weights; the first that is there counts.
FOLDER_CONFIG, FOLDER_WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
BEST = ("best_checkpoint.pth", "best_ema_checkpoint.pth")


# ---------------------------------------------------------------- reading checkpoints
def load_file(path: str | Path) -> dict[str, Any]:
    """A checkpoint (.pth and the like), .safetensors file or folder of timm's layout, on the CPU. Never runs code of the file.

    Besides tensors and plain types only `argparse.Namespace` is let in, which DeiT and the original Vision-KAN put under
    `args`, and paths and numpy scalars, which become plain. Raises UserError for anything else."""
    path = Path(path)
    if (path / FOLDER_CONFIG).is_file():
        return _load_folder(path)
    if not path.is_file():
        what = f"is a folder without {FOLDER_CONFIG}, so no model" if path.is_dir() else \
            "is no ordinary file" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {what}: check the path")
    try:
        checkpoint = untrusted.read(path)
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except untrusted.Foreign as error:
        raise UserError(f"checkpoint {path} holds more than tensors and plain values ({one_line(error)}): refused, "
                        "since reading it could run its code; get it from its source again") from error
    except Exception as error:      # a damaged file makes its reader raise nearly anything
        raise UserError(f"checkpoint {path} cannot be read, it is damaged or no checkpoint ({one_line(error)}): "
                        "copy or download it again") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary of weights")
    return checkpoint


def _load_folder(folder: Path) -> dict[str, Any]:
    """A model as timm keeps it on the Hub, and as tools/export.py writes it: weights beside a config.json that describes them."""
    found = [folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has a {FOLDER_CONFIG} but no weights ({' or '.join(FOLDER_WEIGHTS)}): copy or download it "
                        "again")
    checkpoint = load_file(found[0])
    if "model_args" in checkpoint:      # an export of ours says more in its weights' file
        return checkpoint
    try:
        text = (folder / FOLDER_CONFIG).read_bytes()[:untrusted.MOST_PICKLED]
        config = json.loads(text)
        name, own = config["architecture"], config.get("pretrained_cfg") or {}
        kwargs = {"num_classes": config.get("num_classes", own.get("num_classes")), **(config.get("model_args") or {})}
        size = one_or_two(list(own["input_size"])[-2:]) if own.get("input_size") else None
        if own.get("fixed_input_size") and size:
            kwargs.setdefault("img_size", size)
        names = config.get("label_names") or own.get("label_names")
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{folder / FOLDER_CONFIG} does not describe a model of timm's ({type(error).__name__}: "
                        f"{one_line(error)}): give the weights' file and name the architecture with --model") from error
    flags = {"model": name, "input_size": size, "eval_crop_ratio": own.get("crop_pct"),
             **{key: own.get(key) for key in ("crop_mode", "interpolation", "mean", "std")}}
    return {"model": tensors_of(checkpoint, found[0]), "model_args": {"name": name, "kwargs": kwargs},
            "args": {key: value for key, value in flags.items() if value is not None},
            "class_names": names if isinstance(names, list) and all(map(_name, names)) else None}


def checkpoint_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint was written with, as a dict; empty where it has none."""
    args = checkpoint.get("args") or {}
    args = vars(args) if isinstance(args, Namespace) else args
    return dict(args) if isinstance(args, Mapping) else {}


def in_our_layout(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A checkpoint of another program under this one's keys: `model`, `model_ema`, and `args` that name the model. One of this
    program's stays as it is. Says on stderr what was chosen where there was a choice."""
    if "results" in checkpoint and "model_args" not in checkpoint:      # another program's, of whatever kind
        checkpoint = {name: value for name, value in checkpoint.items() if name != "results"}

    def holds_tensors(value: Any) -> bool:
        return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())

    key = next((key for key in _WEIGHTS if holds_tensors(checkpoint.get(key))), None)
    if key is None and not holds_tensors(checkpoint):
        return checkpoint           # no weights: told by those who look for them
    state = {name: value for name, value in (checkpoint if key is None else checkpoint[key]).items()
             if isinstance(value, torch.Tensor)}
    inside, outside = unwrapped(state)
    if key == "model" and not outside and inside.keys() == state.keys() and "state_dict_ema" not in checkpoint:
        return checkpoint
    if key in ("teacher", "student") or outside:
        left_out = f"; left out: {len(outside)} tensors, such as {next(iter(outside))!a}" if outside else ""
        say(f"checkpoint {path}: its weights are {len(inside)} tensors" + (f" under {key!r}" if key else "") + left_out,
            file=sys.stderr)
    rest = {name: value for name, value in checkpoint.items() if name not in state or key is not None}
    average = next((name for name in _AVERAGES if holds_tensors(checkpoint.get(name))), None)
    ours = {**rest, "model": inside}
    if average:
        ours["model_ema"] = unwrapped(checkpoint[average])[0]
    args = checkpoint_args(checkpoint)
    if isinstance(checkpoint.get("arch"), str):         # of timm's train.py
        args.setdefault("model", checkpoint["arch"])
    sizes = [one_or_two(size[-2:]) if isinstance(size, (list, tuple)) and size else size
             for size in map(args.get, ("input_size", "img_size"))]
    args["input_size"] = sizes[0] or sizes[1]
    return {**ours, "args": {name: value for name, value in args.items() if value is not None}}


def tensors_of(checkpoint: Mapping[str, Any], path: str | Path, key: str = "model") -> dict[str, torch.Tensor]:
    """The state dict under `key` (the checkpoint itself when it is a bare one), unchecked."""
    if isinstance(checkpoint.get(key), Mapping):
        checkpoint = checkpoint[key]
    state = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"checkpoint {path} holds no weights (no key 'model'): it has "
                        f"{', '.join(map(repr, list(checkpoint)[:5])) or 'nothing'}")
    return state


def weights_of(checkpoint: Mapping[str, Any], path: str | Path, key: str = "model") -> dict[str, torch.Tensor]:
    """`tensors_of` that a model can be given: UserError for names that are none, other kinds of number, and values that
    are not finite."""
    state = tensors_of(checkpoint, path, key)
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise UserError(f"checkpoint {path} has the key {name!r} among its weights, which is no name: get it from its "
                            "source again")
        if tensor.is_complex() or not tensor.is_floating_point() and _is_parameter(name, tensor):
            raise UserError(f"checkpoint {path}: the weights {name} are of type {str(tensor.dtype).removeprefix('torch.')}, and "
                            "no model here computes with such: take a checkpoint in floating point")
        if not tensor.to(torch.float32).isfinite().all() and not _unlimited(name, tensor):     # a float64 beyond float32, too
            raise UserError(f"checkpoint {path}: the weights {name} are not finite (infinite or nan), so it is good for nothing: "
                            "take an earlier checkpoint of that run")
    return state


def _is_parameter(name: str, tensor: torch.Tensor) -> bool:
    """Whole numbers are found in a model's counters and index tables only, as int64 or bool."""
    return tensor.dtype not in (torch.int64, torch.bool) or name.rpartition(".")[2] in ("weight", "bias")


def _unlimited(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is a limit of what a layer lets through that is none: Gemma's `input_min` and the like, until they are set."""
    return tensor.ndim == 0 and float(tensor) == {"_min": -math.inf, "_max": math.inf}.get(name[-4:])


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2 ** 53


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _percent(value: Any) -> bool:
    return _number(value) and 0 <= value <= 100


def _result(value: Any) -> bool:
    tests = {"acc1": _percent, "acc5": _percent, "images": _count, "data_set": _name, "split": _name}
    return isinstance(value, Mapping) and all(test(value.get(key)) for key, test in tests.items())


# What a run's checkpoint says beside the weights: key -> (test, what it must be, whether --resume auto must find it).
_ENTRIES = {
    "optimizer": (lambda v: isinstance(v, Mapping), "a mapping", True),
    "lr_scheduler": (lambda v: isinstance(v, Mapping), "a mapping", True),
    "epoch": (lambda v: type(v) is int and -1 <= v < 10 ** 6, "a number of epochs", True),
    "args": (lambda v: v is None or isinstance(v, (Mapping, Namespace)), "flags", True),
    "model_args": (lambda v: isinstance(v, Mapping) and isinstance(v.get("name"), str)
                   and isinstance(v.get("kwargs", {}), Mapping), "a name and arguments", True),
    "model_ema": (lambda v: v is None or isinstance(v, Mapping), "weights", False),
    "scaler": (lambda v: v is None or isinstance(v, Mapping), "a mapping", False),
    "class_names": (lambda v: v is None or isinstance(v, list) and all(map(_name, v)), "names", False),
    **dict.fromkeys(("step", "position", "skipped", "epochs_without_best"), (_count, "a count", False)),
    **dict.fromkeys(("max_accuracy", "max_accuracy_ema", "seconds"), (_number, "a number", False)),
    "losses": (lambda v: isinstance(v, list) and all(map(_number, v)), "a list of numbers", False),
    "unreadable": (lambda v: isinstance(v, list) and all(map(_count, v)), "a list of counts", False),
    "results": (lambda v: isinstance(v, Mapping) and all(map(_result, v.values())), "results of evaluations", False),
}


def check_entries(checkpoint: Mapping[str, Any], path: str | Path, complete: bool = False) -> None:
    """Raises UserError for an entry of another kind than a run writes; with `complete` for one that is missing, too."""
    for key, (test, kind, needed) in _ENTRIES.items():
        if key not in checkpoint:
            if complete and needed:
                raise UserError(f"checkpoint {path} has no key '{key}': it is not one that a run of this program wrote")
        elif not test(checkpoint[key]):
            raise UserError(f"checkpoint {path}: its '{key}' is not {kind}, so it is damaged or of another program: copy it "
                            "again, or take its weights with --finetune")
