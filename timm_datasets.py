"""Data sets under the names of `timm.data.create_dataset`: torch/ and hfds/, which are read by number like any other, and
hfids/ and wds/, which are streams. No file of theirs is executed: no loading scripts, no `pipe:` shards."""
import logging
import multiprocessing
import os
import random
import re
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from importlib.util import module_from_spec
from io import BytesIO
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_dataset
from timm.layers import to_2tuple
from torch.utils.data import get_worker_info

from checkpoints import one_line
from datasets import (
    TRIES,
    ArrayImages,
    FileImages,
    ImageSet,
    Split,
    as_in_checkpoint,
    data_root,
    decode_image,
    load_image,
    one_half,
    seeded,
)
from folders import class_folders, find_labelled, is_hidden, visible
from samplers import SampleKey
from utils import UnreadableData, UserError

SHUFFLE = 2048      # undecoded records among which a stream's order is drawn
VALIDATION = ("validation", "val", "valid", "test")     # names of a split to evaluate on, in this order
PACKAGES = {"hfds": ("datasets", 4), "hfids": ("datasets", 4), "wds": ("webdataset", 0)}      # from 4 on without scripts
STREAM = ("is read as a stream: the order of its images depends on --num_workers and the number of processes; a run that is "
          "resumed at the end of an epoch goes on exactly only with the same of both, and one resumed within an epoch shuffles "
          "that epoch anew, so that some of its images come twice and others not at all; each draw is another image, whatever "
          "--repeated-aug says")


def build(is_train: bool, args: Namespace, data_set: str, class_names: list[str] | None) -> tuple[ImageSet, int]:
    """`datasets.build_dataset` for KIND/NAME. Raises UserError for a package that is missing and whatever its library says."""
    kind, _, name = data_set.partition("/")
    package, least = PACKAGES.get(kind, ("", 0))
    if package and (not _spec(package) or int(version(package).split(".")[0]) < least):
        raise UserError(f"--data-set {data_set} needs the package {package}{f' {least} or newer' if least else ''}: "
                        f"pip install '{package}{f'>={least}' if least else ''}'")
    if package == "datasets" and args.num_workers and multiprocessing.get_start_method() != "fork":
        raise UserError(f"--data-set {data_set}: on this system loader processes cannot tell the package {package} from this "
                        "program's module of that name: give --num_workers 0")
    if kind in ("hfids", "wds"):
        return _build_stream(is_train, args, data_set, class_names)
    split = (_torch if kind == "torch" else _hfds)(is_train, args, name)
    if not len(split.images):
        raise UserError(f"--data-set {data_set} has no images to {'train on' if is_train else 'evaluate'}: check --data-split")
    if class_names:
        split = as_in_checkpoint(split, args, class_names)
    return ImageSet(split, is_train, args), len(split.classes)


def _opened(args: Namespace, open_it: Callable[[], Any]) -> Any:
    """What the library opens, or its error in one sentence."""
    try:
        return open_it()
    except UserError:
        raise
    except Exception as error:      # the libraries raise nearly anything
        raise UserError(f"--data-set {args.data_set} cannot be opened ({type(error).__name__}: {one_line(error)}): check the "
                        "name, --data-path, --data-split and the connection") from error


def _part(args: Namespace, is_train: bool) -> str | None:
    """The half that --data-split names."""
    return args.data_split and args.data_split[0 if is_train else 1]


def _held_out(is_train: bool, args: Namespace, names: list[str], targets: np.ndarray, classes: list[str]
              ) -> tuple[np.ndarray, str]:
    """Indices of one half by --val-split, and a sentence."""
    if not args.val_split:
        raise UserError(f"--data-set {args.data_set} has no validation images of its own: name the two parts with --data-split "
                        "TRAIN VAL, or hold some out with --val-split 0.2")
    chosen, note = one_half(is_train, args, names, targets, classes)
    return np.flatnonzero(chosen), f"{args.data_set}: {note}"


def _numbered(args: Namespace) -> list[str]:
    if not args.num_classes:
        raise UserError(f"--data-set {args.data_set} does not tell its classes: give --num-classes N")
    return [str(number) for number in range(args.num_classes)]


