"""Streamed data sets, which are read in their own order."""
import logging
import os
import random
import re
import zlib
from argparse import Namespace
from collections.abc import Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_dataset
from timm.layers import to_2tuple
from torch.utils.data import get_worker_info

from vision_kan.common.errors import UnreadableData, UserError, one_line
from vision_kan.data.folders import is_hidden
from vision_kan.data.hub import (
    PicklesHuggingFace,
    decode_record,
    find_columns,
    huggingface_datasets,
    open_with_library,
    split_name,
)
from vision_kan.data.images import TRIES, ImageSet, SampleKey, Split, seeded
from vision_kan.data.names import data_root

SHUFFLE_BUFFER = 2048       # undecoded records
STREAM_NOTE = ("is read as a stream: the order of its images depends on --num_workers and the number of processes; a run that is "
               "resumed at the end of an epoch continues exactly only with the same of both, and one resumed within an epoch "
               "shuffles that epoch anew, so that some of its images come twice and others not at all; --repeated-aug has no "
               "effect")


class Record(NamedTuple):
    name: str
    image: dict[str, Any]   # for `decode_record`
    target: int


def _is_data(member: str) -> bool:
    return not any(map(is_hidden, member.split("/")[1 if member.startswith("./") else 0:]))


class WebDataset:
    """Local tar files of a WebDataset. Remote ones are refused: the library would pass their addresses to a shell."""

    def __init__(self, args: Namespace, is_train: bool):
        root = os.path.abspath(data_root(args))
        part, length = parse_split(split_name(args, is_train) or ("train" if is_train else "validation"))
        logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)       # it warns of a missing, optional file
        reader = open_with_library(args, lambda: create_dataset("wds/", root, part, num_samples=length)).reader
        self.files = [os.path.join(root, file) for file in reader.split_info.filenames]
        for file in self.files:
            if not os.path.isfile(file):
                raise UserError(f"--data-set {args.data_set}: the shard {file} is not a local file: check --data-path and "
                                "--data-split, and fetch remote shards first")
        self.keys = (args.input_key or "jpg;jpeg;png;webp").split(";"), args.target_key or "cls"
        self.length, self.classes = reader.num_samples, None

    def records(self, seed: int | None, part: int, parts: int) -> Iterator[Record]:
        """Share `part` of `parts` of the records, shuffled by `seed` if given: whole shards if there are enough, else every
        parts-th record."""
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
            samples = webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(seed + part + 1))(samples)
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


class HuggingFaceStream(PicklesHuggingFace):
    """A Hugging Face data set, read while it is downloaded."""

    def __init__(self, args: Namespace, is_train: bool):
        name = args.data_set.partition("/")[2]
        part, length = parse_split(split_name(args, is_train) or ("train" if is_train else "validation"))
        place, cache = os.path.expanduser(name), os.path.expanduser(args.data_path) or None
        data = open_with_library(args, lambda: huggingface_datasets().load_dataset(
            place if os.path.exists(place) else name, split=part, streaming=True, cache_dir=cache))
        features = data.features
        if not features:
            raise UserError(f"--data-set {args.data_set} does not declare its columns before it is read: take hfds/{name}")
        self.image, self.label = find_columns(features, args)
        self.data = data.cast_column(self.image, huggingface_datasets().Image(decode=False))
        info = (data.info.splits or {}).get(part)
        self.length = length or (info.num_examples if info else 0)
        self.classes = list(getattr(features[self.label], "names", ())) or None
        self.title = f"{args.data_set} {part}"

    def records(self, seed: int | None, part: int, parts: int) -> Iterator[Record]:
        """As `WebDataset.records`."""
        data, by_file = self.data, self.data.num_shards >= parts
        if by_file and parts > 1:
            data = data.shard(parts, part)
        if seed is not None:
            data = data.shuffle(seed, buffer_size=SHUFFLE_BUFFER)
        # `iter` yields all records; a `for` loop would divide them among the loader processes once more
        rows = (row for batch in data.iter(1) for row in [{key: value[0] for key, value in batch.items()}])
        for row in islice(rows, 0 if by_file else part, None, 1 if by_file else parts):
            image = row[self.image]
            name = image and image.get("path") or f"an image of {zlib.crc32(image and image.get('bytes') or b''):08x}"
            target = row[self.label]
            yield Record(f"{self.title}, {name}", image, -1 if target is None else int(target))


