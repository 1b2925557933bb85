"""timm's RandAugment and AutoAugment on a device.

The host draws what happens to each image; so it knows, without waiting for the device, which images get the same operation, and
these are computed together. The operations are PIL's on 8-bit numbers."""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.data.auto_augment import AutoAugment, RandAugment
from torch import Tensor

from vision_kan.common.process import exact_float
from vision_kan.data.device_augment import blurred, greyscale

LEVELS = 10.0       # a magnitude of 10 is level 1
ARGUMENTS = 6       # numbers of an operation, at most


# ---------------------------------------------------------------- timm's operations, from levels
def _signed(value: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.where(u < 0.5, value, -value)


def _rotate(level: np.ndarray, u: np.ndarray, wide: int, high: int, _: dict) -> list:
    """About the centre."""
    angle = -np.radians(_signed(30 * level, u))
    cosine, sine, x, y = np.cos(angle), np.sin(angle), wide / 2, high / 2
    return [cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y]


def _translate(level: np.ndarray, u: np.ndarray, hparams: dict) -> np.ndarray:
    return _signed(level * hparams.get("translate_pct", 0.45), u)


def _mask(bits: np.ndarray) -> np.ndarray:
    """Of an 8-bit number, its highest `bits`, of which one is always left."""
    return 256 - 2.0 ** (8 - bits.clip(1, 8))


def _enhance(level: np.ndarray, *_) -> list:
    return [1.8 * level + 0.1]


def _enhance_increasing(level: np.ndarray, u: np.ndarray, *_) -> list:
    return [np.maximum(0.1, 1 + _signed(0.9 * level, u))]


# name in timm -> kind of `_KINDS`, and its arguments from levels and uniforms [n], width, height and timm's hparams
_OPERATIONS: dict[str, tuple[str, Callable]] = {
    "AutoContrast": ("autocontrast", lambda level, *_: []),
    "Equalize": ("equalize", lambda level, *_: []),
    "Invert": ("solarize", lambda level, *_: [0 * level]),
    "Rotate": ("affine", _rotate),
    "Posterize": ("posterize", lambda level, *_: [_mask(np.trunc(4 * level))]),
    "PosterizeIncreasing": ("posterize", lambda level, *_: [_mask(4 - np.trunc(4 * level))]),
    "PosterizeOriginal": ("posterize", lambda level, *_: [_mask(4 + np.trunc(4 * level))]),
    "Solarize": ("solarize", lambda level, *_: [np.trunc(256 * level).clip(max=256)]),
    "SolarizeIncreasing": ("solarize", lambda level, *_: [256 - np.trunc(256 * level).clip(max=256)]),
    "SolarizeAdd": ("solarize_add", lambda level, *_: [np.trunc(110 * level).clip(max=128)]),
    "Color": ("colour", _enhance),
    "ColorIncreasing": ("colour", _enhance_increasing),
    "Contrast": ("contrast", _enhance),
    "ContrastIncreasing": ("contrast", _enhance_increasing),
    "Brightness": ("brightness", _enhance),
    "BrightnessIncreasing": ("brightness", _enhance_increasing),
    "Sharpness": ("sharpness", _enhance),
    "SharpnessIncreasing": ("sharpness", _enhance_increasing),
    "ShearX": ("affine", lambda level, u, *_: [1, _signed(0.3 * level, u), 0, 0, 1, 0]),
    "ShearY": ("affine", lambda level, u, *_: [1, 0, 0, _signed(0.3 * level, u), 1, 0]),
    "TranslateXRel": ("affine", lambda level, u, wide, high, hparams: [1, 0, _translate(level, u, hparams) * wide, 0, 1, 0]),
    "TranslateYRel": ("affine", lambda level, u, wide, high, hparams: [1, 0, 0, 0, 1, _translate(level, u, hparams) * high]),
    "Desaturate": ("colour", lambda level, *_: [(0.5 - 0.5 * level).clip(0, 0.5)]),
    "GaussianBlur": ("blur", lambda level, *_: [(0.1 + 1.9 * level).clip(0.1, 2)]),
    "GaussianBlurRand": ("blur", lambda level, u, *_: [0.1 + (2 * level.clip(0, 1) - 0.1) * u]),
}


class Step(NamedTuple):
    """`rows` (int64 [n]) of a batch get an operation of this kind with these arguments (float64 [n, ARGUMENTS])."""
    kind: str
    rows: np.ndarray
    arguments: np.ndarray


class Policy:
    """A RandAugment or AutoAugment of timm's for batches of images on a device.

    Args:
        transform: timm's, whose operations, probabilities, magnitudes and weights are taken.
    """

    def __init__(self, transform: RandAugment | AutoAugment, device: torch.device):
        if isinstance(transform, RandAugment):
            self.ops, self.layers = transform.ops, transform.num_layers
            self.weights, self.table = transform.choice_weights, None
        else:
            self.ops, self.layers = [op for chain in transform.policy for op in chain], max(map(len, transform.policy))
            self.weights, self.table = None, np.arange(len(self.ops)).reshape(len(transform.policy), self.layers)
        resample = self.ops[0].kwargs["resample"]
        self.filters = [kind.name.lower() for kind in (resample if isinstance(resample, Sequence) else [resample])]
        self.device = device
        self.fill = torch.tensor(self.ops[0].kwargs["fillcolor"], dtype=torch.uint8, device=device).view(3, 1, 1)
        # of each operation: its probability, magnitude, the deviation of that (inf: uniform up to it) and its bound
        self.numbers = np.array([[op.prob, op.magnitude, op.magnitude_std, op.magnitude_max or LEVELS] for op in self.ops])

    @property
    def num_uniforms(self) -> int:
        """Random numbers of an image: of each layer chance, magnitude, direction and filter, and those of the choice."""
        return 4 * self.layers + (len(self.ops) if self.weights is not None else self.layers)

    def chosen(self, u: np.ndarray) -> np.ndarray:
        """int64 [B, layers], into `ops`, from uniforms [B, K]."""
        if self.weights is not None:    # without replacement: the first to happen, at rates that are the weights
            return np.argsort(-np.log1p(-u[:, :len(self.ops)]) / self.weights, 1, kind="stable")[:, :self.layers]
        if self.table is not None:
            return self.table[(u[:, 0] * len(self.table)).astype(int)]
        return (u[:, :self.layers] * len(self.ops)).astype(int)

    def draw(self, u: np.ndarray, wide: int, high: int) -> list[Step]:
        """What happens, in this order, to images of this size, from uniforms float64 [B, num_uniforms]."""
        chosen, steps = self.chosen(u), []
        for layer in range(chosen.shape[1]):
            chance, noise, direction, filter_ = u[:, self.num_uniforms - 4 * self.layers + 4 * layer:][:, :4].T
            probability, magnitude, deviation, most = self.numbers[chosen[:, layer]].T
            uniform, bell = np.isinf(deviation), torch.special.ndtri(torch.from_numpy(noise)).numpy()
            drawn = np.where(uniform, noise * magnitude, magnitude + np.where(uniform, 0, deviation) * bell.clip(-99, 99))
            level = drawn.clip(0, most) / LEVELS
            found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            happens = np.where(chance < probability, chosen[:, layer], -1)
            for number in np.unique(happens[happens >= 0]):
                op, rows = self.ops[number], np.flatnonzero(happens == number)
                kind, arguments_of = _OPERATIONS[op.name]
                arguments = np.zeros((len(rows), ARGUMENTS))
                for column, value in enumerate(arguments_of(level[rows], direction[rows], wide, high, op.hparams)):
                    arguments[:, column] = value
                parts = (filter_[rows] * len(self.filters)).astype(int) if kind == "affine" else np.zeros(len(rows), int)
                for part in np.unique(parts):
                    key = f"{kind} {self.filters[part]}" if kind == "affine" else kind
                    found.setdefault(key, []).append((rows[parts == part], arguments[parts == part]))
            steps += [Step(kind, *map(np.concatenate, zip(*found[kind]))) for kind in sorted(found)]
        return steps

    def __call__(self, images: Tensor, steps: list[Step]) -> Tensor:
        """`images` (uint8 [B, 3, H, W] on the device), changed in place."""
        if not steps:
            return images
        rows = torch.from_numpy(np.concatenate([step.rows for step in steps]))
        arguments = torch.from_numpy(np.concatenate([step.arguments for step in steps])).float()
        if images.is_cuda:      # from pageable memory the host would wait for the device
            rows, arguments = rows.pin_memory(), arguments.pin_memory()
        rows, arguments = (part.to(images.device, non_blocking=True) for part in (rows, arguments))
        first = 0
        for step in steps:
            these, first = slice(first, first + len(step.rows)), first + len(step.rows)
            x = images.index_select(0, rows[these])
            if step.kind.startswith("affine"):
                x = affine(x, arguments[these], self.fill, step.kind.split()[1])
            else:
                x = _KINDS[step.kind](x, arguments[these, :1, None, None])
            images.index_copy_(0, rows[these], x)
        return images


# ---------------------------------------------------------------- PIL's operations, on uint8 [n, 3, H, W]
def _blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """From `base` (factor 0) over `x` (1) and beyond."""
    base = base.float()
    return (base + factor * (x.float() - base)).clamp_(0, 255).byte()


def _grey(x: Tensor) -> Tensor:
    return greyscale(x.float())


def _smooth(x: Tensor) -> Tensor:
    """PIL's SMOOTH: a pixel five times and its neighbours once; the outermost pixels stay."""
    inner = x.short()
    three = inner[..., :-2, :] + inner[..., 1:-1, :] + inner[..., 2:, :]
    total = three[..., :-2] + three[..., 1:-1] + three[..., 2:] + 4 * inner[..., 1:-1, 1:-1]
    out = x.clone()
    out[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).byte()
    return out


def _look_up(x: Tensor, tables: Tensor) -> Tensor:
    """tables: [n, 3, 256]"""
    return tables.byte().gather(2, x.flatten(2).long()).view_as(x)


def _autocontrast(x: Tensor, _: Tensor) -> Tensor:
    exact = exact_float(x.device)
    low, high = (extreme.to(exact)[..., None] for extreme in (x.amin((2, 3)), x.amax((2, 3))))
    value = torch.arange(256, device=x.device, dtype=exact)
    scale = torch.full_like(low, 255) / (high - low)        # 255 / x would be 255 times the reciprocal
    return _look_up(x, torch.where(high > low, (value * scale - low * scale).trunc().clamp(0, 255), value))


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    counts = torch.zeros(*x.shape[:2], 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, x.flatten(2).long(), torch.ones_like(counts[:1, :1, :1]).expand(x.flatten(2).shape))
    last = counts.gather(2, x.amax((2, 3))[..., None].long())
    step = (x.shape[2] * x.shape[3] - last) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return _look_up(x, torch.where(step > 0, table.clamp(max=255), torch.arange(256, device=x.device)))


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    total, count = _grey(x).long().sum((2, 3), keepdim=True), x.shape[2] * x.shape[3]
    return _blend(x, (2 * total + count) // (2 * count), factor)        # the mean, rounded


_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": lambda x, mask: x & mask.byte(),
    "solarize": lambda x, threshold: torch.where(x < threshold, x, 255 - x),
    "solarize_add": lambda x, more: torch.where(x < 128, x + more.byte(), x),
    "colour": lambda x, factor: _blend(x, _grey(x), factor),
    "contrast": _contrast,
    "brightness": lambda x, factor: _blend(x, torch.zeros_like(factor), factor),
    "sharpness": lambda x, factor: _blend(x, _smooth(x), factor),
    "blur": lambda x, deviation: blurred(x.float(), deviation[:, 0, 0, 0]).clamp_(0, 255).byte(),
}


def _linear(v: list[Tensor], d: Tensor) -> Tensor:
    return v[0] + d * (v[1] - v[0])


def _cubic(v: list[Tensor], d: Tensor) -> Tensor:
    """PIL's of transforms, with a = -1; its resizing has -0.5."""
    return v[1] + d * (v[2] - v[0] + d * (2 * (v[0] - v[1]) + v[2] - v[3] + d * (v[1] - v[0] + v[3] - v[2])))


_SAMPLINGS: dict[str, tuple[range, Callable[[list[Tensor], Tensor], Tensor]]] = {
    "nearest": (range(1), lambda v, d: v[0]), "bilinear": (range(2), _linear), "bicubic": (range(-1, 3), _cubic)}


def affine(x: Tensor, matrix: Tensor, fill: Tensor, kind: str) -> Tensor:
    """Image.transform(AFFINE): pixel (x, y) is that of the input at (a x + b y + c, d x + e y + f), with `fill` outside.

    x: uint8 [n, 3, H, W]. matrix: [n, 6]. kind: nearest, bilinear or bicubic."""
    high, wide = x.shape[2:]
    reach, between = _SAMPLINGS[kind]
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    column, row = (torch.arange(size, device=x.device) + 0.5 for size in (wide, high))
    across, down = a * column + b * row[:, None] + c, d * column + e * row[:, None] + f
    inside = (across >= 0) & (across < wide) & (down >= 0) & (down < high)
    if kind != "nearest":
        across, down = across - 0.5, down - 0.5
    left, top = across.floor(), down.floor()
    across, down = (across - left)[:, None], (down - top)[:, None]
    columns, rows = ([(start.long() + k).clamp(0, size - 1) for k in reach] for start, size in ((left, wide), (top, high)))
    pixels = x.flatten(2)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return pixels.gather(2, (row * wide + column).flatten(1)[:, None].expand(-1, 3, -1)).view_as(x).float()

    value = between([between([at(row, column) for column in columns], across) for row in rows], down)
    return torch.where(inside[:, None], value.clamp_(0, 255).byte(), fill)
