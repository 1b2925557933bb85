import concurrent.futures
import ctypes
import functools
import gc
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import tarfile
import threading
import time

import e2e
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import every, forked, make_args, sentence
from hostile_images import (
    EPS,
    LONG_NAME,
    grown,
    picture,
    write_black_png,
    write_folder,
    write_image,
    write_odd,
    write_unreadable,
)
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.task import ClassificationEvaluator
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets

import datasets
from datasets import build_dataset, build_loaders
from samplers import RASampler
from vision_kan.common.errors import UnreadableData, UserError
from vision_kan.common.process import Process
from vision_kan.data import images as images_module
from vision_kan.data.class_folders import hold_out
from vision_kan.data.images import FileImages, SampleKey, load_image
from vision_kan.data.known import DIGITS_VAL, _digits_file, open_digits
from vision_kan.data.names import evaluated_split, guess_data_set
from vision_kan.data.transforms import build_transform
from vision_kan.data.workers import batches

CIFARS = {"CIFAR": torchvision_datasets.CIFAR100, "CIFAR10": torchvision_datasets.CIFAR10}


@pytest.fixture(autouse=True)
def no_worker_is_left():
    """PyTorch would wait five seconds for each of a loader that an exception's traceback has kept until the garbage collector
    comes. Its handler of SIGCHLD, which tests without `batches` leave behind, would raise in the middle of pytest."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.disable()
    yield
    for child in multiprocessing.active_children():
        if child.daemon:
            child.terminate()
    gc.enable()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", {"cat": 5, "dog": 6, "owl": 5}, {"cat": 2, "dog": 3, "owl": 2})


def epoch_of(loaders, epoch=0, position=0):
    loaders.train_sampler.set_epoch(epoch, position)
    return list(loaders.train)


def same_batches(one, other):
    return len(one) == len(other) and all(
        torch.equal(images, images2) and torch.equal(targets, targets2)
        for (images, targets), (images2, targets2) in zip(one, other, strict=True))


def targets_of(loader):
    return [target for _, targets in loader for target in targets.tolist()]


# ---------------------------------------------------------------- FOLDER
def test_folder_loaders(folder):
    loaders = build_loaders(make_args(folder), Process())
    assert (loaders.data_set, loaders.nb_classes, loaders.class_names) == ("FOLDER", 3, ["cat", "dog", "owl"])
    drawn = epoch_of(loaders)
    assert [len(images) for images, _ in drawn] == [4, 4, 4, 4]
    assert drawn[0][0].shape == (4, 3, 32, 32) and drawn[0][0].dtype == torch.float32
    assert drawn[0][1].dtype == torch.int64
    val = list(loaders.val)
    assert [len(images) for images, _ in val] == [6, 1]  # int(1.5 * 4), the incomplete batch kept
    assert targets_of(loaders.val) == [0, 0, 1, 1, 1, 2, 2]
    assert loaders.gather_unreadable_train() == loaders.val.dataset.count_unreadable() == 0


def test_build_dataset_keeps_deits_signature(folder):
    data, nb_classes = build_dataset(True, make_args(folder))
    assert (len(data), nb_classes) == (16, 3)
    image, target = data[5]  # a plain index works too
    assert image.shape == (3, 32, 32) and target == 1


def test_order_is_torchvisions(folder):
    write_image(folder / "train" / "cat" / "deep" / "er.PNG")
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    theirs = torchvision_datasets.ImageFolder(str(folder / "train"))
    ours, _ = build_dataset(True, make_args(folder))
    assert [(ours.images.name(i), int(ours.targets[i])) for i in range(len(ours))] == theirs.samples


def test_names_that_are_not_ascii_survive(tmp_path):
    write_folder(tmp_path, {"größe": 4, "猫": 4}, {"größe": 1, "猫": 1})
    odd = os.path.join(os.fsencode(tmp_path / "val" / "猫"), b"\xff\xfe.jpg")  # not even UTF-8
    os.rename(tmp_path / "val" / "猫" / "0.jpg", odd)
    loaders = build_loaders(make_args(tmp_path), Process())
    assert loaders.class_names == ["größe", "猫"]
    assert targets_of(loaders.val) == [0, 1]


def test_data_path_may_start_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert guess_data_set("~/data") == "FOLDER"
    assert len(build_dataset(True, make_args("~/data"))[0]) == 16


def test_a_class_missing_from_val_is_fine(tmp_path):
    write_folder(tmp_path, {"a": 4, "b": 4}, {"b": 2})
    assert targets_of(build_loaders(make_args(tmp_path), Process()).val) == [1, 1]


def test_eval_needs_val_only(tmp_path):
    write_folder(tmp_path, {}, {"a": 1, "b": 2})
    loaders = build_loaders(make_args(tmp_path, eval=True), Process())
    assert loaders.train is None and loaders.train_sampler is None and loaders.gather_unreadable_train() == 0
    assert (loaders.data_set, loaders.nb_classes, targets_of(loaders.val)) == ("FOLDER", 2, [0, 1, 1])


def test_eval_takes_the_classes_of_train_where_there_is_one(tmp_path):
    write_folder(tmp_path, {"a": 1, "b": 1, "c": 1}, {"c": 2})
    loaders = build_loaders(make_args(tmp_path, eval=True), Process())
    assert (loaders.nb_classes, targets_of(loaders.val)) == (3, [2, 2])


@pytest.mark.parametrize("break_it, words", [
    (lambda root: os.rename(root / "train", root / "training"), "no train/"),
    (lambda root: os.rename(root / "val", root / "test"), "no val/"),
    (lambda root: (root / "train" / "empty").mkdir(), "train/empty.*holds no image"),
    (lambda root: os.rename(root / "train" / "owl", root / "train" / "emu"), "'owl', which train/ lacks"),
    (lambda root: [path.unlink() for path in root.glob("val/*/*")], "val/ .*holds no image"),
    (lambda root: [path.rename(path.with_suffix(".txt")) for path in root.glob("train/cat/*")],
     "train/cat.*holds no image"),
])
def test_incomplete_folders_are_named(folder, break_it, words):
    break_it(folder)
    with pytest.raises(UserError, match=words):
        build_loaders(make_args(folder, data_set="FOLDER"), Process())


def test_folders_without_class_folders_are_named(tmp_path):
    write_image(tmp_path / "train" / "0.jpg")
    write_image(tmp_path / "val" / "0.jpg")
    with pytest.raises(UserError, match="no class folder in train/"):
        build_loaders(make_args(tmp_path, data_set="FOLDER"), Process())
    with pytest.raises(UserError, match="no class folder in val/"):
        build_loaders(make_args(tmp_path, data_set="FOLDER", eval=True), Process())


@pytest.mark.parametrize("data_set",
                         ["CIFAR", "CIFAR10", "IMNET", "TinyIMNET", "INAT", "INAT19", "FOLDER", None])
def test_a_missing_data_path_is_named(tmp_path, data_set):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, words in [("", "--data-path is not given"),
                        (tmp_path / "nowhere", "nowhere is not a folder.*No such"),
                        (tmp_path / "file", "file is not a folder"),
                        (tmp_path / "empty", "empty is an empty folder")]:
        with pytest.raises(UserError, match=words):
            build_loaders(make_args(path, data_set=data_set), Process())


# ---------------------------------------------------------------- one folder of class folders
def write_single(root, counts):
    """counts: dict class -> number of images, in the class folder or below it."""
    for c, (name, count) in enumerate(counts.items()):
        (root / name / "deep").mkdir(parents=True)
        for i in range(count):
            write_image(root / name / ("deep" if i % 2 else "") / f"{i}.jpg", seed=100 * c + i)
    return root


def halves(root, **changes):
    """Names of the images to train on and of those held out, with the class folder before them."""
    loaders = build_loaders(make_args(root, **{"val_split": 0.2, **changes}), Process())
    return [{os.path.relpath(data.images.name(i), root) for i in range(len(data))}
            for data in (loaders.train.dataset, loaders.val.dataset)]


@pytest.fixture
def single(tmp_path):
    return write_single(tmp_path / "photos", {"cat": 20, "dog": 7, "owl": 3})


def test_a_single_folder_is_split_by_class(single, capsys):
    assert guess_data_set(str(single)) == "FOLDER"
    (single / ".thumbnails").mkdir()
    train, val = halves(single)
    assert not train & val and len(train | val) == 30
    assert [sum(name.startswith(c) for name in val) for c in ("cat", "dog", "owl")] == [4, 1, 1]      # owl: 0.6, but one at least
    said = capsys.readouterr().out
    assert f"{single}: 3 classes, 24 images to train on, 6 held out (--val-split 0.2, --seed 0)" in said
    assert halves(single) == [train, val] and halves(single, seed=1)[1] != val
    assert len(halves(single, val_split=0.5)[1]) == 10 + 4 + 2


def test_a_new_photo_moves_one_other_at_most(single):
    before = halves(single)[1]
    for i in range(20, 40):
        write_image(single / "cat" / f"{i}.jpg", seed=i)
        after = halves(single)[1]
        assert len((before - after) - {f"cat/{i}.jpg"}) <= 1 and len((after - before) - {f"cat/{i}.jpg"}) <= 1
        before = after
    os.rename(single, single.parent / "elsewhere")      # where it is does not matter
    assert halves(single.parent / "elsewhere")[1] == before


def test_the_hash_is_as_written():
    """Independently: of each class the share with the smallest BLAKE2b of 'SEED/NAME'."""
    names, targets = [f"c{i % 2}/{i}.jpg" for i in range(40)], np.arange(40) % 2
    order = sorted(names, key=lambda name: hashlib.blake2b(f"7/{name}".encode(), digest_size=8).hexdigest())
    expected = {name for c in "01" for name in [name for name in order if name.startswith(f"c{c}")][:6]}
    held_out = hold_out(names, targets, 0.3, 7)
    assert {name for name, chosen in zip(names, held_out) if chosen} == expected


def test_near_empty_classes(tmp_path, capsys):
    root = write_single(tmp_path / "photos", {"cat": 8, "dog": 2, "emu": 1, "owl": 1})
    train, val = halves(root)
    assert {"emu/0.jpg", "owl/0.jpg"} <= train and sum(name.startswith("dog") for name in val) == 1
    assert "of a class with a single image none can be held out: emu, owl" in capsys.readouterr().out
    (root / "yak").mkdir()
    with pytest.raises(UserError, match="class folder yak .* holds no image"):
        halves(root)


def test_a_single_folder_is_evaluated_whole_unless_the_run_held_out_a_part(single):
    def evaluated(**changes):
        return len(build_loaders(make_args(single, eval=True, **changes), Process(), ["cat", "dog", "emu", "owl"]).val.dataset)

    assert (evaluated(), evaluated(val_split=0.2), evaluated(val_split=1.0)) == (30, 6, 30)
    with pytest.raises(UserError, match="leaves none to train on"):
        halves(single, val_split=1.0)


def test_what_is_no_single_folder(single, tmp_path):
    with pytest.raises(UserError, match="no train/ folder"):        # main asks for it, see start.settle
        build_loaders(make_args(single, data_set="FOLDER"), Process())
    os.rename(single / "cat", single / "Training")
    os.rename(single / "dog", single / "test")
    with pytest.raises(UserError, match="has the folders Training, test where classes are expected: name the two parts train/"):
        halves(single)
    whole = write_folder(tmp_path / "whole", {"a": 4, "b": 4}, {"a": 1})
    with pytest.raises(UserError, match="--val-split 0.3: --data-set FOLDER has validation images of its own"):
        halves(whole, val_split=0.3)
    for name in ("a", "b"):
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "notes.txt").touch()
    assert guess_data_set(str(tmp_path / "text")) is None
    write_image(tmp_path / "parent/imagenet/0.jpg")     # a single folder is not a set of classes
    assert guess_data_set(str(tmp_path / "parent")) is None


@pytest.mark.parametrize("flags, expected", [
    ({"data_set": "FOLDER"}, "validation"), ({"data_set": "CIFAR10"}, "test"), ({"data_set": "hfds/cats"}, ""),
    ({"data_set": "FOLDER", "val_split": 0.2, "seed": 3}, "validation"),        # the folder has halves of its own
    ({"data_set": "hfds/cats", "val_split": 0.2, "seed": 3}, "0.2 held out by seed 3"),
    ({"data_set": "wds/cats", "data_split": ["train-0.tar|90", "val-0.tar|10"]}, "val-0.tar")])
def test_which_images_are_evaluated(flags, expected):
    assert evaluated_split(make_args(**flags)) == {"data_set": flags["data_set"], "split": expected}


def test_which_images_of_a_folder_without_halves_are_evaluated(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / name / "0.jpg")
    split = evaluated_split(make_args(tmp_path, data_set="FOLDER", val_split=0.2, seed=3))
    assert split == {"data_set": "FOLDER", "split": "0.2 held out by seed 3"}


@pytest.mark.parametrize("changes, words", [({"num_classes": 5}, "--num-classes 5 contradicts the data, which has 3"),
                                            ({"data_split": ["a", "b"]}, "--data-split is for .* not for --data-set FOLDER"),
                                            ({"input_key": "jpg"}, "--input-key is for"), ({"target_key": "x"}, "--target-key")])
def test_flags_for_other_data(folder, changes, words):
    with pytest.raises(UserError, match=words):
        build_loaders(make_args(folder, **changes), Process())


def test_more_loader_processes_than_a_machine_can_use_are_refused(folder, monkeypatch, capsys):
    flags = (*e2e.QUICK, "--data-path", folder, "--batch-size", 4, "--epochs", 1, "--num_workers")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    text = e2e.refusal(capsys, *flags, 999)
    assert text.startswith("--num_workers 999 is more than 64, beyond which the 16 cores") and "leave it out" in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    text = sentence(build_loaders, make_args(folder, num_workers=33), Process())
    assert "--num_workers 33 is more than 32, beyond which the 4 cores" in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    build_loaders(make_args(folder, num_workers=16), Process())


# ---------------------------------------------------------------- the checkpoint's classes
def test_eval_maps_classes_to_the_checkpoints_by_name(folder):
    names = ["emu", "owl", "dog", "cat"]
    loaders = build_loaders(make_args(folder, eval=True), Process(), names)
    assert targets_of(loaders.val) == [3, 3, 2, 2, 2, 1, 1]
    assert (loaders.nb_classes, loaders.class_names) == (4, names)


def test_eval_of_a_class_that_the_checkpoint_does_not_know_is_refused(folder):
    with pytest.raises(UserError, match="'owl' .* checkpoint's 2 classes"):
        build_loaders(make_args(folder, eval=True), Process(), ["cat", "dog"])


def test_eval_on_a_part_of_imagenet_works_when_the_names_are_known(folder):
    names = [f"n{i}" for i in range(997)] + ["owl", "dog", "cat"]
    loaders = build_loaders(make_args(folder, data_set="IMNET", eval=True), Process(), names)
    assert loaders.nb_classes == 1000 and targets_of(loaders.val)[0] == 999


def test_training_on_with_other_classes_is_refused(folder):
    build_loaders(make_args(folder), Process(), ["cat", "dog", "owl"])
    for names in (["cat", "dog"], ["dog", "cat", "owl"]):
        with pytest.raises(UserError, match="--data-path .*--finetune"):
            build_loaders(make_args(folder), Process(), names)


# ---------------------------------------------------------------- IMNET and TinyIMNET
@pytest.mark.parametrize("data_set, count", [("IMNET", 1000), ("TinyIMNET", 200)])
def test_class_count_is_checked(folder, data_set, count):
    with pytest.raises(UserError, match=f"{data_set} has {count} classes .* has 3: .*--data-set FOLDER"):
        build_loaders(make_args(folder, data_set=data_set), Process())


def write_classes(root, count, below="", empty_val=False):
    image = write_image(root / "one.jpg", size=(8, 8))
    for half in ("train", "val"):
        for i in range(count):
            place = root / half / f"n{i:08d}" / below
            place.mkdir(parents=True)
            os.link(image, place / "0.JPEG")
    image.unlink()
    return root


def test_imnet(tmp_path):
    loaders = build_loaders(make_args(write_classes(tmp_path, 1000), data_set="IMNET"), Process())
    assert (loaders.nb_classes, len(loaders.val.dataset)) == (1000, 1000)
    assert loaders.class_names[999] == "n00000999" and loaders.val.dataset[999][1] == 999


def test_tiny_imagenet_with_class_folders_in_val(tmp_path):
    write_classes(tmp_path, 200, below="images")
    (tmp_path / "wnids.txt").write_text("n00000000\n")
    loaders = build_loaders(make_args(tmp_path), Process())
    assert (loaders.data_set, loaders.nb_classes, len(loaders.val.dataset)) == ("TinyIMNET", 200, 200)
    assert loaders.val.dataset[150][1] == 150


def write_tiny(root):
    """The layout of the archive: val/images and val/val_annotations.txt, class 7 first."""
    write_classes(root, 200, below="images")
    rows = []
    for i in range(200):
        wnid = f"n{(i + 7) % 200:08d}"
        write_image(root / "val" / "images" / f"val_{i}.JPEG", seed=i, size=(8, 8))
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t7\t7\n")
    for i in range(200):
        (root / "val" / f"n{i:08d}" / "images" / "0.JPEG").unlink()
        (root / "val" / f"n{i:08d}" / "images").rmdir()
        (root / "val" / f"n{i:08d}").rmdir()
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


@pytest.mark.parametrize("is_eval, keep_train", [(False, True), (True, True), (True, False)])
def test_tiny_imagenet_as_in_the_archive(tmp_path, is_eval, keep_train):
    write_tiny(tmp_path)
    if not keep_train:
        os.rename(tmp_path / "train", tmp_path / "elsewhere")
    loaders = build_loaders(make_args(tmp_path, eval=is_eval), Process())
    assert (loaders.data_set, loaders.nb_classes) == ("TinyIMNET", 200)
    assert targets_of(loaders.val) == [(i + 7) % 200 for i in range(200)]
    assert loaders.val.dataset.count_unreadable() == 0


def test_tiny_imagenets_annotations_are_checked(tmp_path):
    write_tiny(tmp_path)
    rows = (tmp_path / "val" / "val_annotations.txt").read_text()
    (tmp_path / "val" / "val_annotations.txt").write_text(rows.replace("n00000007", "n99999999", 1))
    with pytest.raises(UserError, match="'n99999999', which train/ lacks"):
        build_loaders(make_args(tmp_path), Process())
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\n")
    with pytest.raises(UserError, match="val_annotations.txt has a line"):
        build_loaders(make_args(tmp_path), Process())


# ---------------------------------------------------------------- iNaturalist
def write_inat(root, year, full_path=False):
    categories = [{"id": i, "name": f"species {i}", "genus": f"genus {i // 2}"} for i in range(4)]
    (root / "categories.json").write_text(json.dumps(categories))
    for half, order in (("train", [3, 0, 2, 1]), ("val", [0, 1, 2, 3])):
        images, annotations = [], []
        for c in order:
            name = f"train_val{year}/Aves/{c}/{half}.jpg"
            place = name if full_path else name.replace("Aves/", "")
            write_image(root / place, seed=c)
            images.append({"id": c, "file_name": name})
            annotations.append({"image_id": c, "category_id": c})
        (root / f"{half}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


@pytest.mark.parametrize("data_set, year", [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize("full_path", [False, True])
def test_inat_numbers_the_classes_as_deit_does(tmp_path, data_set, year, full_path):
    loaders = build_loaders(make_args(write_inat(tmp_path, year, full_path)), Process())
    assert (loaders.data_set, loaders.nb_classes) == (data_set, 4)
    assert loaders.class_names == ["species 3", "species 0", "species 2", "species 1"]
    assert targets_of(loaders.val) == [1, 3, 2, 0]
    assert targets_of(loaders.train) and loaders.gather_unreadable_train() == loaders.val.dataset.count_unreadable() == 0


def test_inat_category(tmp_path):
    args = make_args(write_inat(tmp_path, 2018), inat_category="genus")
    loaders = build_loaders(args, Process())
    assert loaders.class_names == ["genus 1", "genus 0"] and targets_of(loaders.val) == [1, 1, 0, 0]
    args.inat_category = "kingdom"
    with pytest.raises(UserError, match="categories.json .*'kingdom'.*--inat-category"):
        build_loaders(args, Process())


@pytest.mark.parametrize("name, content, words", [
    ("categories.json", None, "categories.json .*cannot be read"),
    ("train2018.json", "{", "train2018.json .*cannot be read"),
    ("val2018.json", '{"images": []}', "val2018.json .*lists no image"), ("val2018.json", "{}", "do not fit"),
    ("val2018.json", '{"images": [{"file_name": "x.jpg"}]}', "do not fit together"),
    ("val2018.json", '{"images": [{"file_name": "a/b/99/x.jpg"}]}', "do not fit together")])
def test_inat_files_are_checked(tmp_path, name, content, words):
    write_inat(tmp_path, 2018)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        build_loaders(make_args(tmp_path, data_set="INAT"), Process())


# ---------------------------------------------------------------- CIFAR
def write_cifar(root, cifar, monkeypatch, count=12):
    """Files in the real format under torchvision's names, their MD5s put in place of the real ones."""
    base = root / cifar.base_folder
    base.mkdir(parents=True)
    labels = "labels" if cifar.base_folder.startswith("cifar-10-") else "fine_labels"
    classes = 10 if labels == "labels" else 100

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    for which in ("train_list", "test_list"):
        sums = []
        for i, (name, _) in enumerate(getattr(cifar, which)):
            data = np.random.default_rng(i).integers(0, 256, (count, 3072), dtype=np.uint8)
            content = {"data": data, labels: [(3 * i + j) % classes for j in range(count)]}
            sums.append([name, write(name, content)])
        monkeypatch.setattr(cifar, which, sums)
    names = {cifar.meta["key"]: [f"class {i}" for i in range(classes)]}
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": write(cifar.meta["filename"], names)})
    return root


