"""Training sampler: DeiT's repeated augmentation, resumable and keyed on (seed, epoch, position).

Evaluation needs no class of its own: `range(rank, n, world_size)` is an exact shard of n images.
"""
import math
from collections.abc import Iterator, Sized

import numpy as np
import torch
from torch.utils.data import Sampler

from vision_kan.data.images import SampleKey


class RASampler(Sampler[SampleKey]):
    """Repeated augmentation ("Augment your batch", Hoffer et al. 2020) as in DeiT.

    The epoch's order repeats each image of a permutation `num_repeats` times in a row. Rank r takes the positions r, r +
    num_replicas, ... and stops after n // 256 * 256 / num_replicas of them, so an epoch is about as long as one without repeats.
    Below 256 images, where DeiT's sampler yields nothing, a rank takes ceil(n / num_replicas). With one repeat it shuffles: every
    image once, and the order wraps around to fill the last positions. The order depends on the seed and the epoch only.

    Args:
        dataset: the data set, or its length n.
        num_replicas, rank: number of processes and this one's place.
        shuffle: False keeps the data set's order.
        num_repeats: draws of an image in a row; 1 for plain shuffling.
        seed: of the permutation, mixed with the epoch.

    `len()` is the number of keys of a full epoch on this rank, whatever the position.
    """

    def __init__(self, dataset: Sized | int, num_replicas: int = 1, rank: int = 0, shuffle: bool = True,
                 num_repeats: int = 3, seed: int = 0):
        self.length = dataset if isinstance(dataset, int) else len(dataset)
        if self.length < 1 or num_repeats < 1 or not 0 <= rank < num_replicas:
            raise ValueError(f"RASampler({self.length} images, {num_replicas=}, {rank=}, {num_repeats=})")
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.num_repeats = num_repeats
        self.seed = seed
        self.epoch = 0
        self.position = 0

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Set the epoch and the position at which it begins: this rank draws position + rank, position + rank + num_replicas, ...

        position: 0 .. len(self) * num_replicas, in the order over all processes: the number of images that all of them have seen.
        So a resume neither skips nor repeats an image, even with another number of processes or another batch size."""
        self.epoch = epoch
        self.position = position

    def __len__(self) -> int:
        if self.num_repeats > 1 and self.length >= 256:
            return self.length // 256 * 256 // self.num_replicas
        return math.ceil(self.length / self.num_replicas)

    def order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This rank's draws from the position on: indices, positions and repeats, int64."""
        positions = np.arange(self.position + self.rank, len(self) * self.num_replicas, self.num_replicas)
        nth, repeats = np.divmod(positions, self.num_repeats)
        return self._permutation().numpy()[nth % self.length], positions, repeats

    def __iter__(self) -> Iterator[SampleKey]:
        for index, position, repeat in zip(*self.order()):
            yield SampleKey(int(index), self.seed, self.epoch, int(position), int(repeat))

    def _permutation(self) -> torch.Tensor:
        """The epoch's order of the images, int64 [n], before they are repeated."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator()
        # A hash, because seed + epoch would give (seed 0, epoch 1) and (seed 1, epoch 0) the same order.
        generator.manual_seed(int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0]))
        return torch.randperm(self.length, generator=generator)
