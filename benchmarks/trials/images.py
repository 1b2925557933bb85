"""CIFAR-10's images in memory, augmented and normalised by main.py's code for images on the device."""
import hashlib
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader

from models_kan import TAGS
from samplers import RASampler
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.files import atomic_write
from vision_kan.data.device import CHUNK_BYTES, DeviceAugmentation, EvalLoader, TrainLoader, _Normalise

MEAN, STD = TAGS["cifar10"].mean, TAGS["cifar10"].std
KEYS = ("train", "train_y", "val", "val_y")


class Images(dict[str, Tensor]):
    """"train": uint8 [N, 3, 32, 32], "train_y": int64 [N], "val", "val_y"; and the names of the classes."""

    def __init__(self, tensors: Mapping[str, Tensor], classes: Sequence[str]):
        super().__init__(tensors)
        self.classes = list(classes)


def load_images(folder: Path, cache: Path) -> Images:
    """The images of train/CLASS and val/CLASS, decoded once as long as no file changes. Raises UserError."""
    file = cache / f"images-{hashlib.sha256(bytes(folder.resolve())).hexdigest()[:8]}.npz"
    try:
        state = _state_of(folder)
    except OSError as error:        # a link to a file that is gone
        raise UserError(f"--data {folder}: {one_line(error, 300)}: repair or remove it") from error
    arrays = _cached(file)
    if arrays.get("state") != state:
        arrays = {"state": np.array(state)}
        for split in ("train", "val"):
            if not (folder / split).is_dir():
                raise UserError(f"--data {folder} has no folder {split}: name the folder with train/CLASS and val/CLASS")
            try:
                data = ImageFolder(str(folder / split))
            except FileNotFoundError as error:      # a class without images, or no class at all
                raise UserError(f"--data {folder}: {split}: {one_line(error)}: every class needs a folder with images") from error
            with ThreadPoolExecutor() as pool:      # PIL releases Python's lock while it decodes
                images = list(pool.map(_decoded, (path for path, _ in data.samples)))
            arrays[split] = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
            arrays[f"{split}_y"] = np.asarray(data.targets)
            if data.classes != arrays.setdefault("classes", np.array(data.classes)).tolist():
                raise UserError(f"--data {folder}: train and val have different folders of classes")
        with atomic_write(file) as temporary:
            np.savez(temporary, **arrays)
    return Images({key: torch.from_numpy(arrays[key]) for key in KEYS}, arrays["classes"].tolist())


def _state_of(folder: Path) -> str:
    """A hash of the names, sizes and times of the files in train and val."""
    found = []
    for split in ("train", "val"):
        for place, _, names in os.walk(folder / split, followlinks=True):      # as ImageFolder does
            within = os.path.relpath(place, folder)
            for name in names:
                about = os.stat(os.path.join(place, name))
                found.append((within, name, about.st_size, about.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _cached(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a cache; none if there is no such file, or it is damaged."""
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except Exception:       # damage can raise nearly anything; the cache is made anew
        return {}


def _decoded(path: str) -> np.ndarray:
    try:
        image = np.asarray(pil_loader(path))
    except Exception as error:      # PIL raises nearly anything for a damaged file
        raise UserError(f"--data: the image {path} cannot be read ({one_line(error)}): repair or remove it") from error
    if image.shape != (32, 32, 3):
        raise UserError(f"--data: the image {path} has {image.shape[1]} x {image.shape[0]} pixels: these trials need 32 x 32")
    return image


def subset(images: Images, classes: range) -> Images:
    out = {}
    for split in ("train", "val"):
        keep = (images[f"{split}_y"] >= classes.start) & (images[f"{split}_y"] < classes.stop)
        out[split], out[f"{split}_y"] = images[split][keep], images[f"{split}_y"][keep] - classes.start
    return Images(out, images.classes[classes.start:classes.stop])


def normalise(images: Tensor) -> Tensor:
    """float32 [N, 3, 32, 32] of uint8."""
    return _Normalise(MEAN, STD, images.device)(images)


class Batches(TrainLoader):
    """A TrainLoader of tensors: an epoch's batches, each image mirrored at random and shifted by up to 4 pixels."""

    def __init__(self, images: Images, args: Namespace, seed: int, device: torch.device):
        self.pixels, self.targets = images["train"].to(device), images["train_y"].to(device)
        self.batch_size = args.batch_size
        self.sampler = RASampler(len(self.pixels), num_repeats=1, seed=seed)
        self.augment = DeviceAugmentation(args, self.sampler, device, crop=True)
        self.sources = np.arange(len(self.pixels))
        chunk = CHUNK_BYTES // (4 * self.pixels[0].numel() * self.batch_size)
        self.chunk = 1 if device.type == "cpu" else max(1, chunk)       # a CPU's caches hold one batch


class EvalBatches(EvalLoader):
    """An EvalLoader of tensors."""

    def __init__(self, images: Images, device: torch.device):
        self.pixels, self.targets = images["val"].to(device), images["val_y"]
        self.shard, self.normalise = range(len(self.pixels)), _Normalise(MEAN, STD, device)
        self.batch_size = 500 if device.type == "cpu" else 2500      # on a GPU launches take longer than small batches
