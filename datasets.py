"""Data sets and loaders. Every image that cannot be read is named once, counted and survived."""
import errno
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.layers import to_2tuple
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets import CIFAR10, CIFAR100

from augment import GREY_SCALE, build_transform, to_rgb
from console import readers_may_leave
from folders import class_folders, find_labelled, formats, has_images, images_in
from interruption import STOPPING
from samplers import RASampler, SampleKey
from utils import Process, UnreadableData, UserError, cores, printable, say

CIFARS = {"CIFAR": CIFAR100, "CIFAR10": CIFAR10}
FOLDER_CLASSES = {"IMNET": 1000, "TinyIMNET": 200, "FOLDER": None}
INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
SMALLEST_CROP = 0.08    # share of an image's area in a random resized crop, timm's and DeiT's
# An image of more pixels counts as unreadable. Decoded it takes 4 bytes a pixel, while its mode is converted 8: 1.4 GB in each
# worker that has one at hand. The limit is PIL's own, which holds all that cameras take but a few phones' 200 megapixels; PIL's
# warning from half of it on is for programs that decode what strangers send.
MAX_PIXELS = 178_956_970
VAL_SPLIT = 0.2     # of a folder without train/ and val/, where --val-split does not say
FEW_UNREADABLE = 3      # are never too many, whatever share of a small data set, but with --max-unreadable 0
LEAST_WORKERS = 32      # loader processes that any machine may be asked for
TRIES = 32  # images tried in place of an unreadable one before training gives up


# ---------------------------------------------------------------- images
class Images(Protocol):
    """Numbered images. name: for messages. load: 8-bit RGB, or an exception where it cannot be read; enough and upright:
    `load_image`."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def load(self, index: int, enough: int = 0, upright: bool = False) -> Image.Image: ...


class FileImages:
    """Image files. The paths lie end to end in one string of bytes: a list of millions of strings would be copied
    into every worker, page by page, as its reference counts change, and one very long path must not cost its length
    for every other."""

    def __init__(self, paths: list[str]):
        names = [os.fsencode(path) for path in paths]
        self.paths = b"".join(names)
        self.ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[self.ends[index]:self.ends[index + 1]])

    def load(self, index: int, enough: int = 0, upright: bool = False) -> Image.Image:
        return load_image(self.name(index), enough, upright)


class ArrayImages:
    """Images in memory: uint8 [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int, enough: int = 0, upright: bool = False) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class Split(NamedTuple):
    """One half (training or validation) of a data set."""
    images: Images
    targets: np.ndarray   # int64 [N], into classes
    classes: list[str]
    note: str = ""        # how it was made, for the reader of the log


def _open_file(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))     # a named pipe would be waited for


def load_image(path: str, enough: int = 0, upright: bool = False) -> Image.Image:
    """The image file as 8-bit RGB; raises what PIL raises for a file that it cannot decode.

    enough: a JPEG file that is larger may be decoded at 1/2, 1/4 or 1/8 of its size, its shorter side no shorter than
    so many pixels, in a fraction of the time. 0: as it is.
    upright: turned as its EXIF orientation says. PIL does that for TIFF files in any case."""
    with open(path, "rb", opener=_open_file) as file:
        return decode_image(file, enough, upright)


# EXIF orientation -> what makes the image upright
_TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                         Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                         Image.Transpose.ROTATE_90), 2))


def decode_image(file: BinaryIO, enough: int = 0, upright: bool = False) -> Image.Image:
    """`load_image` of an open file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata and the like: what matters raises
        with Image.open(file, formats=formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if enough:
                image.draft(None, (enough, enough))
            rgb = to_rgb(image)
            turn = _turn(image) if upright else None
            return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a decoded image upright, if anything does. PIL's `exif_transpose` would fail where metadata make no sense."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))       # type: ignore[arg-type]
    except Exception:       # damaged metadata make PIL raise nearly anything, and the image is whole
        return None


@contextmanager
def seeded(key: SampleKey) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators run from (seed, epoch, position) inside, and go on
    as if nothing had happened outside (in a worker, where nothing else draws, that is left out: 0.15 ms)."""
    keep = get_worker_info() is None
    states: Any = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if keep else ()
    words = np.random.SeedSequence([key.seed, key.epoch, key.position]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:2].view(np.uint32))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would reseed the GPUs too
    try:
        yield
    finally:
        if keep:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def _reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200] or type(error).__name__


