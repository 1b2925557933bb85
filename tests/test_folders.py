"""Which files of a folder are read, by whoever reads it."""
import os
import shutil
from pathlib import Path

import e2e
import pytest
from helpers import make_args
from hostile_images import picture, write_folder, write_image
from PIL import Image, features

from datasets import build_dataset, build_loaders
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.data import folders
from vision_kan.data.images import load_image
from vision_kan.data.names import guess_data_set, needs_splitting
from vision_kan.run.trained import image_files


@pytest.fixture(autouse=True)
def untold():
    folders._report_once.cache_clear()


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / "data", {"cat": 3, "dog": 3}, {"cat": 2, "dog": 2})


def files_of(data):
    return [data.images.name(index) for index in range(len(data))]


def litter(root: Path) -> None:
    """What notebooks, file managers and macOS leave, each an image that would be read."""
    for place in ("train/.ipynb_checkpoints/0-checkpoint.jpg", "train/cat/.ipynb_checkpoints/0-checkpoint.jpg",
                  "train/dog/._0.jpg", "train/__MACOSX/cat/._0.jpg", "train/cat/deep/__MACOSX/1.jpg",
                  "val/cat/.thumbnails/0.jpg", "val/.x/0.jpg"):
        write_image(root / place)


# ---------------------------------------------------------------- hidden names
def test_hidden_names_are_no_data_for_the_training(data, capfd):
    before = [files_of(build_dataset(half, make_args(data))[0]) for half in (True, False)]
    assert capfd.readouterr().err == ""
    litter(data)
    loaders = build_loaders(make_args(data), Process())
    assert loaders.class_names == ["cat", "dog"] and guess_data_set(str(data)) == "FOLDER"
    assert [files_of(loaders.train.dataset), files_of(loaders.val.dataset)] == before
    said = capfd.readouterr().err.splitlines()
    assert said == [f"left out in {data}/train: 5 hidden files or folders (.ipynb_checkpoints, __MACOSX, cat/.ipynb_checkpoints, "
                    "...)", f"left out in {data}/val: 2 hidden files or folders (.x, cat/.thumbnails)"]
    build_loaders(make_args(data), Process())
    assert capfd.readouterr().err == ""         # once


def test_hidden_names_are_no_data_for_one_folder_and_for_the_tools(data, capfd):
    images = [path for path in (data / "train").rglob("*.jpg")]
    litter(data)
    loaders = build_loaders(make_args(data / "train", val_split=0.3), Process())
    assert loaders.class_names == ["cat", "dog"] and len(loaders.train.dataset) + len(loaders.val.dataset) == 6
    assert image_files([data / "train"]) == sorted(images)
    assert capfd.readouterr().err.count("5 hidden files or folders") == 1
    hidden = data / "train/dog/._0.jpg"
    assert image_files([hidden]) == [hidden]        # who names it wants it
    assert image_files([data / "train/.ipynb_checkpoints"]) == [data / "train/.ipynb_checkpoints/0-checkpoint.jpg"]


def test_timms_names_follow_the_same_rule(data, capfd):
    litter(data)
    (data / "train/.empty").mkdir()
    train, classes = build_dataset(True, make_args(data, data_set="torch/image_folder"))
    assert classes == 2 and len(train) == 6 and "6 hidden" in capfd.readouterr().err
    kept = folders.visible(str(data), [(f"{data}/train/cat/0.jpg", 0), (f"{data}/train/cat/._0.jpg", 0)])
    assert kept == [(f"{data}/train/cat/0.jpg", 0)] and "1 hidden file or folder (train/cat/._0.jpg)" in capfd.readouterr().err
    (data / "train/emu").mkdir()
    with pytest.raises(UserError, match="class folder .*emu holds no image"):
        build_dataset(True, make_args(data, data_set="torch/image_folder"))


def test_the_folder_itself_may_be_hidden(data):
    hidden = data.rename(data.with_name(".cache"))
    assert len(build_dataset(True, make_args(hidden))[0]) == 6 and len(image_files([hidden])) == 10


# ---------------------------------------------------------------- formats
def test_every_format_that_is_decoded_is_found(data, capfd):
    """By each ending that PIL knows for it."""
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif"} <= set(folders.endings())
    assert (".avif" in folders.endings()) == features.check("avif")
    written = 0
    for ending in folders.endings():
        kind = Image.registered_extensions()[ending]
        path = data / f"train/cat/{ending[1:]}{ending.upper()}"
        image = picture().convert("F") if ending == ".pfm" else picture()
        image.save(path, kind)
        written += 1
        assert load_image(str(path)).size == (40, 32)
    assert len(build_dataset(True, make_args(data))[0]) == 6 + written and len(image_files([data / "train"])) == 6 + written
    assert capfd.readouterr().err == ""


def test_a_format_that_this_pil_cannot_decode_is_counted(data, monkeypatch, capfd):
    monkeypatch.setattr(folders, "formats", lambda: ["JPEG"])
    folders.endings.cache_clear()
    picture().save(data / "train/cat/new.png")
    assert len(build_dataset(True, make_args(data))[0]) == 6
    assert "1 file of no format that is read here (1 .png)" in capfd.readouterr().err
    folders.endings.cache_clear()


