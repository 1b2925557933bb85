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
from tools import convert
from vision_kan.checkpoints.read import load_file
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
    assert convert.main([str(target), str(target), "--model", GKAN]) == 2
    assert "is the checkpoint itself, which would be lost" in capsys.readouterr().err and target.read_bytes() == before
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
    assert "differs from its source" in capsys.readouterr().err


@pytest.mark.parametrize("words, sentence", [
    (["nowhere.pth", "t.safetensors", "--model", GKAN], "neither a file"),
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
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_ratio": 0.9, "interpolation": "bicubic", "crop_mode": "center"}
    torch.save({"model": trained().state_dict(), "args": {"lr": 1.0, **half}}, tmp_path / "source.pth")
    target = tmp_path / "g.safetensors"
    assert convert.main([str(tmp_path / "source.pth"), str(target), "--model", GKAN]) == 0
    assert load_file(target)["args"] == half
    assert load_trained(str(target), device="cpu").data_config["mean"] == (0.5, 0.5, 0.5)