@pytest.mark.parametrize("data_set, nb_classes", [("CIFAR", 100), ("CIFAR10", 10)])
def test_cifar(tmp_path, monkeypatch, data_set, nb_classes):
    write_cifar(tmp_path, CIFARS[data_set], monkeypatch)
    loaders = build_loaders(make_args(tmp_path), Process())
    assert (loaders.data_set, loaders.nb_classes, loaders.class_names[3]) == (data_set, nb_classes, "class 3")
    theirs = CIFARS[data_set](str(tmp_path), train=False)
    assert targets_of(loaders.val) == theirs.targets
    for i in range(3):
        assert loaders.val.dataset.images.load(i).tobytes() == theirs[i][0].tobytes()


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("data_set", ["CIFAR", "CIFAR10"])
@pytest.mark.parametrize("which", ["train_list", "test_list", "meta"])
def test_a_foreign_cifar_pickle_never_runs(tmp_path, monkeypatch, data_set, which):
    cifar = CIFARS[data_set]
    write_cifar(tmp_path / "data", cifar, monkeypatch)
    name = cifar.meta["filename"] if which == "meta" else getattr(cifar, which)[0][0]
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    (tmp_path / "data" / cifar.base_folder / name).write_bytes(payload)
    for is_train in (True, False):
        with pytest.raises(UserError, match="no intact cifar-.*--download"):
            build_dataset(is_train, make_args(tmp_path / "data"))
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload).close()
    assert (tmp_path / "ran").exists()  # the payload is a real one