def test_files_that_are_not_taken_are_counted(data, capfd):
    for name in ("train/cat/a.heic", "train/cat/b.HEIC", "train/dog/deep/notes.txt", "train/dog/LICENSE", "train/README.txt"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).touch()
    write_image(data / "train/stray.jpg")
    assert len(build_dataset(True, make_args(data))[0]) == 6
    assert capfd.readouterr().err == (
        f"left out in {data}/train: 4 files of no format that is read here (2 .heic, 1 .txt, 1 without an ending); 1 image "
        "beside the class folders (stray.jpg)\n")
    for number in range(7):
        (data / f"val/cat/{number}.kind{number}").touch()
    build_dataset(False, make_args(data))
    assert "read here (1 .kind0, 1 .kind1, 1 .kind2, 1 .kind3, 1 .kind4, ...)" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open any folder")
def test_a_folder_that_cannot_be_opened_is_told(data, capfd):
    (data / "train/cat/private").mkdir(mode=0)
    assert len(build_dataset(True, make_args(data))[0]) == 6
    assert "1 folder that cannot be opened (cat/private: Permission denied)" in capfd.readouterr().err


# ---------------------------------------------------------------- links
def test_linked_class_folders_are_read_by_all(data, tmp_path, capfd):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(data / "train" / name)
    assert guess_data_set(str(linked)) == "FOLDER"
    loaders = build_loaders(make_args(linked, val_split=0.3), Process())
    assert len(loaders.train.dataset) + len(loaders.val.dataset) == 6
    assert image_files([linked]) == [linked / name / f"{i}.jpg" for name in ("cat", "dog") for i in range(3)]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../dog", "/"])
def test_links_that_lead_back_multiply_nothing(data, capfd, target):
    before = files_of(build_dataset(True, make_args(data))[0])
    (data / "train/cat/0 again").symlink_to(target)
    assert files_of(build_dataset(True, make_args(data))[0]) == before
    assert capfd.readouterr().err == f"left out in {data}/train: 1 link to folders that are read already (cat/0 again)\n"
    assert image_files([data / "train"]) == sorted(map(Path, before))


def test_each_real_folder_is_read_once_under_its_own_name(data, tmp_path, capfd):
    write_image(data / "train/cat/real/x.jpg")
    write_image(tmp_path / "more/y.jpg")
    (data / "train/cat/a link").symlink_to("real")          # comes before it by name
    for place in ("train/cat/more", "train/dog/more"):
        (data / place).symlink_to(tmp_path / "more")
    names = files_of(build_dataset(True, make_args(data))[0])
    assert [name.removeprefix(f"{data}/train/") for name in names if name[-5] in "xy"] == ["cat/more/y.jpg", "cat/real/x.jpg"]
    assert "2 links to folders that are read already (cat/a link, dog/more)" in capfd.readouterr().err


def test_a_class_that_is_a_link_does_not_lead_to_its_neighbours(data, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(data / "train" / name)
    (data / "train/cat/up").symlink_to("..")
    assert len(build_loaders(make_args(tmp_path / "linked", val_split=0.3), Process()).train.dataset) == 4
    (data / "train/loop").symlink_to("loop")        # leads nowhere
    assert len(build_dataset(True, make_args(data))[0]) == 6


# ---------------------------------------------------------------- the real cause
def test_flat_folders_are_called_so(tmp_path, capsys):
    flags = (*e2e.QUICK, "--batch-size", 2, "--epochs", 1, "--data-path")
    data = write_folder(tmp_path / "data", {"cat": 3, "dog": 3}, {})
    for number in range(2):
        write_image(data / f"val/{number}.jpg")
    text = e2e.refusal(capsys, *flags, data)
    assert "val/ under" in text and "images lie directly in it (2), put each into the folder of its class, val/CLASS/" in text
    write_image(tmp_path / "flat/0.jpg")
    assert "has images directly in it (1) and none in class folders" in e2e.refusal(capsys, *flags, tmp_path / "flat")
    write_image(tmp_path / "half/train/0.jpg")
    (tmp_path / "half/val").mkdir()
    text = e2e.refusal(capsys, *flags, tmp_path / "half")
    assert "no class folder in train/: images lie directly in it (1), put each into" in text


def test_other_causes(tmp_path, capsys):
    flags = (*e2e.QUICK, "--batch-size", 2, "--epochs", 1, "--data-path")
    data = write_folder(tmp_path / "data", {"cat": 3, "dog": 3}, {"cat": 1})
    write_image(tmp_path / "one/cat/0.jpg")
    assert "has a single class folder (cat): a classifier needs two" in e2e.refusal(capsys, *flags, tmp_path / "one")
    shutil.move(data, tmp_path / "outer/inner")
    text = e2e.refusal(capsys, *flags, tmp_path / "outer")
    assert f"is not the folder of the data set, which is in it: give --data-path {tmp_path}/outer/inner" in text
    data = tmp_path / "outer/inner"
    (data / "val").rename(data / "Valid")
    assert "has no val/ folder but Valid/: rename it to val/" in e2e.refusal(capsys, *flags, data)
    shutil.rmtree(data / "Valid")
    assert "has no val/ folder: make one" in e2e.refusal(capsys, *flags, data)
    for name in ("a", "b"):
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "notes.txt").touch()
    assert "its folders hold no image of a format" in e2e.refusal(capsys, *flags, tmp_path / "text")


def test_what_is_asked_for_only_once_is_read_lazily(data, monkeypatch):
    """Whether a folder of a million images has one is known by the first."""
    opened = []
    monkeypatch.setattr(folders.os, "scandir", lambda path, real=os.scandir: (opened.append(path), real(path))[1])
    assert folders.has_images(str(data / "train"), ["cat", "dog"]) and opened == [str(data / "train/cat")]
    assert not folders.has_images(str(data), []) and needs_splitting("FOLDER", str(data)) is False
