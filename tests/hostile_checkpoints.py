"""Hostile checkpoints: a seeded generator of files that are cut off, damaged, foreign, too large, or that would run code.
The tests take some, benchmarks/fuzz_checkpoints.py a thousand."""
import io
import json
import os
import pickle
import random
import struct
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

HUGE = 2 ** 38      # float32 values: a terabyte


@dataclass(frozen=True)
class Hostile:
    """kind: a line of the table. content: None for a folder. loads: "never", "same" (a program may take it if it finds what
    the good file holds), or "any" (the layout has no checksum, so a changed weight is a weight)."""
    kind: str
    what: str
    content: bytes | None
    loads: str = "never"
    suffix: str = ".pth"

    def write(self, path: Path) -> Path:
        if self.content is None:
            path.mkdir()
        else:
            path.write_bytes(self.content)
        return path


def saved(content: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


# ---------------------------------------------------------------- damage
def truncated(wholes: dict[str, bytes], random: random.Random) -> Hostile:
    form = random.choice(list(wholes))
    whole, percent = wholes[form], random.randrange(100)
    return Hostile(f"truncated ({form})", f"{percent} %", whole[:len(whole) * percent // 100], suffix=_suffix(form))


def flipped(wholes: dict[str, bytes], random: random.Random) -> Hostile:
    form = random.choice(list(wholes))
    content = bytearray(wholes[form])
    # half of the flips near the ends, where the structure is: weights fill most of a file
    places = [random.choice([random.randrange(len(content)), random.randrange(4000), len(content) - 1 - random.randrange(8000)])
              for _ in range(random.choice((1, 1, 3)))]
    for place in places:
        content[place] ^= 1 << random.randrange(8)
    return Hostile(f"bit-flipped ({form})", f"at {places}", bytes(content), "same" if form == "zip" else "any", _suffix(form))


def _suffix(form: str) -> str:
    return ".safetensors" if form == "safetensors" else ".pth"


def something_else(wholes: dict[str, bytes], random: random.Random) -> Hostile:
    def archive(**files: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as made:
            for name, content in files.items():
                made.writestr(name.replace("__", "/"), content)
        return file.getvalue()

    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
    choices: dict[str, bytes | None] = {
        "an empty file": b"", "a folder": None, "a zip of texts": archive(a=b"hello", b__c=b"text"),
        "a zip with data.pkl": archive(x__data=b"text", **{"x__data.pkl": b"no pickle"}), "an empty zip": archive(),
        "an HTML page": b"<html><body>404 Not Found</body></html>\n" * 20, "noise": random.randbytes(5000),
        "a picture": b"\x89PNG\r\n\x1a\n" + random.randbytes(500), "zeros": bytes(4096), "a numpy array": _npy(),
        "a TorchScript program": scripted.getvalue(), "a list": saved([1, 2]), "a tensor": saved(torch.ones(3)),
        "a text": saved("text"), "a number": saved(5, legacy=True), "nothing": saved({}), "a pickle": pickle.dumps({"model": {}})}
    what = random.choice(list(choices))
    return Hostile("something else", what, choices[what])


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(10))
    return file.getvalue()


# ---------------------------------------------------------------- code
def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return _global(module, name) + _tuple(*arguments) + b"R"


def _payloads(canary: Path, port: int) -> dict[str, bytes]:
    """Instructions that leave one value on the stack and, read without care, a file or a connection."""
    shell = f"mkdir -p {canary}"
    python = f"__import__('os').makedirs({str(canary)!r}, exist_ok=True)"
    environment = f"__import__('os').environ.__setitem__('HOSTILE', {str(canary)!r}) or {python}"
    inner = pickle.dumps(_Call(os.makedirs, str(canary), 511, True), protocol=2)
    argument, words = _text(shell), b"]" + _text("mkdir") + b"a" + _text("-p") + b"a" + _text(str(canary)) + b"a"
    module = _call("builtins", "__import__", _text("os"))
    return {
        "os.system": _call("os", "system", argument),
        "posix.system": _call("posix", "system", argument),
        "subprocess.Popen": _call("subprocess", "Popen", words),
        "subprocess.run": _call("subprocess", "run", words),
        "eval": _call("builtins", "eval", _text(python)),
        "exec": _call("builtins", "exec", _text(python)),
        "exec of Python 2": _call("__builtin__", "eval", _text(python)),
        "the environment": _call("builtins", "eval", _text(environment)),
        "os.makedirs": _call("os", "makedirs", _text(str(canary)), b"M\xff\x01", b"\x88"),
        "getattr": _call("builtins", "getattr", module, _text("system")) + _tuple(argument) + b"R",
        "operator": _call("operator", "methodcaller", _text("system"), argument) + _tuple(module) + b"R",
        "functools.partial": _call("functools", "partial", _global("os", "system"), argument) + b")R",
        "a dotted name": b"\x80\x04" + _text("torch") + _text("os.system") + b"\x93" + _tuple(argument) + b"R",
        "STACK_GLOBAL": _text("os") + _text("system") + b"\x93" + _tuple(argument) + b"R",
        "INST": b"(" + argument + b"ios\nsystem\n",
        "OBJ": b"(" + _global("subprocess", "Popen") + words + b"o",
        "NEWOBJ": _global("subprocess", "Popen") + b")\x81" + b"}b0" + _call("os", "system", argument),
        "map": _call("builtins", "list", _call("builtins", "map", _global("os", "system"), _tuple(argument))),
        "BUILD": _call("argparse", "Namespace") + b"}" + _text("__setstate__") + _global("os", "system") + b"sb"
                 + argument + b"b",
        "a pickle in the pickle": _call("pickle", "loads", b"B" + struct.pack("<I", len(inner)) + inner),
        "torch.load": _call("torch", "load", _text(str(canary) + ".inner"), b"N", b"N"),
        "a socket": _call("socket", "create_connection", _tuple(_text("127.0.0.1"), b"M" + struct.pack("<H", port)))}


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def repickled(whole: bytes, edit) -> bytes:
    """A zip checkpoint whose pickle is edit(pickle)."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, edit(content) if entry.filename.endswith("/data.pkl") else content)
    return out.getvalue()


def executing(whole: bytes, canary: Path, port: int, random: random.Random, what: str | None = None) -> Hostile:
    """Otherwise the good checkpoint."""
    payloads = _payloads(canary, port)
    what = what or random.choice(list(payloads))
    payload = payloads[what]
    place = random.choice(["aside", "entry", "in args", "legacy", "bare"])
    if place == "aside":            # thrown away after it ran
        content = repickled(whole, lambda old: old[:-1] + payload + b"0.")
    elif place == "entry":
        content = repickled(whole, lambda old: old[:-1] + _text("zzz") + payload + b"s.")
    elif place == "in args":
        content = repickled(whole, lambda old: old[:-1] + _text("args") + b"}" + _text("lr") + payload + b"ss.")
    elif place == "legacy":         # where torch expects only a number
        content = b"\x80\x02" + payload + b"0" + pickle.dumps(0x1950a86a20f9469cfc6c, 2)[2:] + b"\x80\x02M\xe9\x03."
    else:
        content = b"\x80\x02" + payload + b"."
    return Hostile("would run code", f"{what}, {place}", content)


# ---------------------------------------------------------------- too large
def too_large(whole: bytes, random: random.Random) -> Hostile:
    def instead_of(value: bytes) -> bytes:
        return repickled(whole, lambda old: old[:-1] + _text("zzz") + value + b"s.")

    def packed() -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb, zipfile.ZipFile(io.BytesIO(
                saved({"model": {"w": torch.zeros(2 ** 24)}}))) as zeros:
            for entry in zeros.infolist():
                bomb.writestr(entry.filename, zeros.read(entry))
        return file.getvalue()

    def packed_pickle() -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("x/data.pkl", b"\x80\x02]" + b"(" * 2 ** 26 + b".")
        return file.getvalue()

    def declared(count: int) -> bytes:
        return _tuple(_text("storage"), _global("torch", "FloatStorage"), _text("0"), _text("cpu"),
                      b"\x8a\x06" + count.to_bytes(6, "little")) + b"Q"

    def tensor(shape: bytes, stride: bytes, count: int) -> bytes:
        return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(
            declared(count), b"K\x00", shape, stride, b"\x89", _global("collections", "OrderedDict") + b")R") + b"R"

    number = b"\x8a\x06" + HUGE.to_bytes(6, "little")
    legacy = saved({"w": torch.ones(10)}, legacy=True)
    laughs = b"]" + b"q\x01" + b"".join(b"](" + b"h" + bytes([i]) * 1 + b"".join(b"h" + bytes([i]) for _ in range(9)) + b"eq"
                                        + bytes([i + 1]) for i in range(1, 40))
    endless = {"model": {}}
    endless["again"] = endless
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    collisions = {i * (2 ** 61 - 1): None for i in range(1, 3000)}
    choices = {
        "stride 0": saved({"model": {"w": torch.zeros(1).expand(HUGE)}}),
        "strides 0": saved({"model": {"w": torch.zeros(4).as_strided((2 ** 20, 2 ** 20), (0, 0))}}),
        "overlapping strides": saved({"model": {"w": torch.zeros(2 ** 12).as_strided((2 ** 11, 2 ** 11), (1, 1))}}),
        "a storage longer than its record": instead_of(tensor(_tuple(number), _tuple(b"K\x01"), HUGE)),
        "a tensor outside its storage": instead_of(tensor(_tuple(b"K\x10"), _tuple(b"J\xff\xff\xff\x7f"), 10)),
        "a legacy storage longer than the file": legacy.replace(b"K\x0a", b"J\x00\x00\x00\x7f", 1),
        "bytearray": instead_of(_call("__builtin__", "bytearray", number)),
        "torch.Tensor": instead_of(_call("torch", "Tensor", number)),
        "a storage by its class": instead_of(_call("torch", "FloatStorage", number)),
        "range as a list": instead_of(_call("__builtin__", "list", _call("__builtin__", "range", number))),
        "text repeated": instead_of(_call("operator", "mul", _text("x"), number)),
        "a packed archive": packed, "a packed pickle": packed_pickle,
        "a memo far away": instead_of(b"Nr" + struct.pack("<I", 2 ** 32 - 1)),
        "a text without end": instead_of(b"X" + struct.pack("<I", 2 ** 32 - 1) + b"x"),
        "a number of a million digits": instead_of(b"\x8b" + struct.pack("<I", 2 ** 18) + b"\x7f" * 2 ** 18),
        "a meta tensor": saved({"model": {"w": torch.zeros(HUGE, device="meta")}}),
        "lists of lists of lists": instead_of(laughs), "a list in itself": saved(endless),
        "nested deep": saved({"model": {}, "x": deep}),
        "keys that collide": saved({"model": {}, "x": collisions}),
    }
    what = random.choice(list(choices))
    content = choices[what]
    loads = "any" if what == "a memo far away" else "never"     # a memo that is a dictionary takes no more memory for it
    return Hostile("too large", what, content() if callable(content) else content, loads)


def safetensors_lies(whole: bytes, random: random.Random) -> Hostile:
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8:8 + length]), whole[8 + length:]
    first, second = [key for key in header if key != "__metadata__"][:2]

    def with_header(change) -> bytes:
        copy = json.loads(json.dumps(header))
        change(copy)
        text = json.dumps(copy).encode()
        return struct.pack("<Q", len(text)) + text + data

    def about(text: str) -> bytes:
        return with_header(lambda h: h.update({"__metadata__": {"vision_kan": text}}))

    choices = {
        "a header of 2^63 bytes": struct.pack("<Q", 2 ** 63) + whole[8:], "a header of 0 bytes": bytes(8) + whole[8:],
        "a header longer than the file": struct.pack("<Q", len(whole)) + whole[8:],
        "a header that is no JSON": struct.pack("<Q", 50) + b"x" * 50 + data, "only a length": whole[:8],
        "a shape of a terabyte": with_header(lambda h: h[first].update(shape=[HUGE])),
        "a shape that overflows": with_header(lambda h: h[first].update(shape=[2 ** 33, 2 ** 33])),
        "a negative shape": with_header(lambda h: h[first].update(shape=[-1])),
        "offsets outside": with_header(lambda h: h[first].update(data_offsets=[0, 2 ** 40])),
        "offsets that overlap": with_header(lambda h: h[first].update(data_offsets=h[second]["data_offsets"])),
        "offsets the wrong way": with_header(lambda h: h[first].update(data_offsets=h[first]["data_offsets"][::-1])),
        "an unknown type": with_header(lambda h: h[first].update(dtype="F99")),
        "metadata that are no JSON": about("{{"), "metadata that are a list": about("[1]"),
        "metadata nested deep": about('{"a":' * 2000 + "1" + "}" * 2000),
        "metadata with a long number": about('{"a":' + "9" * 5000 + "}"),
        "metadata with a wrong model": about('{"model_args": {"name": 5}}')}
    what = random.choice(list(choices))
    # for its weights alone it will do
    return Hostile("safetensors that lie", what, choices[what], "any" if what == "metadata with a wrong model" else "never",
                   ".safetensors")


# ---------------------------------------------------------------- a good file with something wrong in it
_ABSURD = [None, 5, -5, 10 ** 30, 2.5, float("nan"), float("inf"), "x", "\ud800", [], [1], {}, {"x": 1}, True, torch.ones(2),
           b"x", Namespace(x=1), [[1], ["a"]], {"state": {}, "param_groups": []}, {1: 2}]


def wrong_entry(good: dict[str, Any], random: random.Random) -> Hostile:
    """"any" where the key is not needed by every purpose: then a run may end well."""
    key = random.choice(["args", "model_args", "class_names", "optimizer", "epoch", "lr_scheduler", "scaler", "model",
                         "model_ema", "max_accuracy", "step", "position", "losses", "skipped", "unreadable", "results"])
    value = random.choice(_ABSURD)
    return Hostile("a wrong entry", f"{key}: {str(value)[:40]!a}", saved({**good, key: value}), "any")


def absurd_argument(good: dict[str, Any], random: random.Random) -> Hostile:
    """In `args` or the arguments of the model."""
    described = good["model_args"]
    name, value = random.choice([
        ("num_classes", 10 ** 9), ("depth", 10 ** 6), ("depth", 10 ** 9), ("embed_dim", 10 ** 6), ("hdim_kan", 10 ** 8),
        ("hdim_kan", [8, 10 ** 8]), ("hdim_kan", [8, "x"]), ("hdim_kan", [-8, 8]), ("hdim_kan", [[8], [8]]),
        ("img_size", 10 ** 6), ("kan_grid_points", 10 ** 9), ("num_heads", 0), ("num_classes", -1), ("depth", "x"),
        ("no_such_argument", 1), ("pretrained", True), ("checkpoint_path", "/etc/passwd"), ("mlp_layer", "os.system"),
        ("pretrained_cfg", {"file": "/etc/passwd"}), ("cache_dir", "/"), ("norm_layer", "x"), ("depth", torch.ones(10))])
    wrong = {**described, "kwargs": {**described["kwargs"], name: value}}
    return Hostile("absurd arguments of the model", f"{name}={str(value)[:20]}", saved({**good, "model_args": wrong}), "any")


def absurd_flag(good: dict[str, Any], random: random.Random) -> Hostile:
    name, value = random.choice([
        ("model", "no_such_model"), ("model", "hf-hub:nobody/nothing"), ("model", 5), ("hdim_kan", 10 ** 9),
        ("hdim_kan", [10 ** 9]), ("hdim_kan", [0, 8]), ("hdim_kan", [[8]]),
        ("input_size", 10 ** 9),
        ("epochs", 10 ** 12), ("epochs", -1), ("batch_size", 0), ("lr", float("nan")), ("opt", "no_such_optimizer"),
        ("sched", "x"), ("aa", "rand" * 1000), ("opt_betas", [1, 2, 3]), ("crop_padding", 10 ** 9), ("recount", 10 ** 9),
        ("seed", -1), ("grad_accum", 10 ** 12), ("smoothing", 50), ("model_ema_decay", 7), ("drop_path", "x")])
    flags = dict(good["args"]) | {name: value}
    return Hostile("absurd flags", f"{name}={str(value)[:20]}", saved({**good, "args": flags}), "any")


def wrong_weights(good: dict[str, Any], random: random.Random) -> Hostile:
    weights = {key: value.clone() for key, value in good["model"].items()}
    key = random.choice(list(weights))
    how = random.choice([
        "nan", "inf", "shape", "missing", "extra", "complex", "bool", "int", "sparse", "quantized", "text", "empty", "none",
        "number for a key", "line break in a key", "surrogate in a key", "huge in float64", "huge and empty"])
    value = weights.pop(key)
    if how in ("nan", "inf"):
        value.view(-1)[random.randrange(value.numel())] = float(how)
        weights[key] = value
    elif how == "extra":
        weights |= {key: value, f"{key}.more": value}
    elif how == "number for a key":
        weights |= {key: value, 7: value}
    elif how == "line break in a key":
        weights |= {key: value, "a\nb\x1b[2J": value}
    elif how == "surrogate in a key":
        weights |= {key: value, "a\ud800": value}
    elif how != "missing":
        weights[key] = {
            "shape": lambda: torch.zeros(*value.shape, 2), "complex": lambda: value.to(torch.complex64),
            "bool": lambda: value > 0, "int": lambda: value.to(torch.int64), "sparse": lambda: value.to_sparse(),
            "quantized": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "text": lambda: "text",
            "empty": lambda: torch.zeros(0), "none": lambda: None, "huge in float64": lambda: value.double() + 1e300,
            "huge and empty": lambda: torch.zeros(0, 2 ** 40)}[how]()
    return Hostile("wrong weights", f"{how}: {key}", saved({**good, "model": weights}), "any")


def wrong_optimizer(good: dict[str, Any], random: random.Random) -> Hostile:
    """What only the first step would notice."""
    copy = pickle.loads(pickle.dumps(good["optimizer"]))
    state, groups = copy["state"], copy["param_groups"]
    index = random.choice(list(state))
    how = random.choice(["nan", "shape", "missing", "type", "betas", "lr", "params", "fused", "state list", "index", "ema shape"])
    change = {"nan": lambda: state[index]["exp_avg"].fill_(float("nan")),
              "shape": lambda: state[index].update(exp_avg=torch.zeros(3, 5, 7)),
              "missing": lambda: state[index].pop("exp_avg_sq"),
              "type": lambda: state[index].update(step="x"), "betas": lambda: groups[0].update(betas="x"),
              "lr": lambda: groups[0].update(lr=float("nan")), "params": lambda: groups[0].update(params=[0]),
              "fused": lambda: groups[0].update(fused="x"), "state list": lambda: copy.update(state=[1, 2]),
              "index": lambda: state.update({10 ** 6: state[index]}), "ema shape": lambda: None}[how]
    change()
    content = {**good, "optimizer": copy}
    if how == "ema shape":
        content["model_ema"] = {key: torch.zeros(2) for key in good["model"]}
    return Hostile("wrong optimizer", f"{how} at {index}", saved(content), "any")


# ---------------------------------------------------------------- all
def hostile_files(good: dict[str, Any], canary: Path, port: int, seed: int, count: int) -> Iterator[Hostile]:
    """`count` files from a good checkpoint of a run, of all kinds in turn; the same for the same seed and content.

    canary: a folder that comes to be where code runs. port: of 127.0.0.1, connected to where code runs."""
    whole = saved(good)
    weights = {key: value.contiguous() for key, value in good["model"].items()}
    about = json.dumps({key: good[key] for key in ("model_args", "args")})
    wholes = {"zip": whole, "legacy": saved(good, legacy=True),
              "safetensors": safetensors_bytes(weights, {"vision_kan": about})}
    generator = random.Random(seed)
    kinds = [lambda: truncated(wholes, generator), lambda: flipped(wholes, generator), lambda: something_else(wholes, generator),
             lambda: executing(whole, canary, port, generator), lambda: too_large(whole, generator),
             lambda: safetensors_lies(wholes["safetensors"], generator), lambda: wrong_entry(good, generator),
             lambda: absurd_argument(good, generator), lambda: absurd_flag(good, generator),
             lambda: wrong_weights(good, generator), lambda: wrong_optimizer(good, generator)]
    for number in range(count):
        yield kinds[number % len(kinds)]()
