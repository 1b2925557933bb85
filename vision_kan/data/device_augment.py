"""Augmentation of batches on the device. Its random numbers are a hash of (seed, epoch, position), so that a resume is exact."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vision_kan.common.process import exact_float
from vision_kan.data.images import SMALLEST_CROP

TRIES = 10      # candidates of a crop or erased box before the fallback, as in timm
# The column at which each step's random numbers begin.
CROP, FLIP, THREE, JITTER, ERASE = 0, 24, 26, 30, 40
ERASE_COLUMNS = 2 * TRIES + 6       # for each erased box


# ---------------------------------------------------------------- random numbers
def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (int64 tensors); changing one bit flips about half of the bits. lowbias32 of
    https://github.com/skeeto/hash-prospector, constants by TheIronBorn."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def uniforms(seed: int, epoch: int, positions: Tensor, count: int, begin: int = 0) -> Tensor:
    """float32 [B, count] in [0, 1), a hash of (seed, epoch, position, column), columns from `begin` on. positions: int64 [B]."""
    first, second = (int(word) for word in np.random.SeedSequence([seed, epoch]).generate_state(2))
    rows = _mix(_mix(positions ^ first) ^ second)
    columns = _mix(torch.arange(begin + 1, begin + count + 1, device=positions.device))
    return (_mix(rows[:, None] ^ columns) >> 8).float() * 2.0 ** -24


def _integer(u: Tensor, count: Tensor | int) -> Tensor:
    """A uniform integer in 0 .. count - 1, from u in [0, 1)."""
    return (u * count).floor().long()


# ---------------------------------------------------------------- resampling
# PIL's filters at scale 1 (Pillow, src/libImaging/Resample.c).
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
    """[B, out, size]: linear maps that crop `length` [B] of `size` pixels from `start` [B] on and resize them to `out`, as PIL
    does: pixels outside the crop have no weight, and a reduction averages."""
    exact = exact_float(start.device)       # at an edge the last bit decides which pixel counts
    start, length = start.to(exact), length.to(exact)
    ratio = (length / out)[:, None]
    centre = (torch.arange(out, device=start.device) + 0.5) * ratio                     # [B, out], in the crop
    pixel = torch.arange(size, device=start.device) - start[:, None]                    # [B, size], in the crop
    if kind == "nearest":
        return (pixel[:, None] == centre.floor()[..., None]).float()
    inside = (pixel >= 0) & (pixel < length[:, None])
    weights = FILTERS[kind]((pixel[:, None] - centre[..., None] + 0.5) * (1 / ratio.clamp(min=1))[..., None]) * inside[:, None]
    return (weights / weights.sum(-1, keepdim=True)).float()


# ---------------------------------------------------------------- augmentation
@dataclass(frozen=True)
class Augmentation:
    """The parameters of `transforms.build_transform` for training images, and its steps as tensor operations."""
    size: int
    padded: bool                        # a random crop of the padded image; else a random resized crop
    padding: int
    padding_mode: str                   # "constant" or "reflect"
    kinds: tuple[str, ...]              # interpolations, one drawn for each image
    flip: float
    three: bool                         # 3-Augment: solarise, grey or blur
    jitter: float                       # strength for brightness, contrast and saturation
    erase: float                        # probability of random erasing
    erase_mode: str
    erase_count: int
    spare_first: bool                   # don't erase an image's first repeat

    @property
    def num_uniforms(self) -> int:
        """Random numbers that an image needs."""
        return ERASE + (ERASE_COLUMNS * self.erase_count if self.erase else 0)

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], uniforms [B, K] -> float32 [B, 3, S, S] of 0 .. 255, before normalisation and erasing."""
        return self.coloured(self.cropped(images, u), u)

    def cropped(self, images: Tensor, u: Tensor) -> Tensor:
        return self._padded_crop(images, u) if self.padded else self._resized_crop(images, u)

    def coloured(self, x: Tensor, u: Tensor) -> Tensor:
        if self.three:
            x = _three_augment(x, u[:, THREE:])
        if self.jitter:
            x = _jitter(x, u[:, JITTER:], self.jitter)
        return x

    def random_erase(self, x: Tensor, u: Tensor, repeat: Tensor) -> Tensor:
        """Random erasing of normalised images [B, 3, H, W], after timm's RandomErasing. repeat: int64 [B]."""
        if not self.erase:
            return x
        u, (high, wide) = u[:, ERASE:], x.shape[2:]
        chosen = u[:, 0] < self.erase
        if self.spare_first:
            chosen &= repeat > 0
        count = _integer(u[:, 1], self.erase_count) + 1
        row, column = (torch.arange(size, device=x.device) for size in (high, wide))
        for nth in range(self.erase_count):
            v = u[:, 2 + ERASE_COLUMNS * nth:]
            area = (0.02 + (1 / 3 - 0.02) * v[:, :TRIES]) * (high * wide) / count[:, None]
            ratio = torch.exp(math.log(0.3) * (2 * v[:, TRIES:2 * TRIES] - 1))
            heights, widths = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
            fits = (heights < high) & (widths < wide)
            first = fits.byte().argmax(1, keepdim=True)
            height, width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
            top, left = _integer(v[:, 2 * TRIES], high - height + 1), _integer(v[:, 2 * TRIES + 1], wide - width + 1)
            rows = (row >= top[:, None]) & (row < (top + height)[:, None])
            columns = (column >= left[:, None]) & (column < (left + width)[:, None])
            erased = chosen & fits.any(1) & (nth < count)
            mask = erased[:, None, None, None] & rows[:, None, :, None] & columns[:, None, None, :]
            x = torch.where(mask, self._fill(x, v[:, 2 * TRIES + 2]), x)
        return x

    def _padded_crop(self, images: Tensor, u: Tensor) -> Tensor:
        (high, wide), size, pad = images.shape[2:], self.size, self.padding
        rows = _integer(u[:, CROP, None], high + 2 * pad - size + 1) + torch.arange(size, device=u.device) - pad
        columns = _integer(u[:, CROP + 1, None], wide + 2 * pad - size + 1) + torch.arange(size, device=u.device) - pad
        columns = torch.where(u[:, FLIP, None] < self.flip, columns.flip(1), columns)
        inside = ((rows >= 0) & (rows < high))[:, None, :, None] & ((columns >= 0) & (columns < wide))[:, None, None, :]
        if self.padding_mode == "reflect":
            rows, columns = (index.abs() - 2 * (index - length + 1).clamp(min=0)
                             for index, length in ((rows, high), (columns, wide)))
        image = torch.arange(len(images), device=u.device)[:, None, None, None]
        channel = torch.arange(3, device=u.device)[:, None, None]
        rows, columns = rows.clamp(0, high - 1)[:, None, :, None], columns.clamp(0, wide - 1)[:, None, None, :]
        x = images[image, channel, rows, columns].float()
        return x if self.padding_mode == "reflect" else x * inside

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
        table = _normal_table(x.device)
        indices = torch.arange(math.prod(shape), device=x.device) + _integer(u[:, None], len(table))
        return table[indices % len(table)].view(-1, *shape)