def _tell(line: str) -> None:
    """On stderr, in a single write: loader processes write there at the same time. `say` is for the first process alone."""
    with readers_may_leave():
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


class ImageSet(Dataset):
    """(image float32 [3, H, W], target) pairs of a split.

    Training takes a `SampleKey` (or a plain index: unseeded). An unreadable image is replaced by
    another one, chosen by a hash of the key; in evaluation it is a zero image with target -1.
    `unreadable` (uint8 [N], in shared memory) has a 1 for each image that this process or one of its
    workers could not read, and `named` for each that needs to be named no more.

    Of the draws of an unreadable image in an epoch, in whatever process and worker, only the first names it; an image
    drawn in place of another one is left to its own draw, or to `Loaders.unreadable_train`.

    Raises UnreadableData: with --strict-data for each unreadable image, else where nothing else can be read either.
    """

    is_stream = False   # whether a sample's key says which image it is

    def __init__(self, split: Split, is_train: bool, args: Namespace):
        self.images, self.targets, self.classes, self.note = split
        self.is_train = is_train
        self.input_size = args.input_size
        # Training images of so many pixels a side lose nothing that the smallest crop (SMALLEST_CROP of the area) could
        # show at the input's size; in evaluation every pixel is as in the published figures.
        self.enough = math.ceil(max(to_2tuple(args.input_size)) / math.sqrt(SMALLEST_CROP)) if is_train else 0
        self.transform: Any = build_transform(is_train, args)
        self.spare_first = args.resplit
        self.upright = bool(args.exif_orientation)
        self.strict = args.strict_data
        self.quiet = False  # count what is unreadable without naming it
        try:
            self.marks = torch.zeros(2, len(self.images), dtype=torch.uint8).share_memory_()
            self.scale_told = torch.zeros(1, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise UserError(_about_machine(error) or f"no memory can be shared ({error}): {MORE_SHARED_MEMORY}") from error
        self.unreadable, self.named = self.marks
        if dist.is_initialized() and dist.get_rank():
            self.scale_told[0] = 1      # by the first process

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey | int) -> tuple[torch.Tensor, int]:
        if not self.is_train:
            image = self._load(key)     # type: ignore[arg-type]  # no SampleKey in evaluation
            if image is None:
                return torch.zeros(3, *to_2tuple(self.input_size)), -1
            return self.transform(image), int(self.targets[key])
        if not isinstance(key, SampleKey):
            index, image = self._load_or_replace(key, [key])
            return self.transform(image), int(self.targets[index])
        # later repeats, and the draws that fill the last positions after all images have come, leave it to the first
        first = key.repeat == 0 and key.position < len(self)
        index, image = self._load_or_replace(key.index, key[1:], name=first)
        with seeded(key):
            image = self.transform(image, erase=not (self.spare_first and key.repeat == 0))
        return image, int(self.targets[index])

    def _load(self, index: int, name: bool = True) -> Image.Image | None:
        try:
            image = self.images.load(index, self.enough, self.upright)
        except MemoryError:
            raise
        except Exception as error:  # broken files make PIL's decoders raise nearly anything
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # the machine's fault, not the file's
            if self.strict:     # and not counted: its own sentence must come before that of too many
                raise UnreadableData(f"the image {self.shown(index)} cannot be read ({_reason(error)}): repair or remove "
                                     "it, or leave out --strict-data") from None
            self.unreadable[index] = 1
            if name and not self.quiet:
                self.name_unreadable(index, _reason(error))
            return None
        self._tell_scale(index, image)
        return image

    def _tell_scale(self, index: int, image: Image.Image) -> None:
        white = image.info.get(GREY_SCALE)
        if isinstance(white, int) and not self.scale_told[0]:       # a file's own text of this name is a str
            self.scale_told[0] = 1
            _tell("32-bit grey images are scaled by their values, so that the least of 1 (floating point), 255 and 65535 that "
                  f"holds an image's is white: {printable(self.images.name(index))} is the first (0 to {white})")

    def name_unreadable(self, index: int, reason: str) -> None:
        if not self.named[index]:
            self.named[index] = 1
            _tell(f"Skipping an unreadable image: {printable(self.images.name(index))} ({reason})")

    def shown(self, *indices: int) -> str:
        """Their names in a sentence."""
        return ", ".join(printable(self.images.name(index), 360 // len(indices)) for index in indices)

    def count_unreadable(self) -> int:
        # as numpy's bool: it is asked for at every step, and takes 0.1 ms for ImageNet's 1.3 million where PyTorch takes 0.5
        return int(np.count_nonzero(self.unreadable.numpy().view(bool)))

    def _load_or_replace(self, index: int, key: tuple[int, ...] | list[int], name: bool = True) -> tuple[int, Image.Image]:
        image = self._load(index, name)
        if image is not None:
            return index, image
        for other in np.random.default_rng([*key, index]).integers(len(self), size=TRIES).tolist():
            image = self._load(other, name=False)
            if image is not None:
                return other, image
        raise UnreadableData(f"{self.shown(index)} and {TRIES} other training images cannot be read: "
                             "check the folder behind --data-path")


# ---------------------------------------------------------------- data sets
def of_timm(data_set: str) -> bool:
    """Whether it is a name of timm.data.create_dataset's, read by `timm_datasets`."""
    return "/" in data_set


def guess_data_set(data_path: str | None) -> str | None:
    """The --data-set that the folder looks like, or None."""
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
    if class_folders(os.path.join(root, "train")) or class_folders(os.path.join(root, "val")) or _is_single(root):
        return "FOLDER"
    return None


def _is_single(root: str) -> bool:
    """Whether a folder has class folders with images, two at least, and no train/ and val/."""
    classes = class_folders(root)
    if len(classes) < 2 or any(os.path.exists(os.path.join(root, half)) for half in ("train", "val")):
        return False
    return has_images(root, classes)


def looks_like_imagenet(data_path: str | None) -> bool:
    """Whether the class folders have the names of ImageNet's or parts of it, such as n01440764: whose published figures are of
    images as they are, whatever their EXIF orientation."""
    root = os.path.expanduser(data_path or "")
    classes = next(filter(None, (class_folders(os.path.join(root, half)) for half in ("train", "val", ""))), [])
    return bool(data_path) and bool(classes) and all(re.fullmatch("n[0-9]{8}", name) for name in classes)


def needs_splitting(args: Namespace) -> bool:
    """Whether --data-path is a folder of class folders of which a part has to be held out."""
    return args.data_set == "FOLDER" and bool(args.data_path) and _is_single(os.path.expanduser(args.data_path))


def hold_out(names: Sequence[str], targets: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which images are for validation, bool [N]: of each class `share`, rounded, those whose hash of seed and name is
    smallest. So the order of the names does not matter, and an image more or less moves one other at most.

    A class with two images or more keeps one on either side (`share` 1: all are held out), one alone is trained on."""
    hashes = np.array([int.from_bytes(hashlib.blake2b(f"{seed}/".encode() + os.fsencode(name), digest_size=8).digest())
                       for name in names], dtype=np.uint64)
    chosen = np.zeros(len(names), dtype=bool)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        count = len(members) if share == 1 else min(max(round(share * len(members)), 1), len(members) - 1)
        chosen[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return chosen


def one_half(is_train: bool, args: Namespace, names: Sequence[str], targets: np.ndarray, classes: list[str]
             ) -> tuple[np.ndarray, str]:
    """Which images are in the half that --val-split and --seed make, bool [N], and a sentence about both halves."""
    held_out = hold_out(names, targets, args.val_split, args.seed)
    chosen = ~held_out if is_train else held_out
    if not chosen.any():
        raise UserError(f"--val-split {args.val_split:g} of {len(names)} images leaves none to "
                        f"{'train on' if is_train else 'evaluate'}: choose another share, or give more images")
    alone = [printable(classes[target], 40) for target in np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 1)]
    rest = f"; of a class with a single image none can be held out: {', '.join(alone[:5])}{', ...' if alone[5:] else ''}" \
        if alone and args.val_split < 1 else ""
    return chosen, (f"{len(classes)} classes, {int((~held_out).sum())} images to train on, {int(held_out.sum())} held out "
                    f"(--val-split {args.val_split:g}, --seed {args.seed}){rest}")


def build_dataset(is_train: bool, args: Namespace,
                  class_names: list[str] | None = None) -> tuple[ImageSet, int]:
    """The training or validation images and the number of classes.

    Args:
        args: the flags; `data_set` None takes what the folder looks like, else IMNET.
        class_names: the checkpoint's classes in its order. With `args.eval` the data's classes are
            mapped to them by name; in training they must be the data's own.

    Raises UserError for data that is missing, incomplete or contradicts the flags.
    """
    data_set = _data_set(args)
    if of_timm(data_set):
        from timm_datasets import build
        return build(is_train, args, data_set, class_names)
    if data_set == "DIGITS":
        split = _digits(is_train)
    elif data_set in CIFARS:
        split = _cifar(is_train, args, CIFARS[data_set])
    elif data_set in INAT_YEARS:
        split = _inat(is_train, args, INAT_YEARS[data_set])
    else:
        split = _folders(is_train, args, data_set, class_names)
    if class_names:
        split = as_in_checkpoint(split, args, class_names)
    return ImageSet(split, is_train, args), len(split.classes)


def _data_set(args: Namespace) -> str:
    data_set = args.data_set or guess_data_set(args.data_path) or "IMNET"
    if args.download and data_set not in CIFARS and not data_set.startswith("torch/"):
        raise UserError(f"--download cannot fetch --data-set {data_set}, only {', '.join(CIFARS)} and torch/NAME: "
                        "fetch it yourself and name its folder with --data-path")
    return data_set


def evaluated(args: Namespace) -> dict[str, str]:
    """Which images an evaluation with these flags is of: "data_set", and "split", which is "" where the data set chooses."""
    data_set = _data_set(args)
    if args.data_split:
        split = args.data_split[1].partition("|")[0]        # a stream's number of images follows
    elif args.val_split:
        split = f"{args.val_split:g} held out by seed {args.seed}"
    else:
        split = "" if of_timm(data_set) else "test" if data_set in CIFARS else "validation"
    return {"data_set": data_set, "split": split}


def as_in_checkpoint(split: Split, args: Namespace, class_names: list[str]) -> Split:
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


def _digits(is_train: bool) -> Split:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 with values 0 .. 16, enlarged once to 32 x 32.
    360 of them (20%, the same share of every digit, whatever --seed) are for validation."""
    pixels, targets = _digits_file()
    chosen = _digits_of(is_train, targets)
    small = (pixels[chosen] * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in small]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in large])
    return Split(ArrayImages(pixels), targets[chosen], [str(i) for i in range(10)])


def _digits_file() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, float64 [1797, 8, 8], and their classes, int64 [1797]; read from its file where it is,
    since to import scikit-learn takes longer than all else that happens before the first step but PyTorch."""
    found = find_spec("sklearn")
    file = found and os.path.join(os.path.dirname(found.origin or ""), "datasets", "data", "digits.csv.gz")
    if file and os.path.isfile(file):
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def _digits_of(is_train: bool, targets: np.ndarray, held_out: int = 360) -> np.ndarray:
    """Indices of one half, ascending: those of scikit-learn's train_test_split(test_size=held_out, stratify=targets,
    random_state=0), drawn in its order."""
    random = np.random.RandomState(0)

    def shares(counts: np.ndarray, draws: int) -> np.ndarray:
        exact = counts / counts.sum() * draws
        floor = np.floor(exact).astype(int)
        remainder = exact - floor
        for rest in np.sort(np.unique(remainder))[::-1]:
            tied = np.flatnonzero(remainder == rest)
            missing = draws - floor.sum()
            if missing <= 0:
                break
            floor[random.choice(tied, min(len(tied), missing), replace=False)] += 1
        return floor

    counts = np.bincount(targets)
    train = shares(counts, len(targets) - held_out)
    val = shares(counts - train, held_out)
    chosen = []
    for label, (first, second) in enumerate(zip(train, val)):
        drawn = np.flatnonzero(targets == label)[random.permutation(counts[label])]
        chosen.append(drawn[:first] if is_train else drawn[first:first + second])
    return np.sort(np.concatenate(chosen))


def _cifar(is_train: bool, args: Namespace, cifar: type[CIFAR10]) -> Split:
    root = data_root(args)
    try:
        # Checks the MD5 of every file before it unpickles one, so a foreign pickle never runs.
        data = cifar(root, train=is_train, download=args.download)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        if args.download:
            raise UserError(f"--download could not fetch {cifar.url} to {root} ({error}): "
                            "check the connection and the folder") from error
        raise UserError(f"--data-path {args.data_path} holds no intact {cifar.base_folder}: name the folder "
                        "that contains it, or add --download to fetch it") from error
    return Split(ArrayImages(data.data), np.array(data.targets, dtype=np.int64), list(data.classes))


def _inat(is_train: bool, args: Namespace, year: int) -> Split:
    """iNaturalist as DeiT reads it: classes numbered in the order in which the training annotations
    name them, files at <folder>/<category id>/<name> or where the JSON says."""
    root = data_root(args)
    half = f"{'train' if is_train else 'val'}{year}.json"
    content = {}
    for name in {"categories.json", f"train{year}.json", half}:
        try:
            with open(os.path.join(root, name), encoding="utf-8") as file:
                content[name] = json.load(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{name} under --data-path {args.data_path} cannot be read ({error}): "
                            "iNaturalist needs categories.json, train and val JSON files") from error
    try:
        label = {i: category[args.inat_category] for i, category in enumerate(content["categories.json"])}
        notes = content[f"train{year}.json"]["annotations"]
        named = dict.fromkeys(label[int(note["category_id"])] for note in notes)
        place = {name: index for index, name in enumerate(named)}
        parts = [image["file_name"].split("/") for image in content[half]["images"]]
        targets = [place[label[int(category)]] for _, _, category, _ in parts]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{half}, train{year}.json and categories.json under --data-path {args.data_path} "
                        f"do not fit together ({error!r}): check them and --inat-category "
                        f"{args.inat_category}") from error
    if not parts:
        raise UserError(f"{half} under --data-path {args.data_path} lists no image: check the file")
    paths = [os.path.join(root, top, category, name) for top, _, category, name in parts]
    if not os.path.lexists(paths[0]):
        paths = [os.path.join(root, *part) for part in parts]
    return Split(FileImages(paths), np.array(targets, dtype=np.int64), list(place))


def _folders(is_train: bool, args: Namespace, data_set: str, class_names: list[str] | None) -> Split:
    """train/<class>/... and val/<class>/..., any depth below the class; Tiny ImageNet's val/images too."""
    root = data_root(args)
    train, val = os.path.join(root, "train"), os.path.join(root, "val")
    if data_set == "FOLDER" and (args.eval or args.val_split) and _is_single(root):
        return _single_folder(is_train, args, root)
    for half in ["val"] if args.eval else ["train", "val"]:
        if not os.path.isdir(os.path.join(root, half)):
            raise UserError(f"--data-path {args.data_path} {_why_no_half(root, half)}")
    annotations = os.path.join(val, "val_annotations.txt")
    pictures = os.path.join(val, "images")
    flat_val = (data_set == "TinyIMNET" and os.path.isfile(annotations)
                and os.path.isdir(pictures) and bool(os.listdir(pictures)))
    flat = _tiny_annotations(annotations) if flat_val else {}

    by_name = args.eval and class_names is not None  # then the checkpoint says what the classes are
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
            raise UserError(f"val/ under --data-path {args.data_path} has the class {name!r} that train/ "
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


# What the two halves are called elsewhere. A folder of these is no folder of classes.
_HALVES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "test", "testing")}
_PARTS = {name for names in _HALVES.values() for name in names}


