"""Loaders whose images are augmented on the device: those of loader processes, and small data sets that are kept there."""
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import resize

from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.common.text import say, shown_size
from vision_kan.data.device_augment import Augmentation, uniforms
from vision_kan.data.device_policy import Policy
from vision_kan.data.images import ImageSet
from vision_kan.data.loaders import Loaders
from vision_kan.data.transforms import aa_policy, build_policy, is_small
from vision_kan.data.workers import batches

MAX_MEMORY_SHARE = 0.25     # of the device's memory, for the images
CHUNK_BYTES = 48 * 2 ** 20  # of augmented images made at once: a single small batch costs more to launch than to compute
POLICY = 2 ** 16            # first column of an image's random numbers for --aa


class NotOnDevice(Exception):
    """These images, or their augmentation, cannot be on the device. The message is a clause that says why."""


def move_to_device(loaders: Loaders, args: Namespace, process: Process) -> Loaders:
    """`loaders` with the images on the device, as --data-on-device asks. `auto` does so on a CUDA GPU wherever it can.

    Raises UserError where the flag is `on` and it cannot."""
    loaders = _keep_on_device(loaders, args, process)
    if isinstance(loaders.train, AugmentingLoader):
        say(f"training images are cropped by loader processes and augmented on {process.device}")
    return loaders


def _keep_on_device(loaders: Loaders, args: Namespace, process: Process) -> Loaders:
    if args.eval or args.data_on_device == "off" or (args.data_on_device == "auto" and process.device.type != "cuda"):
        return loaders
    try:
        if loaders.train.dataset.is_stream:
            raise NotOnDevice(f"--data-set {loaders.data_set} is a stream")
        loaders.train = TrainLoader(loaders.train.dataset, loaders.train_sampler, args, process)
    except NotOnDevice as error:
        if args.data_on_device == "on":
            raise UserError(f"--data-on-device on: {error}; change that, or leave the flag out") from None
        say(f"images come from loader processes: {error}")
        return loaders
    where = "training and validation images"
    try:
        loaders.val = EvalLoader(loaders.val.dataset, loaders.val.sampler, args, process)
    except NotOnDevice:
        where = "training images"
    say(f"{where} are on {process.device}, and augmented there")
    return loaders


def build_augmentation(args: Namespace) -> Augmentation:
    """The flags' augmentation except the policy, for which see `build_policy`. Raises NotOnDevice if that is left to PIL."""
    policy = aa_policy(args)
    if policy not in ("", "3a") and args.augment_on == "loader":
        raise NotOnDevice(f"--aa {policy} is computed by PIL with --augment-on loader: --augment-on device, --aa none and "
                          "--aa 3a can be on the device")
    return Augmentation(
        size=max(to_2tuple(args.input_size)), padded=args.src or is_small(args.input_size), padding=args.crop_padding,
        padding_mode="reflect" if args.src else "constant",
        kinds=("bilinear", "bicubic") if args.train_interpolation == "random" else (args.train_interpolation,),
        flip=args.hflip, three=policy == "3a",
        jitter=args.color_jitter if not policy or "3a" in policy else 0.0,      # as in timm
        erase=args.reprob, erase_mode=args.remode,
        erase_count=args.recount, spare_first=args.resplit)


def load_pixels(data: ImageSet, fit: Callable[[Image.Image], Image.Image], device: torch.device, name: bool) -> Tensor:
    """All images as uint8 [N, 3, H, W] on the device. An unreadable one is zeros, marked in `data`, and reported if `name`.

    fit: applied to each image. Raises NotOnDevice for images of different sizes, or more than fit into memory."""
    def load(index: int) -> np.ndarray | None:
        image = data._load(index, name)
        return None if image is None else np.asarray(fit(image))

    def shown(image: np.ndarray) -> str:
        return f"{image.shape[1]} x {image.shape[0]}"

    first = next((image for image in map(load, range(len(data))) if image is not None), None)
    if first is None:
        raise NotOnDevice("none of the images can be read")
    size, limit = len(data) * first.nbytes, MAX_MEMORY_SHARE * _memory(device)
    if size > limit:
        raise NotOnDevice(f"{len(data):,} images of {shown(first)} pixels take {size / 2 ** 30:,.1f} GiB, more than the "
                          f"{limit / 2 ** 30:,.1f} that are a quarter of the memory of {device}")
    pixels = np.zeros((len(data), *first.shape), np.uint8)

    def keep(index: int) -> None:
        image = load(index)
        if image is not None and image.shape != first.shape:
            raise NotOnDevice(f"all images must have one size, and {data.shown(index)} has {shown(image)} pixels where others "
                              f"have {shown(first)}")
        if image is not None:
            pixels[index] = image

    # PIL releases Python's lock while it decodes. The filters of warnings, which each thread changes, are put back at the end.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        try:
            for _ in pool.map(keep, range(len(data))):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous()


def _memory(device: torch.device) -> int:
    """Total bytes of the device. The total, not what is free, so that a machine always decides the same."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2 ** 30


class _Normalise:
    """(pixel / 255 - mean) / std, bit for bit `transforms.Normalise`. The divisors are tensors: for a Python number, a GPU
    would multiply by the reciprocal."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.white = torch.tensor(255.0, device=device)
        self.mean, self.std = (torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1) for value in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        return x.float().div(self.white).sub_(self.mean).div_(self.std)


