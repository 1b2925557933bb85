"""Seeds."""
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators from a hash of `key`, e.g. (seed, epoch, step, rank). The random numbers of a
    step then do not depend on anything before it."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:2])
    seed = int(words[2]) << 32 | int(words[3])
    torch.default_generator.manual_seed(seed)
    for seed_devices in _seeds_of_devices():
        seed_devices(seed)


@cache
def _seeds_of_devices() -> list[Callable[[int], None]]:
    """Of the kinds of devices that are there. `torch.manual_seed` asks all that it knows, and formats a stack for each that is
    not in use: over a millisecond a step."""
    return [seed for seed, there in ((torch.cuda.manual_seed_all, torch.cuda.is_available()),
                                     (torch.mps.manual_seed, torch.backends.mps.is_available())) if there]