def _no_classes(root: str, half: str) -> str:
    """Why a half without images in class folders is as it is, and what helps, or ''."""
    count = len(images_in(os.path.join(root, half)))
    return f"images lie directly in it ({count}), put each into the folder of its class, {half}/CLASS/" if count else ""


def _why_no_half(root: str, half: str) -> str:
    """How a folder that should have train/ and val/ is, and what helps."""
    folders = class_folders(root)
    flat = len(images_in(root))
    if other := next((name for name in folders if name.lower() in _HALVES[half]), None):
        return f"has no {half}/ folder but {other}/: rename it to {half}/"
    if half == "val" and "train" in folders:
        return ("has no val/ folder: make one with a folder per class, or give its train/ as the --data-path, and a part of "
                "that is held out (--val-split)")
    if "train" in folders or "val" in folders:
        return f"has no {half}/ folder: it needs train/ and val/ with one folder per class (--eval needs val/ only)"
    if flat and not has_images(root, folders):
        return (f"has images directly in it ({flat}) and none in class folders: put each into a folder that has the name of its "
                "class, for two classes or more")
    if len(folders) == 1 and guess_data_set(inside := os.path.join(root, folders[0])):
        return f"is not the folder of the data set, which is in it: give --data-path {inside}"
    if len(folders) == 1 and has_images(root, folders):
        return (f"has a single class folder ({printable(folders[0], 60)}): to tell classes apart it takes two or more, one "
                "folder for each")
    if folders and not has_images(root, folders):
        return (f"has no {half}/ folder, and the folders that it has hold no image of a format that is read: it needs train/ and "
                "val/ with one folder per class, or class folders alone")
    return (f"has no {half}/ folder: it needs train/ and val/ with one folder per class (--eval needs val/ only), or --data-set "
            "FOLDER for class folders alone")