class DeviceAugmentation:
    """Augments batches of training images on the device, by draws from (seed, epoch, position), and normalises them.

    crop: whether it also crops and flips them."""

    def __init__(self, args: Namespace, sampler: Any, device: torch.device, crop: bool):
        self.augment, self.sampler, self.crop = build_augmentation(args), sampler, crop
        policy = build_policy(args)
        self.policy = Policy(policy, device) if policy else None
        self.normalise = _Normalise(args.mean, args.std, device)

    def __call__(self, images: Tensor, positions: np.ndarray, drawn: Tensor) -> Tensor:
        """float32 [B, 3, H, W] from uint8 [B, 3, H', W'], which may be changed.

        positions: int64 [B], in the epoch's order. drawn: these and the repeats, int64 [2, B] on the device."""
        seed, epoch = self.sampler.seed, self.sampler.epoch
        u = uniforms(seed, epoch, drawn[0], self.augment.num_uniforms)
        x = self.augment.cropped(images, u) if self.crop else images
        if self.policy:
            own = uniforms(seed, epoch, torch.from_numpy(positions), self.policy.num_uniforms, POLICY).double().numpy()
            x = self.policy(x.byte(), self.policy.draw(own, x.shape[3], x.shape[2]))
        x = self.normalise(self.augment.coloured(x.float(), u))
        return self.augment.random_erase(x, u, drawn[1])


class AugmentingLoader:
    """Batches (float32 [B, 3, H, W], int64 [B]) of a DataLoader whose uint8 images [B, 3, H, W] are cropped; the device does the
    rest of their augmentation. It replaces that DataLoader.

    data: the same images with all of their augmentation."""

    def __init__(self, loader: DataLoader, data: ImageSet, args: Namespace, process: Process):
        self.loader, self.dataset, self.device = loader, data, process.device
        self.sampler: Any = loader.sampler
        self.batch_size = args.batch_size
        self.augment = DeviceAugmentation(args, self.sampler, self.device, crop=False)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        _, positions, repeats = self.sampler.order()
        drawn = torch.from_numpy(np.stack([positions, repeats])).to(self.device)
        for first, (images, targets) in zip(range(0, len(positions), self.batch_size), batches(self.loader)):
            these = slice(first, first + self.batch_size)
            yield self.augment(images.to(self.device, non_blocking=True), positions[these], drawn[:, these]), targets


class TrainLoader:
    """Replaces the DataLoader of a training: augmented batches (float32 [B, 3, S, S], int64 [B]) on the device, in the
    sampler's order. The last incomplete batch is dropped."""

    def __init__(self, data: ImageSet, sampler: Any, args: Namespace, process: Process):
        if not isinstance(args.input_size, int):
            raise NotOnDevice(f"images of --input-size {shown_size(args.input_size)} are cropped by PIL only: square ones can be "
                              "on the device")
        self.dataset, self.sampler, self.batch_size = data, sampler, args.batch_size
        device = process.device
        self.augment = DeviceAugmentation(args, sampler, device, crop=True)
        self.pixels = load_pixels(data, self._fit, device, name=process.is_main)
        self.targets = torch.from_numpy(data.targets).to(device)
        self.sources = _with_replacements(data)
        image_bytes = 4 * 3 * args.input_size ** 2
        self.chunk = max(1, CHUNK_BYTES // (image_bytes * args.batch_size))     # batches made at once

    def _fit(self, image: Image.Image) -> Image.Image:
        """The image resized to the input's size by its shorter side, if a random crop of the padded image follows."""
        augment = self.augment.augment
        if not augment.padded or min(image.size) == augment.size:
            return image
        if len(augment.kinds) > 1:
            raise NotOnDevice("the images are resized once, and --train-interpolation random resizes each time")
        return resize(image, augment.size, str_to_interp_mode(augment.kinds[0]))

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, size = self.pixels.device, self.batch_size
        indices, positions, repeats = self.sampler.order()
        order = torch.from_numpy(np.stack([self.sources[indices], positions, repeats])).to(device)
        count = order.shape[1] // size
        for first in range(0, count, self.chunk):
            # Every chunk has the same size, so that a GPU runs the same kernels, with the same bits, wherever a run was resumed.
            place = np.arange(first * size, (first + self.chunk) * size).clip(max=order.shape[1] - 1)
            index, *drawn = order[:, torch.from_numpy(place).to(device)]
            x, targets = self.augment(self.pixels[index], positions[place], torch.stack(drawn)), self.targets[index]
            for batch in range(min(self.chunk, count - first)):
                yield x[batch * size:(batch + 1) * size], targets[batch * size:(batch + 1) * size]


class EvalLoader:
    """Batches (float32 [B, 3, S, S] on the device, int64 [B] on the host) of a shard. An unreadable image has target -1."""

    def __init__(self, data: ImageSet, shard: range, args: Namespace, process: Process):
        self.dataset, self.shard, self.batch_size = data, shard, max(1, int(1.5 * args.batch_size))
        self.pixels = load_pixels(data, self._fit, process.device, name=not data.quiet)
        self.targets = torch.from_numpy(np.where(data.unreadable.numpy(), -1, data.targets))
        self.normalise = _Normalise(args.mean, args.std, process.device)

    def _fit(self, image: Image.Image) -> Image.Image:
        size = self.dataset.input_size
        if not is_small(size) or image.size != (size, size):
            raise NotOnDevice("images that are resized for an evaluation come from the loader, as in published figures")
        return image

    def __len__(self) -> int:
        return -(-len(self.shard) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.shard), self.batch_size):
            chosen = torch.tensor(self.shard[first:first + self.batch_size])
            yield self.normalise(self.pixels[chosen.to(self.pixels.device)]), self.targets[chosen]


def _with_replacements(data: ImageSet) -> np.ndarray:
    """int64 [N]: each image's own index, or that of a readable one drawn in its place."""
    sources, readable = np.arange(len(data)), np.flatnonzero(data.unreadable.numpy() == 0)
    for index in np.flatnonzero(data.unreadable.numpy()):
        sources[index] = readable[np.random.default_rng([index]).integers(len(readable))]
    return sources
