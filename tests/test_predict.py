"""tools/predict.py, from own photos through main.py to names and probabilities."""
import csv
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from e2e import checkpoint, evaluation, run, write_digits
from helpers import GKAN, RELEASED, ROOT, TWIN, needs_released
from models import nano

from vision_kan.run.trained import Pictures, image_files, load_trained

sys.path.insert(0, str(ROOT / "tools"))
import predict  # noqa: E402


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """One folder of class folders with real digits."""
    folder = tmp_path_factory.mktemp("photos")
    return write_digits(folder, train=20, val=0, names=["null", "one, or two", "größe"]) / "train"


@pytest.fixture(scope="module")
def fine_tuned(photos, tmp_path_factory):
    """`main.py --config recipes/finetune_folder.yaml` from weights in a file, with a smaller model."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    torch.save({"model": timm.create_model(TWIN, num_classes=10).state_dict()}, folder / "weights.pth")
    assert run("--data-set", "FOLDER", "--data-path", photos, "--config", ROOT / "recipes/finetune_folder.yaml", "--finetune",
               folder / "weights.pth", "--model", GKAN, "--input-size", 32, "--epochs", 1, "--warmup-epochs", 0, "--batch-size",
               16, "--device", "cpu", "--num_workers", 0, "--output_dir", folder / "run") == 0
    return folder / "run"


@pytest.mark.slow
def test_the_held_out_part_is_what_is_evaluated(photos, fine_tuned, tmp_path, capsys):
    content = checkpoint(fine_tuned)
    assert content["args"]["val_split"] == 0.2 and content["args"]["seed"] == 0
    assert content["class_names"] == ["größe", "null", "one, or two"]
    words = ["--device", "cpu", "--num_workers", 0, "--data-path", photos]
    log = json.loads((fine_tuned / "log.txt").read_text().splitlines()[-1])
    capsys.readouterr()
    assert run("--eval", "--resume", fine_tuned / "checkpoint.pth", *words) == 0
    out = capsys.readouterr().out
    top1, _, images = evaluation(out)["model"]
    assert (top1, images) == (f"{log['test_acc1']:.2f}", 12)
    assert "48 images to train on, 12 held out (--val-split 0.2, --seed 0)" in out
    assert run("--eval", "--resume", fine_tuned / "checkpoint.pth", *words, "--seed", 1) == 2     # else it saw them in training
    assert "--seed 1 (command line) contradicts the checkpoint" in capsys.readouterr().err
    assert run("--eval", "--resume", fine_tuned / "checkpoint.pth", *words, "--val-split", 1) == 0
    assert evaluation(capsys.readouterr().out)["model"][2] == 60
    # resumed, and from its own args.yaml, it is the same split
    assert run("--resume", "auto", "--output_dir", fine_tuned, *words, "--epochs", 2) == 0
    assert "48 images to train on, 12 held out (--val-split 0.2, --seed 0)" in capsys.readouterr().out
    assert run("--config", fine_tuned / "args.yaml", "--resume", "", "--output_dir", tmp_path / "again", "--epochs", 1) == 0
    assert "48 images to train on, 12 held out" in capsys.readouterr().out


def test_without_a_connection(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *args: (_ for _ in ()).throw(OSError(101, "Network is unreachable")))
    assert run("--data-set", "FOLDER", "--data-path", photos, "--config", ROOT / "recipes/finetune_folder.yaml", "--output_dir",
               tmp_path / "run", "--device", "cpu") == 2
    err = capsys.readouterr().err
    assert "cannot be downloaded" in err and "give the file" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- formats
def read(capsys, *words, code=0):
    capsys.readouterr()
    assert predict.main([str(word) for word in words]) == code
    return capsys.readouterr()


def test_as_the_model_says(photos, fine_tuned, capsys):
    """JSON, CSV and table against softmax of the model's own outputs."""
    file, place = fine_tuned / "checkpoint.pth", photos / "null"
    trained = load_trained(str(file), device="cpu")
    files = image_files([place])
    (images, _), = Pictures(files, trained.args)
    probabilities = trained.model(images).softmax(1)
    text = read(capsys, file, place, "--format", "json", "--device", "cpu", "--batch-size", 3).out
    assert '"name": "größe"' in text
    found = json.loads(text)
    assert [image["file"] for image in found["images"]] == list(map(str, files)) and found["unreadable"] == []
    for image, expected in zip(found["images"], probabilities):
        order = expected.argsort(descending=True).tolist()
        assert [p["class"] for p in image["predictions"]] == order
        assert [p["name"] for p in image["predictions"]] == [["größe", "null", "one, or two"][c] for c in order]
        assert [p["probability"] for p in image["predictions"]] == pytest.approx(expected[order].tolist(), abs=1e-6)
    rows = list(csv.DictReader(read(capsys, file, place, "--format", "csv", "--top", 2).out.splitlines()))
    assert len(rows) == 40 and list(rows[0]) == ["file", "rank", "class", "name", "probability"]
    assert [(row["file"], int(row["class"])) for row in rows if row["rank"] == "1"] == \
        [(image["file"], image["predictions"][0]["class"]) for image in found["images"]]
    head, *lines = read(capsys, file, files[0], "--top", 1).out.splitlines()
    assert head.split() == ["image", "class", "probability"] and len(lines) == 1
    first = found["images"][0]["predictions"][0]
    shown = lines[0].partition("  ")[0]     # of a long name the end
    assert str(files[0]).endswith(shown.removeprefix("...")) and shown.endswith(files[0].name)
    assert first["name"] in lines[0] and lines[0].endswith(f"{first['probability']:.2%}")