def parse_split(part: str) -> tuple[str, int | None]:
    """'NAME|5000' -> name and number of images."""
    name, bar, length = part.partition("|")
    if bar and not re.fullmatch("[1-9][0-9]{0,11}", length):
        raise UserError(f"--data-split {part}: what follows | must be the number of images")
    return name, int(length) if bar else None


class StreamImages:
    """The current image of a stream. Its index, by which unreadable images are marked, is a hash of its name."""

    def __init__(self, stream: WebDataset | HuggingFaceStream, title: str):
        self.stream, self.title = stream, title
        self.current: Record | None = None
        self.names: dict[int, str] = {}

    def __len__(self) -> int:
        return self.stream.length

    def name(self, index: int) -> str:
        return self.names.get(index, f"an image of {self.title}")

    def take(self, record: Record) -> int:
        """Make `record` the current image. Returns its index."""
        self.current, index = record, zlib.crc32(record.name.encode(errors="surrogateescape")) % len(self)
        self.names = {index: record.name}
        return index

    def load(self, index: int, **how) -> Image.Image | torch.Tensor:
        if self.current is None:
            raise ValueError("a stream cannot be read by index")
        return decode_record(self.current.image, **how)


class StreamSet(ImageSet):
    """(image float32 [3, S, S], target) pairs of a stream.

    In training the key seeds the augmentation only; the image is the next one of this worker's share of the stream. In evaluation
    every worker reads all records in their order and decodes those that it is asked for, so that each counts once. `targets` maps
    the stream's classes to the model's.

    Raises UnreadableData also for a stream whose length or classes are not those declared."""
    is_stream = True
    images: StreamImages

    def __init__(self, split: Split, is_train: bool, args: Namespace):
        super().__init__(split, is_train, args)
        self.batch_size = args.batch_size
        self.place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.records: Iterator[Record] = iter(())
        self.at: tuple[int, ...] = ()       # (process, epoch, position) in training, (process, index) in evaluation

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
                with seeded(key, self.draws_from_numpy):
                    return self.transform(image), target
        raise UnreadableData(f"{TRIES} images in a row of {self.images.title} cannot be read: check the data")

    def _shuffled(self, key: SampleKey) -> Iterator[Record]:
        """This worker's share of the records, repeated without end, each time in another order."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        (rank, processes), parts = self.place, self.place[1] * workers
        # The position at which all workers begin in this epoch. It seeds the shards' order, which must be the same for all of
        # them, and another one after a resume.
        begin = key.position - rank - processes * self.batch_size * number
        for cycle in count():
            seed, empty = np.random.SeedSequence([key.seed, key.epoch, max(0, begin), cycle]).generate_state(1), True
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
            raise UnreadableData(f"{self.images.title} cannot be read any further ({type(error).__name__}: {one_line(error)}): "
                                 "check its files and the connection") from error

    def _evaluated(self, index: int) -> tuple[torch.Tensor, int]:
        if self.at[:1] != (os.getpid(),) or index <= self.at[1]:
            self.records, self.at = self._read(None, 0, 1), (os.getpid(), -1)
        record = next(islice(self.records, index - self.at[1] - 1, None), None)
        self.at = (os.getpid(), index)
        if record is None or index == len(self) - 1 and next(self.records, None) is not None:
            raise UnreadableData(f"{self.images.title} has {'fewer' if record is None else 'more'} images than the {len(self)} "
                                 "declared: put the right number after the | of --data-split")
        target = self._target(record)
        image = self._load(self.images.take(record))
        if image is None:
            return torch.zeros(3, *to_2tuple(self.input_size)), -1
        return self.transform(image), target

    def _target(self, record: Record) -> int:
        if not 0 <= record.target < len(self.targets):
            raise UnreadableData(f"{record.name} has class {record.target}, but classes go from 0 to {len(self.targets) - 1}: "
                                 "give the right --num-classes")
        return int(self.targets[record.target])
