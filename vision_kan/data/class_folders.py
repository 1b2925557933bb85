"""A folder of class folders as a data set: with train/ and val/, or split by --val-split."""
import hashlib
import os
from argparse import Namespace
from collections.abc import Sequence

import numpy as np

from vision_kan.common.errors import UserError
from vision_kan.common.text import printable
from vision_kan.data.folders import class_folders, find_labelled, has_images, images_in
from vision_kan.data.images import FileImages, Split
from vision_kan.data.names import data_root, guess_data_set, is_single_folder

FOLDER_CLASSES = {"IMNET": 1000, "TinyIMNET": 200, "FOLDER": None}
VAL_SPLIT = 0.2     # default of --val-split for a folder without train/ and val/


def hold_out(names: Sequence[str], targets: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The mask of the validation images, bool [N].

    Of each class it takes round(share * images), those with the smallest hash of seed and name. So the split does not depend on
    the order of the names, and adding or removing one image moves at most one other.

    A class of two or more images keeps at least one in each half (`share` 1: all are held out); a single image is trained on."""
    hashes = np.array([int.from_bytes(hashlib.blake2b(f"{seed}/".encode() + os.fsencode(name), digest_size=8).digest())
                       for name in names], dtype=np.uint64)
    chosen = np.zeros(len(names), dtype=bool)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        count = len(members) if share == 1 else min(max(round(share * len(members)), 1), len(members) - 1)
        chosen[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return chosen


def split_by_share(is_train: bool, args: Namespace, names: Sequence[str], targets: np.ndarray, classes: list[str]
             ) -> tuple[np.ndarray, str]:
    """The mask of the half that --val-split and --seed give, bool [N], and a sentence about both halves."""
    held_out = hold_out(names, targets, args.val_split, args.seed)
    chosen = ~held_out if is_train else held_out
    if not chosen.any():
        raise UserError(f"--val-split {args.val_split:g} of {len(names)} images leaves none to "
                        f"{'train on' if is_train else 'evaluate'}: choose another share, or give more images")
    single = [printable(classes[target], 40) for target in np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 1)]
    rest = f"; of a class with a single image none can be held out: {', '.join(single[:5])}{', ...' if single[5:] else ''}" \
        if single and args.val_split < 1 else ""
    return chosen, (f"{len(classes)} classes, {int((~held_out).sum())} images to train on, {int(held_out.sum())} held out "
                    f"(--val-split {args.val_split:g}, --seed {args.seed}){rest}")


def open_class_folders(is_train: bool, args: Namespace, data_set: str, class_names: list[str] | None) -> Split:
    """train/<class>/... and val/<class>/..., at any depth below the class; also Tiny ImageNet's flat val/images.

    Raises UserError for a missing half, an empty class, or classes that differ between the halves."""
    root = data_root(args)
    train, val = os.path.join(root, "train"), os.path.join(root, "val")
    if data_set == "FOLDER" and (args.eval or args.val_split) and is_single_folder(root):
        return _single_folder(is_train, args, root)
    for half in ["val"] if args.eval and not is_train else ["train", "val"]:
        if not os.path.isdir(os.path.join(root, half)):
            raise UserError(f"--data-path {args.data_path} {_why_no_half(root, half)}")
    annotations = os.path.join(val, "val_annotations.txt")
    pictures = os.path.join(val, "images")
    flat_val = (data_set == "TinyIMNET" and os.path.isfile(annotations)
                and os.path.isdir(pictures) and bool(os.listdir(pictures)))
    flat = _tiny_annotations(annotations) if flat_val else {}

    by_name = args.eval and class_names is not None     # the checkpoint defines the classes
    val_classes = sorted(set(flat.values())) if flat_val else class_folders(val)
    classes = [] if by_name else class_folders(train)
    classes = classes or val_classes
    if not classes:
        half = "val" if args.eval else "train"
        raise UserError(f"--data-path {args.data_path} has no class folder in {half}/: "
                        + (_no_classes(root, half) or "it needs one folder per class"))
    expected = FOLDER_CLASSES[data_set]
    if expected and len(classes) != expected and not by_name:
        raise UserError(f"--data-set {data_set} has {expected} classes but --data-path {args.data_path} has "
                        f"{len(classes)}: use --data-set FOLDER for your own images")
    for name in val_classes:
        if name not in classes:
            raise UserError(f"val/ under --data-path {args.data_path} has the class {name!r}, which train/ "
                            "lacks: add it to train/ or remove it from val/")

    half = "train" if is_train else "val"
    place = {name: index for index, name in enumerate(classes)}
    if flat_val and not is_train:
        samples = [(os.path.join(pictures, name), place[wnid]) for name, wnid in flat.items()]
    else:
        samples = find_labelled(train if is_train else val, classes)
    if is_train:
        filled = {target for _, target in samples}
        for name, target in place.items():
            if target not in filled:
                raise UserError(f"the class folder {os.path.join('train', name)} under --data-path "
                                f"{args.data_path} holds no image: fill it or remove it")
    if not samples:
        why = _no_classes(root, half)
        raise UserError(f"{half}/ under --data-path {args.data_path} holds no image "
                        + (f"in a class folder: {why}" if why else "of a format that is read: check the folder"))
    return Split(FileImages([path for path, _ in samples]),
                 np.array([target for _, target in samples], dtype=np.int64), classes)


# Common names of the two halves. A folder with such a name is not a class.
_HALF_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "test", "testing")}
_ALL_HALF_NAMES = {name for names in _HALF_NAMES.values() for name in names}


def _no_classes(root: str, half: str) -> str:
    """What to do about images that lie directly in a half, or '' if there are none."""
    count = len(images_in(os.path.join(root, half)))
    return f"images lie directly in it ({count}), put each into the folder of its class, {half}/CLASS/" if count else ""


def _why_no_half(root: str, half: str) -> str:
    """What the folder holds in place of `half`, and the remedy."""
    folders = class_folders(root)
    flat = len(images_in(root))
    if other := next((name for name in folders if name.lower() in _HALF_NAMES[half]), None):
        return f"has no {half}/ folder but {other}/: rename it to {half}/"
    if half == "val" and "train" in folders:
        return ("has no val/ folder: make one with a folder per class, or give its train/ as the --data-path, and a part of "
                "that is held out (--val-split)")
    if "train" in folders or "val" in folders:
        return f"has no {half}/ folder: it needs train/ and val/ with one folder per class (--eval needs val/ only)"
    if flat and not has_images(root, folders):
        return (f"has images directly in it ({flat}) and none in class folders: put each into a folder named after its class, "
                "for two classes or more")
    if len(folders) == 1 and guess_data_set(inside := os.path.join(root, folders[0])):
        return f"is not the folder of the data set, which is in it: give --data-path {inside}"
    if len(folders) == 1 and has_images(root, folders):
        return (f"has a single class folder ({printable(folders[0], 60)}): a classifier needs two or more "
                "classes, one folder for each")
    if folders and not has_images(root, folders):
        return (f"has no {half}/ folder, and its folders hold no image of a format that is read: it needs train/ and val/ with "
                "one folder per class, or class folders alone")
    return (f"has no {half}/ folder: it needs train/ and val/ with one folder per class (--eval needs val/ only), or --data-set "
            "FOLDER for class folders alone")


def _single_folder(is_train: bool, args: Namespace, root: str) -> Split:
    """<class>/..., at any depth below the class: one half by --val-split, or every image to evaluate without it."""
    classes = class_folders(root)
    if parts := [name for name in classes if name.lower() in _ALL_HALF_NAMES]:
        raise UserError(f"--data-path {args.data_path} has the folders {', '.join(parts)} where classes are expected: name the "
                        "two parts train/ and val/, or leave the class folders alone in it")
    samples = find_labelled(root, classes)
    targets = np.array([target for _, target in samples], dtype=np.int64)
    empty = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(f"the class folder {classes[empty[0]]} under --data-path {args.data_path} holds no image: fill it or "
                        "remove it")
    names = [os.path.relpath(path, root).replace(os.sep, "/") for path, _ in samples]
    note, chosen = f"it has no val/ folder, so all {len(names)} images are evaluated", np.ones(len(names), dtype=bool)
    if args.val_split:
        chosen, note = split_by_share(is_train, args, names, targets, classes)
    return Split(FileImages([path for (path, _), mine in zip(samples, chosen) if mine]), targets[chosen], classes,
                 f"--data-path {args.data_path}: {note}")


def _tiny_annotations(path: str) -> dict[str, str]:
    """Tiny ImageNet's val_annotations.txt: image name -> class. The other columns are boxes."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        rows = [line.split("\t") for line in file if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{path} has a line without an image name and a class: fetch the file again")
    return {row[0]: row[1].strip() for row in rows}
