"""tools/convert.py as a user calls it: real files, real images, every option and every mistake."""
import json

import numpy as np
import pytest
import timm
import torch
from helpers import GKAN, NANO, TWIN
from models import trained
from PIL import Image
from safetensors import safe_open

import main as program
from tools import convert, export
from vision_kan.checkpoints.read import load_file
from vision_kan.checkpoints.shipped import shipped
from vision_kan.models import conversion as conversion_module
from vision_kan.models.finetune import load_finetune
from vision_kan.models.infer import load_exactly
from vision_kan.run.trained import load_trained

FULL = ["--hdim_kan", "384", "--kan-basis", "covering", "--kan-second-norm", "static", "--kan-grid-range", "-4", "4"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ and val/ of ten classes, which also serve as a folder of loose images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for c in range(10):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((36, 36)).save(folder / split / f"class{c}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("source") / "deit.pth"
    torch.save({"model": trained().state_dict()}, file)
    return file


def test_group_kan(source, photos, tmp_path, capsys):
    target = tmp_path / "deep" / "g.safetensors"
    assert convert.main([str(source), str(target), "--model", GKAN, "--check", str(photos / "val")]) == 0
    out = capsys.readouterr().out
    assert "converted: 16 tensors" in out and "20 images" in out and "100.0%" in out
    with safe_open(target, "pt") as file:
        about = json.loads(file.metadata()["vision_kan"])
        assert file.metadata()["format"] == "pt"
    model = timm.create_model(about["model_args"]["name"], **about["model_args"]["kwargs"])
    load_exactly(model, load_file(target)["model"], "the target")
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model.eval()(x), trained()(x), atol=1e-5, rtol=1e-5)
    assert [path.name for path in target.parent.iterdir()] == ["g.safetensors"]


def test_full_edge_kan(source, photos, tmp_path, capsys):
    target = tmp_path / "k.safetensors"
    command = [str(source), str(target), "--model", NANO, *FULL]
    assert convert.main([*command, "--calibrate", str(photos / "train"), "--check", str(photos / "val")]) == 0
    out = capsys.readouterr().out
    assert "fitted to the MLP" in out and "error of the feed-forward" in out
    assert convert.main(command) == 2
    assert "--calibrate" in capsys.readouterr().err


def test_the_source_is_not_replaced(source, tmp_path, capsys):
    target = tmp_path / "m.safetensors"
    assert convert.main([str(source), str(target), "--model", GKAN]) == 0
    before = target.read_bytes()
    folder = tmp_path / "exported"
    assert export.main([str(source), str(folder)]) == 0
    for words in ([target, target], [target.as_uri(), target], [folder, folder / "model.safetensors"],
                  ["vit_nano_patch8_32_ViT.digits", shipped()["vit_nano_patch8_32_ViT.digits"]]):
        assert convert.main([*map(str, words), "--model", GKAN]) == 2
        assert "is the checkpoint itself, which would be lost" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert convert.main([str(source), str(tmp_path / "n.safetensors"), "--model", GKAN, "--ffn", "gkan"]) == 2
    assert "--ffn gkan: name the model with its feed-forward in --model" in capsys.readouterr().err


def test_main_evaluates_and_finetunes_the_target(source, photos, tmp_path, capsys):
    target = tmp_path / "g.safetensors"
    assert convert.main([str(source), str(target), "--model", GKAN]) == 0
    assert program.main(["--eval", "--resume", str(target), "--data-path", str(photos), "--data-set", "FOLDER",
                         "--num_workers", "0"]) == 0
    assert "20 images" in capsys.readouterr().out
    assert program.main(["--finetune", str(target), "--model", GKAN, "--input-size", "32", "--data-path",
                         str(photos), "--data-set", "FOLDER", "--num_workers", "0", "--epochs", "1", "--batch-size", "8",
                         "--output_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "checkpoint.pth").exists()


def test_main_converts_by_itself(source, photos, tmp_path, capsys):
    """--finetune into a full-edge KAN takes its calibration batch from the training images."""
    assert program.main(["--finetune", str(source), "--model", NANO, *FULL, "--input-size", "32", "--data-path",
                         str(photos), "--data-set", "FOLDER", "--num_workers", "0", "--epochs", "1", "--batch-size", "8",
                         "--output_dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "fitted to the MLP" in out and "error of the feed-forward" in out
    assert "mlp.fc1" not in out
    kept = load_file(tmp_path / "run" / "checkpoint.pth")["model_args"]["kwargs"]
    assert kept["kan_second_norm"] == "static" and kept["hdim_kan"] == 384


def test_a_damaged_conversion_is_noticed(source, photos, monkeypatch, tmp_path, capsys):
    exact = load_finetune

    def damaged(model, state, grid):
        report = exact(model, state, grid)
        if hasattr(model.blocks[0].mlp, "phi2"):
            with torch.no_grad():
                model.blocks[0].mlp.phi2.coefficients += 0.1
        return report

    monkeypatch.setattr(conversion_module, "load_finetune", damaged)
    assert convert.main([str(source), str(tmp_path / "g.safetensors"), "--model", GKAN, "--check",
                         str(photos / "val")]) == 1
    assert "was not written: the converted model differs from its source" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kwargs", [
    {"depth": 6}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}, {"class_token": True, "reg_tokens": 4}],
    ids=str)
def test_the_sources_architecture_is_kept(kwargs, photos, tmp_path):
    """A file without a description shows depth and fc_norm by its weights; a model without a class token describes itself."""
    model, file, target = trained(**kwargs), tmp_path / "source.pth", tmp_path / "g.safetensors"
    torch.save({"model": model.state_dict(), **({"model_args": {"name": TWIN, "kwargs": {"num_classes": 10, **kwargs}}}
                                                if "class_token" in kwargs else {})}, file)
    assert convert.main([str(file), str(target), "--model", GKAN, "--check", str(photos / "val")]) == 0
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_trained(str(target), device="cpu").model(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted, changes, sentence", [
    ("vit_nano_patch4_32_GKAN", {"blocks.4.norm1.weight": torch.ones(96)}, "blocks.4.norm1.weight is dropped: choose"),
    (GKAN, {"blocks.3.ls1.gamma": torch.ones(96)}, "blocks.3.ls1.gamma is dropped: choose"),
    (GKAN, {"attn_pool.q": torch.ones(96)}, "attn_pool.q is dropped: choose"),
    (GKAN, {"norm.weight": None}, "norm.weight is left as initialised: choose"),
    (GKAN, {"norm.weight": None, "norm.bias": None}, "norm.weight is left as initialised, and 1 more (see the table above)"),
    *((GKAN, {key: torch.zeros(shape)}, "source.pth does not describe or fit a model") for key, shape in (
        ("cls_token", ()), ("pos_embed", 17), ("patch_embed.proj.weight", (96, 3, 8, 0)), ("head.weight", ()),
        ("blocks.0.mlp.fc1.weight", ())))])
def test_a_model_that_computes_something_else_is_not_written(wanted, changes, sentence, tmp_path, capsys):
    state = {key: value for key, value in {**trained().state_dict(), **changes}.items() if value is not None}
    torch.save({"model": state}, tmp_path / "source.pth")
    assert convert.main([str(tmp_path / "source.pth"), str(tmp_path / "g.safetensors"), "--model", wanted]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


@pytest.mark.parametrize("words, sentence", [
    (["nowhere.pth", "t.safetensors", "--model", GKAN], "neither a file"),
    (["http://[x", "t.safetensors", "--model", GKAN], "SOURCE http://[x cannot be a path (Invalid IPv6 URL)"),
    (["~nouser/x", "t.safetensors", "--model", GKAN], "SOURCE ~nouser/x cannot be a path (there is no such user)"),
    (["a" * 300, "t.safetensors", "--model", GKAN], "cannot be a path (it is too long)"),
    (["SOURCE", "a" * 300 + ".safetensors", "--model", GKAN], "cannot be a path (it is too long)"),
    (["SOURCE", "t.pth", "--model", GKAN], "must end in .safetensors"),
    (["SOURCE", "t.safetensors", "--model", "no_such_model"], "is unknown"),
    (["SOURCE", "t.safetensors", "--model", GKAN, "--kan-grups", "4"], "--kan-grups"),
    (["SOURCE", "t.safetensors", "--model", TWIN], "nothing was converted"),
    (["SOURCE", "t.safetensors", "--model", NANO], "nothing was converted"),
    (["SOURCE", "t.safetensors", "--model", "deit_tiny_patch16_224_GKAN"], "nothing of the checkpoint's attention"),
    (["SOURCE", "t.safetensors", "--model", GKAN, "--check", "EMPTY"], "holds no images")])
def test_mistakes(words, sentence, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [{"SOURCE": str(source), "EMPTY": str(tmp_path / "empty")}.get(word, word) for word in words]
    assert convert.main(words) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err


def test_unreadable_images_are_left_out(source, photos, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    target = str(tmp_path / "g.safetensors")
    assert convert.main([str(source), target, "--model", GKAN, "--check", str(tmp_path)]) == 2
    assert "can be read" in capsys.readouterr().err
    Image.new("RGB", (40, 40), "red").save(tmp_path / "whole.png")
    assert convert.main([str(source), target, "--model", GKAN, "--check", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err and "1 images" in captured.out


def test_images_stay_as_the_source_knows_them(photos, tmp_path):
    """Their preparation, and which of them are held out."""
    images = {"data_set": "FOLDER", "val_split": 0.2, "seed": 5}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_ratio": 0.9, "interpolation": "bicubic", "crop_mode": "center"}
    torch.save({"model": trained().state_dict(), "args": {"lr": 1.0, "model": TWIN, **images, **half}}, tmp_path / "source.pth")
    target = tmp_path / "g.safetensors"
    assert convert.main([str(tmp_path / "source.pth"), str(target), "--model", GKAN]) == 0
    assert load_file(target)["args"] == {"input_size": 32, **images, **half}
    assert load_trained(str(target), device="cpu").data_config["mean"] == (0.5, 0.5, 0.5)
