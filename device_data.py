"""Small images at the device's speed: the whole data set lives there as uint8, and batches are cut and augmented there.

The draws of an image are a hash of (seed, epoch, position in the epoch's order, slot), as integers that every device
computes alike: they depend neither on the batch, nor on the number of processes, nor on where a run was resumed. The
distributions are those of `augment.build_transform`, whose PIL operations are the reference; single pixels differ by
rounding. On a CPU it is the same code.

Legend for shapes: N images of the data set, B of a batch, H, W their size, S the input size, K random numbers an image.
"""
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import resize

from augment import is_small
from datasets import ImageSet, Loaders
from samplers import RASampler
from utils import Process, UserError, say, shown_size

# The share of the device's memory that images may take, and what a batch of augmented ones may take at a time: several batches
# are made at once, because a small one costs more to launch than to compute.
LARGEST_SHARE = 0.25
CHUNK_BYTES = 48 * 2 ** 20

# Random numbers of an image by what they are for; TRIES candidates of a box before the last resort, as in timm.
TRIES = 10
CROP, FLIP, THREE, JITTER, ERASE = 0, 24, 26, 30, 40
ERASE_EACH = 2 * TRIES + 6


# ---------------------------------------------------------------- random numbers
def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (int64 tensors) that flips about half of the bits for each one changed: lowbias32 of
    https://github.com/skeeto/hash-prospector, constants by TheIronBorn."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def uniforms(seed: int, epoch: int, positions: Tensor, count: int) -> Tensor:
    """float32 [B, count] in [0, 1), a hash of (seed, epoch, position, column). positions: int64 [B]."""
    first, second = (int(word) for word in np.random.SeedSequence([seed, epoch]).generate_state(2))
    rows = _mix(_mix(positions ^ first) ^ second)
    columns = _mix(torch.arange(1, count + 1, device=positions.device))
    return (_mix(rows[:, None] ^ columns) >> 8).float() * 2.0 ** -24


def _integer(u: Tensor, count: Tensor | int) -> Tensor:
    """A uniform whole number of 0 .. count - 1 from u in [0, 1)."""
    return (u * count).floor().long()


# ---------------------------------------------------------------- resampling
# PIL's filters: half a support and the function, both at scale 1 (Pillow, src/libImaging/Resample.c).
def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    return torch.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1,
                       torch.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)), 0.0)


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: (1 - x.abs()).clamp(min=0),
    "bicubic": _cubic,
    "box": lambda x: ((x > -0.5) & (x <= 0.5)).float(),
    "hamming": _hamming,
    "lanczos": _lanczos,
}


