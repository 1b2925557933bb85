"""Files of strangers: what is read, and that the vetting before it refuses what torch.load would let in."""
import io
import random
import resource
import socket
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from helpers import differences
from hostile_checkpoints import executing, hostile_files, repickled, saved
from torch import nn

from vision_kan.checkpoints import untrusted
from vision_kan.checkpoints.read import load_file
from vision_kan.common.errors import UserError


@pytest.fixture(scope="module")
def good():
    """What a run of one step saves."""
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    weights = dict(model.state_dict())
    return {"model": weights, "model_ema": weights, "optimizer": optimizer.state_dict(), "epoch": 1, "step": 1, "scaler": None,
            "args": {"lr": 1e-3, "opt_betas": [0.9, 0.99]}, "model_args": {"name": "m", "kwargs": {"depth": 3}}}


@pytest.fixture
def server():
    """A port that must get no connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:torch.quantize:UserWarning")
def test_a_thousand_hostile_files_are_refused_or_read_as_they_are(tmp_path, good, server):
    canary, port, kinds = tmp_path / "canary", server.getsockname()[1], Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, hostile in enumerate(hostile_files(good, canary, port, seed=1, count=1100)):
        path = hostile.write(tmp_path / f"{number}{hostile.suffix}")
        try:
            read = load_file(path)
            said = "read"
        except UserError as error:
            said = "refused"
            assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 400, hostile
        kinds[hostile.kind, said] += 1
        if said == "read":
            assert hostile.loads != "never" or read == {}, hostile      # an empty dictionary is refused by its users
            assert hostile.loads != "same" or not differences(read, good), hostile
        path.rmdir() if path.is_dir() else path.unlink()
        assert not canary.exists(), hostile
    for kind in ("would run code", "truncated (zip)", "truncated (legacy)", "truncated (safetensors)"):
        assert kinds[kind, "refused"] and not kinds[kind, "read"], kind
    assert kinds["a wrong entry", "read"] > 50      # refused by what they say, not by how they are written
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 20        # KiB


def test_torch_alone_reads_the_file(tmp_path, good, monkeypatch):
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: calls.append(kwargs) or load(*args, **kwargs))
    torch.save(good, tmp_path / "c.pth")
    assert not differences(load_file(tmp_path / "c.pth"), good)
    assert [call["weights_only"] for call in calls] == [True]
    (tmp_path / "c.pth").write_bytes(executing(saved(good), tmp_path / "canary", 1, random.Random(0), "os.system").content)
    with pytest.raises(UserError):
        load_file(tmp_path / "c.pth")
    assert len(calls) == 1          # not even asked


PLAIN = {"posix": (PurePosixPath("/a/b"), "/a/b"), "windows": (PureWindowsPath("c:/a"), "c:\\a"), "here": (Path("x"), "x"),
         "float64": (np.float64(70.5), 70.5), "float16": (np.float16(2), 2.0), "big-endian": (np.dtype(">f4").type(0.5), 0.5),
         "int": (np.int64(-3), -3), "byte": (np.uint8(200), 200), "switch": (np.bool_(True), True), "text": (np.str_("ab"), "ab")}


@pytest.mark.parametrize("legacy", [False, True])
def test_paths_and_numpys_scalars_become_plain(tmp_path, legacy):
    """DeiT's and MAE's launchers leave a PosixPath in `args`, many loops an np.float64 as their best accuracy."""
    content = {"args": Namespace(**{key: value for key, (value, _) in PLAIN.items()}), "best": [PLAIN["float64"][0]] * 2}
    (tmp_path / "c.pth").write_bytes(saved(content, legacy))
    read = untrusted.read(tmp_path / "c.pth")
    assert vars(read["args"]) == {key: plain for key, (_, plain) in PLAIN.items()} and read["best"] == [70.5, 70.5]
    assert [type(value) for value in vars(read["args"]).values()] == [type(plain) for _, plain in PLAIN.values()]


def test_names_of_other_versions_of_numpy_and_python(tmp_path):
    def older(pickle: bytes) -> bytes:
        return pickle.replace(b"numpy._core.multiarray", b"numpy.core.multiarray").replace(b"cpathlib\n", b"cpathlib._local\n")

    (tmp_path / "c.pth").write_bytes(repickled(saved({"x": np.float64(1.5), "p": PurePosixPath("a")}), older))
    assert untrusted.read(tmp_path / "c.pth") == {"x": 1.5, "p": "a"}


@pytest.mark.parametrize("value", [np.complex64(1), np.datetime64("2020-01-01"), np.longdouble(1), np.dtype("f8"), np.ones(3),
                                   np.void(b"ab")], ids=lambda value: type(value).__name__)
def test_other_values_of_numpys_are_refused(tmp_path, value):
    (tmp_path / "c.pth").write_bytes(saved({"x": value}))
    with pytest.raises((ValueError, untrusted.Foreign)):
        untrusted.read(tmp_path / "c.pth")


def _numpys(code: bytes, values: bytes) -> bytes:
    """A pickled numpy scalar of this type and these bytes."""
    text = b"X" + len(values).to_bytes(4, "little") + values
    return (b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX" + len(code).to_bytes(4, "little") + code + b"\x89\x88\x87R"
            b"c_codecs\nencode\n" + text + b"X\x06\x00\x00\x00latin1\x86R\x86R")


# What torch.load(weights_only=True) takes, or begins to make.
def _shared_tuple(levels: int) -> bytes:
    """((((x, x), (x, x)), ...), ...): 2^levels values, which hashing goes through one by one."""
    return b"K\x01q\x64" + b"".join(b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(100, 100 + levels))


def _archive(records: list[tuple[str, bytes]], before: bytes = b"", comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    file.write(before)
    with zipfile.ZipFile(file, "a" if before else "w") as archive:
        for name, content in records:
            archive.writestr(name, content)
        archive.comment = comment
    return file.getvalue()


def _records(whole: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _in_place_of_one(pickle: bytes) -> bytes:
    return repickled(saved({"x": 1}), lambda old: old.replace(b"K\x01", pickle))


WHOLE = saved({"x": torch.ones(3)})
RECORDS = _records(WHOLE)
ROOT = RECORDS[0][0].split("/")[0]
ODD = {
    "a tuple without end as a key": (_in_place_of_one(b"}" + _shared_tuple(40) + b"K\x01s"), "tuples without end"),
    "two records of a name": (_archive(RECORDS + [(f"{ROOT}/DATA.PKL", b"\x80\x02}.")]), "two ways"),
    "something before the archive": (_archive(RECORDS, before=b"PK\x03\x04" + bytes(100)), "two ways"),
    "a comment after the archive": (_archive(RECORDS, comment=b"PK\x05\x06" + bytes(18)), "something else"),
    "a note after the archive": (_archive(RECORDS, comment=b"note"), "two ways"),
    "two roots": (_archive(RECORDS + [("other/data.pkl", b"\x80\x02}.")]), "something else"),
    "a storage that is short": (_archive([(name, content[:4] if name.endswith("data/0") else content)
                                          for name, content in RECORDS]), "4 bytes where 12 are declared"),
    "a function for a value": (_in_place_of_one(b"ccollections\nOrderedDict\n"), "not a plain value"),
    "a storage's class called": (_in_place_of_one(b"ctorch\nFloatStorage\nK\x05\x85R"), "not a function"),
    "a pointer as a numpy value": (_in_place_of_one(_numpys(b"O8", b"AAAAAAAA")), "a numpy value of type 'O8'"),
    "a numpy value longer than its bytes": (_in_place_of_one(_numpys(b"U9999", b"ab")), "numpy value of another length"),
    "a numpy value of many fields": (_in_place_of_one(_numpys(b"f8,f8", b"a" * 16)), "a numpy value of type 'f8,f8'"),
    "a numpy type called as a function": (_in_place_of_one(b"cnumpy\ndtype\nK\x05\x85R"), None),
    "a path of numbers": (_in_place_of_one(b"cpathlib\nPosixPath\nK\x05\x85R"), None),
    "a number of 500 bits": (_in_place_of_one(b"\x8a\x40" + b"\x11" * 64), "a number of 509 bits"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_torch_would_take(tmp_path, what):
    content, reason = ODD[what]
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=reason):
        untrusted.read(tmp_path / "odd.pth")


def test_odd_values_that_are_in_checkpoints(tmp_path):
    """Written by older programs and other libraries; torch.load reads them, they come back as plain values."""
    content = {"set": {3}, "bytes": b"ab\xff", "device": torch.device("cpu"), "counter": Counter({30: 1}),
               "flags": Namespace(lr=1, more=Namespace(x=(1, 2))), "requires": torch.ones(2, requires_grad=True)}
    for legacy in (False, True):
        (tmp_path / "c.pth").write_bytes(saved(content, legacy))
        read = untrusted.read(tmp_path / "c.pth")
        assert not read.pop("requires").requires_grad
        assert read == {"set": [3], "bytes": b"ab\xff", "device": "cpu", "counter": {30: 1},
                        "flags": Namespace(lr=1, more=Namespace(x=(1, 2)))}