# ---------------------------------------------------------------- torch/
def _torch(is_train: bool, args: Namespace, name: str) -> Split:
    """torchvision's data sets that timm knows. Their pickles are checked against an MD5 or read as tensors only."""
    root = os.path.abspath(data_root(args))

    own = name in ("folder", "image_folder")        # where a part is timm says, what of it is read `folders`

    def opened(part: str) -> Any:
        options: dict[str, Any] = {"is_valid_file": lambda _: False, "allow_empty": True} if own else {"download": args.download}
        return _opened(args, lambda: create_dataset(f"torch/{name}", root, part, trust_remote_code=False, **options))

    data = opened(_part(args, is_train) or ("train" if is_train else "validation"))
    if own:
        data.classes = class_folders(data.root)
        data.samples = find_labelled(data.root, data.classes)
        if empty := set(range(len(data.classes))) - {target for _, target in data.samples}:
            raise UserError(f"the class folder {os.path.join(data.root, data.classes[min(empty)])} holds no image: fill it or "
                            "remove it")
    samples = getattr(data, "samples", None) or getattr(data, "imgs", None)
    if samples is None and hasattr(data, "all_categories"):     # iNaturalist
        samples = [(os.path.join(data.root, data.all_categories[c], file), c) for c, file in data.index]
    named: list[Any] = getattr(data, "classes", None) or getattr(data, "all_categories", [])
    classes = [name if isinstance(name, str) else ", ".join(name) for name in named]        # ImageNet's have several
    if samples is None:
        pixels = np.asarray(data.data)
        pixels = pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=3)
        targets = np.asarray(data.targets, dtype=np.int64).reshape(len(pixels), -1)[:, 0]
        return Split(ArrayImages(pixels), targets, classes)
    samples = samples if own else visible(root, samples)
    paths, targets = [path for path, _ in samples], np.array([target for _, target in samples], dtype=np.int64)
    if not own or data.root != root:
        return Split(FileImages(paths), targets, classes)
    # timm takes the whole folder where it has no such part
    chosen, note = _held_out(is_train, args, [os.path.relpath(path, root) for path in paths], targets, classes)
    return Split(FileImages([paths[index] for index in chosen]), targets[chosen], classes, note)


# ---------------------------------------------------------------- hfds/
class RecordImages:
    """Images of a Hugging Face data set, whose tables stay on the disk: records `chosen`."""

    def __init__(self, name: str, data: Any, key: str, chosen: np.ndarray):
        self.title, self.data, self.key, self.chosen = name, data, key, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        return f"{self.title}, record {self.chosen[index]}"

    def load(self, index: int, enough: int = 0, upright: bool = False) -> Image.Image:
        return _decoded(self.data[int(self.chosen[index])][self.key], enough, upright)


def _decoded(image: dict[str, Any] | None, enough: int, upright: bool) -> Image.Image:
    """Of `datasets.Image(decode=False)`: {"bytes", "path"}."""
    if image and image.get("bytes"):
        return decode_image(BytesIO(image["bytes"]), enough, upright)
    if image and image.get("path"):
        return load_image(image["path"], enough, upright)
    raise ValueError("no image in this record")


def _hfds(is_train: bool, args: Namespace, name: str) -> Split:
    """A data set of the hub, a folder of images or Parquet files, or one that `save_to_disk` has written."""
    parts = _opened(args, lambda: _parts_of(name, args))
    train, val = args.data_split or ("train", next((part for part in VALIDATION if part in parts), None))
    part = train if is_train or val is None else val
    if part not in parts:
        raise UserError(f"--data-set {args.data_set} has no part {part!r} but {', '.join(parts)}: choose with --data-split TRAIN "
                        "VAL")
    data = _opened(args, parts[part])
    image, label = _columns(data.features, args)
    data = data.cast_column(image, _datasets().Image(decode=False))
    targets = data.select_columns(label).with_format("numpy")[:][label]
    if not np.issubdtype(targets.dtype, np.integer):
        raise UserError(f"--data-set {args.data_set}: the classes in {label!r} are no whole numbers: write the data with "
                        f"class_encode_column({label!r})")
    classes = list(getattr(data.features[label], "names", ())) or _numbered(args)
    strange = targets[(targets < 0) | (targets >= len(classes))]
    if len(strange):
        raise UserError(f"--data-set {args.data_set}: {part} has images of no class (such as {strange[0]} of 0 to "
                        f"{len(classes) - 1}): choose another part with --data-split TRAIN VAL")
    title, chosen, note = f"{args.data_set} {part}", np.arange(len(data)), ""
    if val is None:
        chosen, note = _held_out(is_train, args, [str(number) for number in chosen], targets, classes)
    elif not is_train:
        note = f"{args.data_set}: {train} to train on, {val} ({len(data)} images) to evaluate"
    return Split(RecordImages(title, data.select_columns(image), image, chosen), targets[chosen].astype(np.int64), classes, note)