def resampling(kind: str, start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """[B, out, size]: the linear maps that cut `length` [B] of `size` pixels from `start` [B] on and resize them to `out`, as
    PIL does: pixels outside the cut are not seen, and a reduction averages."""
    start, length = start.double(), length.double()         # at an edge the last bit decides which pixel is seen
    ratio = (length / out)[:, None]
    centre = (torch.arange(out, device=start.device) + 0.5) * ratio                     # [B, out], in the cut
    pixel = torch.arange(size, device=start.device) - start[:, None]                    # [B, size], in the cut
    if kind == "nearest":
        return (pixel[:, None] == centre.floor()[..., None]).float()
    inside = (pixel >= 0) & (pixel < length[:, None])
    weights = FILTERS[kind]((pixel[:, None] - centre[..., None] + 0.5) * (1 / ratio.clamp(min=1))[..., None]) * inside[:, None]
    return (weights / weights.sum(-1, keepdim=True)).float()


# ---------------------------------------------------------------- augmentation
@dataclass(frozen=True)
class Augmentation:
    """What `augment.build_transform` does to a training image, as numbers."""
    size: int
    padded: bool                        # a random crop of the padded image; else a random resized crop
    padding: int
    padding_mode: str                   # "constant" or "reflect"
    kinds: tuple[str, ...]              # interpolations to choose from
    flip: float
    three: bool                         # 3-Augment: solarise, grey or blur
    jitter: float                       # brightness, contrast, saturation
    erase: float                        # probability
    erase_mode: str
    erase_count: int
    spare_first: bool                   # no erasing of an image's first repeat

    @property
    def draws(self) -> int:
        return ERASE + (ERASE_EACH * self.erase_count if self.erase else 0)

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], uniforms [B, K] -> float32 [B, 3, S, S] of 0 .. 255, before normalisation and erasing."""
        x = self._padded_crop(images, u) if self.padded else self._resized_crop(images, u)
        if self.three:
            x = _three(x, u[:, THREE:])
        if self.jitter:
            x = _jitter(x, u[:, JITTER:], self.jitter)
        return x

    def erased(self, x: Tensor, u: Tensor, repeat: Tensor) -> Tensor:
        """Random erasing of normalised images [B, 3, S, S], after timm's RandomErasing. repeat: int64 [B]."""
        if not self.erase:
            return x
        u, size = u[:, ERASE:], x.shape[-1]
        chosen = u[:, 0] < self.erase
        if self.spare_first:
            chosen &= repeat > 0
        count = _integer(u[:, 1], self.erase_count) + 1
        line = torch.arange(size, device=x.device)
        for nth in range(self.erase_count):
            v = u[:, 2 + ERASE_EACH * nth:]
            area = (0.02 + (1 / 3 - 0.02) * v[:, :TRIES]) * (size * size) / count[:, None]
            ratio = torch.exp(math.log(0.3) * (2 * v[:, TRIES:2 * TRIES] - 1))
            high, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
            fits = (high < size) & (wide < size)
            first = fits.byte().argmax(1, keepdim=True)
            height, width = high.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
            top, left = _integer(v[:, 2 * TRIES], size - height + 1), _integer(v[:, 2 * TRIES + 1], size - width + 1)
            rows = (line >= top[:, None]) & (line < (top + height)[:, None])
            columns = (line >= left[:, None]) & (line < (left + width)[:, None])
            these = chosen & fits.any(1) & (nth < count)
            there = these[:, None, None, None] & rows[:, None, :, None] & columns[:, None, None, :]
            x = torch.where(there, self._fill(x, v[:, 2 * TRIES + 2]), x)
        return x

    def _padded_crop(self, images: Tensor, u: Tensor) -> Tensor:
        (high, wide), size, pad = images.shape[2:], self.size, self.padding
        rows = _integer(u[:, CROP, None], high + 2 * pad - size + 1) + torch.arange(size, device=u.device) - pad
        columns = _integer(u[:, CROP + 1, None], wide + 2 * pad - size + 1) + torch.arange(size, device=u.device) - pad
        columns = torch.where(u[:, FLIP, None] < self.flip, columns.flip(1), columns)
        seen = ((rows >= 0) & (rows < high))[:, None, :, None] & ((columns >= 0) & (columns < wide))[:, None, None, :]
        if self.padding_mode == "reflect":
            rows, columns = (index.abs() - 2 * (index - length + 1).clamp(min=0)
                             for index, length in ((rows, high), (columns, wide)))
        each = torch.arange(len(images), device=u.device)[:, None, None, None]
        channel = torch.arange(3, device=u.device)[:, None, None]
        x = images[each, channel, rows.clamp(0, high - 1)[:, None, :, None], columns.clamp(0, wide - 1)[:, None, None, :]].float()
        return x if self.padding_mode == "reflect" else x * seen

    def _resized_crop(self, images: Tensor, u: Tensor) -> Tensor:
        high, wide = images.shape[2:]
        top, left, height, width = _crop_box(u[:, CROP:], high, wide)
        second = (u[:, FLIP + 1] < 0.5)[:, None, None]

        def maps(start: Tensor, length: Tensor, size: int) -> Tensor:
            first, *others = (resampling(kind, start, length, size, self.size) for kind in self.kinds)
            return torch.where(second, others[0], first) if others else first

        rows, columns = maps(top, height, high), maps(left, width, wide)
        columns = torch.where((u[:, FLIP] < self.flip)[:, None, None], columns.flip(1), columns)
        return _resampled(images.float(), rows, columns)

    def _fill(self, x: Tensor, u: Tensor) -> Tensor:
        if self.erase_mode == "const":
            return torch.zeros_like(x[:1])
        shape = x.shape[1:] if self.erase_mode == "pixel" else (x.shape[1], 1, 1)
        table = _normals(x.device)
        places = torch.arange(math.prod(shape), device=x.device) + _integer(u[:, None], len(table))
        return table[places % len(table)].view(-1, *shape)


_TABLES: dict[torch.device, Tensor] = {}


def _normals(device: torch.device, count: int = 2 ** 21) -> Tensor:
    """A table of normal numbers; an image takes a stretch of it from a drawn place on."""
    if device not in _TABLES:
        _TABLES[device] = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)
    return _TABLES[device]


