"""What a run reads its images from, and what of it could not be read."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vision_kan.common.errors import UserError
from vision_kan.data.images import ImageSet, SampleKey

FEW_UNREADABLE = 3      # are never too many, whatever share of a small data set, but with --max-unreadable 0


@dataclass
class Loaders:
    """What a run reads its images from. `train` and `train_sampler` are None with --eval.

    train yields (images float32 [B, 3, S, S], targets int64 [B]), the last incomplete batch dropped;
    val the same, every image once (over all ranks with --dist-eval), target -1 for an unreadable one.
    """
    train: Any              # DataLoader of an ImageSet
    val: Any                # likewise
    train_sampler: Any      # RASampler
    data_set: str
    nb_classes: int
    class_names: list[str]
    max_unreadable: float = 0.01
    device: torch.device = torch.device("cpu")

    def gather_unreadable_train(self) -> int:
        """Training images that any process could not read so far. All processes ask at the same time; what has not been
        named yet is named."""
        if self.train is None:
            return 0
        self._share_marks()
        return self.train.dataset.count_unreadable()

    def unreadable_val(self) -> int:
        """Validation images that this process could not read so far."""
        return self.val.dataset.count_unreadable()

    def _share_marks(self) -> None:
        """From now on each process knows what the others could not read and have named."""
        data = [loader.dataset for loader in (self.train, self.val) if loader is not None]      # an empty shard is false
        marks = torch.cat([one.marks for one in data], 1).to(self.device)
        if dist.is_initialized():
            dist.all_reduce(marks, dist.ReduceOp.MAX)
        for one, (unreadable, named) in zip(data, marks.cpu().bool().split([len(one) for one in data], 1)):
            one.unreadable[unreadable] = 1      # no zeros are written: a worker may be at it
            one.named[named] = 1
            for index in (unreadable & ~named).nonzero().flatten().tolist() if one.is_train else []:
                if not dist.is_initialized() or dist.get_rank() == 0:
                    one.name_unreadable(index, "drawn in place of another one")
                one.named[index] = 1

    def gather_unreadable_state(self) -> list[int]:
        """Indices of the training images that any process could not read so far, for a checkpoint. All processes ask at
        the same time."""
        self._share_marks()
        return self.train.dataset.unreadable.nonzero().flatten().tolist()

    def load_unreadable_state(self, indices: list[int]) -> None:
        """Count those images from the beginning and don't name them again. They are tried once more: the files may have
        been repaired, or be others under the same numbers."""
        data = self.train.dataset
        if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
            raise UserError("the checkpoint's list of unreadable images is none: take another checkpoint")
        for index in indices:
            if 0 <= index < len(data) and data._load(index, name=False) is None:
                data.named[index] = 1

    def check_unreadable(self, together: bool = False) -> None:
        """Raises UserError where this process knows of more unreadable training or validation images than --max-unreadable
        allows. FEW_UNREADABLE are too many only where the limit is 0.

        together: all processes ask at the same time, and each knows what any of them could not read."""
        if together:
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
    """[B, 3, S, S]: so many readable validation images, if there are, spread evenly over their order. Uses no random number
    and no loader process. Raises UserError where none can be read."""
    data: Any = loaders.val.dataset
    return readable_images(data, range(0, len(data), max(1, len(data) // size))[:size])


def readable_images(data: ImageSet, keys: Sequence[SampleKey | int]) -> torch.Tensor:
    readable = [image for image, target in map(data.__getitem__, keys) if target >= 0]
    if not readable:
        raise UserError("no image to calibrate with can be read: check the data folder")
    return torch.stack(readable)