def test_unreadable_files_are_named_and_left_out(photos, fine_tuned, tmp_path, capfd):
    file, output = fine_tuned / "checkpoint.pth", tmp_path / "new/found.json"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    whole = image_files([photos])[0]
    out, err = read(capfd, file, broken, whole, "--output", output)
    assert out == "" and str(broken) in err and "1 of the 2 images cannot be read" in err
    found = json.loads(output.read_text())
    assert [image["file"] for image in found["images"]] == [str(whole)] and found["unreadable"] == [str(broken)]
    before = output.read_bytes()
    err = read(capfd, file, broken, "--output", output, code=2).err
    assert "none of the 1 images can be read" in err and "Traceback" not in err
    assert output.read_bytes() == before and os.listdir(output.parent) == ["found.json"]     # nothing lost, nothing left


def test_json_on_a_stream_of_another_encoding():
    """Escaped, so that any reader of JSON accepts it."""
    texts = {}
    for encoding in ("utf-8", "cp1252", "ascii"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        predict.write_json(iter([predict.Prediction(Path("ä.png"), [0], [1.0])]), ["größe"], SimpleNamespace(unreadable=[]), out)
        out.flush()
        texts[encoding] = out.buffer.getvalue()
    assert len({json.dumps(json.loads(text.decode("utf-8"))) for text in texts.values()}) == 1
    assert "größe" in texts["utf-8"].decode() and texts["cp1252"] == texts["ascii"]


def test_names_that_no_terminal_can_show(photos, fine_tuned, tmp_path, capfd):
    odd = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff\n\x1b.png")))
    odd.write_bytes(image_files([photos])[0].read_bytes())
    for kind in predict.FORMATS:
        out = read(capfd, fine_tuned / "checkpoint.pth", odd, "--format", kind).out
        assert out.encode() and ("\x1b" not in out or kind == "csv")


def test_a_file_whose_name_begins_like_a_users_folder(photos, fine_tuned, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~draft.png").write_bytes(image_files([photos])[0].read_bytes())
    assert "~draft.png" in read(capfd, fine_tuned / "checkpoint.pth", "~draft.png").out


def test_mistakes(photos, fine_tuned, tmp_path, capfd):
    file, photo = fine_tuned / "checkpoint.pth", next(Path(photos).rglob("*.*"))
    (tmp_path / "empty").mkdir()
    torch.save({"model": nano(TWIN, num_classes=0).state_dict()}, tmp_path / "headless.pth")
    for words, sentence in (([tmp_path / "none.pth", photos], "does not exist"),
                            ([file, tmp_path / "none.png"], "does not exist"),
                            ([file, "a" * 300], "cannot be a path (it is too long)"),
                            ([file, photos, "--output", file], "is the checkpoint itself, which would be lost"),
                            ([file, photo, "--output", photo], "is one of the images, which would be lost"),
                            ([file, photo, "--output", os.path.relpath(photo)], "is one of the images, which would be lost"),
                            ([tmp_path / "headless.pth", photos], "headless.pth has no head and so no classes to predict"),
                            ([file, tmp_path / "empty"], "holds no images"), ([file, photos, "--top", 0], "--top 0"),
                            ([file, photos, "--batch-size", 0], "--batch-size 0"), ([file], "IMAGE|FOLDER"),
                            ([file, photos, "--format", "xml"], "is not one of table, json, csv"),
                            ([file, photos, "--tpo", 3], "--tpo"), ([file, photos, "--device", "cuda:99"], "--device cuda:99"),
                            ([file, photos, "--weights", "model_ema"], "no model_ema"),
                            ([file, photos, "--output", "/proc/x/y.csv"], "cannot be written")):
        err = read(capfd, *words, code=2).err
        assert sentence in err and "Traceback" not in err and err.splitlines()[-1].startswith("error: "), words


@needs_released
def test_a_released_checkpoint(photos, capsys):
    found = json.loads(read(capsys, RELEASED, photos / "null", "--format", "json", "--top", 3).out)
    assert len(found["images"]) == 20 and all(len(image["predictions"]) == 3 for image in found["images"])
