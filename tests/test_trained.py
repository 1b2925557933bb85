"""Models out of checkpoints, and images to use them on."""
import os

import pytest
import timm
import torch
from e2e import QUICK, checkpoint, evaluation, refusal, run, write_digits
from helpers import NANO, RELEASED, needs_released, sentence
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from engine import evaluate
from tools import export
from tools.images import loaders_of
from vision_kan.common.process import Process
from vision_kan.run.trained import Pictures, class_names, denormalised, image_files, load_trained


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_digits(folder / "data")
    assert run(*QUICK, "--data-path", data, "--epochs", 1, "--drop", 0.1, "--output_dir", folder / "run") == 0
    return folder / "run", data


def test_the_model_is_the_checkpoints_and_evaluates_as_main_does(trained_run, capsys):
    folder, data = trained_run
    file = folder / "checkpoint.pth"
    for weights in ("model", "model_ema"):
        trained = load_trained(str(file), weights=weights, device="cpu", flags=["--data-path", str(data)])
        assert not trained.model.training and not any(p.requires_grad for p in trained.model.parameters())
        stored = checkpoint(folder)[weights]
        assert all(torch.equal(value, stored[key]) for key, value in trained.model.state_dict().items())
        assert trained.class_names == ["digit0", "digit1", "digit2"] and trained.args.input_size == 32
        assert not trained.about.keys() & {"model", "model_ema", "optimizer"} and trained.about["epoch"] == 0
        assert trained.spec.name == NANO
        result = evaluate(trained.model, loaders_of(trained).val, Process())
        capsys.readouterr()
        assert run("--eval", "--resume", file, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
        assert evaluation(capsys.readouterr().out)[weights][0] == f"{result['acc1']:.2f}"


def test_what_cannot_be_loaded(trained_run, tmp_path):
    folder, data = trained_run
    assert "does not exist" in sentence(load_trained, str(tmp_path / "none.pth"))
    content = checkpoint(folder)
    torch.save({key: value for key, value in content.items() if key != "model_ema"}, tmp_path / "c.pth")
    assert "no model_ema" in sentence(load_trained, str(tmp_path / "c.pth"), weights="model_ema")
    other = write_digits(tmp_path / "other", classes=4)
    trained = load_trained(str(folder / "checkpoint.pth"), device="cpu", flags=["--data-path", str(other)])
    assert "digit3" in sentence(loaders_of, trained)


@needs_released
def test_a_file_of_the_original_code():
    trained = load_trained(str(RELEASED), device="cpu")
    assert trained.spec.name.endswith("_KAN") and len(trained.class_names) == trained.model.num_classes
    assert trained.args.input_size == 64


def test_a_model_of_timms(tmp_path):
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save({"model": model.state_dict(), "args": {"model": "resnet10t"}}, tmp_path / "r.pth")
    trained = load_trained(str(tmp_path / "r.pth"), device="cpu")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(trained.model(images), model.eval()(images)) and trained.class_names == list("0123456")


def test_class_names():
    assert class_names({}, 3) == ["0", "1", "2"] and class_names({"class_names": ["a", "b"]}, 3) == ["0", "1", "2"]
    assert class_names({}, 1000)[0] == "tench, Tinca tinca"
    assert class_names({"class_names": ["n01443537", "cat"]}, 2) == ["goldfish, Carassius auratus", "cat"]


def test_pictures(trained_run, tmp_path, capfd):
    folder, data = trained_run
    files = image_files([data / "val"])
    assert len(files) == 24 and files == sorted(files) and image_files([files[3], data / "val", files[3]])[0] == files[3]
    assert "does not exist" in sentence(image_files, [tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    assert "no images" in sentence(image_files, [tmp_path / "empty"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    trained = load_trained(str(folder / "checkpoint.pth"), device="cpu", flags=["--data-path", str(data)])
    pictures = Pictures([*files[:5], broken, *files[5:]], trained.args, batch_size=4)
    images, indices = map(torch.cat, zip(*pictures))
    assert indices.tolist() == [*range(5), *range(6, 25)] and pictures.unreadable == [broken]
    assert str(broken) in capfd.readouterr().err
    expected = torch.cat([batch for batch, _ in loaders_of(trained).val])
    assert torch.equal(images, expected) and os.fspath(pictures.files[5]) == str(broken)


@pytest.mark.slow
def test_photos_are_turned_as_in_the_training(trained_run, tmp_path):
    """An evaluation and the tools do as the checkpoint says; what was trained on a published data set sees photos upright."""
    folder, data = trained_run
    whole = sorted((data / "val/digit1").iterdir())[0]
    exif = Image.Exif()
    exif[0x0112] = 3
    upside_down = tmp_path / "val/digit1/0.png"
    upside_down.parent.mkdir(parents=True)
    with Image.open(whole) as image:
        image.rotate(180).save(upside_down, exif=exif)

    def seen(file, *flags):
        """Whether upright, in an evaluation and in an image that is named."""
        trained = load_trained(str(file), device="cpu", flags=["--data-path", str(tmp_path), *flags])
        (expected, _), = Pictures([whole], trained.args)
        (images, _), = Pictures([upside_down], trained.args)
        (evaluated, _), = loaders_of(trained).val
        return bool(torch.equal(evaluated, expected)), bool(torch.equal(images, expected))

    content = checkpoint(folder)
    assert content["args"]["exif_orientation"] is True and seen(folder / "checkpoint.pth") == (True, True)
    assert seen(folder / "checkpoint.pth", "--no-exif-orientation") == (False, False)
    for name, changes, expected in (("off", {"exif_orientation": False}, (False, False)),
                                    ("published", {"exif_orientation": None, "data_set": "IMNET"}, (False, True))):
        torch.save({**content, "args": {**content["args"], **changes}}, tmp_path / f"{name}.pth")
        flags = ["--data-set", "IMNET"] if name == "published" else []
        assert seen(tmp_path / f"{name}.pth", *flags) == expected, name


@pytest.mark.slow
def test_another_model_of_timms_has_its_images_as_it_was_trained(tmp_path, capsys):
    """Told, kept in the checkpoint, taken from it by evaluation and export, in the tools and by timm; of runs of before, and
    where --mean says so, other ones."""
    data = write_digits(tmp_path / "data", size=40)
    flags = ("--data-path", data, "--device", "cpu", "--num_workers", 0)
    assert run(*QUICK, "--model", "test_vit", "--input-size", 48, "--batch-size", 16, "--data-path", data, "--epochs", 1,
               "--output_dir", tmp_path / "run") == 0
    assert "eval_crop_ratio 0.95, mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in capsys.readouterr().out
    file, image = tmp_path / "run" / "checkpoint.pth", next((data / "val").rglob("*.png"))
    content = torch.load(file, weights_only=True)
    assert content["args"]["mean"] == content["args"]["std"] == [0.5] * 3 and content["args"]["eval_crop_ratio"] == 0.95

    own = timm.data.resolve_model_data_config(timm.create_model("test_vit")) | {"input_size": (3, 48, 48)}
    expected = timm.data.create_transform(**own)(Image.open(image).convert("RGB"))
    trained = load_trained(str(file), device="cpu")
    (seen, _), = Pictures([image], trained.args)
    assert trained.data_config == own and torch.equal(seen[0], expected)
    assert torch.equal(denormalised(seen[0], trained.args), expected * 0.5 + 0.5)
    for target in ("m.safetensors", "folder"):
        assert export.main([str(file), str(tmp_path / target)]) == 0
    assert load_trained(str(tmp_path / "m.safetensors"), device="cpu").data_config == own
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    said = timm.data.resolve_model_data_config(theirs)
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()} == own

    capsys.readouterr()
    assert run("--eval", "--resume", file, *flags) == 0
    first = capsys.readouterr().out
    assert evaluation(first) and "mean 0.5 0.5 0.5" in first
    assert run("--eval", "--resume", file, *flags, "--mean", 0.1, 0.1, 0.1) == 0
    second = capsys.readouterr().out
    assert "--mean is 0.1 0.1 0.1 (command line); the checkpoint has 0.5 0.5 0.5" in second
    assert "contradicts the checkpoint" in refusal(capsys, *QUICK[:4], "--resume", file, "--data-path", data, "--std",
                                                            1, 1, 1)
    # bare weights
    torch.save({"model": timm.create_model("test_vit").state_dict()}, tmp_path / "bare.pth")
    bare = load_trained(str(tmp_path / "bare.pth"), device="cpu", flags=["--model", "test_vit"])
    assert bare.data_config == own | {"input_size": (3, 160, 160)}
    # an older run
    for key in ("mean", "std", "interpolation", "crop_mode"):
        del content["args"][key]
    torch.save({**content, "args": {**content["args"], "eval_crop_ratio": 0.875}}, tmp_path / "older.pth")
    older = load_trained(str(tmp_path / "older.pth"), device="cpu").data_config
    assert older == {**own, "crop_pct": 0.875, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
