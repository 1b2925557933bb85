"""Images by number: decoded, augmented, seeded one by one; unreadable ones are replaced and counted."""
import errno
import math
import os
import random
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.layers import to_2tuple
from torch.utils.data import Dataset, get_worker_info

from vision_kan.common.console import readers_may_leave
from vision_kan.common.errors import UnreadableData, UserError
from vision_kan.common.text import printable
from vision_kan.data.folders import formats
from vision_kan.data.transforms import GREY_SCALE, build_transform, to_rgb
from vision_kan.data.workers import MORE_SHARED_MEMORY, machine_sentence


class SampleKey(NamedTuple):
    """One draw of the training order. (seed, epoch, position) seeds its augmentation, so the result
    depends neither on the worker that makes it nor on how many workers or processes there are."""
    index: int      # type: ignore[assignment]  # of the image in the data set; a tuple has a method of the name
    seed: int
    epoch: int
    position: int   # in the epoch's order over all processes
    repeat: int     # which repeat of this image: 0 .. num_repeats - 1


SMALLEST_CROP = 0.08    # share of an image's area in a random resized crop, timm's and DeiT's
# An image of more pixels counts as unreadable. Decoded it takes 4 bytes a pixel, while its mode is converted 8: 1.4 GB in each
# worker that has one at hand. The limit is PIL's own, which holds all that cameras take but a few phones' 200 megapixels; PIL's
# warning from half of it on is for programs that decode what strangers send.
MAX_PIXELS = 178_956_970
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
    drawn in place of another one is left to its own draw, or to `Loaders.gather_unreadable_train`.

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
            raise UserError(machine_sentence(error) or f"no memory can be shared ({error}): {MORE_SHARED_MEMORY}") from error
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
