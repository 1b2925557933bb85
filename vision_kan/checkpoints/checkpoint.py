"""A checkpoint of this or another program, opened and checked once."""
import inspect
import math
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vision_kan.checkpoints import WEIGHTS
from vision_kan.checkpoints.downloads import fetch
from vision_kan.checkpoints.layouts import args_of, in_our_layout
from vision_kan.checkpoints.read import are_names, load_file
from vision_kan.common.errors import UserError
from vision_kan.common.text import say
from vision_kan.config.flag import MAX_SIDE

# The entries that a run resumes from. All others describe the checkpoint.
_STATE = (*WEIGHTS, "optimizer", "lr_scheduler", "scaler", "losses", "unreadable")
# Arguments of `timm.create_model` itself, which a checkpoint must not set: one names a file to unpickle, others download.
_CREATE_MODEL_ARGUMENTS = set(inspect.signature(timm.create_model).parameters) - {"kwargs"}
MAX_ARGUMENT = 2 ** 20


@dataclass(frozen=True)
class ModelSpec:
    """Arguments of `timm.create_model`."""
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """A checkpoint's content. Without arguments it is empty, for a run that starts from nothing.

    path: the file, folder or location that the user gave, for messages.
    state: all entries, under this program's keys. The constructor accepts another program's content, too."""
    path: str = ""
    state: dict[str, Any] = field(default_factory=dict, repr=False)
    _checked: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.state, note = in_our_layout(self.state)
        if note:
            say(f"checkpoint {self.path}: {note}", file=sys.stderr)

    @classmethod
    def open(cls, location: str | Path) -> "Checkpoint":
        """Open the checkpoint at a location that `fetch` accepts; a Path is a local file or folder. Never runs code of the file.

        Raises: UserError if it cannot be read, holds no weights, or has flags that are out of range for its weights."""
        path = location if isinstance(location, Path) else fetch(location)
        checkpoint = cls(str(location), load_file(path))
        checkpoint._check_flags()
        return checkpoint

    # ---------------------------------------------------------------- what it says
    @property
    def flags(self) -> dict[str, Any]:
        """The flags that it was written with; empty without any."""
        return args_of(self.state)

    @property
    def epoch(self) -> int:
        """The last finished epoch, counted from 0; -1 without any."""
        return self.state.get("epoch", -1)

    @property
    def about(self) -> dict[str, Any]:
        """The entries other than weights and training state; the flags as a dict."""
        about = {key: value for key, value in self.state.items() if key not in _STATE and not isinstance(value, Tensor)}
        return {**about, "args": self.flags} if "args" in about else about

    @property
    def spec(self) -> ModelSpec | None:
        """The model that `model_args` describes; None without a description. Whether timm knows the name is not checked.

        Raises: UserError for arguments that this program never saves."""
        stored = self.state.get("model_args")
        name, kwargs = (stored.get("name"), stored.get("kwargs") or {}) if isinstance(stored, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(kwargs, Mapping):
            return None
        for key, value in kwargs.items():
            if not isinstance(key, str) or key in _CREATE_MODEL_ARGUMENTS or key.startswith("pretrained") or not is_plain(value):
                raise UserError(f"checkpoint {self.path}: its model_args have {key!r}, which is not an argument of a model's "
                                "shape or out of range: get it from its source again, or take its weights with --finetune")
        return ModelSpec(name, dict(kwargs))

    # ---------------------------------------------------------------- what it holds
    def weights(self, key: str = "model") -> dict[str, Tensor]:
        """The state dict under one of `WEIGHTS`; don't change it. Its values are checked once, at the first call.

        Raises: UserError if there is none, or a model cannot use it: a key is not text, numbers are not floating point, values
            are not finite."""
        if key not in self._checked:
            state = self._tensors(key)
            for name, tensor in state.items():
                self._check_tensor(name, tensor)
            self._checked[key] = state
        return self._checked[key]

    def free(self) -> None:
        """Free the memory of the weights and the training state; `about` stays."""
        self.state = self.about
        self._checked.clear()

    def _tensors(self, key: str) -> dict[str, Tensor]:
        entry = self.state.get(key)
        state = {name: value for name, value in entry.items() if isinstance(value, Tensor)} if isinstance(entry, Mapping) else {}
        if not state:
            raise UserError(f"checkpoint {self.path} holds no weights (no key {key!r}): it has "
                            f"{', '.join(map(repr, list(self.state)[:5])) or 'nothing'}")
        return state

    # ---------------------------------------------------------------- checks
    def check_entries(self, complete: bool = False) -> None:
        """Raises UserError for an entry of another kind than a run writes; with `complete` also for a missing one."""
        for key, (test, kind, needed) in _ENTRIES.items():
            if complete and needed and self.state.get(key) is None:
                raise UserError(f"checkpoint {self.path} has no '{key}': a run of this program did not write it")
            if key in self.state and not test(self.state[key]):
                raise UserError(f"checkpoint {self.path}: its '{key}' is not {kind}, so it is damaged or of another program: "
                                "copy it again, or take its weights with --finetune")

    def _check_flags(self) -> None:
        flags, widest = self.flags, max(size for value in self._tensors("model").values() for size in (0, *value.shape))
        for dest, largest in {"input_size": MAX_SIDE, "crop_padding": MAX_SIDE, "hdim_kan": widest, "kan_groups": widest}.items():
            value = flags.get(dest)
            for number in value if isinstance(value, (list, tuple)) else [value]:       # hdim_kan may have one for each block
                if isinstance(number, (int, float)) and not (dest == "hdim_kan") <= number <= largest:
                    raise UserError(f"checkpoint {self.path}: its args have {dest} {number}, which is out of range: get it from "
                                    "its source again")

    def _check_tensor(self, name: Any, tensor: Tensor) -> None:
        if not isinstance(name, str):
            raise UserError(f"checkpoint {self.path} has the key {name!r} among its weights, which is not text: get it from its "
                            "source again")
        if tensor.is_complex() or not tensor.is_floating_point() and _is_parameter(name, tensor):
            raise UserError(f"checkpoint {self.path}: the weights {name} are of type {str(tensor.dtype).removeprefix('torch.')}, "
                            "and no model here computes in that: take a checkpoint in floating point")
        # in float32, because models compute in it and a finite float64 may exceed it
        if not tensor.to(torch.float32).isfinite().all() and not _is_open_limit(name, tensor):
            raise UserError(f"checkpoint {self.path}: the weights {name} are not finite (infinite or nan), so it cannot be used: "
                            "take an earlier checkpoint of that run")


def is_plain(value: object) -> bool:
    """Whether a value is a string, a number within bounds, None, or a short list of these."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 100 and all(map(is_plain, value))
    if isinstance(value, (int, float)):
        return abs(value) <= MAX_ARGUMENT       # False for nan
    return value is None or isinstance(value, str)


def _is_parameter(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a parameter: models have integers only in counters and index tables, as int64 or bool."""
    return tensor.dtype not in (torch.int64, torch.bool) or name.rpartition(".")[2] in ("weight", "bias")


def _is_open_limit(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a limit that is not set yet, minus or plus infinity, such as `input_min` of timm's Gemma."""
    return tensor.ndim == 0 and float(tensor) == {"_min": -math.inf, "_max": math.inf}.get(name[-4:])


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2 ** 53


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_result(value: object) -> bool:
    return isinstance(value, Mapping) and \
        all(isinstance(value.get(key), str) and value[key].isprintable() for key in ("data_set", "split")) and \
        _is_count(value.get("images")) and \
        all(_is_number(value.get(key)) and 0 <= value[key] <= 100 for key in ("acc1", "acc5"))


# The entries of a run's checkpoint besides the weights: key -> (test, what it must be, whether --resume auto requires it).
_ENTRIES = {
    "optimizer": (_is_mapping, "a mapping", True),
    "lr_scheduler": (_is_mapping, "a mapping", True),
    "epoch": (lambda v: type(v) is int and -1 <= v < 10 ** 6, "a number of epochs", True),
    "args": (lambda v: v is None or isinstance(v, (Mapping, Namespace)), "flags", True),
    "model_args": (lambda v: isinstance(v, Mapping) and isinstance(v.get("name"), str)
                   and isinstance(v.get("kwargs", {}), Mapping), "a name and arguments", True),
    "model_ema": (lambda v: v is None or isinstance(v, Mapping), "weights", False),
    "scaler": (lambda v: v is None or isinstance(v, Mapping), "a mapping", False),
    "class_names": (lambda v: v is None or are_names(v), "names", False),
    **dict.fromkeys(("step", "position", "skipped", "epochs_without_best"), (_is_count, "a count", False)),
    **dict.fromkeys(("max_accuracy", "max_accuracy_ema", "seconds"), (_is_number, "a number", False)),
    "losses": (lambda v: isinstance(v, list) and all(map(_is_number, v)), "a list of numbers", False),
    "unreadable": (lambda v: isinstance(v, list) and all(map(_is_count, v)), "a list of counts", False),
    "results": (lambda v: isinstance(v, Mapping) and all(map(_is_result, v.values())), "results of evaluations", False),
}
