"""Reads files of strangers: PyTorch's .pth (zip and legacy) and .safetensors. None of their code runs, and nothing takes
more memory than the file's own length allows.

`torch.load(weights_only=True)` runs no code either, but what it lets in takes what memory it likes (`bytearray(10**11)`,
a compressed record, four bytes that a stride of 0 repeats a trillion times), and releases that this program still runs
with read past a record's end. Here a pickle is a list of instructions for values: the few that `torch.save` writes, where
a name is a word of the table below and never an import.
"""
import json
import math
import os
import pickletools
import struct
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

MOST_PICKLED = 16 * 2 ** 20     # bytes of a checkpoint without its tensors; those of a base model with Adam take 0.1 MiB
MOST_NODES = 2 * 10 ** 6        # values in it, counted as often as they are referred to
MOST_NESTED = 50
MAGIC, PROTOCOL = 0x1950a86a20f9469cfc6c, 1001      # of torch.save before 1.6
SAFETENSORS_KEY = "vision_kan"      # of a .safetensors file's metadata: JSON of what a checkpoint says beside weights


class Foreign(Exception):
    """The file holds an object whose creation would run code; the text is its name."""


def read(path: Path) -> Any:
    """What a .pth or .safetensors file holds: nests of dict, list, tuple, Namespace, text, numbers, and dense tensors on
    the CPU, none of which shares memory with a larger whole that the file does not hold.

    Raises Foreign, and any other Exception, with a reason in its first line, for a file that is damaged or something else."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        return _Tree(size).checked(_read_safetensors(path), "", 0)
    with open(path, "rb") as file:
        try:
            found = _read_zip(file) if file.read(4) == b"PK\x03\x04" else _read_legacy(file, size)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("its instructions make no sense") from error
    return _Tree(size).checked(found, "", 0)


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:         # checks lengths, shapes and offsets against the file by itself
        text = (file.metadata() or {}).get(SAFETENSORS_KEY, "{}")
        if len(text) > MOST_PICKLED:
            raise ValueError(f"its metadata of {len(text)} characters describe no checkpoint")
        about = json.loads(text)
        if not isinstance(about, dict):
            raise ValueError(f"its metadata under {SAFETENSORS_KEY} are no JSON object")
        return {**about, "model": {key: file.get_tensor(key) for key in file.keys()}}


# ---------------------------------------------------------------- the two layouts of torch.save
class _Storage(NamedTuple):
    values: Tensor      # [n], of the storage's type


class _Kind(NamedTuple):
    """('storage', kind, key, device, n[, view]) in a pickle: where a tensor's values are."""
    dtype: torch.dtype
    key: str
    count: int

    @classmethod
    def of(cls, pid: Any) -> "_Kind":
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage" or type(pid[1]) is not _Word:
            raise ValueError("it refers to something that is no tensor's storage")
        key, count = pid[2], pid[4]
        if type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("a storage is described wrongly")
        dtype = torch.uint8 if pid[1].name == "torch.storage UntypedStorage" else _STORAGES.get(pid[1].name.split(" ")[1])
        if dtype is None:
            raise ValueError(f"{pid[1].name} is no dense storage")
        return cls(dtype, key, count)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in records.values()):
            raise ValueError("its records are compressed, as torch.save never leaves them")
        if sum(info.file_size for info in records.values()) > os.fstat(file.fileno()).st_size:
            raise ValueError("its records overlap")
        roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise ValueError("it is an archive of something else")
        root = roots[0]
        if f"{root}/constants.pkl" in records:
            raise ValueError("it is a TorchScript program, not weights")
        order = archive.read(f"{root}/byteorder").decode() if f"{root}/byteorder" in records else sys.byteorder
        if order != sys.byteorder:
            raise ValueError(f"it was written on a {order[:20]}-endian machine")
        found: dict[str, _Storage] = {}

        def storage(pid: Any) -> _Storage:
            kind = _Kind.of(pid)
            if kind.key not in found:
                info = records[f"{root}/data/{kind.key}"]
                if info.file_size != kind.nbytes:
                    raise ValueError(f"storage {kind.key} has {info.file_size} bytes where {kind.nbytes} are declared")
                data = torch.empty(kind.nbytes, dtype=torch.uint8)
                with archive.open(info) as record:          # checks the record's checksum at its end
                    _fill(record, data)
                found[kind.key] = _Storage(data.view(kind.dtype))
            values = found[kind.key].values
            if (values.dtype, len(values)) != (kind.dtype, kind.count):
                raise ValueError(f"storage {kind.key} is declared twice and differently")
            return found[kind.key]

        if records[f"{root}/data.pkl"].file_size > MOST_PICKLED:
            raise ValueError("it holds too much beside tensors")
        return _build(_instructions(BytesIO(archive.read(f"{root}/data.pkl"))), storage)


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """Three pickles that say what it is, the pickle, a list of storages, and each one's length and values."""
    file.seek(0)
    head = [_build(_instructions(file)) for _ in range(3)]
    if head[:2] != [MAGIC, PROTOCOL] or type(head[2]) is not dict:
        raise ValueError("it is no file of torch.save")
    if head[2].get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError("it was written on a machine with another order of bytes")
    found: dict[str, tuple[_Kind, Tensor]] = {}
    left = size

    def storage(pid: Any) -> _Storage:
        nonlocal left
        kind = _Kind.of(pid)
        if kind.key not in found:
            left -= kind.nbytes
            if left < 0:
                raise ValueError("it declares more values than it has")
            found[kind.key] = kind, torch.empty(kind.nbytes, dtype=torch.uint8)
        known, data = found[kind.key]
        if known != kind:
            raise ValueError(f"storage {kind.key} is declared twice and differently")
        values = data.view(kind.dtype)
        view = pid[5] if len(pid) > 5 else None
        if view is not None:
            _, start, count = view
            if not 0 <= start <= start + count <= kind.count:
                raise ValueError(f"a part of storage {kind.key} lies outside it")
            values = values[start:start + count]
        return _Storage(values)

    result = _build(_instructions(file), storage)
    keys = _build(_instructions(file))
    if type(keys) is not list or sorted(keys) != sorted(found):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        kind, data = found[key]
        if struct.unpack("<q" if sys.byteorder == "little" else ">q", file.read(8))[0] != kind.count:
            raise ValueError(f"storage {key} is not as long as declared")
        _fill(file, data)
    return result


