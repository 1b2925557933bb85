"""Reading files of checkpoints and folders of timm's layout."""
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vision_kan.checkpoints import untrusted
from vision_kan.checkpoints.shipped import shipped
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.text import one_or_two

# In a folder of timm's layout: its description, and the names that its weights may have. The first that exists is read.
FOLDER_CONFIG, FOLDER_WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
BEST = ("best_checkpoint.pth", "best_ema_checkpoint.pth")


def load_file(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint (.pth and the like), a .safetensors file or a folder of timm's layout, on the CPU. Never runs
    code of the file.

    Besides tensors and built-in types it accepts `argparse.Namespace`, which DeiT and the original Vision-KAN store under `args`,
    and paths and numpy scalars, which become built-in types. Raises UserError for anything else."""
    path = Path(path)
    if (path / FOLDER_CONFIG).is_file():
        return _load_folder(path)
    if not path.is_file():
        what = f"is a folder without {FOLDER_CONFIG}" if path.is_dir() else \
            "is not a regular file" if path.exists() else "does not exist"
        names = "" if path.exists() else ", ".join(shipped())
        raise UserError(f"checkpoint {path} {what}: check the path"
                        + (f", or name weights that come with this code ({names})" if names else ""))
    try:
        content = untrusted.read(path)
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except untrusted.Foreign as error:
        raise UserError(f"checkpoint {path} holds more than tensors and plain values ({one_line(error)}): refused, "
                        "because reading it could run its code; get it from its source again") from error
    except Exception as error:      # a damaged file makes its reader raise nearly anything
        raise UserError(f"checkpoint {path} cannot be read, it is damaged or not a checkpoint ({one_line(error)}): "
                        "copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def weights_file(path: Path) -> Path:
    """The file whose weights `load_file` reads: of a folder of timm's layout the one in it, else `path` itself. Raises UserError
    for such a folder without weights."""
    if not (path / FOLDER_CONFIG).is_file():
        return path
    found = [path / name for name in FOLDER_WEIGHTS if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} has a {FOLDER_CONFIG} but no weights ({' or '.join(FOLDER_WEIGHTS)}): copy or download it "
                        "again")
    return found[0]


def _load_folder(folder: Path) -> dict[str, Any]:
    """A model in timm's layout, as on the Hub and from tools/export.py: weights and a config.json that describes them."""
    content = load_file(weights_file(folder))
    if "model_args" in content:     # in our own exports the weights' file says more than config.json
        return content
    try:
        text = (folder / FOLDER_CONFIG).read_bytes()[:untrusted.MAX_PICKLED]
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
    state = content["model"] if isinstance(content.get("model"), dict) else content
    return {"model": {key: value for key, value in state.items() if isinstance(value, Tensor)},
            "model_args": {"name": name, "kwargs": kwargs},
            "args": {key: value for key, value in flags.items() if value is not None},
            "class_names": names if are_names(names) else None}


def are_names(value: object) -> bool:
    """Whether a value is a list of strings. They may hold any character, as names of folders do: print them with `printable`."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