def _single_folder(is_train: bool, args: Namespace, root: str) -> Split:
    """<class>/..., any depth below the class: one half of it by --val-split. Without that all of it, to evaluate."""
    classes = class_folders(root)
    if parts := [name for name in classes if name.lower() in _PARTS]:
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
        chosen, note = one_half(is_train, args, names, targets, classes)
    return Split(FileImages([path for (path, _), mine in zip(samples, chosen) if mine]), targets[chosen], classes,
                 f"--data-path {args.data_path}: {note}")


def _tiny_annotations(path: str) -> dict[str, str]:
    """Tiny ImageNet's val_annotations.txt: image name -> class; the columns after these are boxes."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        rows = [line.split("\t") for line in file if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{path} has a line without an image name and a class: fetch the file again")
    return {row[0]: row[1].strip() for row in rows}


# ---------------------------------------------------------------- loaders
@dataclass
class Loaders:
    """What a run reads its images from. `train` and `train_sampler` are None with --eval.

    train yields (images float32 [B, 3, S, S], targets int64 [B]), the last incomplete batch dropped;
    val the same, every image once (over all ranks with --dist-eval), target -1 for an unreadable one.
    """
    train: Any              # DataLoader of an ImageSet
    val: Any                # likewise
    train_sampler: Any      # RASampler
    data_set: str
    nb_classes: int
    class_names: list[str]
    max_unreadable: float = 0.01
    device: torch.device = torch.device("cpu")

    def unreadable_train(self) -> int:
        """Training images that any process could not read so far. All processes ask at the same time; what has not been
        named yet is named."""
        if self.train is None:
            return 0
        self._share_marks()
        return self.train.dataset.count_unreadable()

    def unreadable_val(self) -> int:
        """Validation images that this process could not read so far."""
        return self.val.dataset.count_unreadable()

    def _share_marks(self) -> None:
        """From now on each process knows what the others could not read and have named."""
        data = [loader.dataset for loader in (self.train, self.val) if loader is not None]      # an empty shard is false
        marks = torch.cat([one.marks for one in data], 1).to(self.device)
        if dist.is_initialized():
            dist.all_reduce(marks, dist.ReduceOp.MAX)
        for one, (unreadable, named) in zip(data, marks.cpu().bool().split([len(one) for one in data], 1)):
            one.unreadable[unreadable] = 1      # no zeros are written: a worker may be at it
            one.named[named] = 1
            for index in (unreadable & ~named).nonzero().flatten().tolist() if one.is_train else []:
                if not dist.is_initialized() or dist.get_rank() == 0:
                    one.name_unreadable(index, "drawn in place of another one")
                one.named[index] = 1

    def unreadable_state(self) -> list[int]:
        """Indices of the training images that any process could not read so far, for a checkpoint. All processes ask at
        the same time."""
        self._share_marks()
        return self.train.dataset.unreadable.nonzero().flatten().tolist()

    def load_unreadable_state(self, indices: list[int]) -> None:
        """Count those images from the beginning and don't name them again. They are tried once more: the files may have
        been repaired, or be others under the same numbers."""
        data = self.train.dataset
        if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
            raise UserError("the checkpoint's list of unreadable images is none: take another checkpoint")
        for index in indices:
            if 0 <= index < len(data) and data._load(index, name=False) is None:
                data.named[index] = 1

    def check_unreadable(self, together: bool = False) -> None:
        """Raises UserError where this process knows of more unreadable training or validation images than --max-unreadable
        allows. FEW_UNREADABLE are too many only where the limit is 0.

        together: all processes ask at the same time, and each knows what any of them could not read."""
        if together:
            self._share_marks()
        for half, loader in (("training", self.train), ("validation", self.val)):
            if loader is None:
                continue
            data, limit = loader.dataset, self.max_unreadable
            count = data.count_unreadable()
            if count / len(data) > limit and (count > FEW_UNREADABLE or not limit):
                some = data.unreadable.nonzero().flatten()[:3].tolist()
                raise UserError(f"{count} of the {len(data)} {half} images ({100 * count / len(data):.2g}%) cannot be read, more "
                                f"than --max-unreadable {limit:g} allows: repair or remove them, or raise the limit "
                                f"({data.shown(*some)}{', ...' if count > 3 else ''})")


# ---------------------------------------------------------------- loader processes
def batches(loader: DataLoader) -> Iterator:
    """The loader's batches. Raises UserError where a loader process has died, or where the machine is out of memory, shared
    memory, open files or processes."""
    workers = _workers(getattr(loader, "_iterator", None))      # of the epoch before
    try:
        _check(workers)
        iterator = iter(loader) if workers else _start(loader)
        workers = _workers(iterator)
        while True:
            _check(workers)     # at once: PyTorch looks when it has waited for five seconds
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch
    except UserError:
        raise
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        _check(workers, error)
        if sentence := _about_machine(error):
            raise UserError(sentence) from error
        if workers:     # one may be about to die, its connection being the first to go
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join(1)
            _check(workers, error)
        raise


def _workers(iterator: Iterator | None) -> list[BaseProcess]:
    return getattr(iterator, "_workers", [])


def _start(loader: DataLoader) -> Iterator:
    """iter(loader). While its workers are started, the signals that `_start_worker` ignores are blocked, so that a worker is
    born deaf to them. PyTorch's handler of SIGCHLD would raise an error wherever the training is at that moment, between
    two updates or while a file is written; the one from before is put back, and the error comes out of `batches`."""
    if getattr(loader, "worker_init_fn", None) is not _start_worker or not loader.num_workers or os.name != "posix":
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _start_worker(number: int) -> None:
    """The first thing that a loader process does. Launchers signal all processes of a run, but only the training process
    decides when to stop, and the step that it is in still needs its batch."""
    for stopping in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(stopping, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):      # else SIGTERM keeps PyTorch's handler, which ends the process
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, name="SIGTERM", daemon=True).start()


def _obey_parent() -> None:
    """SIGTERM from the training process ends this one: Python sends it where a program ends without closing its loaders, and
    waits. From anybody else it is ignored."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _check(workers: list[BaseProcess], error: Exception | None = None) -> None:
    """Raises UserError from `error` if one of these processes has ended."""
    for worker in workers:
        code = worker.exitcode
        if code is None:
            continue
        if code == -signal.SIGKILL:
            text = ("was killed, as a system does whose memory is full: lower --num_workers or --batch-size, or give the "
                    "run more memory")
        elif code == -getattr(signal, "SIGBUS", 0):
            text = f"found no room in the shared memory: {MORE_SHARED_MEMORY}"
        else:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
            text = f"has ended unexpectedly ({how}): --num_workers 0 loads in the training process and shows where"
        raise UserError(f"loader process {worker.pid} {text}") from error


