import functools
import hashlib
import http.server
import json
import os
import pickle
import random
import tarfile
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.task import ClassificationEvaluator
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets

import datasets
from config import get_args_parser
from datasets import UnreadableData, build_dataset, build_loaders, guess_data_set, load_image
from samplers import SampleKey
from utils import Process, UserError

CIFARS = {"CIFAR": torchvision_datasets.CIFAR100, "CIFAR10": torchvision_datasets.CIFAR10}


def make_args(data_path="", **changes):
    args = get_args_parser().parse_args([])
    vars(args).update({"data_path": str(data_path), "data_set": None, "input_size": 32, "batch_size": 4,
                       "num_workers": 0, **changes})
    return args


def write_image(path, seed=0, size=(40, 32), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    return path


def write_folder(root, train, val, suffix="jpg"):
    """train, val: dict class -> number of images."""
    for half, classes in (("train", train), ("val", val)):
        for c, (name, count) in enumerate(classes.items()):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                write_image(root / half / name / f"{i}.{suffix}", seed=100 * c + i + (half == "val") * 1000)
    return root


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
    batches = epoch_of(loaders)
    assert [len(images) for images, _ in batches] == [4, 4, 4, 4]
    assert batches[0][0].shape == (4, 3, 32, 32) and batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    val = list(loaders.val)
    assert [len(images) for images, _ in val] == [6, 1]  # int(1.5 * 4), the incomplete batch kept
    assert targets_of(loaders.val) == [0, 0, 1, 1, 1, 2, 2]
    assert loaders.unreadable_train() == loaders.unreadable_val() == 0


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
    assert loaders.train is None and loaders.train_sampler is None and loaders.unreadable_train() == 0
    assert (loaders.data_set, loaders.nb_classes, targets_of(loaders.val)) == ("FOLDER", 2, [0, 1, 1])


def test_eval_takes_the_classes_of_train_where_there_is_one(tmp_path):
    write_folder(tmp_path, {"a": 1, "b": 1, "c": 1}, {"c": 2})
    loaders = build_loaders(make_args(tmp_path, eval=True), Process())
    assert (loaders.nb_classes, targets_of(loaders.val)) == (3, [2, 2])


@pytest.mark.parametrize("break_it, words", [
    (lambda root: os.rename(root / "train", root / "training"), "no train/"),
    (lambda root: os.rename(root / "val", root / "test"), "no val/"),
    (lambda root: (root / "train" / "empty").mkdir(), "train/empty.*holds no image"),
    (lambda root: os.rename(root / "train" / "owl", root / "train" / "emu"), "'owl' that train/ lacks"),
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
    assert loaders.unreadable_val() == 0


def test_tiny_imagenets_annotations_are_checked(tmp_path):
    write_tiny(tmp_path)
    rows = (tmp_path / "val" / "val_annotations.txt").read_text()
    (tmp_path / "val" / "val_annotations.txt").write_text(rows.replace("n00000007", "n99999999", 1))
    with pytest.raises(UserError, match="'n99999999' that train/ lacks"):
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
    assert targets_of(loaders.train) and loaders.unreadable_train() == loaders.unreadable_val() == 0


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
@pytest.mark.parametrize("changes, words", [
    ({"num_workers": -1}, "--num_workers -1 is negative"),
    ({"batch_size": 17}, "--batch-size 17 exceeds the 16 training samples"),
    ({"resplit": True, "repeated_aug": False}, "--resplit .*--no-repeated-aug")])
def test_flags_that_cannot_work_are_named(folder, changes, words):
    with pytest.raises(UserError, match=words):
        build_loaders(make_args(folder, **changes), Process())


def test_batch_size_is_compared_with_one_processs_share(folder):
    build_loaders(make_args(folder, batch_size=8), Process(0, 2))
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
@pytest.mark.parametrize("n", range(1, 18))
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


def test_without_dist_eval_every_process_evaluates_everything(folder):
    for rank in range(3):
        assert targets_of(build_loaders(make_args(folder), Process(rank, 3)).val) == [0, 0, 1, 1, 1, 2, 2]


# ---------------------------------------------------------------- seeds
def test_batches_do_not_depend_on_the_number_of_workers(folder):
    runs, vals = [], []
    for workers in (0, 1, 2):
        loaders = build_loaders(make_args(folder, num_workers=workers, resplit=True), Process())
        runs.append(epoch_of(loaders, epoch=1) + epoch_of(loaders, epoch=2))
        vals.append(list(loaders.val))
    assert same_batches(runs[0], runs[1]) and same_batches(runs[0], runs[2])
    assert same_batches(vals[0], vals[1]) and same_batches(vals[0], vals[2])
    assert not same_batches(runs[0][:4], runs[0][4:])  # the epochs differ


def test_batches_do_not_depend_on_the_number_of_processes(folder):
    def images_of(process):
        return torch.cat([images for images, _ in epoch_of(build_loaders(make_args(folder), process))])

    alone = images_of(Process())
    assert torch.equal(alone[0::2], images_of(Process(0, 2)))
    assert torch.equal(alone[1::2], images_of(Process(1, 2)))


def test_seed_changes_the_batches(folder):
    runs = [epoch_of(build_loaders(make_args(folder, seed=seed), Process())) for seed in (0, 0, 1)]
    assert same_batches(runs[0], runs[1]) and not same_batches(runs[0], runs[2])


def test_a_position_gives_the_tail_of_the_epoch(folder):
    loaders = build_loaders(make_args(folder), Process())
    assert same_batches(epoch_of(loaders, epoch=3)[2:], epoch_of(loaders, epoch=3, position=8))


def test_repeats_of_an_image_differ(folder):
    data, _ = build_dataset(True, make_args(folder))
    repeats = [data[SampleKey(4, seed=0, epoch=0, position=12 + i, repeat=i)][0] for i in range(3)]
    assert not any(torch.equal(repeats[i], repeats[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


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
def write_unreadable(folder, monkeypatch):
    """One file of each kind that cannot be read, class by class; their names."""
    good = write_image(folder.parent / "good.png", size=(300, 300)).read_bytes()
    jpeg = write_image(folder.parent / "good.jpg", size=(300, 300)).read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "truncated.png").write_bytes(good[:len(good) // 2])
    (folder / "truncated.jpg").write_bytes(jpeg[:len(jpeg) // 2])
    (folder / "garbage.jpg").write_bytes(np.random.default_rng(0).bytes(2000))
    (folder / "header.png").write_bytes(good[:40] + np.random.default_rng(0).bytes(2000))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    Image.new("1", (400, 400)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 75_000)  # 300 x 300 only warns, 400 x 400 raises
    forbidden = write_image(folder / "forbidden.jpg")
    forbidden.chmod(0)
    if os.access(forbidden, os.R_OK):  # root may read anything
        def refuse(path, *args, real=open, **options):
            if os.path.basename(path) == forbidden.name:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **options)
        monkeypatch.setattr(datasets, "open", refuse, raising=False)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_once_counted_and_survived(folder, monkeypatch, capfd, workers):
    names = write_unreadable(folder / "train" / "cat", monkeypatch)
    names = [name for name in names if not name[0].isdigit()]
    write_unreadable(folder / "val" / "cat", monkeypatch)
    bad = len(names)
    assert bad == 9
    args = make_args(folder, num_workers=workers, repeated_aug=False)
    loaders = build_loaders(args, Process())
    assert all((targets >= 0).all() and images.flatten(1).std(1).min() > 0
               for epoch in range(3) for images, targets in epoch_of(loaders, epoch))
    for _ in range(2):
        evaluated = list(loaders.val)
        targets = torch.cat([targets for _, targets in evaluated])
        assert (targets < 0).sum() == bad and len(targets) == 7 + bad
        assert not torch.cat([images for images, _ in evaluated])[targets < 0].any()
    assert loaders.unreadable_train() == loaders.unreadable_val() == bad
    said = capfd.readouterr().err
    for half in ("train", "val"):
        for name in names:
            assert said.count(str(folder / half / "cat" / name) + " (") == 1, name
    assert said.count("Skipping an unreadable image") == 2 * bad == len(said.splitlines())
    assert "text.jpg (not an image)" in said and "dangling.jpg (No such file or directory)" in said


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
    monkeypatch.setattr(datasets, "open", fail, raising=False)
    with pytest.raises(OSError, match="Too many open files"):
        epoch_of(loaders)
    assert loaders.unreadable_train() == 0


def test_only_one_process_names_what_all_of_them_evaluate(folder, capfd):
    (folder / "val" / "cat" / "0.jpg").write_bytes(b"")
    for rank in range(3):
        loaders = build_loaders(make_args(folder), Process(rank, 3))
        list(loaders.val)
        assert loaders.unreadable_val() == 1
    assert capfd.readouterr().err.count("Skipping") == 1


def test_odd_but_readable_images_are_read(folder, capfd):
    odd = folder / "val" / "cat"
    picture = load_image(str(odd / "0.jpg"))
    picture.convert("CMYK").save(odd / "cmyk.jpg")
    picture.convert("P").save(odd / "palette.png", transparency=bytes(range(256)))
    picture.convert("RGBA").save(odd / "alpha.png")
    picture.convert("LA").save(odd / "grey-alpha.png")
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(odd / "sixteen.png")
    picture.convert("1").save(odd / "bilevel.png")
    picture.save(odd / "animated.webp", save_all=True, append_images=[Image.new("RGB", picture.size)])
    Image.new("RGB", (1, 300), "red").save(odd / "thin.png")
    loaders = build_loaders(make_args(folder, eval=True), Process())
    assert len(targets_of(loaders.val)) == 7 + 8 and loaders.unreadable_val() == 0
    assert load_image(str(odd / "sixteen.png")).getpixel((0, 0)) == (156, 156, 156)
    assert abs(np.asarray(load_image(str(odd / "animated.webp"))).mean() - np.asarray(picture).mean()) < 5
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_report_to_the_main_process_however_they_start(folder, method):
    for path in [folder / "train" / "cat" / "0.jpg", folder / "train" / "dog" / "1.jpg"]:
        path.write_bytes(b"")
    data, _ = build_dataset(True, make_args(folder))
    keys = [SampleKey(i, 0, 0, i, 0) for i in range(len(data))]
    loader = DataLoader(data, 4, sampler=keys, num_workers=1, multiprocessing_context=mp.get_context(method))
    batches = list(loader)
    assert int(data.unreadable.sum()) == 2 and data.unreadable[0] == data.unreadable[6] == 1
    assert same_batches(batches, list(DataLoader(data, 4, sampler=keys)))


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
    args.input_size = 128                                               # 453: half of it would be too small
    assert build_dataset(True, args)[0]._load(0).size == (1000, 640)


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
    pixels, targets = datasets._digits_file()
    assert np.array_equal(pixels, digits.images) and np.array_equal(targets, digits.target)
    halves = train_test_split(np.arange(1797), test_size=360, stratify=targets, random_state=0)
    for is_train, theirs in zip((True, False), halves):
        assert np.array_equal(datasets._digits_of(is_train, targets), np.sort(theirs))
    monkeypatch.setattr(datasets.os.path, "isfile", lambda path: False)        # another version may keep it elsewhere
    assert np.array_equal(datasets._digits_file()[0], pixels)
