"""Checkpoints that are read and written."""
import ast
import builtins
import errno
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import weakref
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import RELEASED, ROOT, differences, epochs, forked, needs_released, sentence
from safetensors.torch import save_file

from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.layouts import in_our_layout
from vision_kan.checkpoints.read import CHECKPOINT, PREVIOUS, load_file
from vision_kan.checkpoints.write import save_checkpoint, save_safetensors, saved_checkpoints
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write, replacing, write_text
from vision_kan.common.text import to_builtin_types

W = torch.arange(6.).view(2, 3)


# ---------------------------------------------------------------- reading
def test_reads_what_it_saves_and_the_released_layout(tmp_path):
    torch.save({"model": {"w": W}, "epoch": 3, "args": Namespace(model="m", lr=[1, 2])}, tmp_path / "deit.pth")
    checkpoint = Checkpoint.open(tmp_path / "deit.pth")
    assert checkpoint.epoch == 3 and torch.equal(checkpoint.weights()["w"], W)
    assert checkpoint.flags == {"model": "m", "lr": [1, 2]}

    torch.save(OrderedDict(w=W), tmp_path / "bare.pth")
    assert torch.equal(Checkpoint.open(str(tmp_path / "bare.pth")).weights()["w"], W)

    save_file({"w": W}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["model"]["w"], W)

    torch.save({"model": {"w": W}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_file(tmp_path / "old.pth")["model"]["w"], W)


@needs_released
def test_reads_a_file_of_the_original_code():
    checkpoint = Checkpoint.open(RELEASED)
    assert {"model", "model_ema", "optimizer", "args"} <= set(checkpoint.state)
    assert checkpoint.flags["model"].endswith("_KAN")


def test_weights_and_args_of_odd_checkpoints():
    assert set(Checkpoint("f", {"model": {"w": W}, "model_ema": {"v": W}}).weights("model_ema")) == {"v"}
    assert set(Checkpoint("f", {"w": W, "epoch": 1}).weights()) == {"w"}
    for empty in ({"epoch": 1}, {"model": {}}, {}):
        assert "file.pth" in sentence(Checkpoint("file.pth", empty).weights)
    assert "'epoch'" in sentence(Checkpoint("file.pth", {"epoch": 1}).weights)
    for odd in ({}, {"args": None}, {"args": [1]}, {"args": "text"}):
        assert Checkpoint("f", odd).flags == {}


def test_weights_are_looked_at_once(monkeypatch, tmp_path):
    torch.save({"model": {"w": W, "n": torch.tensor(3)}, "model_ema": {"w": W}}, tmp_path / "c.pth")
    looks, look = [], torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: looks.append(tensor) or look(tensor))
    checkpoint = Checkpoint.open(tmp_path / "c.pth")
    for _ in range(3):
        assert set(checkpoint.weights()) == {"w", "n"} and set(checkpoint.weights("model_ema")) == {"w"}
    assert len(looks) == 3


def test_what_is_freed_and_what_stays():
    content = {"model": {"w": W.clone()}, "optimizer": {"state": {0: W.clone()}}, "epoch": 4, "losses": [1.0],
               "args": Namespace(lr=0.1), "class_names": ["a"]}
    tensors = [weakref.ref(content["model"]["w"]), weakref.ref(content["optimizer"]["state"][0])]
    checkpoint = Checkpoint("c.pth", content)
    checkpoint.weights()
    del content
    assert all(tensor() is not None for tensor in tensors)
    checkpoint.free()
    assert not any(tensor() is not None for tensor in tensors)
    assert checkpoint.state == checkpoint.about == {"epoch": 4, "args": {"lr": 0.1}, "class_names": ["a"]}
    assert (checkpoint.path, checkpoint.epoch, checkpoint.flags) == ("c.pth", 4, {"lr": 0.1})
    assert "no weights" in sentence(checkpoint.weights)


