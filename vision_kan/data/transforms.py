"""Image transforms: DeiT's for training and evaluation and DeiT III's 3-Augment, built from timm's."""
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio, str_to_interp_mode
from timm.layers import to_2tuple
from torch.nn import functional as F
from torchvision import transforms

from vision_kan.common.errors import UserError


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    return auto_augment.posterize(image, max(1, bits_to_keep))


# DeiT's policy, rand-m9-mstd0.5-inc1, posterizes to 0 bits at strength 10. That is black in old versions of Pillow and an error
# since version 13.
auto_augment.NAME_TO_OP.update(dict.fromkeys(
    [name for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")], _posterize))
GREY_SCALE = "32-bit grey up to"      # key in the `info` of an image that `to_rgb` has scaled: the value of white, an int


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: an animation's first frame, alpha dropped, 16-bit grey scaled to 8 bits.

    32-bit grey (TIFF) does not define white. It is the smallest of 1 (floating point only), 255 and 65535 that no value exceeds.
    Raises ValueError for values outside 0 .. 65535. Ignores the EXIF orientation.
    """
    if image.mode == "RGB":
        image.load()        # convert would copy the pixels
        return image
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image)      # PIL would clip all at 255
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    white = 65535 if sixteen else _white(values)
    # piece by piece, because the arithmetic takes 24 bytes per pixel
    pieces = np.array_split(values.reshape(-1), max(1, values.size >> 20))
    grey = Image.fromarray(np.concatenate([_to_8_bits(piece, white) for piece in pieces]).reshape(values.shape))
    rgb = grey.convert("RGB")
    if not sixteen:
        rgb.info[GREY_SCALE] = white
    return rgb


def _white(values: np.ndarray) -> int:
    """The value of white in 32-bit grey: 1, 255 or 65535. Raises ValueError for values beyond."""
    low, high = values.min(), values.max()
    for white in (1, 255, 65535)[values.dtype.kind != "f":]:
        if 0 <= low and high <= white:
            return white
    raise ValueError(f"32-bit grey from {low:g} to {high:g}, not 0 to 1, 255 or 65535: convert it to 8 or 16 bits")


def _to_8_bits(values: np.ndarray, white: int) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    values = values.astype(np.int64)
    return (values if white == 255 else (values + 128) // 257).astype(np.uint8)


# Longer images are cropped before they are resized: resized by its shorter side to 256 pixels, an image of 20,000 x 1 would take
# 4 GB. Panoramas reach a ratio of about 10.
MAX_ASPECT_RATIO = 20


def shorten(image: Image.Image, choose: Callable[[int], int], most: int = MAX_ASPECT_RATIO,
            size: int | Sequence[int] = 1) -> Image.Image:
    """The image, its longer side cropped to `most` times the shorter one, relative to the sides of `size`.

    choose: takes the number of surplus pixels and returns how many of them are cut off before the part that is kept.
    size: of the model's input, an int or (height, width)."""
    (width, height), (rows, columns) = image.size, to_2tuple(size)
    for wide, long, limit in ((True, width, most * height * columns // rows), (False, height, most * width * rows // columns)):
        keep = max(1, limit) + (long - max(1, limit)) % 2       # same parity as the long side, so that the centre stays
        if keep < long:
            first = choose(long - keep)
            return image.crop((first, 0, first + keep, height) if wide else (0, first, width, first + keep))
    return image


def is_small(size: int | Sequence[int]) -> bool:
    """Whether images of this --input-size are trained on as padded random crops and evaluated without resizing."""
    return max(to_2tuple(size)) <= 32


class Normalise:
    """PIL RGB image -> float32 [3, H, W], (pixel / 255 - mean) / std per channel; ImageNet's mean and std by default.

    Bit for bit torchvision's ToTensor and Normalize in a quarter of their time: those reorder the channels byte by byte and copy
    once more.
    """

    def __init__(self, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD):
        self.mean = np.array(mean, np.float32).reshape(3, 1, 1)
        self.std = np.array(std, np.float32).reshape(3, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        values = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
        values /= np.float32(255)
        values -= self.mean
        values /= self.std
        return torch.from_numpy(values)


class TrainTransform:
    """PIL RGB image -> normalised float32 [3, H, W]; `erase=False` leaves random erasing out."""

    def __init__(self, steps: list[Callable], erasing: Callable | None):
        self.steps = transforms.Compose(steps)
        self.erasing = erasing

    def __call__(self, image: Image.Image, erase: bool = True) -> torch.Tensor:
        tensor = self.steps(image)
        return self.erasing(tensor) if erase and self.erasing else tensor


def as_pixels(image: Image.Image) -> torch.Tensor:
    """PIL RGB image -> uint8 [3, H, W], laid out as the image is."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


class ResizedCrop:
    """PIL RGB image or uint8 [3, H, W] -> uint8 [3, size, size]: timm's random resized crop, drawn by it, resized by PyTorch in a
    third of PIL's time.

    The filters of both are alike: 98% of the numbers are equal, others differ by 1, and with bicubic one in 10,000 by more (up
    to 8 were seen). Filters that PyTorch lacks are PIL's."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        kinds = self.crop.interpolation
        kind = random.choice(kinds) if isinstance(kinds, (tuple, list)) else kinds
        if kind.value not in ("bilinear", "bicubic") or not height * width:     # of a line a crop may be empty: PIL's is black
            image = transforms.functional.to_pil_image(image) if isinstance(image, torch.Tensor) else image
            cut = image.crop((left, top, left + width, top + height))
            return as_pixels(transforms.functional.resize(cut, self.crop.size, kind))
        if isinstance(image, torch.Tensor):
            pixels = image[None, :, top:top + height, left:left + width].contiguous(memory_format=torch.channels_last)
        else:
            pixels = as_pixels(image.crop((left, top, left + width, top + height)))[None]
        return F.interpolate(pixels, self.crop.size, mode=kind.value, antialias=True)[0]


class CropTransform:
    """PIL RGB image -> uint8 [3, H, W], cropped and flipped; the rest of a training's augmentation is left to the device, with
    random erasing, whatever `erase` is.

    takes_tensors: whether the image may be a uint8 tensor [3, H, W]."""

    def __init__(self, steps: list[Callable]):
        self.steps = transforms.Compose(steps)
        self.takes_tensors = isinstance(steps[0], ResizedCrop)

    def __call__(self, image: Image.Image | torch.Tensor, erase: bool = True) -> torch.Tensor:
        return self.steps(image).contiguous()


class EvalTransform:
    """PIL RGB image -> normalised float32 [3, H, W]: resize and centre crop. At 32 px or below, an image that already is H x W
    is not resized.

    size: the side of a square, or (height, width).
    mode: timm's crop mode: "center" resizes by the shorter side, "squash" both sides, "border" by the longer side and fills up
        with the mean."""

    def __init__(self, size: int | Sequence[int], crop_ratio: float, mode: str = "center", interpolation: str = "bicubic",
                 mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD):
        self.size = size
        high, wide = to_2tuple(size)
        self.kept_size = (wide, high) if is_small(size) else None       # in PIL's order
        timm_transform = create_transform((3, high, wide), is_training=False, crop_pct=crop_ratio, crop_mode=mode,
                                          interpolation=interpolation, mean=tuple(mean))
        self.resize = transforms.Compose(timm_transform.transforms[:-2])        # without its ToTensor and Normalize
        # "border" resizes by the longer side, and at least one pixel of the shorter one must remain
        self.most = {"center": MAX_ASPECT_RATIO, "border": min(MAX_ASPECT_RATIO, high, wide), "squash": sys.maxsize}[mode]
        self.finish = Normalise(mean, std)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.size != self.kept_size:
            image = self.resize(shorten(image, lambda spare: spare // 2, self.most, self.size))
        return self.finish(image)


def build_transform(is_train: bool, args: Namespace) -> TrainTransform | EvalTransform:
    """DeiT's transform of a training or an evaluation image (PIL, RGB).

    Training: random resized crop (with `--src`, or an input of 32 px and below: resize by the shorter side, pad by
    `--crop-padding`, random crop), flip, colours (`--ThreeAugment` in place of `--aa`; `--color-jitter` with 3-Augment or without
    `--aa`), normalisation, random erasing (also with 3-Augment: DeiT III's code has none, its recipes give `--reprob 0`). The
    aspect ratio of a resized crop is 3/4 to 4/3 times the input's, so an oblong input distorts no more than a square one.

    Raises UserError for an `--aa` policy, `--remode` or `--train-interpolation` that timm does not know.
    """
    if not is_train:
        return EvalTransform(args.input_size, args.eval_crop_ratio, args.crop_mode, args.interpolation, args.mean, args.std)
    crop, colours, finish = _training_steps(args)
    erasing = finish.pop() if args.reprob > 0 else None
    return TrainTransform([*crop, *colours, Normalise(args.mean, args.std)], erasing)   # instead of timm's ToTensor, Normalize


def build_crop(args: Namespace) -> CropTransform:
    """What loader processes do with --augment-on device: crop and flip, with the draws of `build_transform`."""
    first, *others = _training_steps(args)[0]
    fast = ResizedCrop(first) if isinstance(first, RandomResizedCropAndInterpolation) else transforms.Compose([first, as_pixels])
    return CropTransform([fast, *others])


def build_policy(args: Namespace) -> RandAugment | AutoAugment | None:
    """timm's --aa policy, or None for none and for 3-Augment's, which has its own."""
    colours = _training_steps(args)[1] if aa_policy(args) not in ("", "3a") else []
    return next((step for step in colours if isinstance(step, (RandAugment, AutoAugment))), None)


def aa_policy(args: Namespace) -> str:
    """The --aa policy that holds, "" for none."""
    return "3a" if args.ThreeAugment else "" if args.aa in (None, "none") else args.aa


def _training_steps(args: Namespace) -> tuple[list[Callable], list[Callable], list[Callable]]:
    """timm's steps of a training image: crop and flip; colours; tensor, normalisation and, with --reprob, random erasing."""
    policy = aa_policy(args)
    high, wide = to_2tuple(args.input_size)
    shape = wide / high
    try:
        primary, secondary, final = create_transform(
            input_size=(3, high, wide), is_training=True, ratio=(3 / 4 * shape, 4 / 3 * shape), hflip=args.hflip,
            color_jitter=args.color_jitter, auto_augment=policy,
            interpolation=args.train_interpolation, separate=True, mean=tuple(args.mean),
            re_prob=args.reprob, re_mode=args.remode, re_count=args.recount)
    except (AssertionError, KeyError, ValueError, IndexError) as error:  # timm's parser raises any of them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--aa {policy} (or --remode {args.remode}, --train-interpolation "
                        f"{args.train_interpolation}) is not one that timm knows ({reason}): give a policy "
                        "such as rand-m9-mstd0.5-inc1, augmix-m3, original or none") from error
    crop = list(primary.transforms)
    if args.src or is_small(args.input_size):
        crop[0] = _pad_and_crop(args, "reflect" if args.src else "constant")
    return crop, list(secondary.transforms), list(final.transforms)


def _pad_and_crop(args: Namespace, padding_mode: str) -> Callable:
    size, interpolation, padding = args.input_size, args.train_interpolation, args.crop_padding
    kinds = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
    resizes = [transforms.Resize(size, str_to_interp_mode(kind)) if isinstance(size, int)
               else ResizeKeepRatio(size, longest=0., interpolation=kind) for kind in kinds]
    crop = transforms.RandomCrop(size, padding=padding or None, padding_mode=padding_mode)
    return transforms.Compose([partial(_shorten_anywhere, size=size), transforms.RandomChoice(resizes), crop])


def _shorten_anywhere(image: Image.Image, size: int | Sequence[int]) -> Image.Image:
    return shorten(image, lambda spare: int(torch.randint(spare + 1, ())), size=size)


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix of a batch, or None if the flags switch both off. It draws from numpy's generator."""
    if args.mixup == 0 and args.cutmix == 0 and args.cutmix_minmax is None:
        return None
    return Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                 args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes)