@pytest.mark.parametrize("data_set", ["CIFAR", "CIFAR10"])
def test_cifar_elsewhere_names_download(folder, data_set):
    with pytest.raises(UserError, match="holds no intact .*--download"):
        build_loaders(make_args(folder, data_set=data_set), Process())


@pytest.mark.parametrize("data_set", ["IMNET", "TinyIMNET", "INAT", "FOLDER", "DIGITS", None])
def test_download_of_what_torchvision_cannot_fetch_is_refused(folder, data_set):
    with pytest.raises(UserError, match="--download cannot fetch --data-set"):
        build_loaders(make_args(folder, data_set=data_set, download=True), Process())


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A local web server with a small CIFAR-10 archive; torchvision's address and sums point to it."""
    cifar, served = torchvision_datasets.CIFAR10, tmp_path / "served"
    write_cifar(served, cifar, monkeypatch)
    with tarfile.open(served / cifar.filename, "w:gz") as archive:
        archive.add(served / cifar.base_folder, cifar.base_folder)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cifar, "url", f"http://127.0.0.1:{server.server_port}/{cifar.filename}")
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5((served / cifar.filename).read_bytes()).hexdigest())
    yield served / cifar.filename
    server.shutdown()
    server.server_close()


def test_download_fetches_cifar_into_a_new_folder(tmp_path, cifar_server):
    args = make_args(tmp_path / "new" / "folder", data_set="CIFAR10", download=True)
    loaders = build_loaders(args, Process())
    assert len(loaders.val.dataset) == 12 and loaders.nb_classes == 10


@pytest.mark.parametrize("evaluating, halves", [(False, [True, False]), (True, [False])])
def test_several_processes_download_all_that_is_read(evaluating, halves, tmp_path, monkeypatch):
    """torchvision's QMNIST, INaturalist and Places365 download one half at a time."""
    built: list[bool] = []
    monkeypatch.setattr(datasets, "build_dataset", lambda is_train, args: built.append(is_train))
    monkeypatch.setattr(datasets.dist, "barrier", lambda: None)
    args = make_args(tmp_path, data_set="torch/qmnist", download=True, eval=evaluating)
    assert not datasets._download_once(args, Process()).download and built == halves


def test_download_in_a_process_group(tmp_path, cifar_server):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        loaders = build_loaders(make_args(tmp_path / "new", data_set="CIFAR10", download=True), Process())
        assert len(loaders.val.dataset) == 12
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("spoil", ["missing", "changed"])
def test_a_failed_download_is_one_sentence(tmp_path, cifar_server, spoil):
    if spoil == "missing":
        cifar_server.unlink()
    else:
        cifar_server.write_bytes(b"something else")
    with pytest.raises(UserError, match="--download could not fetch http"):
        build_loaders(make_args(tmp_path / "new", data_set="CIFAR10", download=True), Process())


# ---------------------------------------------------------------- DIGITS
def test_digits_need_no_folder():
    loaders = build_loaders(make_args(data_set="DIGITS"), Process())
    assert (loaders.nb_classes, loaders.class_names) == (10, [str(i) for i in range(10)])
    train, val = loaders.train.dataset, loaders.val.dataset
    assert (len(train), len(val), len(loaders.train_sampler)) == (1437, 360, 1280)
    assert train.images.load(0).size == (32, 32) and train.images.load(0).mode == "RGB"
    assert train.images.pixels.min() == 0 and train.images.pixels.max() == 255
    assert np.bincount(val.targets).min() >= 34 and np.bincount(val.targets).max() <= 37  # stratified
    both = {images.load(i).tobytes() for images in (train.images, val.images) for i in range(len(images))}
    assert len(both) > 1790  # no image on both sides


def test_digits_split_does_not_depend_on_the_seed():
    splits = [build_dataset(False, make_args(data_set="DIGITS", seed=seed))[0].targets for seed in (0, 1)]
    assert np.array_equal(*splits)


