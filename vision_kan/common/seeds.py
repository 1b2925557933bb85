"""Seeds."""
import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators from a hash of `key`, e.g. (seed, epoch, step, rank). The random numbers of a
    step then do not depend on anything before it."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:2])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
