"""Data sets of other libraries: torchvision's, Hugging Face's and WebDataset's, as timm names them."""
import os
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset

from vision_kan.common.errors import UserError, one_line
from vision_kan.data.class_folders import split_by_share
from vision_kan.data.folders import class_folders, find_labelled, visible
from vision_kan.data.images import ArrayImages, FileImages, Split, decode_image, load_image
from vision_kan.data.names import data_root

VALIDATION = ("validation", "val", "valid", "test")     # names of a split to evaluate on, the first that is there
# kind -> package and its oldest major version: from 4 on `datasets` runs no scripts of a data set
PACKAGES = {"hfds": ("datasets", 4), "hfids": ("datasets", 4), "wds": ("webdataset", 0)}


def open_with_library(args: Namespace, opener: Callable[[], Any]) -> Any:
    """What `opener` returns. Raises UserError for the library's errors."""
    try:
        return opener()
    except UserError:
        raise
    except Exception as error:      # the libraries raise nearly anything
        raise UserError(f"--data-set {args.data_set} cannot be opened ({type(error).__name__}: {one_line(error)}): check the "
                        "name, --data-path, --data-split and the connection") from error


def split_name(args: Namespace, is_train: bool) -> str | None:
    """The split that --data-split names, or None."""
    return args.data_split and args.data_split[0 if is_train else 1]


def _held_out(is_train: bool, args: Namespace, names: list[str], targets: np.ndarray, classes: list[str]
              ) -> tuple[np.ndarray, str]:
    """Indices of one half by --val-split, and a sentence about both. Raises UserError without the flag."""
    if not args.val_split:
        raise UserError(f"--data-set {args.data_set} has no validation images of its own: name the two parts with --data-split "
                        "TRAIN VAL, or hold some out with --val-split 0.2")
    chosen, note = split_by_share(is_train, args, names, targets, classes)
    return np.flatnonzero(chosen), f"{args.data_set}: {note}"


def numbered_classes(args: Namespace) -> list[str]:
    if not args.num_classes:
        raise UserError(f"--data-set {args.data_set} does not declare its classes: give --num-classes N")
    return [str(number) for number in range(args.num_classes)]


# ---------------------------------------------------------------- torch/
def open_torchvision(is_train: bool, args: Namespace, name: str) -> Split:
    """torchvision's data sets that timm knows. Pickles in them are checked against an MD5, or read as tensors only."""
    root = os.path.abspath(data_root(args))

    own = name in ("folder", "image_folder")        # timm finds the split's folder, and `folders` reads it

    def opened(part: str) -> Any:
        options: dict[str, Any] = {"is_valid_file": lambda _: False, "allow_empty": True} if own else {"download": args.download}
        return open_with_library(args, lambda: create_dataset(f"torch/{name}", root, part, trust_remote_code=False, **options))

    data = opened(split_name(args, is_train) or ("train" if is_train else "validation"))
    if own:
        data.classes = class_folders(data.root)
        data.samples = find_labelled(data.root, data.classes)
        if empty := set(range(len(data.classes))) - {target for _, target in data.samples}:
            raise UserError(f"the class folder {os.path.join(data.root, data.classes[min(empty)])} holds no image: fill it or "
                            "remove it")
    samples = getattr(data, "samples", None) or getattr(data, "imgs", None)
    if samples is None and hasattr(data, "all_categories"):     # iNaturalist
        samples = [(os.path.join(data.root, data.all_categories[c], file), c) for c, file in data.index]
    named: list[Any] = getattr(data, "classes", None) or getattr(data, "all_categories", [])
    classes = [name if isinstance(name, str) else ", ".join(name) for name in named]        # ImageNet's have several names
    if samples is None:
        pixels = np.asarray(data.data)
        pixels = pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=3)
        targets = np.asarray(data.targets, dtype=np.int64).reshape(len(pixels), -1)[:, 0]
        return Split(ArrayImages(pixels), targets, classes)
    samples = samples if own else visible(root, samples)
    paths, targets = [path for path, _ in samples], np.array([target for _, target in samples], dtype=np.int64)
    if not own or data.root != root:
        return Split(FileImages(paths), targets, classes)
    # timm takes the whole folder if it has no such split
    chosen, note = _held_out(is_train, args, [os.path.relpath(path, root) for path in paths], targets, classes)
    return Split(FileImages([paths[index] for index in chosen]), targets[chosen], classes, note)


# ---------------------------------------------------------------- hfds/
class PicklesHuggingFace:
    """Holds objects of Hugging Face's package. Unpickling it imports the package first: in a new process the name `datasets` may
    still mean the file datasets.py."""

    def __reduce__(self) -> tuple:
        return _unpickle, (type(self), pickle.dumps(vars(self)))


def _unpickle(kind: type, content: bytes) -> Any:
    huggingface_datasets()
    made: Any = object.__new__(kind)
    vars(made).update(pickle.loads(content))
    return made