# ---------------------------------------------------------------- which data set is it
def test_guess_data_set(tmp_path):
    for name, entries, guess in [
            ("folder", ["train/a/", "val/a/"], "FOLDER"), ("val-only", ["val/a/"], "FOLDER"),
            ("train-only", ["train/a/"], "FOLDER"), ("cifar", ["cifar-100-python/"], "CIFAR"),
            ("cifar10", ["cifar-10-batches-py/"], "CIFAR10"),
            ("tiny", ["wnids.txt", "train/n1/", "val/"], "TinyIMNET"),
            ("tiny2", ["train/n1/", "val/val_annotations.txt"], "TinyIMNET"),
            ("inat", ["train2018.json", "val2018.json"], "INAT"), ("inat19", ["val2019.json"], "INAT19"),
            ("nothing", ["train.txt"], None), ("flat", ["train/0.jpg", "val/0.jpg"], None),
            ("empty", [], None)]:
        (tmp_path / name).mkdir()
        for entry in entries:
            path = tmp_path / name / entry
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if entry.endswith("/") else path.write_text("")
        assert guess_data_set(str(tmp_path / name)) == guess, name
    assert guess_data_set(str(tmp_path / "nowhere")) is guess_data_set("") is guess_data_set(None) is None


# ---------------------------------------------------------------- flags
def test_batch_size_is_compared_with_one_processs_share(folder):
    build_loaders(make_args(folder, batch_size=8), Process(0, 2))
    with pytest.raises(UserError, match="--batch-size 17 exceeds the 16 training samples"):
        build_loaders(make_args(folder, batch_size=17), Process())
    with pytest.raises(UserError, match="--batch-size 9 exceeds the 8 .*2 processes"):
        build_loaders(make_args(folder, batch_size=9), Process(0, 2))


def test_batch_size_of_one(folder):
    loaders = build_loaders(make_args(folder, batch_size=1), Process())
    assert len(loaders.train) == 16 and len(loaders.val) == 7


def test_memory_is_pinned_for_a_gpu_only(folder):
    for device, pin_mem, pinned in [("cpu", True, False), ("cuda", True, True), ("cuda", False, False)]:
        loaders = build_loaders(make_args(folder, pin_mem=pin_mem), Process(device=torch.device(device)))
        assert loaders.train.pin_memory is loaders.val.pin_memory is pinned


# ---------------------------------------------------------------- every evaluation image once
@pytest.mark.parametrize("n", every(4, range(1, 18)))
def test_evaluation_counts_every_image_once(tmp_path, n):
    write_folder(tmp_path, {"a": 16}, {"a": n}, suffix="png")
    bad = tmp_path / "val" / "a" / f"{n // 2}.png"
    for unreadable in (0, 1):
        if unreadable:
            bad.write_bytes(b"")
        for world in (1, 2, 3, 4):
            counted, images = 0, []
            for rank in range(world):
                args = make_args(tmp_path, batch_size=2, dist_eval=True)
                loaders = build_loaders(args, Process(rank, world))
                evaluator = ClassificationEvaluator()
                for batch, targets in loaders.val:
                    readable = targets >= 0
                    evaluator.update(torch.zeros(int(readable.sum()), 2), targets[readable])
                    images += [image.numpy().tobytes() for image in batch[readable]]
                counted += int(evaluator.counts[0])
            assert counted == n - unreadable
            assert len(set(images)) == n - unreadable


@pytest.mark.slow
def test_shards_hold_every_image_once_for_each_size_and_number_of_processes(tmp_path):
    """The loaders of 1 .. 64 images in 1 .. 4 processes: each image in exactly one of them, where its place says."""
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "b").mkdir()
    args = make_args(tmp_path, eval=True, dist_eval=True, input_size=8, batch_size=3, data_set="FOLDER")
    shades = {}
    for n in range(1, 65):
        half = "a" if n <= 20 else "b"
        Image.new("RGB", (8, 8), (n, 2 * n, 0)).save(tmp_path / "val" / half / f"{n:02d}.bmp")
        data, _ = build_dataset(False, args)
        shades[n] = data[n - 1][0][0, 0, 0].item()
        assert len(data) == n == len(set(shades.values()))
        for world in (1, 2, 3, 4):
            seen = {}
            for rank in range(world):
                loader = build_loaders(args, Process(rank, world)).val
                images, targets = zip(*loader) if len(loader) else ((), ())
                seen[rank] = [(image[0, 0, 0].item(), int(t)) for batch in zip(images, targets) for image, t in zip(*batch)]
            expected = [(shades[i + 1], int(i >= 20)) for i in range(n)]
            assert seen == {rank: expected[rank::world] for rank in range(world)}, (n, world)


def test_without_dist_eval_every_process_evaluates_everything(folder):
    for rank in range(3):
        assert targets_of(build_loaders(make_args(folder), Process(rank, 3)).val) == [0, 0, 1, 1, 1, 2, 2]


# ---------------------------------------------------------------- seeds
def tensors_of(folder, world=1, workers=0, position=0, **flags):
    """position -> (image, target) of an epoch's draws, those of all processes together, from a position on."""
    drawn = {}
    for rank in range(world):
        loaders = build_loaders(make_args(folder, num_workers=workers, batch_size=1, **flags), Process(rank, world))
        epoch = epoch_of(loaders, 1, position)
        drawn |= {position + rank + i * world: (images[0], int(targets)) for i, (images, targets) in enumerate(epoch)}
    return drawn


@pytest.mark.slow
def test_an_image_depends_on_seed_epoch_and_position_alone(folder):
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"")      # nor does the one in its place
    flags = {"resplit": True, "ThreeAugment": False}
    expected = tensors_of(folder, **flags)
    assert len(expected) == 16
    for workers, world, position in [(1, 1, 0), (2, 1, 0), (3, 1, 0), (0, 2, 0), (0, 3, 0), (2, 2, 0), (3, 3, 0), (0, 1, 5),
                                     (2, 1, 7), (3, 2, 4), (1, 3, 7), (0, 2, 15)]:
        drawn = tensors_of(folder, world, workers, position, **flags)
        for place in range(position, 16):
            image, target = drawn[place]
            assert torch.equal(image, expected[place][0]) and target == expected[place][1], (workers, world, position, place)
    other = tensors_of(folder, seed=1, **flags)
    assert not any(torch.equal(other[place][0], expected[place][0]) for place in expected)


def test_validation_images_do_not_depend_on_the_number_of_workers(folder):
    vals = [list(build_loaders(make_args(folder, num_workers=workers), Process()).val) for workers in (0, 1, 2)]
    assert same_batches(vals[0], vals[1]) and same_batches(vals[0], vals[2])