_TABLES: dict[torch.device, Tensor] = {}


def _normal_table(device: torch.device, count: int = 2 ** 21) -> Tensor:
    """Normal random numbers, float32 [count]; an erased box takes a stretch of them from a drawn index on."""
    if device not in _TABLES:
        _TABLES[device] = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)
    return _TABLES[device]


def _resampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, 3, H, W] by the maps [B, S, H] and [B, S, W]. Like PIL: columns first, rounded to integers after each map."""
    for step in (lambda x: x @ columns.transpose(1, 2)[:, None], lambda x: rows[:, None] @ x):
        x = (step(x) + 0.5).floor().clamp(0, 255)
    return x


def _crop_box(u: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, left, height, width [B] of timm's RandomResizedCropAndInterpolation."""
    area = (SMALLEST_CROP + (1 - SMALLEST_CROP) * u[:, :TRIES]) * (high * wide)
    ratio = torch.exp(math.log(4 / 3) * (2 * u[:, TRIES:2 * TRIES] - 1))
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= wide) & (height <= high)
    first = fits.byte().argmax(1, keepdim=True)
    width, height = width.gather(1, first)[:, 0], height.gather(1, first)[:, 0]
    found = fits.any(1)
    central_width, central_height = min(wide, round(high * 4 / 3)), min(high, round(wide * 4 / 3))      # timm's fallback
    width, height = torch.where(found, width, float(central_width)), torch.where(found, height, float(central_height))
    top = torch.where(found, (u[:, 2 * TRIES] * (high - height + 1)).floor(), float((high - central_height) // 2))
    left = torch.where(found, (u[:, 2 * TRIES + 1] * (wide - width + 1)).floor(), float((wide - central_width) // 2))
    return top, left, height, width


def greyscale(x: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, 1, S, S]: PIL's mode L."""
    return (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).round()


def _three_augment(x: Tensor, u: Tensor) -> Tensor:
    """DeiT III's 3-Augment, one of three for each image: solarised from 128 on, grey, or blurred (deviation 0.1 to 2)."""
    choice = _integer(u[:, 0], 3)[:, None, None, None]
    solarised = torch.where(x < 128, x, 255 - x)
    return torch.where(choice == 0, solarised, torch.where(choice == 1, greyscale(x), blurred(x, 0.1 + 1.9 * u[:, 1])))


def blurred(x: Tensor, deviation: Tensor, reach: int = 6) -> Tensor:
    """Gaussian blur. deviation: [B], in pixels, at most 2. The edge's pixels are repeated beyond it."""
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
    """torchvision's ColorJitter of brightness, contrast and saturation, in an order drawn for each image."""
    low = max(0.0, 1 - strength)
    factors = (low + (1 + strength - low) * u[:, :3])[:, :, None, None, None]
    order = torch.argsort(u[:, 3:6], 1)
    for place in range(3):
        kind = order[:, place, None, None, None]
        factor = factors.gather(1, order[:, place, None, None, None, None]).squeeze(1)
        grey = greyscale(x)
        towards = torch.where(kind == 0, 0.0, torch.where(kind == 1, (grey.mean((2, 3), keepdim=True) + 0.5).floor(), grey))
        x = (factor * x + (1 - factor) * towards).clamp(0, 255).floor()
    return x
