"""Printing and formatting: lines on rank 0, names, JSON. Imports neither torch nor numpy: process groups, tensors and numpy's
numbers exist only if a program has imported them."""
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vision_kan.common.console import readers_may_leave


def say(*words, **kwargs) -> None:
    """Print on rank 0 only."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_rank() == 0:
        with readers_may_leave():
            print(*words, **{"flush": True, **kwargs})


def warn(*sentences: str) -> None:
    """Print warnings on stderr of rank 0, except empty ones."""
    for sentence in filter(None, sentences):
        say(f"warning: {sentence}", file=sys.stderr)


def printable(name: str, most: int = 100_000) -> str:
    """A file's name, or its last `most` characters, on one line in printable characters."""
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= most else f"...{name[3 - most:]}"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON for a UTF-8 file. Letters are not escaped, but bytes of file names that are not UTF-8 are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")     # JSON escapes lone surrogates in the same way


def one_or_two(sides: Sequence[Any]) -> Any:
    """Height and width in the form of `args.input_size`: one number for a square, else a list of two. `timm.layers.to_2tuple` is
    the inverse."""
    return sides[0] if all(type(side) is int and side == sides[0] for side in sides) else list(sides)


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a size in the form of `args.input_size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def shown_size(size: int | Sequence[int], between: str = " ") -> str:
    """A size in the form of --input-size, or with another separator."""
    return between.join(map(str, [size] if isinstance(size, int) else size))


def to_builtin_types(value: Any) -> Any:
    """`value` with tuples, mappings and numpy numbers converted to built-in types, so that any program can load a checkpoint with
    `torch.load(weights_only=True)` without an allow-list."""
    if isinstance(value, Mapping):
        return {key: to_builtin_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtin_types(item) for item in value]
    if _is(value, "numpy", "generic"):
        return value.item()
    if isinstance(value, (str, int, float, bool, type(None))) or _is(value, "torch", "Tensor"):
        return value
    return str(value)


def _is(value: object, module: str, name: str) -> bool:
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))