class RecordImages(PicklesHuggingFace):
    """The records `chosen` of a Hugging Face data set as images. Its tables stay on the disk."""

    def __init__(self, name: str, data: Any, key: str, chosen: np.ndarray):
        self.title, self.data, self.key, self.chosen = name, data, key, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        return f"{self.title}, record {self.chosen[index]}"

    def load(self, index: int, **how) -> Image.Image | torch.Tensor:
        return decode_record(self.data[int(self.chosen[index])][self.key], **how)


def decode_record(image: dict[str, Any] | None, **how) -> Image.Image | torch.Tensor:
    """The image of a record of `datasets.Image(decode=False)`: {"bytes", "path"}. how: see `decode_image`."""
    if image and image.get("bytes"):
        return decode_image(BytesIO(image["bytes"]), **how)
    if image and image.get("path"):
        return load_image(image["path"], **how)
    raise ValueError("no image in this record")


def open_huggingface(is_train: bool, args: Namespace, name: str) -> Split:
    """A data set of the hub, a folder of images or Parquet files, or one written by `save_to_disk`."""
    parts = open_with_library(args, lambda: splits_of(name, args))
    train, val = args.data_split or ("train", next((part for part in VALIDATION if part in parts), None))
    part = train if is_train or val is None else val
    if part not in parts:
        raise UserError(f"--data-set {args.data_set} has no part {part!r} but {', '.join(parts)}: choose with --data-split TRAIN "
                        "VAL")
    data = open_with_library(args, parts[part])
    image, label = find_columns(data.features, args)
    data = data.cast_column(image, huggingface_datasets().Image(decode=False))
    targets = data.select_columns(label).with_format("numpy")[:][label]
    if not np.issubdtype(targets.dtype, np.integer):
        raise UserError(f"--data-set {args.data_set}: the classes in {label!r} are not whole numbers: write the data with "
                        f"class_encode_column({label!r})")
    classes = list(getattr(data.features[label], "names", ())) or numbered_classes(args)
    unlabelled = targets[(targets < 0) | (targets >= len(classes))]
    if len(unlabelled):
        raise UserError(f"--data-set {args.data_set}: {part} has images of no class (such as {unlabelled[0]} of 0 to "
                        f"{len(classes) - 1}): choose another part with --data-split TRAIN VAL")
    title, chosen, note = f"{args.data_set} {part}", np.arange(len(data)), ""
    if val is None:
        chosen, note = _held_out(is_train, args, [str(number) for number in chosen], targets, classes)
    elif not is_train:
        note = f"{args.data_set}: {train} to train on, {val} ({len(data)} images) to evaluate"
    return Split(RecordImages(title, data.select_columns(image), image, chosen), targets[chosen].astype(np.int64), classes, note)


def package_spec(package: str) -> ModuleSpec | None:
    """The spec of an installed package; this project's modules of the same name don't count."""
    here = Path(__file__).parents[2]
    return PathFinder.find_spec(package, [place for place in sys.path if Path(place).resolve() != here])


def huggingface_datasets() -> Any:
    """Hugging Face's package, imported at its first use: the import takes a second, and the package is optional.

    The file datasets.py has the same name. From here on `datasets` means the package, whose modules import each other by it; what
    was imported from the file before stays valid."""
    known = sys.modules.get("datasets")
    if hasattr(known, "load_dataset"):
        return known
    spec = package_spec("datasets")
    assert spec is not None and spec.loader is not None     # `build_dataset` has checked
    package = sys.modules["datasets"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["datasets"]
        if known is not None:
            sys.modules["datasets"] = known
        raise
    return package


def splits_of(name: str, args: Namespace) -> dict[str, Callable[[], Any]]:
    """The splits of a data set: name -> a function that opens it."""
    datasets = huggingface_datasets()
    place, cache = os.path.expanduser(name), os.path.expanduser(args.data_path) or None
    if any(os.path.isfile(os.path.join(place, file)) for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(place)
        saved = saved if isinstance(saved, dict) else {"train": saved}
        return {part: partial(saved.__getitem__, part) for part in saved}
    place = place if os.path.exists(place) else name
    return {part: partial(datasets.load_dataset, place, split=part, cache_dir=cache)
            for part in datasets.get_dataset_split_names(place)}


def find_columns(features: Any, args: Namespace) -> tuple[str, str]:
    """The columns of the image and of the class: those of --input-key and --target-key, or the only ones of their kind."""
    found = []
    for flag, key, kind in (("--input-key", args.input_key, "Image"), ("--target-key", args.target_key, "ClassLabel")):
        fitting = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if key is None and len(fitting) != 1:
            raise UserError(f"--data-set {args.data_set} has {len(fitting)} columns of the kind {kind} among "
                            f"{', '.join(features)}: name the right one with {flag}")
        if key is not None and key not in features:
            raise UserError(f"{flag} {key}: --data-set {args.data_set} has no such column but {', '.join(features)}")
        found.append(key or fitting[0])
    return found[0], found[1]
