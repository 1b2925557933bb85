"""Images by index: decoded and augmented, each from its own seed. Unreadable ones are replaced and counted."""
import errno
import math
import os
import random
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.layers import to_2tuple
from torch.utils.data import Dataset, get_worker_info
from torchvision.io import decode_jpeg

from vision_kan.common.console import readers_may_leave
from vision_kan.common.errors import UnreadableData, UserError
from vision_kan.common.text import printable
from vision_kan.data.folders import formats
from vision_kan.data.transforms import GREY_SCALE, build_transform, to_rgb
from vision_kan.data.workers import MORE_SHARED_MEMORY, explain_machine_error


class SampleKey(NamedTuple):
    """One draw of the training order. (seed, epoch, position) seeds its augmentation, so the result does not depend on the number
    of workers or processes."""
    index: int      # type: ignore[assignment]  # of the image in the data set; hides tuple.index
    seed: int
    epoch: int
    position: int   # in the epoch's order over all processes
    repeat: int     # which repeat of this image: 0 .. num_repeats - 1


SMALLEST_CROP = 0.08    # share of an image's area in a random resized crop, as in timm and DeiT
# An image of more pixels counts as unreadable. A decoded image takes 4 bytes per pixel, and 8 while its mode is converted: 1.4 GB
# in each worker that holds one. The limit is PIL's own; it admits what cameras take, except the 200 megapixels of a few phones.
MAX_PIXELS = 178_956_970
TRIES = 32  # images tried in place of an unreadable one before training gives up


# ---------------------------------------------------------------- images
class Images(Protocol):
    """Images by index. name: for messages. load: 8-bit RGB; raises any exception if the image cannot be read. how: the keywords
    of `decode_image`."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def load(self, index: int, **how) -> Image.Image | torch.Tensor: ...


class FileImages:
    """Image files. All paths are joined into one string of bytes. As a list of millions of strings they would be copied into
    every worker, page by page, as reference counts change; in an array the longest path would set the size of all."""

    def __init__(self, paths: list[str]):
        names = [os.fsencode(path) for path in paths]
        self.paths = b"".join(names)
        self.ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[self.ends[index]:self.ends[index + 1]])

    def load(self, index: int, **how) -> Image.Image | torch.Tensor:
        return load_image(self.name(index), **how)


class ArrayImages:
    """Images in memory: uint8 [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int, **how) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class Split(NamedTuple):
    """One half (training or validation) of a data set."""
    images: Images
    targets: np.ndarray   # int64 [N], into classes
    classes: list[str]
    note: str = ""        # how it was made, for the log


def _open_file(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))     # else opening a named pipe would wait for a writer


def load_image(path: str, **how) -> Image.Image | torch.Tensor:
    """`decode_image` of a file."""
    with open(path, "rb", opener=_open_file) as file:
        return decode_image(file, **how)


# EXIF orientation -> what makes the image upright
_TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                         Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                         Image.Transpose.ROTATE_90), 2))