MORE_SHARED_MEMORY = "enlarge /dev/shm (docker run --ipc=host or --shm-size=16g), or lower --num_workers or --batch-size"
# What PyTorch's and the system's errors say of the machine -> what helps.
_MACHINE = {
    r"Too many open files|0 items of ancdata":
        "there are too many open files for the loader processes: raise the limit (ulimit -n 65536), or lower --num_workers",
    r"(open|mmap|resize|allocate).*(shared memory|/torch_)|shared memory limit|No space left on device":
        f"the shared memory has no room for the loader processes: {MORE_SHARED_MEMORY}",
    r"Pin memory thread exited":
        "the thread that receives the loader processes' batches has died, most often of too many open files: raise the limit "
        "(ulimit -n 65536), lower --num_workers, or add --no-pin-mem",
    r"Resource temporarily unavailable":
        "no more loader processes can be started: lower --num_workers, or raise the limit (ulimit -u)",
    r"MemoryError|[Cc]an(no|')t allocate memory":
        "there is not enough memory to load the images: lower --num_workers or --batch-size, or give the run more memory",
}


def _about_machine(error: Exception) -> str | None:
    """What helps where the error is the machine's and not the program's, else None."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[-1]     # a worker's error comes with its whole traceback
    return next((sentence for pattern, sentence in _MACHINE.items() if re.search(pattern, text)), None)


def build_loaders(args: Namespace, process: Process, class_names: list[str] | None = None) -> Loaders:
    """Training and validation loaders of this process; see `build_dataset` for class_names.

    Raises UserError, besides the data sets' own, for flags that contradict each other or the data.
    """
    if args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers} is negative: use 0 to load in the main process")
    if args.num_workers > (most := max(LEAST_WORKERS, 4 * cores())):
        raise UserError(f"--num_workers {args.num_workers} is more than {most}, beyond which the {cores()} cores for each "
                        "training process here gain nothing: give fewer, or leave it out")
    if args.resplit and not args.repeated_aug:
        raise UserError("--resplit spares the first repeat of each image from random erasing: "
                        "remove it or --no-repeated-aug")
    data_set = _data_set(args)
    if args.download and dist.is_initialized():
        args = _download_once(args, process)
    options = {"num_workers": args.num_workers, "worker_init_fn": _start_worker, "persistent_workers": args.num_workers > 0,
               "pin_memory": args.pin_mem and process.device.type == "cuda"}

    train = sampler = None
    stream_note = ""
    if not args.eval:
        data, _ = build_dataset(True, args, class_names)
        stream_note = data.note if data.is_stream else ""
        repeats = 3 if args.repeated_aug and not data.is_stream else 1
        sampler = RASampler(data, process.world_size, process.rank, num_repeats=repeats, seed=args.seed)
        if len(sampler) < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size} exceeds the {len(sampler)} training samples "
                            f"that each of {process.world_size} processes draws per epoch: lower --batch-size")
        train = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True,
                           generator=torch.Generator(), **options)

    data, nb_classes = build_dataset(False, args, class_names)
    _check_unused(args, data_set, nb_classes, data.note)
    if data.note:
        say(data.note)
    if stream_note:
        say(stream_note, file=sys.stderr)
    if args.dist_eval:
        shard = range(process.rank, len(data), process.world_size)
    else:
        shard = range(len(data))
        data.quiet = process.rank > 0
    # Each loader has a generator of its own: iter() draws a number from it, else from the global one.
    val = DataLoader(data, max(1, int(1.5 * args.batch_size)), sampler=shard,
                     generator=torch.Generator(), **options)
    return Loaders(train, val, sampler, data_set, nb_classes, data.classes, args.max_unreadable, process.device)


def _check_unused(args: Namespace, data_set: str, nb_classes: int, note: str) -> None:
    """Raises UserError for flags that say something about other data than these."""
    if args.num_classes not in (None, nb_classes):
        raise UserError(f"--num-classes {args.num_classes} contradicts the data, which has {nb_classes} classes: leave it out")
    if args.val_split and not args.eval and "--val-split" not in note:
        raise UserError(f"--val-split {args.val_split:g}: --data-set {data_set} has validation images of its own: leave it out")
    for flag in ("data_split", "input_key", "target_key"):
        if getattr(args, flag) is not None and not of_timm(data_set):
            raise UserError(f"--{flag.replace('_', '-')} is for the data sets of timm's (torch/, hfds/, hfids/, wds/), not for "
                            f"--data-set {data_set}: leave it out")


def _download_once(args: Namespace, process: Process) -> Namespace:
    """One process per machine downloads while the others wait; returns flags without the wish."""
    try:
        if process.local_rank == 0:
            build_dataset(False, args)
    finally:
        dist.barrier()
    return Namespace(**{**vars(args), "download": False})