def _resampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, 3, H, W] by the maps [B, S, H] and [B, S, W], as PIL: columns first, rounded to whole numbers after each."""
    for step in (lambda x: x @ columns.transpose(1, 2)[:, None], lambda x: rows[:, None] @ x):
        x = (step(x) + 0.5).floor().clamp(0, 255)
    return x


def _crop_box(u: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, left, height, width [B] of timm's RandomResizedCropAndInterpolation."""
    area = (0.08 + 0.92 * u[:, :TRIES]) * (high * wide)
    ratio = torch.exp(math.log(4 / 3) * (2 * u[:, TRIES:2 * TRIES] - 1))
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= wide) & (height <= high)
    first = fits.byte().argmax(1, keepdim=True)
    width, height = width.gather(1, first)[:, 0], height.gather(1, first)[:, 0]
    found = fits.any(1)
    whole_width, whole_height = min(wide, round(high * 4 / 3)), min(high, round(wide * 4 / 3))
    width, height = torch.where(found, width, float(whole_width)), torch.where(found, height, float(whole_height))
    top = torch.where(found, (u[:, 2 * TRIES] * (high - height + 1)).floor(), float((high - whole_height) // 2))
    left = torch.where(found, (u[:, 2 * TRIES + 1] * (wide - width + 1)).floor(), float((wide - whole_width) // 2))
    return top, left, height, width


def _grey(x: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, 1, S, S]: PIL's mode L."""
    return (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).round()


def _three(x: Tensor, u: Tensor) -> Tensor:
    """DeiT III's 3-Augment, one of the three for each image: inverted from 128 on, grey, or blurred (deviation 0.1 to 2)."""
    choice = _integer(u[:, 0], 3)[:, None, None, None]
    solarised = torch.where(x < 128, x, 255 - x)
    return torch.where(choice == 0, solarised, torch.where(choice == 1, _grey(x), _blurred(x, 0.1 + 1.9 * u[:, 1])))


def _blurred(x: Tensor, deviation: Tensor, reach: int = 6) -> Tensor:
    """A Gaussian of this deviation [B] in pixels (at most 2); beyond the edge its pixels go on."""
    offset = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (offset / deviation[:, None]).square())
    weights = weights / weights.sum(1, keepdim=True)
    for dims in ((reach, reach, 0, 0), (0, 0, reach, reach)):
        padded = F.pad(x, dims, "replicate")
        size, dim = (x.shape[3], 3) if dims[0] else (x.shape[2], 2)
        x = torch.zeros_like(x)
        for k in range(2 * reach + 1):
            x = torch.addcmul(x, padded.narrow(dim, k, size), weights[:, k, None, None, None])
    return x.round()


def _jitter(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """torchvision's ColorJitter of brightness, contrast and saturation, in an order of its own for each image."""
    low = max(0.0, 1 - strength)
    factors = (low + (1 + strength - low) * u[:, :3])[:, :, None, None, None]
    order = torch.argsort(u[:, 3:6], 1)
    for place in range(3):
        kind = order[:, place, None, None, None]
        factor = factors.gather(1, order[:, place, None, None, None, None]).squeeze(1)
        grey = _grey(x)
        towards = torch.where(kind == 0, 0.0, torch.where(kind == 1, (grey.mean((2, 3), keepdim=True) + 0.5).floor(), grey))
        x = (factor * x + (1 - factor) * towards).clamp(0, 255).floor()
    return x


# ---------------------------------------------------------------- images on the device
class NotOnDevice(Exception):
    """Why these images, or what is done to them, cannot be on the device: a clause."""


def on_device(loaders: Loaders, args: Namespace, process: Process) -> Loaders:
    """`loaders` of a training with the images on the device, as --data-on-device says; auto: on a GPU, wherever it can be.

    Raises UserError where it has to be and cannot."""
    if args.eval or args.data_on_device == "off" or (args.data_on_device == "auto" and process.device.type == "cpu"):
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
    """The flags' augmentation. Raises NotOnDevice for a policy that is not written for tensors, and for oblong inputs."""
    if not isinstance(args.input_size, int):
        raise NotOnDevice(f"images of --input-size {shown_size(args.input_size)} are augmented by PIL only: square ones can be "
                          "on the device")
    policy = "3a" if args.ThreeAugment else args.aa or "none"
    if policy not in ("none", "3a"):
        raise NotOnDevice(f"--aa {policy} is computed by PIL only: --aa none and --aa 3a can be on the device")
    return Augmentation(
        size=args.input_size, padded=args.src or is_small(args.input_size), padding=args.crop_padding,
        padding_mode="reflect" if args.src else "constant",
        kinds=("bilinear", "bicubic") if args.train_interpolation == "random" else (args.train_interpolation,),
        flip=args.hflip, three=policy == "3a", jitter=args.color_jitter, erase=args.reprob, erase_mode=args.remode,
        erase_count=args.recount, spare_first=args.resplit)


def load_pixels(data: ImageSet, fit: Callable[[Image.Image], Image.Image], device: torch.device, name: bool) -> Tensor:
    """uint8 [N, 3, H, W] on the device; zeros for an image that cannot be read, which is marked and, with `name`, named.

    fit: applied to each image. Raises NotOnDevice for images of different sizes, or too many for the device."""
    def load(index: int) -> np.ndarray | None:
        image = data._load(index, name)
        return None if image is None else np.asarray(fit(image))

    def shown(image: np.ndarray) -> str:
        return f"{image.shape[1]} x {image.shape[0]}"

    first = next((image for image in map(load, range(len(data))) if image is not None), None)
    if first is None:
        raise NotOnDevice("none of the images can be read")
    size, limit = len(data) * first.nbytes, LARGEST_SHARE * _memory(device)
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

    with ThreadPoolExecutor() as pool:      # PIL decodes without Python's lock
        try:
            for _ in pool.map(keep, range(len(data))):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous()


def _memory(device: torch.device) -> int:
    """Bytes of the device in all, so that the same machine always decides alike."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2 ** 30


class _Normalise:
    """(pixel / 255 - mean) / std to the last bit as `augment.Normalise`. Divisors are tensors: by a number, a GPU multiplies
    with its reciprocal."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.most = torch.tensor(255.0, device=device)
        self.mean, self.std = (torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1) for value in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        return x.float().div(self.most).sub_(self.mean).div_(self.std)


class TrainLoader:
    """Augmented batches (float32 [B, 3, S, S], int64 [B]) on the device in the sampler's order, the last incomplete one
    dropped; in the place of a DataLoader."""

    def __init__(self, data: ImageSet, sampler: RASampler, args: Namespace, process: Process):
        self.dataset, self.sampler, self.batch_size = data, sampler, args.batch_size
        self.augment = build_augmentation(args)
        device = process.device
        self.pixels = load_pixels(data, self._fit, device, name=process.is_main)
        self.targets = torch.from_numpy(data.targets).to(device)
        self.sources = _replaced(data)
        self.normalise = _Normalise(args.mean, args.std, device)
        each = 4 * 3 * args.input_size ** 2
        self.chunk = max(1, CHUNK_BYTES // (each * args.batch_size))

    def _fit(self, image: Image.Image) -> Image.Image:
        """With its shorter side as long as the input where the crop is one of the padded image."""
        if not self.augment.padded or min(image.size) == self.augment.size:
            return image
        if len(self.augment.kinds) > 1:
            raise NotOnDevice("the images are resized once, and --train-interpolation random resizes each time")
        return resize(image, self.augment.size, str_to_interp_mode(self.augment.kinds[0]))

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sampler, device, size = self.sampler, self.pixels.device, self.batch_size
        indices, positions, repeats = sampler.order()
        order = torch.from_numpy(np.stack([self.sources[indices], positions, repeats])).to(device)
        batches = order.shape[1] // size
        for first in range(0, batches, self.chunk):
            # Always of one size, so that a GPU takes the same kernels, and gives the same bits, wherever a run was resumed.
            place = torch.arange(first * size, (first + self.chunk) * size, device=device).clamp(max=order.shape[1] - 1)
            index, position, repeat = order[:, place]
            u = uniforms(sampler.seed, sampler.epoch, position, self.augment.draws)
            x = self.normalise(self.augment(self.pixels[index], u))
            x, targets = self.augment.erased(x, u, repeat), self.targets[index]
            for batch in range(min(self.chunk, batches - first)):
                yield x[batch * size:(batch + 1) * size], targets[batch * size:(batch + 1) * size]


class EvalLoader:
    """Batches (float32 [B, 3, S, S] on the device, int64 [B] on the host) of these images; -1 for an unreadable one."""

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


def _replaced(data: ImageSet) -> np.ndarray:
    """int64 [N]: which image is taken for each, another one for an unreadable one."""
    sources, readable = np.arange(len(data)), np.flatnonzero(data.unreadable.numpy() == 0)
    for index in np.flatnonzero(data.unreadable.numpy()):
        sources[index] = readable[np.random.default_rng([index]).integers(len(readable))]
    return sources