def decode_image(file: BinaryIO, min_side: int = 0, upright: bool = False, tensor: bool = False) -> Image.Image | torch.Tensor:
    """The image in an open file as 8-bit RGB. Raises what PIL raises for a file that it cannot decode.

    min_side: a larger JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time, as long as its shorter side
        keeps at least this number of pixels; 0 keeps its size.
    upright: turn the image as its EXIF orientation says. PIL does so for TIFF files in any case.
    tensor: return uint8 [3, H, W] where this saves time, which is for most JPEG files: the same pixels without PIL's copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for odd metadata and the like; what prevents decoding raises
        with Image.open(file, formats=formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            full_size = image.size
            if min_side:
                image.draft(None, (min_side, min_side))
            if tensor and (image.format, image.mode, image.size) == ("JPEG", "RGB", full_size) and not (upright and _turn(image)):
                pixels = _decode_jpeg(file)
                if pixels is not None:
                    return pixels
            rgb = to_rgb(image)
            turn = _turn(image) if upright else None
            return rgb if turn is None else rgb.transpose(turn)


def _decode_jpeg(file: BinaryIO) -> torch.Tensor | None:
    """uint8 [3, H, W], laid out as the image is, of a JPEG file in RGB; None if PIL must say what is wrong with it."""
    file.seek(0)
    try:
        return decode_jpeg(torch.frombuffer(file.read(), dtype=torch.uint8))
    except RuntimeError:    # the file is damaged, or this torchvision was built without libjpeg
        file.seek(0)
        return None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes a decoded image upright, or None. PIL's `exif_transpose` fails on damaged metadata."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))       # type: ignore[arg-type]
    except Exception:       # damaged metadata can raise nearly anything, though the image itself is intact
        return None


@contextmanager
def seeded(key: SampleKey, numpy: bool = True) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's CPU generators are seeded by (seed, epoch, position). Afterwards their states are
    restored, except in a worker, where nothing else draws: it saves 0.15 ms.

    numpy: False if nothing is drawn from numpy's, whose seeding takes longest."""
    keep = get_worker_info() is None
    states: Any = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if keep else ()
    words = np.random.SeedSequence([key.seed, key.epoch, key.position]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    if numpy:
        np.random.seed(words[1:2].view(np.uint32))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would also reseed the GPUs
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


def _print_line(line: str) -> None:
    """Print on stderr in a single write, because loader processes write there at the same time. `say` prints in rank 0 only."""
    with readers_may_leave():
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


class ImageSet(Dataset):
    """(image float32 [3, H, W], target) pairs of a split.

    Training takes a `SampleKey` (or an int: unseeded). An unreadable image is replaced by another one, chosen by a hash of the
    key; in evaluation it is zeros with target -1. `unreadable` (uint8 [N], in shared memory) is 1 for each image that this
    process or one of its workers could not read, `named` for each that has been reported.

    In an epoch only the first draw of an unreadable image reports it, whichever process and worker it falls to. An unreadable
    replacement is reported by its own draw, or by `Loaders.gather_unreadable_train`.

    Raises UnreadableData for an unreadable image with --strict-data, else if TRIES replacements cannot be read either.
    """

    is_stream = False   # whether the images come in the stream's order, not by index
    draws_from_numpy = True     # as timm's RandAugment and AugMix do

    def __init__(self, split: Split, is_train: bool, args: Namespace):
        self.images, self.targets, self.classes, self.note = split
        self.is_train = is_train
        self.input_size = args.input_size
        # With this many pixels a side, the smallest crop (SMALLEST_CROP of the area) still has the input's resolution. Evaluation
        # decodes at full size, as published figures do.
        min_side = math.ceil(max(to_2tuple(args.input_size)) / math.sqrt(SMALLEST_CROP)) if is_train else 0
        self.how: dict[str, Any] = {"min_side": min_side, "upright": bool(args.exif_orientation)}
        self.transform: Any = build_transform(is_train, args)
        self.spare_first = args.resplit
        self.strict = args.strict_data
        self.quiet = False  # count unreadable images without reporting them
        try:
            self.marks = torch.zeros(2, len(self.images), dtype=torch.uint8).share_memory_()
            self.scale_reported = torch.zeros(1, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise UserError(explain_machine_error(error) or f"no memory can be shared ({error}): {MORE_SHARED_MEMORY}") from error
        self.unreadable, self.named = self.marks
        if dist.is_initialized() and dist.get_rank():
            self.scale_reported[0] = 1      # rank 0 reports it

    def __len__(self) -> int:
        return len(self.images)

    def with_crop(self, crop: Any) -> "ImageSet":
        """The same images, with the same marks, through `transforms.build_crop`."""
        other = copy(self)
        other.transform, other.draws_from_numpy, other.how = crop, False, {**self.how, "tensor": crop.takes_tensors}
        return other

    def __getitem__(self, key: SampleKey | int) -> tuple[torch.Tensor, int]:
        if not self.is_train:
            image = self._load(key)     # type: ignore[arg-type]  # no SampleKey in evaluation
            if image is None:
                return torch.zeros(3, *to_2tuple(self.input_size)), -1
            return self.transform(image), int(self.targets[key])
        if not isinstance(key, SampleKey):
            index, image = self._load_or_replace(key, [key])
            return self.transform(image), int(self.targets[index])
        # later repeats, and the draws that fill up the last positions, leave the report to the first draw
        first = key.repeat == 0 and key.position < len(self)
        index, image = self._load_or_replace(key.index, key[1:], name=first)
        with seeded(key, self.draws_from_numpy):
            image = self.transform(image, erase=not (self.spare_first and key.repeat == 0))
        return image, int(self.targets[index])

    def _load(self, index: int, name: bool = True) -> Any:
        """The image, or None if it cannot be read."""
        try:
            image = self.images.load(index, **self.how)
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise nearly anything for a broken file
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # the machine's fault, not the file's
            if self.strict:     # not counted, so that this sentence comes before that of too many unreadable images
                raise UnreadableData(f"the image {self.shown(index)} cannot be read ({_reason(error)}): repair or remove "
                                     "it, or leave out --strict-data") from None
            self.unreadable[index] = 1
            if name and not self.quiet:
                self.name_unreadable(index, _reason(error))
            return None
        self._report_scale(index, image)
        return image

    def _report_scale(self, index: int, image: Any) -> None:
        white = image.info.get(GREY_SCALE) if isinstance(image, Image.Image) else None
        if isinstance(white, int) and not self.scale_reported[0]:       # an entry of this name in a file would be a str
            self.scale_reported[0] = 1
            _print_line("32-bit grey images are scaled: white is the smallest of 1 (floating point), 255 and 65535 that no value "
                        f"of the image exceeds. The first is {printable(self.images.name(index))} (0 to {white})")

    def name_unreadable(self, index: int, reason: str) -> None:
        if not self.named[index]:
            self.named[index] = 1
            _print_line(f"Skipping an unreadable image: {printable(self.images.name(index))} ({reason})")

    def shown(self, *indices: int) -> str:
        """The images' names, for a message."""
        return ", ".join(printable(self.images.name(index), 360 // len(indices)) for index in indices)

    def count_unreadable(self) -> int:
        """The number of images that this process, or any that it has shared marks with, could not read so far."""
        # numpy, because this runs at every step: 0.1 ms for ImageNet's 1.3 million images where PyTorch takes 0.5
        return int(np.count_nonzero(self.unreadable.numpy().view(bool)))

    def _load_or_replace(self, index: int, key: tuple[int, ...] | list[int], name: bool = True) -> tuple[int, Any]:
        image = self._load(index, name)
        if image is not None:
            return index, image
        for other in np.random.default_rng([*key, index]).integers(len(self), size=TRIES).tolist():
            image = self._load(other, name=False)
            if image is not None:
                return other, image
        raise UnreadableData(f"{self.shown(index)} and {TRIES} other training images cannot be read: "
                             "check the folder behind --data-path")
