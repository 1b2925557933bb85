"""Checkpoints: read without running their code, written whole or not at all. No models."""
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import untrusted
from utils import UserError, one_or_two, say, to_json

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


def one_line(error: BaseException) -> str:
    """An error's first line, of characters that a terminal prints as they are."""
    line = (str(error).splitlines() or [type(error).__name__])[0][:150]
    return "".join(c if c.isprintable() else "?" for c in line)


def checkpoint_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint was written with, as a dict; empty where it has none."""
    args = checkpoint.get("args") or {}
    args = vars(args) if isinstance(args, Namespace) else args
    return dict(args) if isinstance(args, Mapping) else {}


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


def saved_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, newest first: checkpoint.pth, checkpoint_previous.pth,
    checkpoint_previous_2.pth and so on, then the best ones, which may be of any epoch. Gaps are allowed."""
    stem = Path(PREVIOUS).stem
    numbered = {int(match.group(1)): path for path in folder.glob(f"{stem}_*.pth")
                if (match := re.fullmatch(rf"{stem}_([1-9]\d{{0,8}})\.pth", path.name))}
    ordered = [folder / CHECKPOINT, folder / PREVIOUS, *(numbered[number] for number in sorted(numbered)),
               *(folder / name for name in BEST)]
    return [path for path in ordered if path.exists()]


# ---------------------------------------------------------------- writing checkpoints
def save_checkpoint(checkpoint: dict[str, Any], folder: Path, also: tuple[str, ...] = (), keep: int = 2) -> None:
    """Write `checkpoint.pth`, keep the `keep` - 1 before under the names of `saved_checkpoints`, and give the new file
    the names in `also`. A kill or a full disk at any moment leaves the earlier files whole. Raises OSError."""
    path = folder / CHECKPOINT
    handle, temporary = tempfile.mkstemp(prefix=".checkpoint-", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            _dump(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        for name in also:
            _link(temporary, folder / name)
        _age(folder, keep)
        os.replace(temporary, path)
        _sync_folder(folder)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A place of the same name beside `target` for a file or a folder, which becomes `target` where the block ends well; else
    nothing is left of it. Raises UserError where the disk does not allow it, or a folder that holds something is in the way."""
    temporary = None
    try:
        if target.is_dir() and any(target.iterdir()):
            raise OSError(errno.ENOTEMPTY, "a folder that is not empty is in the way")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
        yield temporary / target.name
        os.replace(temporary / target.name, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): free some space, or name another "
                        "place") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _dump(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:       # torch's zip writer hides the reason
        raise OSError(errno.ENOSPC, f"writing failed ({str(error).splitlines()[0][:80]})") from error


def save_pth(checkpoint: dict[str, Any], target: Path) -> None:
    """One checkpoint under a name of its own, whole or not at all. Raises UserError where it cannot be written."""
    with whole(target) as place, open(place, "wb") as file:
        _dump(checkpoint, file)


def save_safetensors(state: Mapping[str, torch.Tensor], about: Mapping[str, Any], target: Path) -> None:
    """Weights as .safetensors, with what a checkpoint says beside them (plain values) in the metadata, whole or not at all.
    `load_file` gives both back."""
    with whole(target) as temporary:
        try:
            save_file({key: value.contiguous() for key, value in state.items()}, temporary,
                      metadata={"format": "pt", untrusted.SAFETENSORS_KEY: to_json(about)})
        except SafetensorError as error:
            raise OSError(errno.EIO, one_line(error)) from error
        os.chmod(temporary, 0o644)


def _age(folder: Path, keep: int) -> None:
    """Each of the last checkpoints takes the name of the one before it; those beyond `keep` go. `checkpoint.pth` stays
    in place until it is replaced, so that at every moment each name holds a whole file."""
    stem = Path(PREVIOUS).stem
    names = [CHECKPOINT, PREVIOUS, *(f"{stem}_{number}.pth" for number in range(2, keep))][:keep]
    for newer, older in zip(names[-2::-1], names[:0:-1]):
        if (folder / newer).exists():
            _link(folder / newer, folder / older)
    for path in saved_checkpoints(folder):
        if path.name.startswith(stem) and path.name not in names:
            path.unlink()


def _link(source: str | Path, target: Path) -> None:
    """A second name for a file, put in place in one step; a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def plain(value: Any) -> Any:
    """`value` with tuples, mappings and numpy numbers as plain types, so that any program loads a checkpoint
    with `torch.load(weights_only=True)` and no allow-list."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.Tensor, str, int, float, bool, type(None))):
        return value
    return str(value)
