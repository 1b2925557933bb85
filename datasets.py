"""Data sets by name, and the loaders of a run, under DeiT's names."""
import sys
from argparse import Namespace
from importlib.metadata import version
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from samplers import RASampler
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process, cores
from vision_kan.common.text import say
from vision_kan.data.class_folders import open_class_folders
from vision_kan.data.device import AugmentingLoader
from vision_kan.data.hub import PACKAGES, numbered_classes, open_huggingface, open_torchvision, package_spec
from vision_kan.data.images import ImageSet, Split
from vision_kan.data.known import open_cifar, open_digits, open_inat
from vision_kan.data.loaders import Loaders, readable_images, validation_images
from vision_kan.data.names import CIFARS, INAT_YEARS, data_set_of, is_timm_name, match_checkpoint_classes
from vision_kan.data.streams import STREAM_NOTE, HuggingFaceStream, StreamImages, StreamSet, WebDataset
from vision_kan.data.transforms import build_crop
from vision_kan.data.workers import start_worker

MIN_WORKER_LIMIT = 32       # this many loader processes are allowed on any machine
STREAMED = ("hfids/", "wds/")


def build_dataset(is_train: bool, args: Namespace,
                  class_names: list[str] | None = None) -> tuple[ImageSet, int]:
    """The training or validation images and the number of classes.

    Args:
        args: the flags; `data_set` None takes what the folder looks like, else IMNET.
        class_names: the checkpoint's classes in its order. With `args.eval` the data's classes are
            mapped to them by name; in training they must be the data's own.

    Raises UserError for data that is missing, incomplete or contradicts the flags.
    """
    data_set = data_set_of(args)
    kind = ImageSet
    if data_set.startswith(STREAMED):
        kind, split = StreamSet, _open_stream(is_train, args, data_set, class_names)
    elif is_timm_name(data_set):
        split = _open_library(is_train, args, data_set)
    elif data_set == "DIGITS":
        split = open_digits(is_train)
    elif data_set in CIFARS:
        split = open_cifar(is_train, args, CIFARS[data_set])
    elif data_set in INAT_YEARS:
        split = open_inat(is_train, args, INAT_YEARS[data_set])
    else:
        split = open_class_folders(is_train, args, data_set, class_names)
    if class_names:
        split = match_checkpoint_classes(split, args, class_names)
    return kind(split, is_train, args), len(split.classes)


def build_loaders(args: Namespace, process: Process, class_names: list[str] | None = None) -> Loaders:
    """Training and validation loaders of this process; see `build_dataset` for class_names.

    Raises UserError, besides the data sets' own, for flags that contradict each other or the data.
    """
    if args.num_workers > (most := max(MIN_WORKER_LIMIT, 4 * cores())):
        raise UserError(f"--num_workers {args.num_workers} is more than {most}, beyond which the {cores()} cores for each "
                        "training process here gain nothing: give fewer, or leave it out")
    data_set = data_set_of(args)
    if args.download and dist.is_initialized():
        args = _download_once(args, process)
    options = {"num_workers": args.num_workers, "worker_init_fn": start_worker, "persistent_workers": args.num_workers > 0,
               "pin_memory": args.pin_mem and process.device.type == "cuda"}

    train: DataLoader | AugmentingLoader | None = None
    sampler = None
    stream_note = ""
    if not args.eval:
        data, _ = build_dataset(True, args, class_names)
        stream_note = data.note if data.is_stream else ""
        repeats = 3 if args.repeated_aug and not data.is_stream else 1
        sampler = RASampler(data, process.world_size, process.rank, num_repeats=repeats, seed=args.seed)
        if len(sampler) < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size} exceeds the {len(sampler)} training samples "
                            f"that each of {process.world_size} processes draws per epoch: lower --batch-size")
        on_device = args.augment_on == "device"
        train = DataLoader(data.with_crop(build_crop(args)) if on_device else data, args.batch_size, sampler=sampler,
                           drop_last=True, generator=torch.Generator(), **options)
        if on_device:
            train = AugmentingLoader(train, data, args, process)

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
    """Raises UserError for flags that do not apply to this data set."""
    if args.num_classes not in (None, nb_classes):
        raise UserError(f"--num-classes {args.num_classes} contradicts the data, which has {nb_classes} classes: leave it out")
    if args.val_split and not args.eval and "--val-split" not in note:
        raise UserError(f"--val-split {args.val_split:g}: --data-set {data_set} has validation images of its own: leave it out")
    for flag in ("data_split", "input_key", "target_key"):
        if getattr(args, flag) is not None and not is_timm_name(data_set):
            raise UserError(f"--{flag.replace('_', '-')} is for timm's data sets (torch/, hfds/, hfids/, wds/), not for "
                            f"--data-set {data_set}: leave it out")


def _download_once(args: Namespace, process: Process) -> Namespace:
    """One process per machine downloads while the others wait. Returns the flags without --download."""
    try:
        if process.local_rank == 0:
            for is_train in (False,) if args.eval else (True, False):       # a download may be of one half only
                build_dataset(is_train, args)
    finally:
        dist.barrier()
    return Namespace(**{**vars(args), "download": False})


def _check_package(data_set: str) -> None:
    """Raises UserError if the package that reads KIND/NAME is missing or too old."""
    package, least = PACKAGES.get(data_set.partition("/")[0], ("", 0))
    if package and (not package_spec(package) or int(version(package).split(".")[0]) < least):
        raise UserError(f"--data-set {data_set} needs the package {package}{f' {least} or newer' if least else ''}: "
                        f"pip install '{package}{f'>={least}' if least else ''}'")


def _open_library(is_train: bool, args: Namespace, data_set: str) -> Split:
    """torch/NAME or hfds/NAME. Raises UserError for its library's errors."""
    _check_package(data_set)
    kind, _, name = data_set.partition("/")
    split = (open_torchvision if kind == "torch" else open_huggingface)(is_train, args, name)
    if not len(split.images):
        raise UserError(f"--data-set {data_set} has no images to {'train on' if is_train else 'evaluate'}: check --data-split")
    return split


def _open_stream(is_train: bool, args: Namespace, data_set: str, class_names: list[str] | None) -> Split:
    """hfids/NAME or wds/NAME. class_names: used if the stream has none of its own."""
    _check_package(data_set)
    if args.resplit:
        raise UserError(f"--resplit spares the first repeat of each image, and --data-set {data_set} has no repeats: leave it "
                        "out")
    stream = (WebDataset if data_set.startswith("wds/") else HuggingFaceStream)(args, is_train)
    if not stream.length:
        raise UserError(f"--data-set {data_set} does not declare its number of images: give --data-split 'TRAIN|NUMBER' "
                        "'VAL|NUMBER'")
    names = class_names if class_names and args.num_classes in (None, len(class_names)) else None
    classes = stream.classes or names or numbered_classes(args)
    note = f"warning: --data-set {data_set} {STREAM_NOTE}" if is_train else ""
    return Split(StreamImages(stream, data_set), np.arange(len(classes)), classes, note)


def calibration_batch(loaders: Loaders, seed: int, size: int = 64) -> torch.Tensor:
    """[B, 3, H, W]: up to `size` training images (with --eval: validation images), the same on every process."""
    if not loaders.train:
        return validation_images(loaders, size)
    data: ImageSet = loaders.train.dataset
    return readable_images(data, list(islice(RASampler(data, num_repeats=1, seed=seed), size)))
