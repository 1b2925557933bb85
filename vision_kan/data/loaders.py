"""The loaders of a run, and its count of unreadable images."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vision_kan.common.errors import UserError
from vision_kan.data.images import ImageSet, SampleKey

FEW_UNREADABLE = 3      # this many are accepted whatever their share, except with --max-unreadable 0


@dataclass
class Loaders:
    """The loaders of a run. `train` and `train_sampler` are None with --eval.

    train yields (images float32 [B, 3, H, W], targets int64 [B]) without the last incomplete batch. val yields the same, every
    image once (over all ranks with --dist-eval), with target -1 for an unreadable one.
    """
    train: Any              # DataLoader of an ImageSet, or device's TrainLoader or AugmentingLoader
    val: Any                # DataLoader of an ImageSet, or device.EvalLoader
    train_sampler: Any      # RASampler
    data_set: str
    nb_classes: int
    class_names: list[str]
    max_unreadable: float = 0.01
    device: torch.device = torch.device("cpu")

    def gather_unreadable_train(self) -> int:
        """The number of training images that any process could not read so far; reports those not reported yet. A collective:
        all processes call it at the same time."""
        if self.train is None:
            return 0
        self._share_marks()
        return self.train.dataset.count_unreadable()

    def _share_marks(self) -> None:
        """Merge the marks of all processes: what any of them could not read, and what any has reported. A collective."""
        data = [loader.dataset for loader in (self.train, self.val) if loader is not None]      # an empty loader is falsy
        marks = torch.cat([images.marks for images in data], 1).to(self.device)
        if dist.is_initialized():
            dist.all_reduce(marks, dist.ReduceOp.MAX)
        for images, (unreadable, named) in zip(data, marks.cpu().bool().split([len(images) for images in data], 1)):
            images.unreadable[unreadable] = 1       # write ones only: a worker may set others meanwhile
            images.named[named] = 1
            for index in (unreadable & ~named).nonzero().flatten().tolist() if images.is_train else []:
                if not dist.is_initialized() or dist.get_rank() == 0:
                    images.name_unreadable(index, "drawn in place of another one")
                images.named[index] = 1

    def gather_unreadable_state(self) -> list[int]:
        """Indices of the training images that any process could not read so far, for a checkpoint. A collective."""
        self._share_marks()
        return self.train.dataset.unreadable.nonzero().flatten().tolist()

    def load_unreadable_state(self, indices: list[int]) -> None:
        """Count the checkpoint's unreadable images from the start, without reporting them again. Each is tried once more: its
        file may have been repaired or replaced."""
        data = self.train.dataset
        if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
            raise UserError("the checkpoint's list of unreadable images is not a list of numbers: take another checkpoint")
        for index in indices:
            if 0 <= index < len(data) and data._load(index, name=False) is None:
                data.named[index] = 1

    def check_unreadable(self, gather: bool = False) -> None:
        """Raises UserError if this process knows of more unreadable training or validation images than --max-unreadable allows.
        FEW_UNREADABLE are too many only if the limit is 0.

        gather: first merge what all processes could not read; a collective then."""
        if gather:
            self._share_marks()
        for half, loader in (("training", self.train), ("validation", self.val)):
            if loader is None:
                continue
            data, limit = loader.dataset, self.max_unreadable
            count = data.count_unreadable()
            if count / len(data) > limit and (count > FEW_UNREADABLE or not limit):
                some = data.unreadable.nonzero().flatten()[:3].tolist()
                raise UserError(f"{count} of the {len(data)} {half} images ({100 * count / len(data):.2g}%) cannot be read, more "
                                f"than --max-unreadable {limit:g} allows: repair or remove them, or raise the limit "
                                f"({data.shown(*some)}{', ...' if count > 3 else ''})")


def validation_images(loaders: Loaders, size: int = 64) -> torch.Tensor:
    """[B, 3, H, W]: up to `size` readable validation images, evenly spaced in the data set. Uses no random numbers and no loader
    processes. Raises UserError if none can be read."""
    data: ImageSet = loaders.val.dataset
    return readable_images(data, evenly_spaced(range(len(data)), size))


def evenly_spaced(items: Sequence, count: int) -> list:
    """At most `count` of the items, over their whole length."""
    count = min(count, len(items))
    return [items[len(items) * i // count] for i in range(count)]


def readable_images(data: ImageSet, keys: Sequence[SampleKey | int]) -> torch.Tensor:
    """[B, 3, H, W]: the images of these keys that can be read. Raises UserError if none can."""
    readable = [image for image, target in map(data.__getitem__, keys) if target >= 0]
    if not readable:
        raise UserError("no image to calibrate with can be read: check the data folder")
    return torch.stack(readable)