def test_of_two_networks_one_is_kept():
    """DINO's teacher and student: the one that is not chosen must not stay in memory."""
    content = {"teacher": {"w": W.clone()}, "student": {"w": W.clone()}, "epoch": 4}
    tensors = [weakref.ref(content[key]["w"]) for key in ("teacher", "student")]
    checkpoint = Checkpoint("c.pth", in_our_layout(content)[0])
    del content
    assert [tensor() is None for tensor in tensors] == [False, True]
    checkpoint.free()
    assert tensors[0]() is None and checkpoint.state == {"epoch": 4, "args": {}}


def test_no_function_takes_a_checkpoint_and_its_path():
    """A `Checkpoint` knows where it is from."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("vision_kan/**/*.py"), *ROOT.glob("tools/*.py")]
    taken = [f"{file.name}: {node.name}" for file in files
             for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
             if {"checkpoint", "path"} <= {argument.arg for argument in node.args.args}]
    assert not taken


PATCH = "patch_embed.proj.weight"
VIT = {PATCH: W, "cls_token": W, "blocks.0.attn.qkv.weight": W}


def named(*wrappers: str, **more) -> dict:
    return {f"{''.join(wrappers)}{key}": value for key, value in VIT.items()} | more


LAYOUTS = {
    "DeiT": {"model": VIT, "epoch": 3}, "bare": dict(VIT), "state_dict": {"state_dict": VIT},
    "DataParallel": {"model": named("module.")}, "torch.compile": {"state_dict": named("_orig_mod.")},
    "both": {"model": named("module.", "_orig_mod.")}, "DeepSpeed": {"module": VIT, "epoch": 2},
    "Lightning": {"state_dict": named("model.") | {"criterion.weight": W}, "pytorch-lightning_version": "2.5"},
    "Lightning, with a teacher": {"state_dict": named("model.") | named("teacher.")},
    "a backbone": {"state_dict": named("backbone.") | {"head.weight": W}},
    "DINO": {"student": named("module.", "backbone.") | {"module.head.mlp.0.weight": W},
             "teacher": named("backbone.") | {"head.mlp.0.weight": W}, "epoch": 9},
    "a name as the model": {"model": "resnet50", "state_dict": VIT}, "numbers among them": {**VIT, "epoch": 5}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_programs(layout, capsys):
    content = LAYOUTS[layout]
    ours = Checkpoint("f.pth", content)
    assert ours.state["model"].keys() == VIT.keys() == ours.weights().keys()
    assert ours.state.get("epoch") == content.get("epoch")
    said = capsys.readouterr().err
    assert bool(said) == (layout in ("Lightning", "Lightning, with a teacher", "a backbone", "DINO")), said
    assert not said or said.startswith("checkpoint f.pth: its weights are 3 tensors")
    assert ("under 'teacher'" in said) == (layout == "DINO")
    assert ("left out: 1 tensors, such as 'criterion.weight'" in said) == (layout == "Lightning")


def test_a_checkpoint_of_ours_is_left_as_it_is():
    for ours in ({"model": VIT, "model_ema": VIT, "args": {"lr": 1}}, {"epoch": 3}, {}):
        assert Checkpoint("f", ours).state is ours


def test_results_of_another_program_are_not_taken_for_ours():
    """Many a loop keeps something under that name."""
    for results in ("71.3", {"top1": 71.3}, [0.5]):
        ours = Checkpoint("f", {"model": VIT, "results": results})
        assert "results" not in ours.state
        ours.check_entries()
        damaged = Checkpoint("f", {"model": VIT, "model_args": {"name": "vit"}, "results": results})
        assert "'results' is not results of evaluations" in sentence(damaged.check_entries)


def test_a_checkpoint_of_timms_train_script():
    told = Namespace(model="resnet18", img_size=None, input_size=[3, 64, 64], lr=0.1)
    ours = Checkpoint("f", {"state_dict": VIT, "state_dict_ema": named("module."), "arch": "resnet18", "args": told})
    assert ours.weights().keys() == ours.weights("model_ema").keys() == VIT.keys()
    assert ours.flags == {"model": "resnet18", "input_size": 64, "lr": 0.1}
    assert Checkpoint("f", {"state_dict": VIT, "arch": "vit"}).flags == {"model": "vit"}
    assert Checkpoint("f", {"state_dict": VIT, "args": {"img_size": 96}}).flags["input_size"] == 96


def test_a_folder_of_timms_layout(tmp_path):
    def write(**config) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    write(architecture="vit_x", num_classes=3, model_args={"depth": 2}, label_names=list("abc"),
          pretrained_cfg={"input_size": [3, 96, 96], "fixed_input_size": True, "crop_pct": 0.9, "mean": [0.5] * 3})
    assert "no weights (model.safetensors or pytorch_model.bin)" in sentence(load_file, tmp_path)
    torch.save(VIT, tmp_path / "pytorch_model.bin")
    found = load_file(tmp_path)
    assert found["model"].keys() == VIT.keys() and found["class_names"] == list("abc")
    assert found["model_args"] == {"name": "vit_x", "kwargs": {"num_classes": 3, "depth": 2, "img_size": 96}}
    assert found["args"] == {"model": "vit_x", "input_size": 96, "eval_crop_ratio": 0.9, "mean": [0.5] * 3}
    write(architectures=["ViTForImageClassification"])          # of Hugging Face's transformers
    assert "config.json does not describe a model of timm's" in sentence(load_file, tmp_path)
    for damaged in ("[1]", "{", '{"architecture": "x", "pretrained_cfg": 5}', "[" * 10 ** 5):
        (tmp_path / "config.json").write_text(damaged)
        assert "config.json does not describe" in sentence(load_file, tmp_path)


def test_missing_file_folder_and_empty_file(tmp_path):
    assert "does not exist" in sentence(load_file, tmp_path / "none.pth")
    assert "folder" in sentence(load_file, tmp_path)
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "empty.pth" in sentence(load_file, tmp_path / "empty.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_file(tmp_path, form):
    path = tmp_path / ("f.safetensors" if form == "safetensors" else "f.pth")
    if form == "safetensors":
        save_file({"w": torch.rand(100, 100)}, path)
    else:
        torch.save({"model": {"w": torch.rand(100, 100)}, "epoch": 1}, path,
                   _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for length in (1, 10, 100, len(whole) // 2, len(whole) - 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        text = sentence(load_file, path)
        assert path.name in text and "again" in text, length


def test_a_flipped_bit_anywhere_does_not_pass_for_a_checkpoint(tmp_path):
    path, expected = tmp_path / "f.pth", torch.rand(64, 64)
    torch.save({"model": {"w": expected}, "epoch": 1}, path)
    whole = path.read_bytes()
    in_the_tensor = whole.index(expected.numpy().tobytes()) + 5000
    refused = 0
    for place in [in_the_tensor, *range(0, len(whole), 641)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        try:
            checkpoint = load_file(path)
        except UserError as error:
            assert "f.pth" in str(error)
            refused += 1
            continue
        assert place != in_the_tensor
        # a bit of padding or of an archive's field that nobody reads may go unnoticed, a value may not
        assert checkpoint["epoch"] == 1 and torch.equal(checkpoint["model"]["w"], expected)
    assert refused > 20
    path.write_bytes(whole)
    assert torch.equal(load_file(path)["model"]["w"], expected)


def test_files_that_are_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    (tmp_path / "text.pth").write_text("<html><body>404 Not Found</body></html>\n" * 20)
    (tmp_path / "noise.pth").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.safetensors").write_text("not safe\n")
    for name in ("photos.zip", "text.pth", "noise.pth", "text.safetensors"):
        assert name in sentence(load_file, tmp_path / name)
    for content, kind in (([{"w": W}], "list"), (W, "Tensor"), ("text", "str")):
        torch.save(content, tmp_path / "other.pth")
        assert f"holds a {kind}" in sentence(load_file, tmp_path / "other.pth")


def test_results_are_those_of_an_evaluation_or_the_file_is_damaged():
    def ours(**content) -> Checkpoint:
        return Checkpoint("f.pth", {"model": VIT, "model_args": {"name": "vit"}, **content})

    good = {"acc1": 50.0, "acc5": 100, "images": 24, "data_set": "FOLDER", "split": ""}
    for fine in ({}, {"model": good}, {"model": good, "model_ema": {**good, "acc1": 0}}):
        ours(results=fine).check_entries()
    ours().check_entries()      # of an earlier version
    for change in ({"acc1": 100.1}, {"acc5": -1}, {"acc1": float("nan")}, {"acc1": True}, {"images": 2.5}, {"images": -1},
                   {"data_set": None}, {"split": "a\nb"}):
        assert "its 'results' is not" in sentence(ours(results={"model": {**good, **change}}).check_entries), change
    for damaged in (None, [], 5, {"model": None}, {"model": 50.0}, {"model": {}}):
        assert "its 'results' is not" in sentence(ours(results=damaged).check_entries), damaged


class Call:
    """Pickles as the call function(*args), which runs where it is unpickled without care."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _malice(marker: str) -> dict[str, object]:
    code = f"__import__('os').mkdir({marker!r})"
    return {"os.system": Call(os.system, f"mkdir {marker}"), "eval": Call(builtins.eval, code),
            "exec": Call(builtins.exec, code), "os.mkdir": Call(os.mkdir, marker),
            "a class": Call(subprocess.Popen, ["mkdir", marker]),
            "import": Call(builtins.__import__, "os")}


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "in the args"])
@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "os.mkdir", "a class", "import"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, form, kind):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    evil = _malice(str(marker))[kind]
    content = {"model": {"w": W}, "args": Namespace(x=evil) if form == "in the args" else {"x": evil}}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content if kind == "import" else evil))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    text = sentence(load_file, path)
    assert "evil.pth" in text and not marker.exists()
    if form in ("zip", "legacy", "in the args"):
        assert "refused" in text
    if kind == "os.mkdir":      # the trap is armed: careless reading springs it
        careless = pickle.loads if form == "bare pickle" else lambda raw: torch.load(io.BytesIO(raw), weights_only=False)
        careless(path.read_bytes())
        assert marker.exists()


