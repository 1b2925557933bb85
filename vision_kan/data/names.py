"""The data set that the flags choose: its name, its folder and its classes."""
import os
import re
from argparse import Namespace

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from vision_kan.common.errors import UserError
from vision_kan.data.folders import class_folders, has_images
from vision_kan.data.images import Split

CIFARS = {"CIFAR": CIFAR100, "CIFAR10": CIFAR10}
INAT_YEARS = {"INAT": 2018, "INAT19": 2019}


def is_timm_name(data_set: str) -> bool:
    """Whether it is a name for timm.data.create_dataset, KIND/NAME."""
    return "/" in data_set


def guess_data_set(data_path: str | None) -> str | None:
    """The --data-set that a folder looks like, or None."""
    if not data_path:
        return None
    root = os.path.expanduser(data_path)

    def has(*names: str) -> bool:
        return any(os.path.exists(os.path.join(root, name)) for name in names)

    for name, cifar in CIFARS.items():
        if has(cifar.base_folder):
            return name
    for name, year in INAT_YEARS.items():
        if has(f"train{year}.json", f"val{year}.json"):
            return name
    if has("wnids.txt", "val/val_annotations.txt"):
        return "TinyIMNET"
    if class_folders(os.path.join(root, "train")) or class_folders(os.path.join(root, "val")) or is_single_folder(root):
        return "FOLDER"
    return None


def is_single_folder(root: str) -> bool:
    """Whether a folder has at least two class folders, some image in them, and neither train/ nor val/."""
    classes = class_folders(root)
    if len(classes) < 2 or any(os.path.exists(os.path.join(root, half)) for half in ("train", "val")):
        return False
    return has_images(root, classes)


def looks_like_imagenet(data_path: str | None) -> bool:
    """Whether the class folders are named as ImageNet's, such as n01440764. Its published figures ignore the EXIF orientation."""
    root = os.path.expanduser(data_path or "")
    classes = next(filter(None, (class_folders(os.path.join(root, half)) for half in ("train", "val", ""))), [])
    return bool(data_path) and bool(classes) and all(re.fullmatch("n[0-9]{8}", name) for name in classes)


def needs_splitting(data_set: str | None, data_path: str | None) -> bool:
    """Whether --data-path is a folder of class folders, so that validation images have to be held out."""
    return data_set == "FOLDER" and bool(data_path) and is_single_folder(os.path.expanduser(data_path or ""))


def data_set_of(args: Namespace) -> str:
    """--data-set, or the data set that --data-path looks like, or IMNET. Raises UserError if --download cannot fetch it."""
    data_set = args.data_set or guess_data_set(args.data_path) or "IMNET"
    if args.download and data_set not in CIFARS and not data_set.startswith("torch/"):
        raise UserError(f"--download cannot fetch --data-set {data_set}, only {', '.join(CIFARS)} and torch/NAME: "
                        "fetch it yourself and name its folder with --data-path")
    return data_set


def evaluated_split(args: Namespace) -> dict[str, str]:
    """The images that an evaluation with these flags uses: "data_set", and "split", "" if the data set chooses it."""
    data_set = data_set_of(args)
    if args.data_split:
        split = args.data_split[1].partition("|")[0]        # a stream's number of images follows
    elif args.val_split and (is_timm_name(data_set) or needs_splitting(data_set, args.data_path)):
        split = f"{args.val_split:g} held out by seed {args.seed}"
    else:
        split = "" if is_timm_name(data_set) else "test" if data_set in CIFARS else "validation"
    return {"data_set": data_set, "split": split}


def match_checkpoint_classes(split: Split, args: Namespace, class_names: list[str]) -> Split:
    """The split with the checkpoint's classes. Evaluation maps classes by name; in training they must be the same.

    Raises UserError for classes that the checkpoint lacks."""
    if not args.eval:
        if split.classes != list(class_names):
            raise UserError(f"the {len(split.classes)} classes under --data-path are not the checkpoint's "
                            f"{len(class_names)}: use the data it was trained on, or --finetune")
        return split
    place = {name: index for index, name in enumerate(class_names)}
    for name in split.classes:
        if name not in place:
            raise UserError(f"the class {name!r} under --data-path is not one of the checkpoint's "
                            f"{len(class_names)} classes: remove it or evaluate another checkpoint")
    to_checkpoint = np.array([place[name] for name in split.classes])
    return Split(split.images, to_checkpoint[split.targets], list(class_names), split.note)


def data_root(args: Namespace) -> str:
    """The folder of --data-path. Raises UserError if it is missing, unreadable or empty (except with --download)."""
    if not args.data_path:
        raise UserError("--data-path is not given: name the folder of the data set, "
                        "or try --data-set DIGITS, which needs none")
    root = os.path.expanduser(args.data_path)
    if args.download:
        return root
    try:
        empty = not os.listdir(root)
    except OSError as error:
        raise UserError(f"--data-path {args.data_path} is not a folder that can be read ({error.strerror}): "
                        "check the path") from error
    if empty:
        raise UserError(f"--data-path {args.data_path} is an empty folder: check the path")
    return root
