"""Reading untrusted files: PyTorch's .pth (zip and legacy) and .safetensors. No code of theirs runs, and memory is bounded by the
length of the file.

`torch.load(weights_only=True)` and safetensors read the files. torch.load runs no code, but a file can make it use any amount of
memory and time: with `bytearray(10**11)`, a compressed record, four bytes that a stride of 0 repeats a trillion times, a tensor
whose shape makes its storage grow, or a tuple of tuples as a key. So `check_pickle` first goes through the instructions of a .pth
with names in place of objects.
"""
import json
import math
import os
import pickletools
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

MAX_PICKLED = 16 * 2 ** 20      # bytes of a checkpoint without its tensors; a base model with Adam has 0.1 MiB
MAX_NODES = 2 * 10 ** 6         # values, counted once for each reference
MAX_IN_A_TUPLE = 10 ** 4        # the same for a tuple, whose hash takes this number of steps
MAX_DEPTH = 50
MAGIC = 0x1950a86a20f9469cfc6c  # at the start of a file of torch.save before 1.6
SAFETENSORS_KEY = "vision_kan"  # in a .safetensors file's metadata: JSON of a checkpoint's entries besides the weights


class Foreign(Exception):
    """The file holds an object whose creation would run code; the message is the object's name."""


def read(path: Path) -> Any:
    """The content of a .pth or .safetensors file: nests of dict, list, tuple, Namespace, text, numbers, and dense tensors on the
    CPU. Paths become text, numpy's scalars Python's.

    Raises Foreign, or for a file that is damaged or not a checkpoint any other Exception, with the reason in its first line."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".safetensors":
            return _Tree(size).checked(_read_safetensors(path), "", 0)
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            _vet_zip(file, size) if is_zip else _vet_legacy(file, size)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("its instructions make no sense") from error
        file.seek(0)
        with torch.serialization.safe_globals([Namespace, *_STAND_INS]):    # DeiT and Vision-KAN store flags in a Namespace
            return _Tree(size).checked(torch.load(file, map_location="cpu", weights_only=True), "", 0)


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:         # it checks lengths, shapes and offsets itself
        text = (file.metadata() or {}).get(SAFETENSORS_KEY, "{}")
        if len(text) > MAX_PICKLED:
            raise ValueError(f"its metadata of {len(text)} characters do not describe a checkpoint")
        about = json.loads(text)
        if not isinstance(about, dict):
            raise ValueError(f"its metadata under {SAFETENSORS_KEY} are not a JSON object")
        return {**about, "model": {key: file.get_tensor(key) for key in file.keys()}}


# ---------------------------------------------------------------- the two layouts of torch.save
def _vet_zip(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in records.values()):
            raise ValueError("its records are compressed, which torch.save never does")
        if sum(info.file_size for info in records.values()) > size:
            raise ValueError("its records overlap")
        # Other readers could find other records: torch's reader ignores the case of names.
        if archive.comment or len({name.lower() for name in records}) != len(archive.infolist()) or \
                min((info.header_offset for info in records.values()), default=0):
            raise ValueError("it is an archive that can be read in two ways")
        roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise ValueError("it is an archive of something else")
        root = roots[0]
        if f"{root}/constants.pkl" in records:
            raise ValueError("it is a TorchScript program, not weights")
        if records[f"{root}/data.pkl"].file_size > MAX_PICKLED:
            raise ValueError("it holds too much besides tensors")

        def check_storage(key: str, nbytes: int) -> None:
            found = records[f"{root}/data/{key}"].file_size
            if found != nbytes:
                raise ValueError(f"storage {key} has {found} bytes where {nbytes} are declared")

        check_pickle(BytesIO(archive.read(f"{root}/data.pkl")), check_storage)
        damaged = archive.testzip()         # torch.load ignores the checksums that torch.save writes
        if damaged:
            raise ValueError(f"its record {damaged} is damaged")


def _vet_legacy(file: BinaryIO, size: int) -> None:
    """Check the five pickles: three of a header, the content, and a list of storages, whose lengths and values torch.load
    checks."""
    def none(key: str, nbytes: int) -> None:
        raise ValueError("a tensor stands where none belongs")

    declared: dict[str, int] = {}

    def fits(key: str, nbytes: int) -> None:
        if declared.setdefault(key, nbytes) != nbytes or sum(declared.values()) > size:
            raise ValueError("it declares more values than it has")

    for storage in (none, none, none, fits, none):
        check_pickle(file, storage)


# ---------------------------------------------------------------- the pickle
class _Global(NamedTuple):
    """A name, `module attribute`, that a pickle would import."""
    name: str


class _Tuple(NamedTuple):
    items: list[Any]
    size: int       # values in it, counted once for each reference


class _Storage(NamedTuple):
    nbytes: int
    dtype: torch.dtype


_OTHER = object()       # stands for any other value
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_OTHERS = ("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST")
_FIXED = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IMPORTING = ("INST", "OBJ", "STACK_GLOBAL", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
_DTYPES = {f"torch {name}": getattr(torch, name) for name in (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128")}
_STORAGES = {f"{module} {name}Storage": dtype for module in ("torch", "torch.cuda") for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}.items()}
_STORAGES["torch.storage UntypedStorage"] = torch.uint8
_TENSORS = tuple(f"torch._utils _rebuild_tensor{version}" for version in ("", "_v2", "_v3"))


class _NumpyType:
    """Replaces a file's numpy.dtype while it is read; for numbers and texts only."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"f[248]|[iu][1248]|b1|U\d{1,4}", code):
            raise ValueError(f"it has a numpy value of type {code[:20]!a}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: _NumpyType, values: bytes) -> Any:
    if len(values) != kind.dtype.itemsize:
        raise ValueError("it has a numpy value of another length")
    return np.ndarray((), kind.dtype, values).item()


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


# Types that launchers and training loops leave in a file's flags. A stand-in creates each value on any operating system.
_STAND_INS: list[tuple[Callable, str]] = [
    (_NumpyType, "numpy.dtype"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_windows_path if "Windows" in name else _posix_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"))]
# The functions that a pickle may call. Each creates a value no larger than its arguments.
_CALLED = (*_TENSORS, "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state", "argparse Namespace",
           "collections OrderedDict", "collections Counter", "torch Size", "torch device", "_codecs encode",
           "__builtin__ set", "builtins set", *(" ".join(name.rsplit(".", 1)) for _, name in _STAND_INS))


def check_pickle(file: BinaryIO, storage: Callable[[str, int], None]) -> None:
    """Go through a pickle's instructions without creating any object. Raises an exception for an instruction that torch.save
    never writes, and for one that would create more than the file holds.

    storage: called with the name and the bytes of each referenced storage."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    start = file.tell()

    def pop(count: int | None = None) -> list[Any]:
        """Remove and return the last `count` values, or those since the mark."""
        first = marks.pop() if count is None else len(stack) - count
        items = stack[first:]
        del stack[first:]
        return items

    value: Any
    for opcode, value, place in pickletools.genops(file):
        name = opcode.name
        assert place is not None        # genops knows the position in a file
        if place - start > MAX_PICKLED:
            raise ValueError("it holds too much besides tensors")
        if name in _LITERALS:
            if type(value) is int and value.bit_length() > 64 and value != MAGIC:      # many could collide as keys
                raise ValueError(f"it has a number of {value.bit_length()} bits")
            stack.append(value)
        elif name in _OTHERS:
            stack.append(_OTHER)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "GLOBAL":
            stack.append(_global(value))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE" or name in _FIXED:
            stack.append(_tuple(pop(_FIXED.get(name))))
        elif name in ("APPEND", "APPENDS"):
            pop(1 if name == "APPEND" else None)
        elif name in ("SETITEM", "SETITEMS"):
            for key in pop(2 if name == "SETITEM" else None)[::2]:
                if type(key) not in (str, int):
                    raise ValueError("a dictionary has a key that is neither text nor a number")
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = pop(2)
            if type(function) is not _Global or type(arguments) is not _Tuple or function.name not in _CALLED:
                raise ValueError("it calls something that is not a function")
            if function.name in _TENSORS:
                _check_tensor(*arguments.items)
            stack.append(_OTHER)
        elif name == "BUILD":
            pop(1)
        elif name == "BINPERSID":
            stack.append(_storage(pop(1)[0], storage))
        elif name in _IMPORTING:
            raise Foreign(value if type(value) is str else name)
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"torch.save never writes the instruction {name}")


def _global(text: str) -> _Global:
    if text in _CALLED or text in _DTYPES or text in _STORAGES:
        return _Global(text)
    if text.startswith("torch._utils _rebuild_"):
        raise ValueError(f"it holds a tensor that is not dense, {text.split(' ')[1]}")
    raise Foreign(text.replace(" ", "."))


def _tuple(items: list[Any]) -> _Tuple:
    size = 1 + sum(item.size if type(item) is _Tuple else 1 for item in items)
    if size > MAX_IN_A_TUPLE:
        raise ValueError("it has tuples of tuples without end")
    return _Tuple(items, size)


def _storage(persistent_id: _Tuple, storage: Callable[[str, int], None]) -> _Storage:
    """The storage of a tensor's values. persistent_id: ('storage', kind, key, device, n[, view])."""
    what, kind, key, _, count, *view = persistent_id.items
    if what != "storage" or type(kind) is not _Global or kind.name not in _STORAGES or type(key) is not str or \
            type(count) is not int or count < 0:
        raise ValueError("it refers to something other than a tensor's storage")
    dtype = _STORAGES[kind.name]
    storage(key, count * dtype.itemsize)
    if view and type(view[0]) is _Tuple:        # the legacy layout: a name, the index of the first value, the count
        _, start, length = view[0].items
        if not 0 <= start <= start + length <= count:
            raise ValueError(f"a part of storage {key} lies outside it")
        count = length
    return _Storage(count * dtype.itemsize, dtype)


def _check_tensor(storage: _Storage, offset: int, shape: _Tuple, stride: _Tuple, requires_grad: Any = None, hooks: Any = None,
                  dtype: _Global | None = None, attributes: Any = None) -> None:
    """Raises ValueError unless a tensor lies within its storage and has no more values than it."""
    numbers = [offset, *shape.items, *stride.items]
    if any(type(number) is not int or not 0 <= number < 2 ** 48 for number in numbers) or len(shape.items) != len(stride.items):
        raise ValueError("a tensor has an impossible shape")
    has = storage.nbytes // (_DTYPES[dtype.name] if type(dtype) is _Global else storage.dtype).itemsize
    count = math.prod(shape.items)
    last = offset + sum((n - 1) * step for n, step in zip(shape.items, stride.items)) if count else 0
    if count > has or count and last >= has:
        raise ValueError(f"a tensor of shape {tuple(shape.items)} is declared with {has} values")


# ---------------------------------------------------------------- the values
class _Tree:
    """Copies a file's content, in which a list may occur in many places or in itself, to a tree of bounded size.

    size: bytes of the file."""

    def __init__(self, size: int):
        self.nodes = MAX_NODES
        self.bytes = 8 * size + 2 ** 20     # allowed for tensors: a few may share a storage, but not a thousand

    def checked(self, value: Any, path: str, depth: int) -> Any:
        self.nodes -= 1
        if depth > MAX_DEPTH or self.nodes < 0:
            raise ValueError(f"{path or 'it'} is nested without end")
        if isinstance(value, Namespace):
            return Namespace(**self.checked(vars(value), path, depth))
        if isinstance(value, dict):
            return {self._key(key, path): self.checked(item, f"{path}.{key}" if path else str(key), depth + 1)
                    for key, item in value.items()}
        if isinstance(value, tuple):        # torch.Size, too
            return tuple(self.checked(item, path, depth + 1) for item in value)
        if isinstance(value, (list, set)):
            return [self.checked(item, path, depth + 1) for item in value]
        if isinstance(value, Tensor):
            self.bytes -= value.numel() * value.itemsize
            if self.bytes < 0:
                raise ValueError("its tensors are many times larger than the file")
            return value.detach()
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value)
        if type(value) is int and value.bit_length() > 64:
            raise ValueError(f"{path} is a number of {value.bit_length()} bits")
        if type(value) not in (str, int, float, bool, type(None), bytes):
            raise ValueError(f"{path or 'it'} is not a plain value")
        return value

    @staticmethod
    def _key(key: Any, path: str) -> str | int:
        if type(key) is str and not (key.isprintable() and len(key) < 1000):
            raise ValueError(f"{path or 'it'} has an entry with an unreadable name")
        if type(key) not in (str, int):     # possible for an OrderedDict, made from pairs
            raise ValueError(f"{path or 'it'} has a {type(key).__name__} for a key")
        return key