def test_reads_what_torch_reads(tmp_path):
    """Every kind of value and tensor that checkpoints are made of, in both layouts, bit by bit."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    whole = torch.randn(100)
    content = {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(),
        "numbers": [-1, 2 ** 40, -2 ** 35, 2.5, float("inf")],
        "types": [torch.ones(3).to(kind) for kind in (torch.half, torch.bfloat16, torch.double, torch.int8, torch.bool,
                                                      torch.complex64)],
        "views": [whole[3:7], whole[::2], whole.view(10, 10).T, whole[5], torch.zeros(0, 3)], "texts": ["\u00fc", "x" * 300],
        "parameter": torch.nn.Parameter(torch.ones(2)), "tuple": (1, (None, True)), 3: {4: []}}
    for new in (True, False):
        torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
        read, expected = load_file(tmp_path / "c.pth"), torch.load(tmp_path / "c.pth", weights_only=True)
        expected["parameter"] = expected["parameter"].detach()
        assert not differences(read, expected)
        assert read["views"][0].untyped_storage().data_ptr() == read["views"][3].untyped_storage().data_ptr()
    torch.save({"f8": torch.ones(2).to(torch.float8_e4m3fn), "u16": torch.ones(2).to(torch.uint16),
                "args": Namespace(x=[Namespace(y=1)]), "od": OrderedDict(a=OrderedDict()),
                "size": torch.Size([1, 2]), "type": torch.float16}, tmp_path / "new.pth")
    read = load_file(tmp_path / "new.pth")
    assert read.pop("f8").float().tolist() == read.pop("u16").tolist() == [1, 1]
    assert read == {"args": Namespace(x=[Namespace(y=1)]), "od": {"a": {}}, "size": (1, 2), "type": "torch.float16"}


# ---------------------------------------------------------------- a run's folder
def test_saved_checkpoints_are_listed_newest_first(tmp_path):
    assert saved_checkpoints(tmp_path) == [] and saved_checkpoints(tmp_path / "none") == []
    listed = ["checkpoint.pth", "checkpoint_previous.pth", "checkpoint_previous_2.pth", "checkpoint_previous_3.pth",
              "checkpoint_previous_10.pth", "best_checkpoint.pth", "best_ema_checkpoint.pth"]
    others = ["checkpoint_previous_.pth", "checkpoint_previous_02.pth", "checkpoint_previous_x.pth", "other.pth",
              "checkpoint_previous_2.pth.tmp", ".checkpoint-x.tmp", "log.txt"]
    for name in listed + others:
        (tmp_path / name).touch()
    assert [path.name for path in saved_checkpoints(tmp_path)] == listed
    for name in ("checkpoint.pth", "checkpoint_previous_2.pth", "best_checkpoint.pth"):      # gaps
        (tmp_path / name).unlink()
        listed.remove(name)
    assert [path.name for path in saved_checkpoints(tmp_path)] == listed


# ---------------------------------------------------------------- writing
def test_save_keeps_the_one_before_and_gives_more_names(tmp_path):
    save_checkpoint({"epoch": 0}, tmp_path, ("best_checkpoint.pth",))
    assert epochs(tmp_path) == {CHECKPOINT: 0, "best_checkpoint.pth": 0}
    save_checkpoint({"epoch": 1}, tmp_path)
    assert epochs(tmp_path) == {CHECKPOINT: 1, PREVIOUS: 0, "best_checkpoint.pth": 0}
    save_checkpoint({"epoch": 2}, tmp_path, ("best_checkpoint.pth", "best_ema_checkpoint.pth"))
    assert epochs(tmp_path) == {CHECKPOINT: 2, PREVIOUS: 1, "best_checkpoint.pth": 2, "best_ema_checkpoint.pth": 2}
    assert (tmp_path / CHECKPOINT).stat().st_mode & 0o777 == 0o644


def test_save_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for epoch in range(3):
        save_checkpoint({"epoch": epoch}, tmp_path, ("best_checkpoint.pth",))
    assert epochs(tmp_path) == {CHECKPOINT: 2, PREVIOUS: 1, "best_checkpoint.pth": 2}


@pytest.mark.parametrize("moment", ["writing", "torch's writer", "fsync", "copy", "replace"])
def test_a_failure_at_any_moment_leaves_the_earlier_files_whole(tmp_path, monkeypatch, moment):
    for epoch in range(2):
        save_checkpoint({"epoch": epoch}, tmp_path, ("best_checkpoint.pth",))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def some_bytes_and_then(error):
        def save(checkpoint, file):
            file.write(b"PK" * 1000)
            raise error
        return save

    def half_a_copy(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        full()

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(torch, "save", some_bytes_and_then(OSError(errno.ENOSPC, "No space left on device")))
        elif moment == "torch's writer":
            patch.setattr(torch, "save", some_bytes_and_then(RuntimeError("[enforce fail] unexpected pos 64 vs 0\n...")))
        elif moment == "copy":
            patch.setattr(os, "link", full)
            patch.setattr(shutil, "copyfile", half_a_copy)
        else:
            patch.setattr(os, moment, full)
        with pytest.raises(OSError) as e:
            save_checkpoint({"epoch": 2}, tmp_path, ("best_checkpoint.pth",))
    assert e.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_checkpoint({"epoch": 3}, tmp_path)         # and with space again it goes on
    assert epochs(tmp_path) == {CHECKPOINT: 3, PREVIOUS: 1, "best_checkpoint.pth": 1}


def test_safetensors_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "w.safetensors"
    save_safetensors({"w": W.t()}, {"epoch": 3, "class_names": ["a"]}, target)
    assert load_file(target)["epoch"] == 3 and torch.equal(load_file(target)["model"]["w"], W.t())
    before = target.read_bytes()

    def full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return sentence(save_safetensors, {"w": torch.zeros(10 ** 4)}, {}, target)

    assert "w.safetensors cannot be written" in forked(full_disk)
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_or_folder_takes_its_place_when_all_went_well(folder, tmp_path):
    def write(place, content):
        if folder:
            place.mkdir()
        (place / "a" if folder else place).write_text(content)

    target = tmp_path / "target"
    for unfinished in (target, tmp_path / "new" / "newer" / "target"):
        with pytest.raises(KeyError), atomic_write(unfinished) as place:
            write(place, "half")
            raise KeyError
        assert not list(tmp_path.iterdir())
    with atomic_write(target) as place:
        write(place, "all")
        assert not target.exists() and place.name == "target"
    assert (target / "a" if folder else target).read_text() == "all" and list(tmp_path.iterdir()) == [target]

    def again():
        with atomic_write(target) as place:
            write(place, "new")

    if folder:
        assert "a folder that is not empty is in the way" in sentence(again)
    else:
        again()
    assert (target / "a" if folder else target).read_text() == ("all" if folder else "new")
    assert list(tmp_path.iterdir()) == [target]


def test_what_else_fails_meanwhile_is_not_blamed_on_the_file(tmp_path):
    def reads(what):
        with atomic_write(tmp_path / "target"):
            open(what)

    assert f"(No such file or directory, {tmp_path}/source)" in sentence(lambda: reads(tmp_path / "source"))
    with pytest.raises(BrokenPipeError), atomic_write(tmp_path / "target"):
        raise BrokenPipeError       # of a reader that has left
    assert not list(tmp_path.iterdir())


def test_a_runs_file_is_replaced_in_one_step(tmp_path):
    target = tmp_path / "status.json"
    write_text(target, "größe\n")
    with pytest.raises(KeyError), replacing(target) as place:
        place.write_text("half")
        raise KeyError
    assert target.read_text(encoding="utf-8") == "größe\n" and list(tmp_path.iterdir()) == [target]
    (tmp_path / ".status.json.tmp").write_text("left by a kill")
    write_text(target, "b")
    assert target.read_text() == "b" and list(tmp_path.iterdir()) == [target]


def test_builtin_types():
    given = {"tuple": (1, (2.5, None)), "numpy": np.float32(0.5), "int": np.int64(3), "bool": np.bool_(True),
             "ordered": OrderedDict(a=W), "path": Path("a/b"), "size": torch.Size([1, 2]), 3: ["text", False],
             "dtype": torch.bfloat16}
    result = to_builtin_types(given)
    assert torch.equal(result["ordered"].pop("a"), W)
    assert result == {"tuple": [1, [2.5, None]], "numpy": 0.5, "int": 3, "bool": True, "ordered": {}, "path": "a/b",
                      "size": [1, 2], 3: ["text", False], "dtype": "torch.bfloat16"}
    assert {type(result[key]) for key in ("numpy", "int", "bool", "ordered", "size")} == {float, int, bool, dict, list}


@pytest.mark.slow
def test_any_program_loads_what_is_saved(tmp_path):
    state = to_builtin_types({"args": vars(Namespace(betas=(0.9, 0.99), path=Path("x"), lr=np.float64(1e-3))),
                   "best": np.float64(71.25), "groups": [OrderedDict(lr=1.0)]})
    save_checkpoint({"model": {"w": W}, **state}, tmp_path)
    code = "import sys, torch; print(torch.load(sys.argv[1], weights_only=True)['best'])"
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path / CHECKPOINT)], capture_output=True, text=True,
                            timeout=100, cwd=tmp_path)      # from elsewhere: this project cannot be imported
    assert answer.stdout == "71.25\n", answer.stderr