def _spec(package: str) -> ModuleSpec | None:
    """Where a package is, leaving out this project's own modules."""
    here = os.path.dirname(os.path.abspath(__file__))
    return PathFinder.find_spec(package, [place for place in sys.path if os.path.abspath(place) != here])


def _datasets() -> Any:
    """Hugging Face's package, imported at its first use: it takes a second, and need not be there. This project's module has the
    same name; from here on it means the package, whose parts import each other by it, and what was imported from the module
    stays."""
    known = sys.modules["datasets"]
    if hasattr(known, "load_dataset"):
        return known
    spec = _spec("datasets")
    assert spec is not None and spec.loader is not None     # `build` has looked
    package = sys.modules["datasets"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        sys.modules["datasets"] = known
        raise
    return package


def _parts_of(name: str, args: Namespace) -> dict[str, Callable[[], Any]]:
    """The parts of a data set: name -> what opens it."""
    datasets = _datasets()
    place, cache = os.path.expanduser(name), os.path.expanduser(args.data_path) or None
    if any(os.path.isfile(os.path.join(place, file)) for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(place)
        saved = saved if isinstance(saved, dict) else {"train": saved}
        return {part: partial(saved.__getitem__, part) for part in saved}
    place = place if os.path.exists(place) else name
    return {part: partial(datasets.load_dataset, place, split=part, cache_dir=cache)
            for part in datasets.get_dataset_split_names(place)}


def _columns(features: Any, args: Namespace) -> tuple[str, str]:
    """The columns of the image and of the class: --input-key and --target-key, or the only ones that can be."""
    found = []
    for flag, key, kind in (("--input-key", args.input_key, "Image"), ("--target-key", args.target_key, "ClassLabel")):
        fitting = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if key is None and len(fitting) != 1:
            raise UserError(f"--data-set {args.data_set} has {len(fitting)} columns of the kind {kind} among "
                            f"{', '.join(features)}: name the right one with {flag}")
        if key is not None and key not in features:
            raise UserError(f"{flag} {key}: --data-set {args.data_set} has no such column but {', '.join(features)}")
        found.append(key or fitting[0])
    return found[0], found[1]


# ---------------------------------------------------------------- streams: hfids/ and wds/
class Record(NamedTuple):
    name: str
    image: dict[str, Any]   # as `_decoded` takes it
    target: int


def _is_data(member: str) -> bool:
    return not any(map(is_hidden, member.split("/")[1 if member.startswith("./") else 0:]))


class WebDataset:
    """Tar files of a WebDataset: local ones, since the library would hand other addresses to a shell."""

    def __init__(self, args: Namespace, is_train: bool):
        root = os.path.abspath(data_root(args))
        part, length = _told(_part(args, is_train) or ("train" if is_train else "validation"))
        logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)       # there need not be an info file
        reader = _opened(args, lambda: create_dataset("wds/", root, part, num_samples=length)).reader
        self.files = [os.path.join(root, file) for file in reader.split_info.filenames]
        for file in self.files:
            if not os.path.isfile(file):
                raise UserError(f"--data-set {args.data_set}: the shard {file} is no file here: check --data-path and "
                                "--data-split, and fetch remote shards first")
        self.keys = (args.input_key or "jpg;jpeg;png;webp").split(";"), args.target_key or "cls"
        self.length, self.classes = reader.num_samples, None

    def records(self, seed: int | None, part: int, parts: int) -> Iterator[Record]:
        import webdataset
        files = list(self.files)
        if seed is not None:
            random.Random(seed).shuffle(files)
        by_file = len(files) >= parts
        samples = iter(webdataset.DataPipeline(webdataset.SimpleShardList(files[part::parts] if by_file else files),
                                               webdataset.tarfile_to_samples(handler=webdataset.reraise_exception,
                                                                             select_files=_is_data)))
        if not by_file:
            samples = islice(samples, part, None, parts)
        if seed is not None:
            samples = webdataset.shuffle(SHUFFLE, initial=SHUFFLE, rng=random.Random(seed + part + 1))(samples)
        pictures, label = self.keys
        for sample in samples:
            name = f"{sample['__url__']}, {sample['__key__']}"
            image = next((sample[key] for key in pictures if key in sample), None)
            try:
                target = int(sample[label])
            except (KeyError, ValueError) as error:
                raise UnreadableData(f"{name} has no class under {label!r} but {', '.join(map(str, sample))[:200]}: name it with "
                                     "--target-key") from error
            yield Record(name, {"bytes": image}, target)


class HuggingFaceStream:
    """A Hugging Face data set that is read while it arrives."""

    def __init__(self, args: Namespace, is_train: bool):
        name = args.data_set.partition("/")[2]
        part, length = _told(_part(args, is_train) or ("train" if is_train else "validation"))
        place, cache = os.path.expanduser(name), os.path.expanduser(args.data_path) or None
        data = _opened(args, lambda: _datasets().load_dataset(place if os.path.exists(place) else name, split=part,
                                                              streaming=True, cache_dir=cache))
        features = data.features
        if not features:
            raise UserError(f"--data-set {args.data_set} does not tell its columns before it is read: take hfds/{name}")
        self.image, self.label = _columns(features, args)
        self.data = data.cast_column(self.image, _datasets().Image(decode=False))
        told = (data.info.splits or {}).get(part)
        self.length = length or (told.num_examples if told else 0)
        self.classes = list(getattr(features[self.label], "names", ())) or None
        self.title = f"{args.data_set} {part}"

    def records(self, seed: int | None, part: int, parts: int) -> Iterator[Record]:
        data, by_file = self.data, self.data.num_shards >= parts
        if by_file and parts > 1:
            data = data.shard(parts, part)
        if seed is not None:
            data = data.shuffle(seed, buffer_size=SHUFFLE)
        # `iter` gives all of it, where a plain loop would share it out among the loader processes
        rows = (row for batch in data.iter(1) for row in [{key: value[0] for key, value in batch.items()}])
        for row in islice(rows, 0 if by_file else part, None, 1 if by_file else parts):
            image = row[self.image]
            name = image and image.get("path") or f"an image of {zlib.crc32(image and image.get('bytes') or b''):08x}"
            target = row[self.label]
            yield Record(f"{self.title}, {name}", image, -1 if target is None else int(target))


def _told(part: str) -> tuple[str, int | None]:
    """'NAME|5000' -> name and number of images."""
    name, bar, length = part.partition("|")
    if bar and not re.fullmatch("[1-9][0-9]{0,11}", length):
        raise UserError(f"--data-split {part}: what follows | must be the number of images")
    return name, int(length) if bar else None


class StreamImages:
    """The image of a stream that is at hand; unreadable ones are remembered by a number made from their name."""

    def __init__(self, stream: WebDataset | HuggingFaceStream, title: str):
        self.stream, self.title = stream, title
        self.at_hand: Record | None = None
        self.names: dict[int, str] = {}

    def __len__(self) -> int:
        return self.stream.length

    def name(self, index: int) -> str:
        return self.names.get(index, f"an image of {self.title}")

    def take(self, record: Record) -> int:
        self.at_hand, index = record, zlib.crc32(record.name.encode(errors="surrogateescape")) % len(self)
        self.names = {index: record.name}
        return index

    def load(self, index: int, enough: int = 0, upright: bool = False) -> Image.Image:
        if self.at_hand is None:
            raise ValueError("a stream is not read by number")
        return _decoded(self.at_hand.image, enough, upright)


class StreamSet(ImageSet):
    """(image float32 [3, S, S], target) pairs of a stream.

    In training a key says how an image is augmented, and the next one of this process's and worker's share of the stream is
    taken. In evaluation every loader process reads the records in their order and decodes those that it is asked for: each
    counts once. `targets` has the target of each of the stream's classes.

    Raises UnreadableData also for a stream whose length or classes are not those that are told."""
    is_stream = True
    images: StreamImages

    def __init__(self, split: Split, is_train: bool, args: Namespace):
        super().__init__(split, is_train, args)
        self.batch_size = args.batch_size
        self.place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.records: Iterator[Record] = iter(())
        self.at: tuple[int, ...] = ()       # this process, epoch and position or index

    def __getitem__(self, key: SampleKey | int) -> tuple[torch.Tensor, int]:
        if not isinstance(key, SampleKey):
            return self._evaluated(key)
        if self.at[:2] != (os.getpid(), key.epoch) or key.position <= self.at[2]:
            self.records = self._shuffled(key)
        self.at = (os.getpid(), key.epoch, key.position)
        for record in islice(self.records, TRIES):
            target = self._target(record)
            image = self._load(self.images.take(record))
            if image is not None:
                with seeded(key):
                    return self.transform(image), target
        raise UnreadableData(f"{TRIES} images in a row of {self.images.title} cannot be read: check the data")

    def _shuffled(self, key: SampleKey) -> Iterator[Record]:
        """This worker's share again and again, each time in another order."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        (rank, processes), parts = self.place, self.place[1] * workers
        # where all of them begin in the epoch: they must put the shards into one order, another than before a resume
        begin = key.position - rank - processes * self.batch_size * number
        for again in count():
            seed, empty = np.random.SeedSequence([key.seed, key.epoch, max(0, begin), again]).generate_state(1), True
            for record in self._read(int(seed[0]), rank * workers + number, parts):
                empty = False
                yield record
            if empty:
                raise UnreadableData(f"{self.images.title} has fewer images than loader processes: lower --num_workers")

    def _read(self, seed: int | None, part: int, parts: int) -> Iterator[Record]:
        try:
            yield from self.images.stream.records(seed, part, parts)
        except UserError:
            raise
        except Exception as error:      # the libraries raise nearly anything for a damaged file
            raise UnreadableData(f"{self.images.title} cannot be read on ({type(error).__name__}: {one_line(error)}): check its "
                                 "files and the connection") from error

    def _evaluated(self, index: int) -> tuple[torch.Tensor, int]:
        if self.at[:1] != (os.getpid(),) or index <= self.at[1]:
            self.records, self.at = self._read(None, 0, 1), (os.getpid(), -1)
        record = next(islice(self.records, index - self.at[1] - 1, None), None)
        self.at = (os.getpid(), index)
        if record is None or index == len(self) - 1 and next(self.records, None) is not None:
            raise UnreadableData(f"{self.images.title} has {'fewer' if record is None else 'more'} images than the {len(self)} "
                                 "that are told: put the right number after the | of --data-split")
        target = self._target(record)
        image = self._load(self.images.take(record))
        if image is None:
            return torch.zeros(3, *to_2tuple(self.input_size)), -1
        return self.transform(image), target

    def _target(self, record: Record) -> int:
        if not 0 <= record.target < len(self.targets):
            raise UnreadableData(f"{record.name} is of class {record.target}, and there are {len(self.targets)}, from 0: give "
                                 "the right --num-classes")
        return int(self.targets[record.target])


def _build_stream(is_train: bool, args: Namespace, data_set: str, class_names: list[str] | None) -> tuple[ImageSet, int]:
    if args.resplit:
        raise UserError(f"--resplit spares the first repeat of each image, and --data-set {data_set} has no repeats: leave it "
                        "out")
    stream = (WebDataset if data_set.startswith("wds/") else HuggingFaceStream)(args, is_train)
    if not stream.length:
        raise UserError(f"--data-set {data_set} does not tell how many images it has: give --data-split 'TRAIN|NUMBER' "
                        "'VAL|NUMBER'")
    names = class_names if class_names and args.num_classes in (None, len(class_names)) else None
    classes = stream.classes or names or _numbered(args)
    note = f"warning: --data-set {data_set} {STREAM}" if is_train else ""
    split = Split(StreamImages(stream, data_set), np.arange(len(classes)), classes, note)
    if class_names:
        split = as_in_checkpoint(split, args, class_names)
    return StreamSet(split, is_train, args), len(split.classes)
