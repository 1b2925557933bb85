"""What a run starts from: checkpoint, effective flags, model, optimizer, schedule, teacher."""
import hashlib
import math
import os
import re
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from helpers import GKAN, NANO, RELEASED, TWIN, every, needs_released, sentence
from models import nano
from timm.layers import DropPath
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models_kan import ModelSpec
from vision_kan import kernels
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.read import CHECKPOINT, PREVIOUS
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.common.text import to_builtin_types
from vision_kan.config.checks import validate
from vision_kan.config.flags import PREPARATION
from vision_kan.config.recipes import dump_yaml
from vision_kan.config.resolve import describe_sources, parse_args
from vision_kan.models import vetting
from vision_kan.models.infer import load_exactly
from vision_kan.run import training_run
from vision_kan.run.build import build_model, build_teacher, description, load_start, model_spec
from vision_kan.run.starting import Start, effective_config, read_start
from vision_kan.run.training_run import resume
from vision_kan.training import optim
from vision_kan.training.optim import (
    build_optimizer,
    build_scheduler,
    build_state,
    freeze_all_but_attention,
    scaled_lr,
    schedule_warnings,
)
from vision_kan.training.state import TrainState, lr_of

TOKEN = "deit_tiny_distilled_patch16_224_KAN"


def settled(*argv, start: Start | None = None):
    return effective_config(parse_args(list(map(str, argv))), start or Start())


def save(path: Path, **content) -> Path:
    torch.save(content, path)
    return path


@cache
def run_content(sched: str = "cosine") -> dict:
    """What a run leaves in a checkpoint."""
    config = settled("--model", NANO, "--sched", sched)
    model, spec = build_model(ModelSpec(NANO, {"num_classes": 4, "depth": 1}), config)
    state = build_state(config.args, model, 1.0, 4, torch.device("cpu"), torch.float32)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    state.optimizer.step()
    said = description(config, spec, Namespace(nb_classes=4, class_names=list("abcd")))
    return {**state.state_dict(), **said, "epoch": 0}


def save_run(path: Path, sched: str = "cosine", **content) -> Path:
    return save(path, **{**run_content(sched), **content})


# ---------------------------------------------------------------- reading
def test_nothing_to_start_from():
    assert read_start(parse_args([])) == Start()
    assert "--resume FILE" in sentence(read_start, parse_args(["--eval"]))


@pytest.mark.parametrize(("flags", "purpose"), [(["--resume"], "resume"), (["--eval", "--resume"], "eval"),
                                                (["--finetune"], "finetune")])
def test_purpose(tmp_path, flags, purpose):
    path = save_run(tmp_path / "c.pth", class_names=["a", "b"])
    found = read_start(parse_args([*flags, str(path)]))
    assert (found.purpose, found.checkpoint.path) == (purpose, str(path))
    assert found.spec == (None if purpose == "finetune" else ModelSpec(NANO, {"depth": 1, "num_classes": 4}))
    assert found.class_names(False) == (None if purpose == "finetune" else ["a", "b"]) and found.class_names(True) == ["a", "b"]


def test_resume_auto(tmp_path, capsys):
    auto = ["--resume", "auto", "--output_dir", str(tmp_path)]
    assert "--output_dir" in sentence(read_start, parse_args(["--resume", "auto"]))
    assert read_start(parse_args(auto)) == Start()
    assert "a new run begins" in capsys.readouterr().out
    assert "no checkpoint yet" in sentence(read_start, parse_args([*auto, "--eval"]))

    other = save(tmp_path / "other.pth", model=nano().state_dict())
    assert read_start(parse_args([*auto, "--finetune", str(other)])).purpose == "finetune"

    for name, epoch in ((CHECKPOINT, 2), (PREVIOUS, 1)):
        save_run(tmp_path / name, epoch=epoch)
    assert read_start(parse_args([*auto, "--finetune", str(other)])).purpose == "resume"
    capsys.readouterr()
    assert read_start(parse_args(auto)).checkpoint.epoch == 2
    assert capsys.readouterr() == ("", "")