def _fill(source: BinaryIO, data: Tensor) -> None:
    """All bytes of `data` from `source`, which a record ends after."""
    target = memoryview(data.numpy())
    place = 0
    while place < len(target):
        chunk = source.read(min(2 ** 20, len(target) - place))
        if not chunk:
            raise ValueError("it ends in the middle of a tensor")
        target[place:place + len(chunk)] = chunk
        place += len(chunk)


# ---------------------------------------------------------------- the pickle
class _Word(NamedTuple):
    """A name, `module attribute`, that a pickle would import."""
    name: str


class _Flags:
    """An argparse.Namespace under construction."""

    def __init__(self):
        self.values: dict[str, Any] = {}


def _instructions(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    start = file.tell()
    for opcode, value, place in pickletools.genops(file):
        if place - start > MOST_PICKLED:
            raise ValueError("it holds too much beside tensors")
        yield opcode.name, value


def _no_storage(pid: Any) -> _Storage:
    raise ValueError("a tensor stands where none belongs")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_LAST = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IMPORTING = ("INST", "OBJ", "STACK_GLOBAL", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")


def _build(instructions: Iterator[tuple[str, Any]], storage: Callable[[Any], _Storage] = _no_storage) -> Any:
    """The value that a pickle describes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for name, value in instructions:
        if name in _LITERALS:
            stack.append(value)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "GLOBAL":
            stack.append(_word(value))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _LAST:
            items = stack[-_LAST[name]:]
            del stack[-_LAST[name]:]
            stack.append(tuple(items))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            if type(stack[-1]) is not list:
                raise ValueError(f"{name} to what is no list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            if type(stack[-1]) is not dict:
                raise ValueError(f"{name} to what is no dictionary")
            stack[-1].update(_pairs(zip(items[::2], items[1::2], strict=True)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, word = stack.pop(), stack.pop()
            if type(word) is not _Word or type(arguments) is not tuple or word.name not in _MAKERS:
                raise ValueError("it calls what is no function")
            stack.append(_MAKERS[word.name](*arguments))
        elif name == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is _Flags and type(state) is dict:
                stack[-1].values |= state
            elif type(stack[-1]) is not dict:       # an OrderedDict's: the versions of a model's modules, not needed
                raise ValueError("it changes what has no attributes")
        elif name == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name in _IMPORTING:
            raise Foreign(value if type(value) is str else name)
        elif name != "PROTO":
            raise ValueError(f"the instruction {name} is none of torch.save's")
    raise ValueError("it ends in the middle")


def _pairs(pairs) -> dict[str | int, Any]:
    """A dictionary of them. Few kinds of key: numbers chosen to collide would make it slow beyond all bounds."""
    found = {}
    for key, value in pairs:
        if type(key) is not str and not (type(key) is int and abs(key) < 2 ** 31):
            raise ValueError(f"a dictionary has a {type(key).__name__} for a key")
        found[key] = value
    return found


def _word(text: str) -> _Word:
    if text in _MAKERS or text in _DTYPES or text == "torch.storage UntypedStorage" or \
            (text.split(" ")[0] in ("torch", "torch.cuda") and text.split(" ")[1] in _STORAGES):
        return _Word(text)
    if text.startswith("torch._utils _rebuild_"):
        raise ValueError(f"it holds a tensor that is not dense, {text.split(' ')[1]}")
    raise Foreign(text.replace(" ", "."))


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: Any = False,
            hooks: Any = None, attributes: Any = None) -> Tensor:
    values = storage.values
    for number in (offset, *shape, *stride):
        if type(number) is not int or not 0 <= number < 2 ** 48:
            raise ValueError("a tensor's shape is no shape")
    if math.prod(shape) > len(values):
        raise ValueError(f"a tensor of shape {shape} is declared with {len(values)} values")
    if attributes:
        raise ValueError("it holds a tensor with attributes")
    return values.as_strided(shape, stride, offset)         # checks the bounds


def _typed_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: Any,
                  hooks: Any, dtype: _Word, attributes: Any = None) -> Tensor:
    return _tensor(_Storage(storage.values.view(_DTYPES[dtype.name])), offset, shape, stride, attributes=attributes)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    if type(data) is not Tensor:
        raise ValueError("it holds a parameter that is no tensor")
    return data


def _bytes(text: str, encoding: str) -> bytes:
    """Python 2 and 3 agree on bytes only in this detour."""
    if encoding != "latin1":
        raise ValueError(f"bytes as {encoding[:20]}")
    return text.encode("latin1")


_DTYPES = {f"torch {name}": getattr(torch, name) for name in (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128")}
_STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
             "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
             "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
             "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128}
# What a pickle may call. Each makes a new plain value of its arguments.
_MAKERS: dict[str, Callable] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _typed_tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "collections OrderedDict": lambda pairs=(): _pairs(pairs),
    "collections Counter": lambda counts=None: _pairs((counts or {}).items()),
    "argparse Namespace": _Flags,
    "torch Size": lambda sizes=(): tuple(sizes),
    "torch device": lambda kind, index=None: kind if index is None else f"{kind}:{index}",
    "_codecs encode": _bytes,
    "__builtin__ set": lambda items=(): list(items),
    "builtins set": lambda items=(): list(items),
}


# ---------------------------------------------------------------- the values
class _Tree:
    """Copies what a file describes, where the same list may stand in many places or in itself, into a tree of bounded size.

    size: bytes of the file."""

    def __init__(self, size: int):
        self.nodes = MOST_NODES
        self.bytes = 8 * size + 2 ** 20     # of tensors: some may share a storage, a thousand may not

    def checked(self, value: Any, path: str, depth: int) -> Any:
        self.nodes -= 1
        if depth > MOST_NESTED or self.nodes < 0:
            raise ValueError(f"{path or 'it'} is nested without end")
        kind = type(value)
        if kind is _Flags:
            return Namespace(**self.checked(value.values, path, depth))
        if kind is dict:
            return {self._key(key, path): self.checked(item, f"{path}.{key}" if path else str(key), depth + 1)
                    for key, item in value.items()}
        if kind in (list, tuple):
            return kind([self.checked(item, path, depth + 1) for item in value])
        if kind is Tensor:
            self.bytes -= value.numel() * value.itemsize
            if self.bytes < 0:
                raise ValueError("its tensors are many times larger than the file")
        elif kind is _Word and value.name in _DTYPES:
            return value.name.replace(" ", ".")
        elif kind is int and value.bit_length() > 64:
            raise ValueError(f"{path} is a number of {value.bit_length()} bits")
        elif kind not in (str, int, float, bool, type(None), bytes):
            raise ValueError(f"{path or 'it'} is no plain value")
        return value

    @staticmethod
    def _key(key: str | int, path: str) -> str | int:
        if type(key) is str and not (key.isprintable() and len(key) < 1000):
            raise ValueError(f"{path or 'it'} has an entry with an unreadable name")
        return key