def test_epochs_differ_whatever_the_number_of_workers(folder):
    runs = []
    for workers in (0, 2):
        loaders = build_loaders(make_args(folder, num_workers=workers), Process())
        runs.append([epoch_of(loaders, epoch) for epoch in (1, 2, 1)])
        assert same_batches(runs[-1][0], runs[-1][2]) and not same_batches(runs[-1][0], runs[-1][1])
    assert all(same_batches(*pair) for pair in zip(*runs))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_does_not_read_ahead_into_the_next_epoch(folder, tmp_path, monkeypatch, workers):
    read = tmp_path / "read"
    monkeypatch.setattr(images_module, "load_image", lambda path, real=load_image, **how: (
        os.write(log, f"{path}\n".encode()), real(path, **how))[1])
    log = os.open(read, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    loaders = build_loaders(make_args(folder, num_workers=workers), Process())
    for epoch in (0, 1):
        before = len(read.read_text().splitlines())
        loaders.train_sampler.set_epoch(epoch)
        assert sum(len(targets) for _, targets in batches(loaders.train)) == 16
        time.sleep(0.3 if workers else 0)
        assert len(read.read_text().splitlines()) - before == 16
    os.close(log)


def test_seed_changes_the_batches(folder):
    runs = [epoch_of(build_loaders(make_args(folder, seed=seed), Process())) for seed in (0, 0, 1)]
    assert same_batches(runs[0], runs[1]) and not same_batches(runs[0], runs[2])


def test_a_position_gives_the_tail_of_the_epoch(folder):
    loaders = build_loaders(make_args(folder), Process())
    assert same_batches(epoch_of(loaders, epoch=3)[2:], epoch_of(loaders, epoch=3, position=8))


def test_repeats_of_an_image_differ(folder):
    loaders = build_loaders(make_args(folder, batch_size=1), Process())
    keys = list(loaders.train_sampler)
    assert [key.position for key in keys] == list(range(16))
    drawn = [images for images, _ in epoch_of(loaders)]
    for i, first in enumerate(keys):
        for j in range(i + 1, min(i + 3, 16)):
            if keys[j].index == first.index:
                assert not torch.equal(drawn[i], drawn[j]), (first, keys[j])
    assert len({key.index for key in keys}) == 6       # or there would be no repeats to compare


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"position": 1}])
def test_seed_epoch_and_position_each_change_the_augmentation(folder, change):
    data, _ = build_dataset(True, make_args(folder))
    key = SampleKey(4, seed=0, epoch=0, position=0, repeat=0)
    assert torch.equal(data[key][0], data[key][0])
    assert not torch.equal(data[key][0], data[key._replace(**change)][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_generators_of_the_process_alone(folder, workers):
    loaders = build_loaders(make_args(folder, num_workers=workers), Process())

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = states()
    epoch_of(loaders)
    list(loaders.val)
    assert states() == before


def test_generators_go_on_when_a_transform_fails(folder):
    data, _ = build_dataset(True, make_args(folder))

    def fails(image, erase):
        torch.rand(1)
        raise ZeroDivisionError

    data.transform = fails
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):  # an error of ours, not of the file: it is not survived
        data[SampleKey(0, 0, 0, 0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_resplit_spares_the_first_repeat(folder):
    erased = {}
    for resplit in (False, True):
        args = {"aa": "none", "color_jitter": 0.0, "resplit": resplit}
        with_erasing, _ = build_dataset(True, make_args(folder, reprob=1.0, **args))
        without, _ = build_dataset(True, make_args(folder, reprob=0.0, **args))
        keys = [SampleKey(4, 0, 0, position, position % 3) for position in range(9)]
        erased[resplit] = [not torch.equal(with_erasing[key][0], without[key][0]) for key in keys]
    assert erased[False] == [True] * 9
    assert erased[True] == [False, True, True] * 3


# ---------------------------------------------------------------- unreadable images
@pytest.fixture
def no_permissions(monkeypatch):
    """Root may read any file, whatever its permissions."""
    if os.geteuid():
        return

    def refuse(path, *args, real=open, **options):
        if not os.stat(path).st_mode & 0o400:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)
    monkeypatch.setattr(images_module, "open", refuse, raising=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_once_counted_and_survived(folder, no_permissions, capfd, workers):
    names = write_unreadable(folder / "train" / "cat")
    assert names == write_unreadable(folder / "val" / "cat")
    bad = len(names)
    assert bad == 20
    loaders = build_loaders(make_args(folder, num_workers=workers, repeated_aug=False), Process())
    assert all((targets >= 0).all() and images.flatten(1).std(1).min() > 0
               for epoch in range(3) for images, targets in epoch_of(loaders, epoch))
    for _ in range(2):
        evaluated = list(loaders.val)
        targets = torch.cat([targets for _, targets in evaluated])
        assert (targets < 0).sum() == bad and len(targets) == 7 + bad
        assert not torch.cat([images for images, _ in evaluated])[targets < 0].any()
    assert loaders.gather_unreadable_train() == loaders.val.dataset.count_unreadable() == bad
    said = capfd.readouterr().err
    assert said.count("Skipping an unreadable image") == 2 * bad == len(said.splitlines())
    for half in ("train", "val"):
        for name in names:
            shown = name if name.isprintable() else repr(name)[1:-1]
            assert said.count(str(folder / half / "cat" / shown) + " (") == 1, name
    for reason in ("text.jpg (not an image)", "dangling.jpg (No such file or directory)", "empty.jpg (not an image)",
                   "forbidden.jpg (Permission denied)", "bomb.png (more than 178,956,970 pixels)", "pipe.jpg (not an image)",
                   "circle.jpg (Too many levels of symbolic links)", "two\\nlines.jpg (", "schöne 猫 🙂.jpg ("):
        assert said.count(reason) == 2, reason


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """PIL would hand it to Ghostscript, whatever its name."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o700)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(gs))
    (tmp_path / "photo.jpg").write_text(EPS)
    with pytest.raises(UnidentifiedImageError):
        load_image(str(tmp_path / "photo.jpg"))
    assert not (tmp_path / "ran").exists()
    with Image.open(tmp_path / "photo.jpg") as image, pytest.raises(OSError):
        image.load()        # nothing comes out of our gs
    assert (tmp_path / "ran").exists()      # the file is a real one


def test_one_very_long_path_costs_its_own_length():
    paths = [f"/data/{i}.jpg" for i in range(1000)]
    paths[500] = "/data/" + "ä/" * 1000 + "\udcff.jpg"
    images = FileImages(paths)
    assert len(images) == 1000 and [images.name(i) for i in range(1000)] == paths
    assert len(images.paths) < 20_000
    assert len(FileImages([])) == 0


def test_the_image_in_an_unreadable_ones_place_is_always_the_same(folder):
    for path in list(folder.glob("train/cat/*"))[:3]:
        path.write_bytes(b"")
    runs = []
    for workers in (0, 2, 0):
        loaders = build_loaders(make_args(folder, num_workers=workers), Process())
        runs.append(epoch_of(loaders, epoch=5))
    assert same_batches(runs[0], runs[1]) and same_batches(runs[0], runs[2])


def test_an_unreadable_image_has_different_replacements(folder):
    args = make_args(folder)
    data, _ = build_dataset(True, args)
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"")
    chosen = {data._load_or_replace(0, (0, 0, position, 0))[0] for position in range(60)}
    assert len(chosen) > 10 and 0 not in chosen


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_with_a_sentence_when_nothing_can_be_read(folder, workers):
    for path in folder.glob("train/*/*"):
        path.write_bytes(b"")
    loaders = build_loaders(make_args(folder, num_workers=workers), Process())
    with pytest.raises(UnreadableData) as caught:
        epoch_of(loaders)
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).startswith(str(folder)) and "--data-path" in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_machine_out_of_handles_is_not_an_unreadable_image(folder, monkeypatch):
    def fail(path, *args, **options):
        raise OSError(24, "Too many open files", path)

    loaders = build_loaders(make_args(folder), Process())
    monkeypatch.setattr(images_module, "open", fail, raising=False)
    with pytest.raises(OSError, match="Too many open files"):
        epoch_of(loaders)
    assert loaders.gather_unreadable_train() == 0


def test_only_one_process_names_what_all_of_them_evaluate(folder, capfd):
    (folder / "val" / "cat" / "0.jpg").write_bytes(b"")
    for rank in range(3):
        loaders = build_loaders(make_args(folder), Process(rank, 3))
        list(loaders.val)
        assert loaders.val.dataset.count_unreadable() == 1
    assert capfd.readouterr().err.count("Skipping") == 1


@pytest.mark.parametrize("flags", [{}, {"input_size": 48}, {"input_size": 48, "src": True}], ids=str)
def test_odd_but_readable_images_are_read(tmp_path, capfd, flags):
    sizes = write_odd(tmp_path / "train" / "a")
    odd = tmp_path / "train" / "a"
    (tmp_path / "val").symlink_to("train")
    assert {name: load_image(str(odd / name)).size for name in sizes} == sizes
    args = make_args(tmp_path, data_set="FOLDER", repeated_aug=False, **flags)
    loaders = build_loaders(args, Process())
    assert len(targets_of(loaders.val)) == len(sizes) == 22
    assert len(targets_of(loaders.train)) == 20     # the last batch is not whole
    assert loaders.gather_unreadable_train() == loaders.val.dataset.count_unreadable() == 0
    assert capfd.readouterr().err == ""
    if not flags:
        assert load_image(str(odd / "sixteen.png")).getpixel((0, 0)) == (156, 156, 156)
        for name in ("animated.webp", "animated.png", "animated.tif", "cmyk.jpg", "turned.jpg", "gif inside.jpg"):
            difference = np.asarray(load_image(str(odd / name)), float) - np.asarray(picture(), float)
            assert np.abs(difference).mean() < 8, name      # the first frame, not turned


def corners(image):
    """Grey values of the four corners, in reading order."""
    grey, (x, y) = image.convert("L"), (image.width - 2, image.height - 2)
    return [round(grey.getpixel(place) / 60) for place in ((1, 1), (x, 1), (1, y), (x, y))]


def write_turned(path, orientation, upright):
    """`upright` as a camera writes it that was held so that EXIF has this orientation."""
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
            2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            7: Image.Transpose.TRANSVERSE}.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    (upright if turn is None else upright.transpose(turn)).save(path, exif=exif)
    return path


@pytest.fixture
def quarters():
    """60 x 40 pixels, a grey for each quarter."""
    return Image.fromarray(np.kron(np.array([[0, 60], [120, 180]], np.uint8), np.ones((20, 30), np.uint8))).convert("RGB")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(tmp_path, quarters, orientation, kind):
    path = write_turned(tmp_path / f"x.{kind}", orientation, quarters)
    image = load_image(str(path), upright=True)
    assert image.size == (60, 40) and corners(image) == [0, 1, 2, 3]
    with Image.open(path) as raw:
        as_stored = raw.size if kind != "tif" else (60, 40)     # PIL turns TIFF files by itself
    assert load_image(str(path)).size == as_stored


def test_a_turned_jpeg_is_decoded_small_all_the_same(tmp_path, quarters):
    path = write_turned(tmp_path / "x.jpg", 6, quarters.resize((2400, 1600), Image.Resampling.NEAREST))
    image = load_image(str(path), min_side=100, upright=True)
    assert image.size == (300, 200) and corners(image) == [0, 1, 2, 3]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40,
                                  b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0"])
def test_an_image_with_damaged_metadata_is_read(tmp_path, quarters, exif):
    quarters.save(tmp_path / "x.jpg", exif=exif)
    assert corners(load_image(str(tmp_path / "x.jpg"), upright=True)) == [0, 1, 2, 3]


JPEGS = [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30, "optimize": True},
         {"restart_marker_blocks": 2}, {"keep_rgb": True}]


@pytest.mark.parametrize("how", JPEGS, ids=str)
def test_a_jpeg_decoded_to_a_tensor_has_pils_pixels(tmp_path, how):
    for size in ((61, 43), (8, 8), (1, 1), (500, 375)):
        picture(size=size).save(tmp_path / "x.jpg", **how)
        pixels = load_image(str(tmp_path / "x.jpg"), min_side=792, upright=True, tensor=True)
        assert isinstance(pixels, torch.Tensor)
        assert np.array_equal(pixels.permute(1, 2, 0), load_image(str(tmp_path / "x.jpg")))


@pytest.mark.parametrize("mode, name, how", [
    ("L", "x.jpg", {}), ("CMYK", "x.jpg", {}), ("RGB", "x.png", {}), ("P", "x.gif", {}), ("RGB", "x.webp", {}),
    ("RGB", "large.jpg", {"min_side": 100}), ("RGB", "turned.jpg", {"upright": True})], ids=str)
def test_pil_decodes_what_is_not_a_plain_jpeg(tmp_path, mode, name, how):
    exif = Image.Exif()
    exif[0x0112] = 6 if name == "turned.jpg" else 1
    picture(size=(400, 300)).convert(mode).save(tmp_path / name, exif=exif)
    ours, theirs = (load_image(str(tmp_path / name), tensor=tensor, **how) for tensor in (True, False))
    assert isinstance(ours, Image.Image) and ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


def test_a_damaged_jpeg_is_refused_or_decoded_as_by_pil(tmp_path):
    """The loader's verdict does not depend on who decodes."""
    whole, random = io.BytesIO(), np.random.default_rng(0)
    picture(size=(120, 90)).save(whole, "jpeg")
    whole = whole.getvalue()
    files = [whole[:size] for size in (0, 2, 300, 700, *range(len(whole) - 40, len(whole)))]
    for _ in range(150):
        broken = bytearray(whole)
        for place in random.integers(len(whole), size=3):
            broken[place] = random.integers(256)
        files.append(bytes(broken))
    path, verdicts = tmp_path / "x.jpg", set()
    for data in files:
        path.write_bytes(data)
        try:
            theirs = load_image(str(path))
        except Exception as error:
            with pytest.raises(type(error)):
                load_image(str(path), tensor=True)
            verdicts.add("refused")
        else:
            ours = load_image(str(path), tensor=True)
            verdicts.add(type(ours).__name__)
            pixels = ours.permute(1, 2, 0) if isinstance(ours, torch.Tensor) else np.asarray(ours)
            assert np.array_equal(pixels, theirs)
    assert {"refused", "Tensor"} <= verdicts


def test_32_bit_grey_is_told_once_and_refused_by_name(folder, capfd):
    for number in range(3):
        Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(folder / f"train/cat/float{number}.tif")
    Image.fromarray(np.full((40, 40), -1024, np.int32)).save(folder / "train/cat/hounsfield.tif")
    loaders = build_loaders(make_args(folder, num_workers=1, repeated_aug=False), Process())
    epoch_of(loaders), epoch_of(loaders)
    told, refused = sorted(capfd.readouterr().err.splitlines())
    assert told.startswith("32-bit grey images are scaled") and "cat/float" in told.partition("The first is ")[2]
    assert told.endswith("(0 to 1)")
    assert "hounsfield.tif (32-bit grey from -1024 to -1024, not 0 to 1, 255 or 65535: convert it" in refused


# ---------------------------------------------------------------- --strict-data and --max-unreadable
def break_images(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"no picture")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("broken", ["train/cat/0.jpg", "val/dog/2.jpg"])
def test_strict_data_stops_at_the_first_unreadable_image(folder, capfd, broken, workers):
    break_images(folder, broken)
    loaders = build_loaders(make_args(folder, num_workers=workers, strict_data=True, repeated_aug=False), Process())
    text = sentence(lambda: (list(batches(loaders.train)), list(batches(loaders.val))))
    assert text.startswith(f"the image {folder / broken} cannot be read (not an image)") and "--strict-data" in text
    assert capfd.readouterr().err == ""     # not skipped


@pytest.mark.parametrize("workers", every(2, [1, 0]))
def test_strict_data_ends_the_program(folder, capsys, workers):
    data, _ = build_dataset(True, make_args(folder))
    order = [data.images.name(key.index) for key in RASampler(len(data), num_repeats=1)]
    break_images(folder, *order[1:3])       # by the first update workers have met both, which would be too many
    flags = (*e2e.QUICK, "--data-path", folder, "--batch-size", 1, "--num_workers", workers, "--mixup", 0, "--cutmix", 0)
    text = e2e.refusal(capsys, *flags, "--epochs", 1, "--strict-data")
    assert text.startswith(f"the image {order[1]} cannot be read") and "--strict-data" in text
    assert e2e.run(*flags, "--epochs", 1, "--max-unreadable", 0.5) == 0


def test_more_unreadable_images_than_allowed(tmp_path):
    write_folder(tmp_path, {"a": 150, "b": 150}, {"a": 60})
    for share, broken, stops in [(0.01, 3, False), (0.01, 4, True), (0.1, 30, False), (0.1, 31, True), (1, 300, False),
                                 (0, 0, False), (0, 1, True), (0.001, 3, False), (0.001, 4, True), (0.29, 87, False)]:
        loaders = build_loaders(make_args(tmp_path, max_unreadable=share), Process())
        loaders.train.dataset.unreadable[:broken] = 1
        if not stops:
            loaders.check_unreadable()
            continue
        text = sentence(loaders.check_unreadable)
        assert f"{broken} of the 300 training images (" in text and f"--max-unreadable {share:g}" in text
        assert "train/a/0.jpg" in text and ("..." in text) == (broken > 3)


def test_a_few_unreadable_images_are_never_too_many(folder):
    loaders = build_loaders(make_args(folder), Process())
    for data, half in ((loaders.val.dataset, "7 validation images (57%)"), (loaders.train.dataset, "16 training images (25%)")):
        data.unreadable[1:4] = 1
        loaders.check_unreadable()
        data.unreadable[5] = 1
        assert f"4 of the {half}" in sentence(loaders.check_unreadable)
        data.unreadable[:] = 0
    loaders = build_loaders(make_args(folder, eval=True), Process())
    loaders.val.dataset.unreadable[:4] = 1
    assert "4 of the 7 validation images" in sentence(loaders.check_unreadable)


@pytest.mark.parametrize("workers", every(2, [2, 0]))
def test_the_program_stops_by_itself_when_too_many_images_cannot_be_read(folder, capsys, workers):
    break_images(folder, "val/cat/0.jpg", *(f"val/dog/{i}.jpg" for i in range(3)))
    flags = (*e2e.QUICK, "--data-path", folder, "--batch-size", 4, "--epochs", 2, "--num_workers", workers, "--mixup", 0,
             "--cutmix", 0)
    text = e2e.refusal(capsys, *flags)
    assert "4 of the 7 validation images (57%) cannot be read, more than --max-unreadable 0.01 allows" in text
    assert e2e.run(*flags, "--max-unreadable", 0.6) == 0


def test_a_resumed_run_counts_the_same_images_and_does_not_name_them_again(folder, capfd):
    break_images(folder, "train/cat/0.jpg", "train/owl/3.jpg", "train/owl/4.jpg")
    args = make_args(folder, repeated_aug=False)
    loaders = build_loaders(args, Process())
    epoch_of(loaders)
    state = loaders.gather_unreadable_state()
    assert state == [0, 14, 15] and loaders.gather_unreadable_train() == 3
    assert capfd.readouterr().err.count("Skipping") == 3
    write_image(folder / "train" / "owl" / "4.jpg")                     # repaired meanwhile
    again = build_loaders(args, Process())
    again.load_unreadable_state([*state, 16, 10 ** 12, -1])             # a smaller folder than it was
    assert again.gather_unreadable_train() == 2 and again.gather_unreadable_state() == [0, 14]
    epoch_of(again)
    assert again.gather_unreadable_train() == 2 and capfd.readouterr().err == ""
    for odd in (3, "abc", ["1"], {"a": 1}, None, [1.5]):
        assert "checkpoint" in sentence(again.load_unreadable_state, odd)


def test_what_was_drawn_in_place_of_another_is_named_at_the_epochs_end(folder, capfd):
    loaders = build_loaders(make_args(folder), Process())
    drawn = {key.index for key in loaders.train_sampler}        # five of 16 images three times each, one once
    assert len(drawn) == 6
    names = [loaders.train.dataset.images.name(index) for index in range(16)]
    break_images(folder, *(name for index, name in enumerate(names) if index not in drawn), names[min(drawn)])
    epoch_of(loaders)
    bad = set(loaders.train.dataset.unreadable.nonzero().flatten().tolist())
    assert bad - drawn and bad & drawn == {min(drawn)}
    assert capfd.readouterr().err.count("(not an image)") == len(bad & drawn)
    assert loaders.gather_unreadable_train() == len(bad)
    assert capfd.readouterr().err.count("(drawn in place of another one)") == len(bad - drawn)
    epoch_of(loaders)
    assert loaders.gather_unreadable_train() == len(bad) and capfd.readouterr().err == ""


def test_long_names_leave_room_for_the_sentence(tmp_path):
    name = "long " * 30
    write_folder(tmp_path, {name: 4}, {name: 4})
    for path in (tmp_path / "val" / name).iterdir():
        path.rename(path.with_name(LONG_NAME[:240] + path.name)).write_bytes(b"")
    strict = build_loaders(make_args(tmp_path, strict_data=True), Process())
    assert "1.jpg" in sentence(strict.val.dataset.__getitem__, 1)
    loaders = build_loaders(make_args(tmp_path), Process())
    list(loaders.val)
    text = sentence(loaders.check_unreadable)
    assert all(f"{i}.jpg" in text for i in range(3))


def test_an_image_that_fills_the_last_position_is_named_where_it_comes_first(tmp_path, capfd):
    write_folder(tmp_path, {"a": 3, "b": 4}, {"a": 1})
    ranks = [build_loaders(make_args(tmp_path, repeated_aug=False), Process(rank, 2)) for rank in (0, 1)]
    first, last = (list(loaders.train_sampler)[place] for loaders, place in zip(ranks, (0, -1)))
    assert (first.index, first.position, last.position) == (last.index, 0, 7)
    break_images(tmp_path, ranks[0].train.dataset.images.name(first.index))
    for loaders in ranks:
        epoch_of(loaders)
        assert loaders.gather_unreadable_train() == 1
        assert loaders.train.dataset.unreadable[first.index]
    said = capfd.readouterr().err.splitlines()
    assert [line.rpartition("(")[2] for line in said] == ["not an image)", "drawn in place of another one)"]


def evaluated_in_parts(rank, world, folder, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    loaders = build_loaders(make_args(folder, eval=True, dist_eval=True, max_unreadable=0.3), Process(rank, world))
    list(loaders.val)
    loaders.check_unreadable()      # two of seven: not too many yet
    text = sentence(loaders.check_unreadable, gather=True)
    dist.destroy_process_group()
    return text


def in_processes(world, function, *args):
    """function(rank, world, *args) in `world` forks of this process at once."""
    with concurrent.futures.ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: forked(function, rank, world, *args), range(world)))


def test_processes_that_share_an_evaluation_share_its_limit(folder, tmp_path):
    break_images(folder, *(f"val/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(2)))
    one, other = in_processes(2, evaluated_in_parts, folder, tmp_path / "meet")
    assert one == other and one.startswith("4 of the 7 validation images (57%)")


def one_of(rank, world, folder, rendezvous, workers):
    """An epoch in one of several processes: how many images it could not read itself, how many they could not all together."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    loaders = build_loaders(make_args(folder, num_workers=workers, batch_size=2), Process(rank, world))
    epoch_of(loaders)
    dist.barrier()
    alone = int(loaders.train.dataset.unreadable.count_nonzero())
    state = loaders.gather_unreadable_state()
    together = [loaders.gather_unreadable_train() for _ in range(2)]
    text = ""
    try:
        loaders.check_unreadable()
    except UserError as error:
        text = str(error)
    dist.destroy_process_group()
    return alone, state, together, text


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_count_what_any_of_them_could_not_read_and_name_it_once(folder, tmp_path, capfd, workers):
    break_images(folder, *(f"train/{c}/{i}.jpg" for c in ("cat", "dog", "owl") for i in range(4)))
    alone, states, together, texts = zip(*in_processes(3, one_of, folder, tmp_path / "meet", workers))
    assert states[0] == states[1] == states[2] and set(states[0]) <= {0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 14}
    assert list(together) == [[len(states[0])] * 2] * 3
    assert max(alone) <= len(states[0]) and sum(alone) > len(states[0])         # three processes draw the repeats of one image
    assert len(set(texts)) == 1 and texts[0].startswith(f"{len(states[0])} of the 16 training images")
    said = capfd.readouterr().err
    assert said.count("Skipping an unreadable image") == len(states[0]), said


# ---------------------------------------------------------------- memory
def test_memory_is_measured():
    assert 90 < grown(lambda: np.ones(100 << 20, np.uint8)) < 120


def test_a_decompression_bomb_costs_no_memory(tmp_path):
    write_black_png(tmp_path / "small.png", 2000, 1999)
    image = load_image(str(tmp_path / "small.png"))     # the files are real ones
    assert image.size == (2000, 1999) and image.getextrema() == ((0, 0),) * 3
    write_image(tmp_path / "val" / "a" / "good.jpg")
    write_image(tmp_path / "train" / "a" / "good.jpg")
    path = write_black_png(tmp_path / "train" / "a" / "bomb.png", 20_000, 20_000)
    assert path.stat().st_size < 1_500_000      # of 1.2 GB
    data, _ = build_dataset(True, make_args(tmp_path))
    assert data._load(0) is None and data._load(1) is not None
    assert grown(data.__getitem__, SampleKey(0, 0, 0, 0, 0)) < 40


def test_the_limit_of_pixels_does_not_depend_on_pils(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = write_black_png(tmp_path / "bomb.png", 20_000, 20_000)
    with Image.open(path) as image:
        assert image.size == (20_000, 20_000)
    assert grown(pytest.raises, Image.DecompressionBombError, load_image, str(path)) < 20


@pytest.mark.slow
def test_the_largest_image_takes_eight_bytes_a_pixel(tmp_path):
    """As to_rgb and evaluation handle it: 13,000 x 13,000 pixels."""
    path = write_black_png(tmp_path / "large.png", 13_000, 13_000)
    val = build_transform(False, make_args(input_size=224))
    assert grown(lambda: val(load_image(str(path)))) < 169 * 8 * 1.05
    Image.new("I;16", (13_000, 13_000)).save(tmp_path / "sixteen.png", compress_level=1)
    assert grown(lambda: val(load_image(str(tmp_path / "sixteen.png")))) < 169 * 10


# ---------------------------------------------------------------- loader processes
def digits(workers, batch_size=64):
    return build_loaders(make_args(data_set="DIGITS", num_workers=workers, batch_size=batch_size), Process())


def pids(loader):
    return [worker.pid for worker in loader._iterator._workers]


def alive(pid):
    try:
        os.kill(pid, 0)
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_batches_are_the_loaders(folder):
    for workers in (0, 2):
        loaders = build_loaders(make_args(folder, num_workers=workers), Process())
        for loader in (loaders.train, loaders.val):
            assert same_batches(list(batches(loader)), list(loader))
    loader = DataLoader(build_dataset(False, make_args(folder))[0], 2, num_workers=1)       # its workers end with the epoch
    assert same_batches(list(batches(loader)), list(batches(loader)))


@pytest.mark.parametrize("number, words", [
    (signal.SIGKILL, "was killed, most likely because the memory was full: lower --num_workers"), (signal.SIGBUS, "--ipc=host"),
    (signal.SIGSEGV, "signal 11, Segmentation fault): --num_workers 0")])
def test_a_killed_worker_is_one_sentence(number, words):
    loader = digits(2).train
    taken = batches(loader)
    next(taken)
    worker = loader._iterator._workers[1]
    os.kill(worker.pid, number)
    worker.join()
    start = time.monotonic()
    text = sentence(next, taken)
    assert text.startswith(f"loader process {worker.pid} ") and words in text
    assert text == sentence(next, batches(loader))      # nor can another epoch begin
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("waiting", every(2, [False, True]))
def test_the_training_is_not_interrupted_where_a_worker_dies(waiting):
    """PyTorch would raise from its handler of SIGCHLD, wherever the training is."""
    def train():
        torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = False        # as in a new process
        loader = digits(1).train
        taken = batches(loader)
        next(taken)
        victim, = pids(loader)
        if waiting:
            os.kill(victim, signal.SIGSTOP)
            threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        else:
            os.kill(victim, signal.SIGKILL)
            time.sleep(0.3)         # where an update would be
        return sentence(list, taken)
    assert "was killed" in forked(train)


@pytest.mark.parametrize("error, words", [
    # of torch/csrc/DataLoader.cpp, with what its handler of SIGBUS adds
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
                  "shared memory. Please try to raise your shared memory limit."), "--ipc=host"),
    (RuntimeError("unable to open shared memory object </torch_7_1> in read-write mode: Too many open files (24)"), "ulimit -n"),
    (RuntimeError("unable to open shared memory object </torch_7_1> in read-write mode: Permission denied (13)"), "/dev/shm"),
    (RuntimeError("unable to mmap 12 bytes from file </torch_7_1_2>: Cannot allocate memory (12)"), "/dev/shm"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (RuntimeError("Pin memory thread exited unexpectedly"), "--no-pin-mem"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 9 bytes. Error code 12 (Cannot allocate memory)"), "lower --num_workers or --batch-size"),
    (OSError(24, "Too many open files"), "ulimit -n"), (OSError(12, "Cannot allocate memory"), "give the run more memory"),
    (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"), (MemoryError(), "give the run more memory"),
    (OSError(28, "No space left on device"), "--ipc=host")], ids=lambda value: str(value)[-60:])
def test_what_pytorch_says_of_the_machine_becomes_a_sentence_that_helps(error, words):
    def loader():
        raise error
        yield

    assert words in sentence(list, batches(Iterated(loader())))


class Iterated:
    """A loader in this process whose batches are given."""
    num_workers = 0

    def __init__(self, given):
        self.given = given

    def __iter__(self):
        return self.given


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset"), EOFError(), FileNotFoundError(2, "gone"),
                                   RuntimeError("Pin memory thread exited unexpectedly")], ids=lambda error: type(error).__name__)
def test_a_worker_that_is_dying_is_found_behind_its_broken_connection(error):
    def given():
        threading.Timer(0.2, worker.kill).start()
        if isinstance(error, RuntimeError):
            worker.join()
        raise error
        yield

    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True)
    worker.start()
    assert f"loader process {worker.pid} was killed" in sentence(list, batches(Iterated(Given(given(), [worker]))))


class Given:
    """An iterator with workers, as PyTorch's."""

    def __init__(self, given, workers):
        self.given, self._workers = given, workers

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.given)


@pytest.mark.parametrize("error", [RuntimeError("sizes of shm differ"), ZeroDivisionError(), KeyError("x"), OSError(5, "I/O")])
def test_other_errors_stay_what_they_are(error):
    def loader():
        raise error
        yield

    with pytest.raises(type(error)) as caught:
        list(batches(Iterated(loader())))
    assert caught.value is error


def test_a_worker_without_memory_is_one_sentence(tmp_path):
    write_image(tmp_path / "val" / "a" / "0.jpg")
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(4):
        write_black_png(tmp_path / "train" / "a" / f"{i}.png", 13_300, 13_300)      # 708 MB

    def starve(workers):
        loader = build_loaders(make_args(tmp_path, num_workers=workers), Process()).train
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        # much less than an image, because earlier tests may have left free memory to this process
        resource.setrlimit(resource.RLIMIT_AS, (size + (150 << 20),) * 2)
        return sentence(list, batches(loader))

    for workers in (0, 1):
        assert "not enough memory to load the images" in forked(starve, workers)


def test_too_few_open_files_are_one_sentence(capfd):
    def limited(spare):
        loader = digits(2).train
        limit = len(os.listdir("/proc/self/fd")) + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        kept = []
        return sentence(lambda: kept.extend(batches(loader)))

    for spare in (5, 14, 25):
        assert "ulimit -n" in forked(limited, spare)


def mount_small_memory(size):
    """Mounts a /dev/shm of `size` bytes for this process and its children; False without permission."""
    namespace = 0x20000     # CLONE_NEWNS
    if ctypes.CDLL(None, use_errno=True).unshare(namespace):
        return False
    commands = ("mount", "--make-rprivate", "/"), ("mount", "-t", "tmpfs", "-o", f"size={size}", "none", "/dev/shm")
    return not any(subprocess.run(words, check=False, capture_output=True).returncode for words in commands)


@pytest.mark.skipif(not forked(mount_small_memory, "1m"), reason="needs the right to mount a small /dev/shm")
@pytest.mark.parametrize("size", every(4, ["16k", "4k", "40k", "3m"]))
def test_a_small_shared_memory_is_one_sentence(size):
    """Too small for the list of unreadable images, a queue's lock, a batch."""
    def train():
        assert mount_small_memory(size)
        return sentence(lambda: list(batches(digits(2, batch_size=256).train)))
    text = forked(train)
    assert text.startswith("the shared memory has no room") and "docker run --ipc=host" in text


def shoot(parent, numbers, until):
    """Send signals to all child processes of `parent` but this one, as fast as can be."""
    count = 0
    while not until.exists():
        for child in open(f"/proc/{parent}/task/{parent}/children").read().split():
            if int(child) != os.getpid():
                for number in numbers:
                    try:
                        os.kill(int(child), number)
                        count += 1
                    except ProcessLookupError:
                        pass
        time.sleep(0.0003)
    return count


@pytest.mark.slow
def test_workers_ignore_the_signals_that_ask_a_run_to_stop_from_their_first_moment(tmp_path):
    def train():
        process = multiprocessing.get_context("fork").Process(
            target=shoot, args=(os.getpid(), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2), tmp_path / "end"))
        process.start()
        try:
            counts = []
            for _ in range(3):
                loaders = digits(2)
                counts += [len(list(batches(loaders.train))), len(list(batches(loaders.val)))]
                os.kill(pids(loaders.train)[0], signal.SIGUSR2)
            return counts
        finally:
            (tmp_path / "end").touch()
            process.join()

    assert forked(train) == [20, 4] * 3


def test_the_training_process_can_end_its_workers():
    loader = digits(2).train
    taken = batches(loader)
    next(taken)
    for worker in loader._iterator._workers:
        worker.terminate()
        worker.join(3)
        assert worker.exitcode == 0
    assert "has ended unexpectedly (exit code 0)" in sentence(list, taken)


def test_signals_reach_the_training_process_once_its_workers_are_started():
    loader = digits(1).train
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handler = signal.getsignal(signal.SIGCHLD)
    list(batches(loader))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before and signal.getsignal(signal.SIGCHLD) == handler


HELD = []


def hold(argv):
    """A program that leaves its loaders open: ends normally, by an error, or is killed."""
    loaders = digits(2)
    HELD.append((loaders, batches(loaders.train), batches(loaders.val)))
    for taken in HELD[0][1:]:
        next(taken)
    print(*pids(loaders.train), *pids(loaders.val), flush=True)
    print("ready", flush=True)
    if argv == ["error"]:
        raise UserError("as expected")
    if argv == ["wait"]:
        time.sleep(100)
    return 0


@pytest.mark.parametrize("how, code, seconds", every(3, [("error", 1, 4), ("normal", 0, 4), ("wait", -9, 10)]))
def test_no_worker_outlives_the_training_process(tmp_path, how, code, seconds):
    process = e2e.Run(tmp_path, how, call=hold)
    deadline = time.monotonic() + 60
    while "ready" not in process.out.read_text():
        assert time.monotonic() < deadline, process.err.read_text()
        time.sleep(0.02)
    workers = [int(word) for word in process.out.read_text().split()[:-1]]
    assert len(workers) == 4
    start = time.monotonic()
    if how == "wait":
        assert all(map(alive, workers))
        process.kill()
    assert process.wait(30) == code, process.err.read_text()
    while any(map(alive, workers)):
        assert time.monotonic() - start < seconds
        time.sleep(0.05)
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_report_to_the_main_process_however_they_start(folder, method):
    for path in [folder / "train" / "cat" / "0.jpg", folder / "train" / "dog" / "1.jpg"]:
        path.write_bytes(b"")
    data, _ = build_dataset(True, make_args(folder))
    keys = [SampleKey(i, 0, 0, i, 0) for i in range(len(data))]
    loader = DataLoader(data, 4, sampler=keys, num_workers=1, multiprocessing_context=mp.get_context(method))
    drawn = list(loader)
    assert int(data.unreadable.sum()) == 2 and data.unreadable[0] == data.unreadable[6] == 1
    assert same_batches(drawn, list(DataLoader(data, 4, sampler=keys)))


def test_large_photographs_are_decoded_at_less_than_their_size_for_training_alone(tmp_path):
    for half in ("train", "val"):
        for name in ("a", "b"):
            write_image(tmp_path / half / name / "large.jpg", size=(1000, 640), quality=95)
            write_image(tmp_path / half / name / "lossless.png", size=(1000, 640))
    args = make_args(tmp_path, data_set="FOLDER", input_size=64)       # the smallest crop needs 227 pixels a side
    train, val = build_dataset(True, args)[0], build_dataset(False, args)[0]
    assert [train._load(i).size for i in range(2)] == [(500, 320), (1000, 640)]
    assert [val._load(i).size for i in range(2)] == [(1000, 640)] * 2
    whole = load_image(train.images.name(0))
    half = np.asarray(train._load(0), dtype=float)
    assert np.abs(half - np.asarray(whole.reduce(2), dtype=float)).mean() < 1      # the same picture
    for args.input_size in (128, [64, 128]):                            # 453: half of it would be too small
        assert build_dataset(True, args)[0]._load(0).size == (1000, 640)


def test_an_unreadable_image_has_the_shape_of_an_oblong_one(tmp_path):
    for half in ("train", "val"):
        for name in ("a", "b"):
            write_image(tmp_path / half / name / "0.png")
    (tmp_path / "val" / "b" / "0.png").write_bytes(b"no image")
    val, _ = build_dataset(False, make_args(tmp_path, data_set="FOLDER", input_size=[24, 40]))
    (read, first), (unread, second) = val[0], val[1]
    assert read.shape == unread.shape == (3, 24, 40) and (first, second) == (0, -1) and not unread.any()


def test_a_worker_seeds_each_image_as_the_main_process_does(tmp_path):
    for name in ("a", "b"):
        for number in range(4):
            write_image(tmp_path / "train" / name / f"{number}.png", number)
            write_image(tmp_path / "val" / name / f"{number}.png", number)
    images = [next(iter(build_loaders(make_args(tmp_path, num_workers=workers, batch_size=8), Process()).train))[0]
              for workers in (0, 2)]
    assert torch.equal(*images)


def test_digits_are_scikit_learns_and_so_is_their_split(monkeypatch):
    digits = load_digits()
    pixels, targets = _digits_file()
    assert np.array_equal(pixels, digits.images) and np.array_equal(targets, digits.target)
    train, val = train_test_split(np.arange(1797), test_size=360, stratify=targets, random_state=0)
    assert np.array_equal(DIGITS_VAL, np.sort(val))
    assert np.array_equal(open_digits(is_train=True).targets, targets[np.sort(train)])
    monkeypatch.setattr(os.path, "isfile", lambda path: False)        # another version may keep it elsewhere
    assert np.array_equal(_digits_file()[0], pixels)