def test_resume_auto_falls_back_loudly_from_a_damaged_file(tmp_path, capsys):
    auto = parse_args(["--resume", "auto", "--output_dir", str(tmp_path)])
    for name, epoch in ((CHECKPOINT, 2), (PREVIOUS, 1)):
        save_run(tmp_path / name, epoch=epoch)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for damaged in (b"", whole[:len(whole) // 2], b"text" * 1000):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        found = read_start(auto)
        assert found.checkpoint.epoch == 1 and found.checkpoint.path == str(tmp_path / PREVIOUS)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 2 and all(line.startswith("warning: ") for line in told)
        assert CHECKPOINT in told[0] and PREVIOUS in told[1]

    (tmp_path / PREVIOUS).write_bytes(whole[:100])
    text = sentence(read_start, auto)
    assert f"{CHECKPOINT} and {PREVIOUS} in {tmp_path}" in text and "new run" in text

    (tmp_path / CHECKPOINT).unlink()
    (tmp_path / PREVIOUS).unlink()
    save_run(tmp_path / PREVIOUS, epoch=1)       # a kill between the two renames
    assert read_start(auto).checkpoint.epoch == 1


@pytest.mark.parametrize("change, reason", every(3, [
    ({"args": None}, "has no 'args'"), ({"model": {"cls_token": torch.zeros(1)}}, "does not fit the model"),
    ({"optimizer": None}, "has no 'optimizer'"),
    ({"epoch": -5}, "'epoch' is not"), ({"epoch": 10 ** 30}, "a number of 100 bits"),
    ({"epoch": 10 ** 9}, "'epoch' is not"), ({"epoch": "x"}, "'epoch' is not"),
    ({"step": -1}, "'step' is not"), ({"losses": [float("nan")]}, "'losses' is not"),
    ({"class_names": 5}, "'class_names' is not"),
    ({"model_args": {"name": 5}}, "'model_args' is not"), ({"model_args": {"name": NANO, "kwargs": {"num_classes": 9}}}, "head"),
    ({"model_args": {"name": "resnet5000"}}, "resnet5000"), ({"scaler": [1]}, "'scaler' is not"),
    ({"scaler": {1: 2}}, "'scaler' is not a GradScaler state")]))
def test_resume_auto_falls_back_from_what_is_no_run(change, reason, tmp_path, capsys):
    auto = parse_args(["--resume", "auto", "--output_dir", str(tmp_path)])
    save_run(tmp_path / "best_checkpoint.pth", epoch=1)
    save_run(tmp_path / CHECKPOINT, **change)
    save_run(tmp_path / "checkpoint_previous_2.pth", **change)
    found = read_start(auto)
    told = capsys.readouterr().err.splitlines()
    assert found.checkpoint.path.endswith("best_checkpoint.pth") and len(told) == 3
    assert reason in told[0] and reason in told[1] and "going on from the earlier" in told[2] and "epoch 2" in told[2]


def test_weights_that_are_not_finite_are_no_start(tmp_path, capsys):
    weights = nano().state_dict()
    weights["head.bias"][1] = float("nan")
    file = save_run(tmp_path / CHECKPOINT, model=weights)
    assert "head.bias are not finite" in sentence(read_start, parse_args(["--resume", "auto", "--output_dir", str(tmp_path)])) \
        or "head.bias are not finite" in capsys.readouterr().err
    with pytest.raises(UserError, match="head.bias are not finite"):
        Checkpoint.open(file).weights()


def test_a_limit_that_is_none_is_a_good_value():
    """timm's Gemma has them until they are set; a limit infinite on the other side would let nothing pass."""
    low, high = torch.tensor(-torch.inf), torch.tensor(torch.inf)
    state = {"q_proj.input_min": low, "q_proj.output_max": high}
    assert Checkpoint("x.pth", {"model": state}).weights() == state
    for name, value in (("input_min", high), ("output_max", low), ("input_max", low * 0), ("scale", high),
                        ("norm.weight_max", high[None])):
        with pytest.raises(UserError, match=f"{name} are not finite"):
            Checkpoint("x.pth", {"model": {name: value}}).weights()


def test_finetune_from_nothing_known():
    for source in ("no/such/file.pth", "resnet5000", "checkpoint.pth"):
        assert f"--finetune {source} is neither" in sentence(read_start, parse_args(["--finetune", source]))
    assert "no pretrained weights" in sentence(read_start, parse_args(["--finetune", NANO]))
    assert "nonsense" in sentence(read_start, parse_args(["--finetune", "test_vit.nonsense"]))


class Hub(BaseHTTPRequestHandler):
    """Stands in for timm's hub: serves `files` {path: content} with the headers that its client asks for."""
    files: dict[str, bytes] = {}
    requests: list[str] = []

    def answer(self):
        if self.path in self.files:
            self.requests.append(self.command)
        body = self.files.get(self.path)
        self.send_response(200 if body else 404)
        if body:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_GET = do_HEAD = answer

    def log_message(self, *args):
        pass


@contextmanager
def hub(cache: Path, monkeypatch):
    """A server that offers Hub.files; gives what was asked of it."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{http.server_port}"
    for name, value in (("ENDPOINT", url), ("HF_HUB_CACHE", str(cache)), ("HF_HUB_OFFLINE", False),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(huggingface_hub.constants, name, value)     # HF_ENDPOINT and HF_HOME were read at import
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Hub.requests = []
    try:
        yield Hub.requests
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_finetune_from_timms_hub_from_its_cache_and_without_a_connection(tmp_path, monkeypatch, capfd):
    model = timm.create_model("test_vit")
    Hub.files = {"/timm/test_vit.r160_in1k/resolve/main/model.safetensors": safetensors.torch.save(model.state_dict())}
    source = parse_args(["--finetune", "test_vit.r160_in1k"])
    with hub(tmp_path, monkeypatch) as requests:
        found = read_start(source)
    assert (found.purpose, found.checkpoint.path, requests) == ("finetune", "test_vit.r160_in1k", ["HEAD", "GET"])
    assert found.checkpoint.weights().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.checkpoint.weights().items())
    assert found.checkpoint.flags == {**HALF, "eval_crop_ratio": 0.95, "interpolation": "bicubic", "crop_mode": "center"}

    monkeypatch.setattr(time, "sleep", lambda seconds: None)            # between the client's retries
    assert read_start(source).checkpoint.weights().keys() == model.state_dict().keys()
    text = sentence(read_start, parse_args(["--finetune", "test_vit2.r160_in1k"]))
    assert "--finetune test_vit2.r160_in1k" in text and "connection" in text and "downloaded file" in text
    assert "Traceback" not in capfd.readouterr().err


def test_a_model_on_the_hub_wherever_a_checkpoint_is_named(tmp_path, monkeypatch):
    """hf-hub:NAME as timm writes it: config.json and weights, from the Hub's cache once they were fetched."""
    model = nano(TWIN, depth=2).eval()
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    with hub(tmp_path / "cache", monkeypatch) as requests:
        Hub.files = {f"/me/it/resolve/main/{name}": (tmp_path / "saved" / name).read_bytes()
                     for name in ("config.json", "model.safetensors")}
        for argv in (["--eval", "--resume", "hf-hub:me/it"], ["--finetune", "hf-hub:me/it"]):
            found = read_start(parse_args(argv))
            assert found.checkpoint.weights().keys() == model.state_dict().keys() and found.checkpoint.path == "hf-hub:me/it"
        assert requests.count("GET") == 2
        args = settled("--distillation-type", "hard", "--teacher-model", TWIN, "--teacher-path", "hf-hub:me/it", "--input-size",
                       32).args
        teacher = build_teacher(args, CLASSES, torch.device("cpu"))
        pictures = torch.rand(2, 3, 32, 32)
        assert torch.equal(teacher(pictures), model(pictures))
        spec = read_start(parse_args(["--eval", "--resume", "hf-hub:me/it@main"])).spec
        assert spec.name == TWIN and spec.kwargs["num_classes"] == 4 and spec.kwargs["depth"] == 2
    monkeypatch.setattr(time, "sleep", lambda seconds: None)            # between the client's retries
    assert read_start(parse_args(["--finetune", "hf-hub:me/it"])).checkpoint.weights().keys() == model.state_dict().keys()
    for name in ("me/other", "no such name!"):
        text = sentence(read_start, parse_args(["--finetune", f"hf-hub:{name}"]))
        assert f"hf-hub:{name} cannot be downloaded from the Hub" in text and "connection" in text


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_wherever_a_checkpoint_is_named(prefix, tmp_path):
    model = nano(GKAN, num_classes=3)
    save_for_hf(model, tmp_path, safe_serialization=True)
    where = f"{prefix}{tmp_path}"
    for argv, purpose in ((["--eval", "--resume", where], "eval"), (["--finetune", where], "finetune")):
        found = read_start(parse_args(argv))
        assert found.purpose == purpose and found.checkpoint.weights().keys() == model.state_dict().keys()
    assert read_start(parse_args(["--eval", "--resume", where])).spec.name == GKAN
    empty = tmp_path / "empty"
    empty.mkdir()
    for argv in (["--eval", "--resume"], ["--finetune"]):
        assert "is a folder without config.json" in sentence(read_start, parse_args([*argv, f"{prefix}{empty}"]))


# ---------------------------------------------------------------- which model a checkpoint holds
def spec_of(tmp_path, *argv, **content):
    path = save(tmp_path / "c.pth", **content)
    return read_start(parse_args(["--eval", "--resume", str(path), *argv])).spec


def test_spec_of_ours_is_what_it_says(tmp_path):
    said = {"name": NANO, "kwargs": {"depth": 2, "num_classes": 4, "hdim_kan": 5}}
    spec = spec_of(tmp_path, model=nano(**said["kwargs"]).state_dict(), model_args=said, args={"model": "something_else"})
    assert spec == ModelSpec(NANO, said["kwargs"])


def test_spec_of_a_deit_checkpoint_is_inferred_from_its_shapes(tmp_path):
    model = nano(TWIN, num_classes=7)
    for args in ({"model": TWIN}, {"model": "unknown_to_timm"}, None):
        for weights in (model.state_dict(), {f"module.{key}": value for key, value in model.state_dict().items()}):
            spec = spec_of(tmp_path, model=weights, args=args)
            assert spec.name == TWIN
            assert spec.kwargs["num_classes"] == 7 and spec.kwargs["depth"] == 1 and spec.kwargs["img_size"] == 32
            load_exactly(timm.create_model(spec.name, **spec.kwargs), weights, "it")


@needs_released
def test_spec_of_a_released_checkpoint(tmp_path):
    found = read_start(parse_args(["--eval", "--resume", str(RELEASED)]))
    assert found.spec.name == "deit_tiny_patch16_224_KAN"
    assert found.spec.kwargs["hdim_kan"] == 20 and found.spec.kwargs["img_size"] == 64
    config = settled("--eval", "--resume", RELEASED, start=found)
    assert (config.args.input_size, config.args.hdim_kan) == (64, 20)


def test_spec_of_a_foreign_timm_model(tmp_path):
    weights = timm.create_model("resnet18", num_classes=3).state_dict()
    assert spec_of(tmp_path, "--model", "resnet18", model=weights) == ModelSpec("resnet18")
    assert spec_of(tmp_path, model=weights, args={"model": "resnet18"}) == ModelSpec("resnet18")
    assert "--model" in sentence(spec_of, tmp_path, model=weights)          # nothing says what it is
    assert "no weights" in sentence(spec_of, tmp_path, epoch=3)


# ---------------------------------------------------------------- the flags
def test_given_flag_goes_before_checkpoint_before_the_models_own_before_default(tmp_path):
    stored = {"model": NANO, "input_size": 32, "eval_crop_ratio": 1.0, "lr": 0.25, "batch_size": 8, "seed": 5}
    found = Start("resume", Checkpoint("c.pth", {"args": stored}), ModelSpec(NANO, {"img_size": 32, "hdim_kan": 7}))
    config = settled("--batch-size", 16, "--epochs", 9, start=found)
    args, sources = config.args, config.sources
    assert (args.batch_size, sources["batch_size"]) == (16, "command line")
    assert (args.lr, sources["lr"]) == (0.25, "checkpoint")
    assert (args.hdim_kan, sources["hdim_kan"]) == (7, "checkpoint")        # from the architecture, not from the args
    assert args.momentum == 0.9 and "momentum" not in sources
    assert "--seed 3" in sentence(settled, "--seed", 3, start=found)

    assert (settled("--model", NANO).args.input_size, settled("--model", NANO).sources["input_size"]) == (32, "model")
    assert settled("--model", "resnet18").args.input_size == timm.get_pretrained_cfg("resnet18").input_size[-1]
    assert settled("--model", NANO, "--input-size", 64).args.input_size == 64
    assert settled("--model", "no_such_model").args.input_size == 224

    config = settled("--eval", start=Start("eval", found.checkpoint, found.spec))
    assert config.args.eval_crop_ratio == 1.0 and config.args.lr == parse_args([]).args.lr


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def prepared(config) -> dict:
    """The flags of how images are prepared that are not the defaults."""
    default = parse_args([]).args
    return {key: value for key in sorted(PREPARATION) if (value := getattr(config.args, key)) != getattr(default, key)}


@pytest.mark.parametrize(("name", "own"), [
    ("vit_tiny_patch16_224", {**HALF, "eval_crop_ratio": 0.9}), ("resnet34.tv_in1k", {"interpolation": "bilinear"}),
    ("coatnet_rmlp_2_rw_384", {**HALF, "crop_mode": "squash"}), ("volo_d4_448", {"eval_crop_ratio": 1.15}),
    # as ever
    ("deit_tiny_patch16_224", {}), ("deit3_small_patch16_224.fb_in22k_ft_in1k", {}), ("deit_base_patch16_384_GKAN", {}),
    (NANO, {}), ("no_such_model", {})])
def test_images_are_prepared_as_the_models_configuration_says(name, own):
    config = settled("--model", name)
    assert prepared(config) == {**prepared(config), **own} and bool(prepared(config)) == bool(own)
    assert all(config.sources[key] == "model" for key in own)
    validate(config.args)
    assert "mean" in own and "mean 0.5 0.5 0.5" in describe_sources(config) or "mean" not in describe_sources(config)
    given = ("--mean", 0.1, 0.2, 0.3, "--std", 1, 1, 1, "--eval-crop-ratio", 0.875, "--interpolation", "box")
    assert prepared(settled("--model", name, *given)) == {
        "mean": [0.1, 0.2, 0.3], "std": [1.0] * 3, "interpolation": "box",
        **({"crop_mode": own["crop_mode"]} if "crop_mode" in own else {})}


def test_how_images_are_prepared_is_the_weights_own_before_the_models():
    other = {**HALF, "mean": [0.1] * 3, "eval_crop_ratio": 0.5}
    for purpose in ("resume", "eval", "finetune"):
        for model in (NANO, "vit_tiny_patch16_224"):
            spec = None if purpose == "finetune" else ModelSpec(model)
            found = Start(purpose, Checkpoint("c.pth", {"args": {"model": model, **other}}), spec)
            assert prepared(settled("--model", model, *["--eval"] * (purpose == "eval"), start=found)) == other
            # an older run, which had the defaults whatever the model's own
            before = replace(found, checkpoint=Checkpoint("c.pth", {"args": {"model": model, "eval_crop_ratio": 0.875}}))
            assert not prepared(settled("--model", model, start=before))
            # a file that tells nothing
            bare = replace(found, checkpoint=Checkpoint("c.pth"))
            assert bool(prepared(settled("--model", model, start=bare))) == (model != NANO)


def test_what_the_checkpoints_model_has_of_its_own(tmp_path):
    found = read_start(parse_args(["--resume", str(save_run(tmp_path / "c.pth"))]))
    for argv, own in ((["--kan-h", 0.5], "0.33"), (["--hdim_kan", 96], "48"), (["--kan-grid-range", -1, 1], "-2.0 2.0"),
                      (["--kan-basis", "covering"], "original")):
        assert f"contradicts the checkpoint, which has {own}: " in sentence(settled, *argv, start=found)
    settled("--kan-h", 0.33, "--hdim_kan", 48, "--kan-grid-range", -2, 2, start=found)
    # what a run's args.yaml says of an option that was left to the model
    (tmp_path / "args.yaml").write_text("hdim_kan: null\nkan_h: null\nkan_grid_range: null\n")
    for words in ((), ("--eval",)):
        settled("--config", tmp_path / "args.yaml", *words, start=replace(found, purpose="eval" if words else "resume"))


def test_settling_changes_nothing_that_it_is_given():
    config = parse_args(["--model", NANO])
    found = Start("resume", Checkpoint("c.pth", {"args": {"lr": 0.25}}), ModelSpec(NANO, {"hdim_kan": 7}))
    before = vars(config.args).copy(), dict(config.sources), {"args": {"lr": 0.25}}
    effective_config(config, found)
    assert (vars(config.args), config.sources, found.checkpoint.state) == before


def test_data_set_is_guessed_from_the_folder(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    config = settled("--data-path", tmp_path)
    assert (config.args.data_set, config.sources["data_set"]) == ("FOLDER", "data folder")
    assert settled("--data-path", tmp_path, "--data-set", "IMNET").args.data_set == "IMNET"
    assert settled().args.data_set == "IMNET"
    trained = {"args": {"model": NANO, "data_set": "CIFAR"}}
    assert settled("--data-path", tmp_path, "--eval", start=Start("eval", Checkpoint("", trained))).args.data_set == "FOLDER"
    assert settled("--data-path", tmp_path, start=Start("resume", Checkpoint("", trained))).args.data_set == "CIFAR"
    assert settled("--data-path", tmp_path / "train/cat", "--eval", start=Start("eval", Checkpoint("", trained))
                   ).args.data_set == "CIFAR"


def test_photos_are_turned_upright_and_published_images_are_not(tmp_path):
    (tmp_path / "photos/train/cat").mkdir(parents=True)
    (tmp_path / "imagenet/train/n01440764").mkdir(parents=True)

    def turned(*argv, purpose=None, **stored):
        config = settled(*argv, start=Start(purpose, Checkpoint("", {"args": {"model": NANO, **stored}} if purpose else {})))
        return config.args.exif_orientation, config.sources.get("exif_orientation")

    photos = ("--data-path", tmp_path / "photos")
    assert turned(*photos) == (True, "data folder") and turned(*photos, "--no-exif-orientation") == (False, "command line")
    assert turned("--data-set", "CIFAR10") == turned("--data-path", tmp_path / "imagenet") == (None, None)
    for purpose, flag in (("eval", "--eval"), ("resume", "--no-eval")):
        assert turned(*photos, flag, purpose=purpose, data_set="FOLDER") == (False, "checkpoint")      # from before the flag
        for value in (True, False):
            assert turned(*photos, flag, purpose=purpose, data_set="FOLDER", exif_orientation=value) == (value, "checkpoint")
        assert turned(flag, purpose=purpose, data_set="CIFAR10", exif_orientation=None) == (None, None)
    assert turned("--no-exif-orientation", "--eval", purpose="eval", data_set="FOLDER", exif_orientation=True)[0] is False
    assert "contradicts" in sentence(settled, *photos, "--no-exif-orientation", start=Start("resume", Checkpoint("", {"args": {
        "model": NANO, "data_set": "FOLDER", "exif_orientation": True}})))
    assert turned(*photos, purpose="finetune", data_set="FOLDER", exif_orientation=False) == (True, "data folder")


def test_workers_are_capped_by_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert settled().args.num_workers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (settled().args.num_workers, settled().sources["num_workers"]) == (3, "machine")
    assert settled("--num_workers", 30).args.num_workers == 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert settled().args.num_workers == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert settled().args.num_workers == 10         # DeiT's


# ---------------------------------------------------------------- the model
def built(*argv, classes: int = 4, depth: int | None = 1, start: Start | None = None):
    config = settled(*argv, start=start)
    spec = model_spec(config, start or Start(), classes)
    if depth:
        spec.kwargs["depth"] = depth
    return build_model(spec, config)


def test_model_spec_of_the_flags():
    spec = model_spec(settled("--model", NANO, "--hdim_kan", 6, "--kan-grid-range", -1, 1, "--kan-trainable-h"),
                      Start(), 5)
    assert spec == ModelSpec(NANO, {"num_classes": 5, "img_size": 32, "hdim_kan": 6, "kan_grid_range": [-1.0, 1.0],
                                    "kan_trainable_h": True})


def test_model_spec_of_a_checkpoint():
    found = Start("eval", Checkpoint("c.pth", {}), ModelSpec(NANO, {"num_classes": 4, "depth": 1}))
    assert model_spec(settled("--eval", start=found), found, 4) == found.spec
    text = sentence(model_spec, settled("--eval", start=found), found, 5)
    assert "4 classes" in text and "the data 5" in text and "--data-path" in text and "--finetune" in text
    foreign = Start("eval", Checkpoint("c.pth", {}), ModelSpec("resnet18"))
    assert model_spec(settled("--eval", start=foreign), foreign, 9) == ModelSpec("resnet18", {"num_classes": 9})


def test_build_model_gives_back_a_spec_that_builds_it_again():
    model, spec = built("--model", NANO, "--hdim_kan", 6, "--kan-trainable-grid", "--drop-path", 0.3, "--drop", 0.1)
    assert spec.kwargs == {"num_classes": 4, "img_size": 32, "hdim_kan": 6, "kan_trainable_grid": True, "depth": 1}
    again = timm.create_model(spec.name, **spec.kwargs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.blocks[0].mlp.layers[0].rbf.grid.requires_grad


def test_unknown_model():
    text = sentence(built, "--model", "vit_pico_KAN")
    assert "--model vit_pico_KAN" in text and "--list-models" in text


@pytest.mark.parametrize("name", [NANO, TWIN])
def test_drop_reaches_position_projection_and_feed_forward(name):
    model, _ = built("--model", name, "--drop", 0.25)
    rates = {module: m.p for module, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert rates["pos_drop"] == rates["blocks.0.attn.proj_drop"] == 0.25
    feed_forward = [rate for module, rate in rates.items() if module.startswith("blocks.0.mlp")]
    assert feed_forward and set(feed_forward) == {0.25}
    assert rates.get("head_drop", 0) == 0 and rates.get("blocks.0.attn.attn_drop", 0) == 0      # as in DeiT
    model, _ = built("--model", name)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))


def test_drop_of_a_convolutional_network_is_its_heads():
    for name in ("resnet18", "poolformer_s12"):         # Python words its TypeError in one way, timm in another
        model, spec = built("--model", name, "--drop", 0.25, depth=None)
        head = model.drop_rate if name == "resnet18" else model.head.drop.p
        assert head == 0.25 and spec == ModelSpec(name, {"num_classes": 4})


def test_drop_path_of_the_last_block():
    model, _ = built("--model", NANO, "--drop-path", 0.3, depth=3)
    rates = [block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0 for block in model.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])


def test_a_flag_that_a_model_has_no_use_for():
    assert built("--model", "dla46x_c", depth=None)[1] == ModelSpec("dla46x_c", {"num_classes": 4})
    text = sentence(built, "--model", "dla46x_c", "--drop-path", 0.1, depth=None)      # as the default it is dropped
    assert "--drop-path" in text and "dla46x_c" in text and "leave it out" in text
    assert "--cosub has no effect on --model dla46x_c" in sentence(built, "--model", "dla46x_c", "--cosub", depth=None)
    text = sentence(built, "--model", TWIN, "--hdim_kan", 7)
    assert "hdim_kan" in text and NANO in text
    text = sentence(built, "--model", "resnet18", "--kan-grid-points", 7, depth=None)
    assert "--kan-grid-points" in text and "resnet18" in text


@pytest.mark.parametrize(("flag", "name", "others"), [
    (("--kan-groups", 4), TWIN, [GKAN]), (("--kan-groups", 4), NANO, [GKAN]), (("--kan-base", "silu"), NANO, [GKAN]),
    (("--no-kan-input-phi",), TWIN, [GKAN]), (("--kan-trainable-base",), NANO, [GKAN]),
    (("--kan-trainable-grid",), GKAN, [NANO]), (("--no-kan-trainable-h",), GKAN, [NANO]),
    (("--kan-lr-mult", 5), TWIN, [GKAN]), (("--kan-lr-mult", 20), NANO, [GKAN]), (("--kan-weight-decay", 0.1), NANO, [GKAN]),
    (("--kan-groups", 4), "resnet18", []), (("--kan-lr-mult", 5), "resnet18", [])])
def test_an_option_of_another_feed_forward(flag, name, others):
    depth = None if name == "resnet18" else 1
    text = sentence(built, "--model", name, *flag, depth=depth)
    flag_name = flag[0].replace("--no-", "--")
    assert text.startswith(f"{flag_name} has no effect on --model {name}: leave it out") and "\n" not in text
    assert all(other in text for other in others) and ("choose" in text) == bool(others)
    for other in others:
        built("--model", other, *flag)


def test_an_option_of_another_feed_forward_that_was_not_given(tmp_path):
    """An option in a checkpoint of another model, or in a run's args.yaml, is not an error."""
    spec = ModelSpec(TWIN, {"num_classes": 4, "depth": 1, "kan_groups": 4, "kan_trainable_grid": False})
    model, kept = build_model(spec, settled("--model", TWIN))
    assert kept == ModelSpec(TWIN, {"num_classes": 4, "depth": 1}) and isinstance(model, VisionTransformer)
    stored = {"model": TWIN, "kan_lr_mult": 7.0, "kan_weight_decay": 0.1}
    found = Start("resume", Checkpoint("c.pth", {"args": stored}), ModelSpec(TWIN, {"depth": 1}))
    config = settled(start=found)
    assert config.args.kan_lr_mult == 7.0
    build_model(model_spec(config, found, 4), config)
    recipe = tmp_path / "args.yaml"
    recipe.write_text(dump_yaml(settled("--model", TWIN).args))
    built("--config", recipe)
    assert "--kan-lr-mult" in sentence(built, "--config", recipe, "--kan-lr-mult", 3)
    recipe.write_text(f"model: {TWIN}\nkan_lr_mult: 3\n")
    assert "--kan-lr-mult has no effect" in sentence(built, "--config", recipe)
    built("--config", recipe, "--eval")         # trains nothing
    # of a checkpoint that does not say what its options were
    bare = Start("eval", Checkpoint("c.pth", {}), ModelSpec(TWIN, {"num_classes": 4, "depth": 1}))
    assert "--kan-groups has no effect" in sentence(built, "--eval", "--kan-groups", 4, start=bare)


def test_input_size_and_patches():
    for size in (33, 7):
        text = sentence(built, "--model", NANO, "--input-size", size)
        assert f"--input-size {size}" in text and "patch size 8" in text
    assert "take 32" in sentence(built, "--model", NANO, "--input-size", 33)
    assert "take 8" in sentence(built, "--model", NANO, "--input-size", 7)
    model, _ = built("--model", NANO, "--input-size", 48)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 4)
    built("--model", "resnet18", "--input-size", 33, depth=None)
    built("--model", "pvt_v2_b0", "--input-size", 32, depth=None)       # patches of 7 that overlap


def test_oblong_input_sizes():
    assert "--input-size 33 48" in (text := sentence(built, "--model", NANO, "--input-size", 33, 48)) and "take 32 48" in text
    assert "take 32" in sentence(built, "--model", NANO, "--input-size", 33, 39)
    for name, kept in ((NANO, True), ("vit_tiny_patch16_224", True), ("resnet10t", False)):
        model, spec = built("--model", name, "--input-size", 32, 48, depth=None)
        assert model.training and model(torch.zeros(2, 3, 32, 48)).shape == (2, 4)
        assert spec.kwargs.get("img_size") == ([32, 48] if kept else None)


@pytest.mark.parametrize("name", ["nest_tiny", "convit_tiny", "efficientformer_l1"])
def test_a_model_that_takes_square_images_alone(name):
    with torch.device("meta"):
        built("--model", name, "--input-size", 224, depth=None)
        assert "--input-size 224 448" in (text := sentence(built, "--model", name, "--input-size", 224, 448, depth=None))
    assert f"--model {name} " in text


def test_a_model_of_timms_that_is_oblong_itself():
    assert settled("--model", "vit_base_patch16_sapiens2").args.input_size == \
        list(timm.get_pretrained_cfg("vit_base_patch16_sapiens2").input_size[1:])


@pytest.mark.parametrize("name", every(8, [
    "coat_lite_tiny", "convnext_atto", "efficientvit_m0", "hrnet_w18_small", "levit_128s", "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "vit_tiny_patch16_224", "vovnet39a", "xcit_nano_12_p8_224"]))
def test_families_of_timm_can_be_built(name):
    """They differ in which arguments they take, how they refuse one, and in what `patch_embed` is."""
    for argv in ([], ["--drop", 0.1]):
        with torch.device("meta"):
            model, spec = built("--model", name, *argv, depth=None)
            size = settled("--model", name).args.input_size
            assert model(torch.zeros(2, 3, size, size)).shape == (2, 4)
        assert spec.kwargs["num_classes"] == 4


def test_grad_checkpointing():
    model, _ = built("--model", NANO, "--grad-checkpointing", depth=2)
    assert model.grad_checkpointing is True
    assert built("--model", NANO)[0].grad_checkpointing is False
    assert "--grad-checkpointing" in sentence(built, "--model", "coat_tiny", "--grad-checkpointing", depth=None)


def test_distillation_needs_a_token_and_training_mode():
    distil = ["--distillation-type", "soft", "--teacher-path", "t.pth"]
    text = sentence(built, "--model", NANO, *distil)
    assert "--distillation-type soft" in text and NANO in text and "distilled" in text
    model, _ = built("--model", TOKEN, "--input-size", 32, *distil)
    outputs = model.train()(torch.zeros(2, 3, 32, 32))
    assert isinstance(outputs, tuple) and [o.shape for o in outputs] == [(2, 4), (2, 4)]
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert built("--model", TOKEN, "--input-size", 32)[0].train()(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert "--no-train-mode" in sentence(built, "--model", TOKEN, "--input-size", 32, "--no-train-mode", *distil)
    built("--model", NANO, "--eval", *distil)        # evaluating needs no token


def test_attention_only():
    model = nano()
    freeze_all_but_attention(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"pos_embed", "head.weight", "head.bias", *(
        f"blocks.0.attn.{part}" for part in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"))}
    names = {p for group in build_optimizer(flags(), model, 1e-3).param_groups for p in group["params"]}
    assert names == {p for p in model.parameters() if p.requires_grad}
    token = timm.create_model(TOKEN, depth=1)
    freeze_all_but_attention(token)
    assert token.head_dist.weight.requires_grad and not token.dist_token.requires_grad
    assert "--attn-only" in sentence(freeze_all_but_attention, timm.create_model("resnet18"))


def test_finetune_takes_the_weights_over_and_tells(tmp_path):
    source, model = nano(seed=1, num_classes=9), nano()
    spec, content = ModelSpec(NANO, {"depth": 1, "num_classes": 4}), {"model": source.state_dict()}
    table = load_start(model, spec, Start("finetune", Checkpoint("c.pth", content)), None)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert "loaded" in table and "head.weight" in table
    assert "no head.weight of the model's shape" in sentence(
        load_start, model, spec, Start("finetune", Checkpoint("c.pth", content)), None, True)     # --eval
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_start(model, spec, Start("resume", Checkpoint("c.pth", content)), None) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_finetune_from_a_name_without_weights():
    text = sentence(read_start, parse_args(["--finetune", NANO]))
    assert text == f"--finetune {NANO}: {NANO} has no pretrained weights of its own: start from a checkpoint with --finetune"


# ---------------------------------------------------------------- where it begins
def test_processes_that_would_begin_at_different_places(monkeypatch):
    """As where --output_dir is a folder of each machine: the first has a checkpoint, the second none."""
    args = flags("--epochs", 5, "--output_dir", "here", "--resume", "auto")
    state = SimpleNamespace(epoch=2, step=0)
    resume(state, args, Start(), None, Process())
    monkeypatch.setattr(training_run, "gather_number", lambda number, process: [number.item(), 0.0])
    text = sentence(resume, state, args, Start(), None, Process())
    assert text == "process 0 begins at epoch 2, process 1 at 0: --output_dir here must be a folder that all machines share"
    args.resume = "c.pth"
    assert "--resume c.pth must be the same file on all machines" in sentence(resume, state, args, Start(), None, Process())


def test_a_new_run_has_something_to_train():
    config = parse_args(["--epochs", "3", "--start_epoch", "5"])
    assert "--start_epoch 5 leaves nothing to train of --epochs 3" in sentence(effective_config, config, Start())
    assert effective_config(config, Start("resume", Checkpoint("c.pth", {"args": {"epochs": 3}}))).args.start_epoch == 5


# ---------------------------------------------------------------- teacher
CLASSES = ["a", "b", "c", "d"]


def test_teacher(tmp_path):
    args = settled("--distillation-type", "hard", "--teacher-model", TWIN, "--teacher-path", tmp_path / "t.pth", "--input-size",
                   32).args
    assert build_teacher(Namespace(distillation_type="none"), CLASSES, torch.device("cpu")) is None
    original = nano(TWIN)
    save(tmp_path / "t.pth", model=original.state_dict(), model_args={"name": TWIN, "kwargs": {"depth": 1}})
    teacher = build_teacher(args, CLASSES, torch.device("cpu"))
    images = torch.rand(2, 3, 32, 32)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(images), original.eval()(images))

    assert "--teacher-path" in sentence(build_teacher, args, [*CLASSES, "e"], torch.device("cpu"))
    save(tmp_path / "t.pth", model=original.state_dict(), model_args={"name": TWIN, "kwargs": {"depth": 1}},
         class_names=["b", "a", "c", "d"])
    assert "its classes, or their order" in sentence(build_teacher, args, CLASSES, torch.device("cpu"))
    save(tmp_path / "t.pth", model=original.state_dict(), model_args={"name": TWIN, "kwargs": {"depth": 1}},
         class_names=["0", "1", "2", "3"])       # a stream's, which have no names
    assert build_teacher(args, CLASSES, torch.device("cpu"))
    save(tmp_path / "t.pth", model=nano(NANO).state_dict())
    text = sentence(build_teacher, args, CLASSES, torch.device("cpu"))
    assert "--teacher-path" in text and "does not fit" in text
    args.teacher_model = "teacher9000"
    assert "--teacher-model teacher9000" in sentence(build_teacher, args, CLASSES, torch.device("cpu"))
    args.teacher_path = str(tmp_path / "none.pth")
    assert "none.pth does not exist" in sentence(build_teacher, args, CLASSES, torch.device("cpu"))


# ---------------------------------------------------------------- optimizer
def flags(*argv) -> Namespace:
    return parse_args(list(map(str, argv))).args


def test_learning_rate_is_for_512_images_an_update():
    assert scaled_lr(flags("--lr", 0.1, "--batch-size", 64), 1) == pytest.approx(0.1 * 64 / 512)
    assert scaled_lr(flags("--lr", 0.1, "--batch-size", 64, "--grad-accum", 4), 2) == pytest.approx(0.1)
    assert scaled_lr(flags("--lr", 0.1, "--batch-size", 64, "--unscale-lr"), 8) == 0.1


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: groups[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("argv", [[], ["--layer-decay", 0.5], ["--opt", "muon"]])
def test_no_weight_decay_on_biases_norms_positions_and_tokens(argv):
    model = timm.create_model(TOKEN, depth=1, num_classes=4)
    decay = {name: group["weight_decay"] for name, group in
             by_name(model, build_optimizer(flags("--weight-decay", 0.2, *argv), model, 1e-3)).items()}
    free = {name for name in decay if name.endswith("bias") or "norm" in name} | {"pos_embed", "cls_token", "dist_token"}
    assert {name for name, value in decay.items() if value == 0} == free
    assert {value for name, value in decay.items() if name not in free} == {0.2}
    assert "blocks.0.mlp.layers.0.spline_linear.weight" in decay.keys() - free


def test_layer_decay():
    model = nano(depth=2)
    optimizer = build_optimizer(flags("--layer-decay", 0.5), model, 1e-3)
    scale = {name: group["lr_scale"] for name, group in by_name(model, optimizer).items()}
    assert scale["head.weight"] == 1
    blocks = [scale[f"blocks.{i}.attn.qkv.weight"] for i in range(2)]
    assert blocks[0] == blocks[1] / 2 and scale["patch_embed.proj.weight"] == blocks[0] / 2 and blocks[1] < 1
    build_scheduler(flags("--layer-decay", 0.5, "--warmup-epochs", 0), optimizer, 1).step(0)
    rates = {name: group["lr"] for name, group in by_name(model, optimizer).items()}
    assert rates["blocks.0.attn.qkv.weight"] == pytest.approx(1e-3 * blocks[0])
    assert lr_of(optimizer) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["muon", "Muon", "lookahead_muon", "nmuon"])
def test_muon_is_for_hidden_matrices(name):
    model = nano()
    groups = by_name(model, build_optimizer(flags("--opt", name), model, 1e-3))
    fallback = {name for name, group in groups.items() if group.get("use_fallback")}
    assert fallback == {name for name in groups if name.startswith(("head", "patch_embed"))}
    assert "blocks.0.mlp.layers.0.spline_linear.weight" not in fallback


def test_betas_eps_and_momentum_reach_the_optimizer():
    group = build_optimizer(flags("--opt-betas", 0.7, 0.8, "--opt-eps", 1e-3), nano(), 1e-2).param_groups[0]
    assert (tuple(group["betas"]), group["eps"], group["lr"]) == ((0.7, 0.8), 1e-3, 1e-2)
    assert tuple(build_optimizer(flags(), nano(), 1e-2).param_groups[0]["betas"]) == (0.9, 0.999)
    optimizer = build_optimizer(flags("--opt", "sgd", "--momentum", 0.5), nano(), 1e-2)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.5


def test_optimizers_that_cannot_be_set_up():
    for betas, name in (((0.9,), "adamw"), ((0.9, 0.9, 0.9), "adamw"), ((0.9, 0.9), "adan"), ((0.9,), "muon"),
                        ((0.9,), "lookahead_lamb"), ((0.9, 0.9), "sgd")):
        text = sentence(build_optimizer, flags("--opt", name, "--opt-betas", *betas), nano(), 1e-3)
        assert f"--opt {name}" in text and "--opt-betas" in text
    build_optimizer(flags("--opt", "adan", "--opt-betas", 0.9, 0.9, 0.9), nano(), 1e-3)
    build_optimizer(flags("--opt", "sgd", "--opt-betas", 0.9, 0.9, "--resume", "c.pth"), nano(), 1e-3)     # an earlier run's


@pytest.mark.parametrize("opt, package, remedy", [
    ("kron", "opt_einsum", "pip install opt_einsum"), ("lookahead_kronw", "opt_einsum", "pip install opt_einsum"),
    ("bnbadam8bit", "bitsandbytes", "pip install bitsandbytes"), ("fusedadam", "apex", "https://github.com/NVIDIA/apex")])
def test_optimizers_that_need_a_package(opt, package, remedy, monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    text = sentence(build_optimizer, flags("--opt", opt), nano(), 1e-3)
    assert f"--opt {opt} needs the package {package}, which is not installed: " in text and remedy in text


def test_optimizers_for_gpus_alone(monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for opt in ("bnbadam", "fusedlamb"):
        assert "on CUDA GPUs only" in sentence(build_optimizer, flags("--opt", opt), nano(), 1e-3)


@pytest.mark.parametrize("model", [NANO, GKAN, TWIN])
def test_second_order_optimizers_and_fused_attention(model):
    for name in ("adahessian", "lookahead_adahessian"):
        text = sentence(build_optimizer, flags("--opt", name, "--model", model), nano(model), 1e-3)
        assert f"--opt {name} needs second derivatives" in text and "attention" in text


@pytest.mark.parametrize("model", [NANO, GKAN, "vit_nano_patch8_32_EKAN"])
def test_second_order_optimizers_and_the_kan_layers(model):
    """AdaHessian's first update, from second derivatives through the layers, is that of the reference."""
    updated = {}
    for backend in ("auto", "reference"):
        kernels.use(backend)
        net = nano(model)
        for block in net.blocks:
            block.attn.fused_attn = False
        optimizer = build_optimizer(flags("--opt", "adahessian", "--model", model), net, 1e-3)
        assert optimizer.is_second_order
        net(torch.randn(2, 3, 32, 32)).square().mean().backward(create_graph=True)
        optimizer.step()
        updated[backend] = [parameter.hess if isinstance(parameter.hess, float) else parameter.hess.clone()
                            for parameter in net.parameters()]
    kernels.use("auto")
    for a, b in zip(*updated.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(torch.as_tensor(b).abs().max()))
    assert any(isinstance(hess, torch.Tensor) and hess.any() for hess in updated["auto"])


def test_state_that_training_starts_from():
    model = nano()
    args = flags("--model-ema-decay", 0.5, "--start_epoch", 3)
    state = build_state(args, model, 1e-3, 5, torch.device("cpu"), torch.float32)
    assert state.model is model and state.epoch == 3 and not state.scaler.is_enabled()
    assert state.ema.decay == 0.5 and state.ema.module is not model
    assert torch.equal(state.ema.module.head.weight, model.head.weight)
    assert build_state(flags("--no-model-ema"), model, 1e-3, 5, torch.device("cpu"), torch.float32).ema is None
    forced = build_state(flags("--model-ema-force-cpu"), model, 1e-3, 5, torch.device("cpu"), torch.float16)
    assert forced.ema.device == "cpu" and forced.scaler.is_enabled()
    assert not build_state(args, model, 1e-3, 5, torch.device("cpu"), torch.bfloat16).scaler.is_enabled()


# ---------------------------------------------------------------- coefficients of learned activations
def coefficients(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith(".coefficients")}


def gkan(*argv, **kwargs):
    """Flags, a group KAN and its optimizer at rate 1e-3."""
    args, model = flags("--model", GKAN, *argv), nano(GKAN, **kwargs)
    return args, model, build_optimizer(args, model, 1e-3)


OPTIMIZERS = ["adamw", "lookahead_adamw", "muon", "lookahead_muon", "lamb", "sgd", "lion", "adafactor"]


@pytest.mark.parametrize("argv", [
    *(["--opt", name] for name in OPTIMIZERS), ["--layer-decay", 0.5], ["--layer-decay", 0.5, "--opt", "muon"],
    ["--weight-decay", 0], ["--weight-decay", 0, "--layer-decay", 0.5], ["--sched", "plateau"]], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_coefficients_have_groups_of_their_own(argv, decay):
    _, model, optimizer = gkan("--kan-weight-decay", decay, *argv, kan_trainable_base=True)
    own = coefficients(model)
    assert len(own) == 2
    groups = by_name(model, optimizer)          # asserts that each trained parameter is in one group only
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    assert {name for name, group in groups.items() if "kan_multiple" in group} == own.keys()
    assert {group["weight_decay"] for name, group in groups.items() if name in own} == {decay}
    assert {group["kan_multiple"] for name, group in groups.items() if name in own} == {20.0}
    plain = flags("--model", GKAN, *argv)
    others = {name: group["weight_decay"] for name, group in groups.items() if name not in own}
    assert set(others.values()) == {0, plain.weight_decay}
    assert others["blocks.0.mlp.phi1.scale"] == 0 and others["blocks.0.mlp.fc1.weight"] == plain.weight_decay
    assert not [group for group in optimizer.param_groups if not group["params"]]
    if "muon" in argv:
        fallback = {name for name, group in groups.items() if group.get("use_fallback")}
        assert own.keys() <= fallback and "blocks.0.mlp.fc1.weight" not in fallback


def test_models_without_coefficients_have_the_groups_of_before():
    for name in (NANO, TWIN):
        groups = build_optimizer(flags("--model", name), nano(name), 1e-3).param_groups
        assert len(groups) == 2 and not [group for group in groups if "kan_multiple" in group]


def steps_of(args, model, optimizer, epochs: int = 6, updates: int = 4):
    """{parameter: rate} before each update; with plateau for an accuracy that never rises."""
    scheduler = build_scheduler(args, optimizer, updates)
    for epoch in range(epochs):
        if args.sched != "plateau":
            scheduler.step(epoch)
        for update in range(updates):
            scheduler.step_update(epoch * updates + update)
            yield {name: group["lr"] for name, group in by_name(model, optimizer).items()}
        if args.sched == "plateau":
            scheduler.step(epoch + 1, 50.0)


SCHEDULES = {
    "cosine": ["--warmup-epochs", 2], "cosine by updates": ["--sched-on-updates", "--warmup-epochs", 1],
    "step": ["--sched", "step", "--decay-epochs", 2, "--warmup-epochs", 0], "tanh": ["--sched", "tanh", "--warmup-epochs", 1],
    "noise": ["--lr-noise", 0.1],
    "plateau": ["--sched", "plateau", "--patience-epochs", 0, "--warmup-epochs", 0, "--decay-rate", 0.3],
    "plateau after a warm-up": ["--sched", "plateau", "--patience-epochs", 0, "--cooldown-epochs", 0, "--warmup-epochs", 2],
    "plateau with noise": ["--sched", "plateau", "--patience-epochs", 0, "--warmup-epochs", 1, "--lr-noise", 0.1],
    "plateau at its lowest": ["--sched", "plateau", "--patience-epochs", 0, "--cooldown-epochs", 0, "--warmup-epochs", 0,
                              "--min-lr", 2e-4]}


@pytest.mark.parametrize("multiple", [20, 0.5])
@pytest.mark.parametrize("more", every(3, [["--layer-decay", 0.5], [], ["--weight-decay", 0], ["--opt", "lookahead_adamw"],
                                           ["--opt", "muon"]]), ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_coefficients_learn_at_a_multiple_of_the_rate_at_every_step(schedule, more, multiple):
    argv = ["--epochs", 6, *SCHEDULES[schedule], *more]
    args, model, optimizer = gkan("--kan-lr-mult", multiple, *argv)
    twin = nano(TWIN)
    twins = steps_of(flags(*argv), twin, build_optimizer(flags(*argv), twin, 1e-3))
    seen = []
    for rate, of_twin in zip(steps_of(args, model, optimizer), twins, strict=True):
        assert {name: rate[name] for name in of_twin} == pytest.approx(of_twin, rel=1e-12)      # the others as in the twin
        for name in coefficients(model):
            assert rate[name] == pytest.approx(multiple * rate["blocks.0.mlp.fc1.weight"], rel=1e-12)
        assert lr_of(optimizer) == rate["head.weight"]
        seen.append(rate["head.weight"])
    assert len(set(seen)) > 1           # a schedule, not a constant


def test_the_lowest_rate_of_plateau_is_scaled_as_in_the_other_schedules():
    low = ["--epochs", 40, "--min-lr", 2e-4, "--warmup-epochs", 0]
    args, model, optimizer = gkan(*low, "--sched", "plateau", "--patience-epochs", 0, "--cooldown-epochs", 0)
    *_, last = steps_of(args, model, optimizer, epochs=12)
    assert last["head.weight"] == pytest.approx(2e-4) and last["blocks.0.mlp.phi2.coefficients"] == pytest.approx(4e-3)
    args, model, optimizer = gkan(*low)
    *_, last = steps_of(args, model, optimizer, epochs=41)
    assert last["head.weight"] == pytest.approx(2e-4) and last["blocks.0.mlp.phi2.coefficients"] == pytest.approx(4e-3)


def train(args, model, optimizer, steps: int = 3, seed: int = 0):
    """A few updates on random images at the rate of the schedule."""
    generator = torch.Generator().manual_seed(seed)
    for _ in zip(range(steps), steps_of(args, model, optimizer)):
        model(torch.randn(4, 3, 32, 32, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("argv", [[], ["--sched", "plateau"], ["--sched", "plateau", "--warmup-epochs", 0],
                                  ["--opt", "sgd", "--warmup-epochs", 0],
                                  ["--opt", "lookahead_adamw"], ["--opt", "muon"], ["--kan-weight-decay", 0.5]], ids=str)
def test_a_multiple_of_0_freezes_the_coefficients(argv):
    for multiple in (0, 20):
        args, model, optimizer = gkan("--kan-lr-mult", multiple, *argv)
        with torch.no_grad():
            for p in coefficients(model).values():
                p.fill_(0.25)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        after = train(args, model, optimizer)
        frozen = {name for name, p in model.named_parameters() if torch.equal(before[name], after[name])}
        assert frozen == (set() if multiple else coefficients(model).keys())


def test_their_weight_decay_is_their_own():
    weights = {}
    for decay in (0, 0.5):
        args, model, optimizer = gkan("--weight-decay", 0, "--kan-weight-decay", decay, "--warmup-epochs", 0, "--kan-lr-mult", 1)
        with torch.no_grad():
            for p in coefficients(model).values():
                p.fill_(0.25)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)        # the decay alone
        next(steps_of(args, model, optimizer))
        optimizer.step()
        weights[decay] = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(weights[0.5]["blocks.0.mlp.phi1.coefficients"], torch.full((8, 8), 0.25 * (1 - 0.5e-3)))
    assert {name for name in weights[0] if not torch.equal(weights[0][name], weights[0.5][name])} == coefficients(model).keys()


def test_attention_only_trains_no_coefficient():
    args, model = flags("--model", GKAN, "--attn-only"), nano(GKAN)
    freeze_all_but_attention(model)
    optimizer = build_optimizer(args, model, 1e-3)
    assert by_name(model, optimizer).keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("kan_multiple" in group for group in optimizer.param_groups) and lr_of(optimizer) == 1e-3


@pytest.mark.parametrize("opt, more", every(3, [
    *((opt, more) for opt in ("adamw", "lookahead_adamw", "muon", "lamb", "sgd") for more in ([], ["--layer-decay", 0.5])),
    ("novograd", []), ("adafactorbv", []), ("adafactor", [])]), ids=str)
def test_the_optimizers_state_survives_a_file(opt, more, tmp_path):
    argv = ["--opt", opt, "--warmup-epochs", 0, *more]
    args, model, optimizer = gkan(*argv)
    weights = train(args, model, optimizer)
    torch.save({"model": weights, "optimizer": to_builtin_types(optimizer.state_dict())}, tmp_path / "c.pth")
    whole = train(args, model, optimizer, seed=1)

    args, model, optimizer = gkan(*argv)
    saved = torch.load(tmp_path / "c.pth", weights_only=True)
    vetting.check_optimizer(optimizer, saved["optimizer"])
    state = TrainState(model, optimizer, build_scheduler(args, optimizer, 1), torch.amp.GradScaler(enabled=False))
    state.load_state_dict(saved)
    assert {name for name, group in by_name(model, optimizer).items() if "kan_multiple" in group} == coefficients(model).keys()
    again = train(args, model, optimizer, seed=1)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not torch.equal(whole["blocks.0.mlp.phi1.coefficients"], weights["blocks.0.mlp.phi1.coefficients"])


# ---------------------------------------------------------------- schedule
LR, MIN, WARM = 1.0, 0.01, 0.001


def rates(*argv, epochs: int = 20, updates: int = 4, lr: float = LR) -> list[float]:
    """The learning rate at the start of each epoch, as main asks for it."""
    args = flags("--epochs", epochs, "--min-lr", MIN, "--warmup-lr", WARM, *argv)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler = build_scheduler(args, optimizer, updates)
    result = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        scheduler.step_update(epoch * updates)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def cosine(epoch: float, epochs: int = 20) -> float:
    return MIN + (LR - MIN) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def test_cosine_fills_exactly_the_epochs_in_spite_of_deits_cooldown():
    assert parse_args([]).args.cooldown_epochs == 10
    result = rates("--warmup-epochs", 4)
    assert result[:4] == pytest.approx([WARM + (LR - WARM) * epoch / 4 for epoch in range(4)])
    assert result[4:] == pytest.approx([cosine(epoch) for epoch in range(4, 20)])
    assert MIN < result[-1] < 2 * MIN
    assert rates("--warmup-epochs", 4, "--cooldown-epochs", 0) == result


def test_each_schedule():
    flat = ["--warmup-epochs", 0]
    assert rates(*flat) == pytest.approx([cosine(epoch) for epoch in range(20)])
    tanh = rates(*flat, "--sched", "tanh")
    assert tanh[0] == pytest.approx(LR, rel=0.01) and MIN < tanh[-1] < 2 * MIN
    assert tanh == sorted(tanh, reverse=True) and tanh[10] > cosine(10)
    step = rates(*flat, "--sched", "step", "--decay-epochs", 6, "--decay-rate", 0.5)
    assert step == pytest.approx([0.5 ** (epoch // 6) for epoch in range(20)])
    multistep = rates(*flat, "--sched", "multistep", "--decay-epochs", 6, "--decay-rate", 0.5)
    assert multistep == pytest.approx(step)
    power = rates(*flat, "--sched", "poly", "--decay-rate", 2)
    assert power == pytest.approx([MIN + (LR - MIN) * (1 - epoch / 20) ** 2 for epoch in range(20)])


def test_schedule_by_updates():
    args = flags("--epochs", 5, "--warmup-epochs", 1, "--min-lr", MIN, "--warmup-lr", WARM, "--sched-on-updates")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], LR)
    scheduler = build_scheduler(args, optimizer, 4)
    seen = []
    for update in range(20):
        scheduler.step(update // 4)             # changes nothing
        scheduler.step_update(update)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[:4] == pytest.approx([WARM + (LR - WARM) * update / 4 for update in range(4)])
    assert seen[4:] == pytest.approx([cosine(update) for update in range(4, 20)])
    decayed = rates("--sched", "multistep", "--decay-epochs", 2, "--sched-on-updates", "--warmup-epochs", 0, epochs=5)
    assert decayed == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_noise():
    quiet = rates("--warmup-epochs", 0)
    noisy = rates("--warmup-epochs", 0, "--lr-noise", 0.25, 0.75)
    share = [abs(a / b - 1) for a, b in zip(noisy, quiet, strict=True)]
    assert max(share[:5]) < 1e-9 and max(share[15:]) < 1e-9 and min(share[5:15]) > 0
    assert max(share) < 0.67
    assert rates("--warmup-epochs", 0, "--lr-noise", 0.25)[16] != quiet[16]      # one value: to the end
    assert rates("--warmup-epochs", 0, "--lr-noise", 0.25, 0.75) == noisy
    assert rates("--warmup-epochs", 0, "--lr-noise", 0.25, 0.75, "--seed", 1)[5:15] != noisy[5:15]
    small = rates("--warmup-epochs", 0, "--lr-noise", 0.25, 0.75, "--lr-noise-pct", 0.05)
    assert max(abs(a / b - 1) for a, b in zip(small, quiet, strict=True)) < 0.05
    narrow = rates("--warmup-epochs", 0, "--lr-noise", 0.25, 0.75, "--lr-noise-std", 0.01)
    assert 0 < max(abs(a / b - 1) for a, b in zip(narrow, quiet, strict=True)) < 0.05


def plateau(*argv, accuracies) -> list[float]:
    args = flags("--sched", "plateau", "--min-lr", MIN, "--warmup-lr", WARM, *argv)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], LR)
    scheduler = build_scheduler(args, optimizer, 4)
    result = [optimizer.param_groups[0]["lr"]]
    for epoch, accuracy in enumerate(accuracies):
        scheduler.step(epoch + 1, accuracy)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_plateau(recwarn):
    argv = ["--warmup-epochs", 0, "--decay-rate", 0.5, "--cooldown-epochs", 0]
    rising, flat = list(range(12)), [50] * 12
    assert plateau(*argv, "--patience-epochs", 2, accuracies=rising) == [1.0] * 13      # the metric goes up: no decay
    result = plateau(*argv, "--patience-epochs", 2, accuracies=flat)
    assert result == [1, 1, 1, 1] + [0.5] * 3 + [0.25] * 3 + [0.125] * 3        # the first epoch sets the best
    assert plateau(*argv, "--patience-epochs", 5, accuracies=flat) == [1] * 7 + [0.5] * 6
    rested = plateau(*argv[:4], "--cooldown-epochs", 3, "--patience-epochs", 2, accuracies=flat)
    assert rested == [1] * 4 + [0.5] * 6 + [0.25] * 3
    assert plateau(*argv, "--patience-epochs", 0, accuracies=flat)[-1] == MIN
    warm = plateau("--warmup-epochs", 2, "--patience-epochs", 2, accuracies=flat)
    assert warm[:3] == pytest.approx([WARM, (WARM + LR) / 2, LR])
    assert not recwarn.list             # timm's words on its deprecation are not for the user


def test_warmup_may_be_longer_than_the_run():
    result = rates("--warmup-epochs", 40)
    assert result == pytest.approx([WARM + (LR - WARM) * epoch / 40 for epoch in range(20)])
    assert rates("--warmup-epochs", 0, epochs=1) == [LR]


# ---------------------------------------------------------------- what a checkpoint says of itself
def test_description_is_plain_and_leads_back_to_the_model():
    config = settled("--model", NANO, "--kan-grid-range", -1, 1, "--opt-betas", 0.8, 0.9)
    model, spec = build_model(model_spec(config, Start(), 3), config)
    loaders = Namespace(nb_classes=3, class_names=["a", "b", "c"])
    said = description(config, spec, loaders)
    assert said["args"]["nb_classes"] == 3 and said["args"]["opt_betas"] == [0.8, 0.9]
    assert said["class_names"] == ["a", "b", "c"] and "timm" in said["versions"]
    again = timm.create_model(said["model_args"]["name"], **said["model_args"]["kwargs"])
    load_exactly(again, model.state_dict(), "it")
    assert isinstance(again, VisionTransformer)


# ---------------------------------------------------------------- warnings about the schedule
@pytest.mark.parametrize(("argv", "said"), [
    ([], []), (["--batch-size", 4], ["--min-lr 1e-05 .* 3.91e-06 .*rises"]), (["--batch-size", 11], []),
    (["--batch-size", 4, "--unscale-lr"], []), (["--batch-size", 4, "--grad-accum", 3], []),
    (["--min-lr", 1e-2, "--unscale-lr"], ["--min-lr 0.01 lies above the learning rate 0.0005, which rises"]),
    *((["--batch-size", 4, "--sched", name], ["--min-lr .*rises"]) for name in ("tanh", "poly")),
    (["--batch-size", 4, "--sched", "plateau"], ["--min-lr .*is never lowered"]),
    *((["--batch-size", 4, "--sched", name], []) for name in ("step", "multistep")),
    (["--warmup-lr", 1e-3], ["--warmup-lr 0.001 .*goes down"]), (["--warmup-lr", 1e-3, "--warmup-epochs", 0], []),
    *((["--epochs", 5, "--sched", name], ["--warmup-epochs fill all 5 of --epochs"]) for name in ("cosine", "plateau"))], ids=str)
def test_a_schedule_that_goes_the_wrong_way_is_told(argv, said):
    """The rate does what the warning says."""
    args = flags(*argv)
    lr = scaled_lr(args, 1)
    warnings = schedule_warnings(args, lr)
    assert len(warnings) == len(said) and all(re.search(*both) for both in zip(said, warnings))
    optimizer = build_optimizer(args, nano(), lr)
    scheduler, rates = build_scheduler(args, optimizer, 1), []
    for epoch in range(args.epochs):
        if args.sched == "plateau":
            rates.append(lr_of(optimizer))
            scheduler.step(epoch + 1, 50.0)
        else:
            scheduler.step(epoch)
            rates.append(lr_of(optimizer))
    if args.warmup_epochs < args.epochs:
        after = rates[args.warmup_epochs:]
        assert ("rises" in str(warnings)) == (after[-1] > after[0])
        assert ("never lowered" in str(warnings)) == (after[-1] == after[0])
        assert ("goes down" in str(warnings)) == (rates[0] > after[0])
