import pickle
from collections import Counter

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from samplers import RASampler
from vision_kan.data.images import SampleKey


def keys(sampler, epoch=0, position=0):
    sampler.set_epoch(epoch, position)
    return list(sampler)


def global_order(n, world, **kwargs):
    """All ranks' keys in the order of their positions."""
    shares = [keys(RASampler(n, world, rank, **kwargs), epoch=3) for rank in range(world)]
    return sorted((key for share in shares for key in share), key=lambda key: key.position)


class TimmSeeded(RASampler):
    """Ours with the seed mapped away: timm seeds with the epoch alone."""

    def _permutation(self):
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch))


@pytest.mark.parametrize("n", [256, 257, 300, 511, 512, 1437])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_indices_equal_timms(n, world):
    for rank in range(world):
        theirs = RepeatAugSampler(range(n), world, rank)
        theirs.set_epoch(5)
        ours = TimmSeeded(range(n), world, rank)
        assert [key.index for key in keys(ours, epoch=5)] == list(theirs)
        assert len(ours) == len(theirs)


def test_indices_equal_timms_without_shuffling_and_with_other_repeats():
    for repeats in (2, 5):
        theirs = RepeatAugSampler(range(300), 2, 1, shuffle=False, num_repeats=repeats)
        ours = RASampler(300, 2, 1, shuffle=False, num_repeats=repeats)
        assert [key.index for key in ours] == list(theirs)


@pytest.mark.parametrize("n", [1, 2, 5, 17, 255])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_below_256_images_a_rank_draws_its_share_where_deit_draws_nothing(n, world):
    for rank in range(world):
        theirs = RepeatAugSampler(range(n), world, rank)
        theirs.set_epoch(2)
        drawn = [key.index for key in keys(TimmSeeded(n, world, rank), epoch=2)]
        assert len(drawn) == -(-n // world) == len(RASampler(n, world, rank))
        assert drawn == list(theirs)  # timm repairs it the same way


def test_1437_images_give_1280_draws_of_427_images():
    drawn = keys(RASampler(1437))
    assert len(drawn) == 1280
    assert len({key.index for key in drawn}) == 427
    assert sorted(set(Counter(key.index for key in drawn).values())) == [2, 3]  # the last image is cut short


def test_keys_tell_seed_epoch_position_and_repeat():
    drawn = keys(RASampler(1437, 2, 1, seed=7), epoch=4)
    assert {(key.seed, key.epoch) for key in drawn} == {(7, 4)}
    assert [key.position for key in drawn] == list(range(1, 1280, 2))
    assert all(key.repeat == key.position % 3 for key in drawn)
    together = global_order(1437, 2, seed=7)
    for image in {key.index for key in together[:1278]}:
        assert [key.repeat for key in together if key.index == image] == [0, 1, 2]


def test_keys_can_be_pickled():
    key = keys(RASampler(10))[3]
    assert pickle.loads(pickle.dumps(key)) == key
    assert isinstance(pickle.loads(pickle.dumps(key)), SampleKey)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("n", [5, 17, 300, 1437])
def test_the_order_does_not_depend_on_the_world_size(n, repeats):
    alone = global_order(n, 1, num_repeats=repeats)
    for world in (2, 3, 4):
        together = global_order(n, world, num_repeats=repeats)
        shared = min(len(alone), len(together))
        assert together[:shared] == alone[:shared]
        assert abs(len(together) - len(alone)) < world


@pytest.mark.parametrize("n", range(1, 18))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_one_repeat_shows_every_image_once_then_wraps(n, world):
    together = global_order(n, world, num_repeats=1)
    assert sorted(key.index for key in together[:n]) == list(range(n))
    assert [key.index for key in together[n:]] == [together[i % n].index for i in range(n, len(together))]
    assert len(together) == -(-n // world) * world
    assert {key.repeat for key in together} == {0}


def test_one_repeat_is_not_rounded_to_256():
    assert len(RASampler(1437, num_repeats=1)) == 1437


def test_seed_and_epoch_both_change_the_order():
    orders = {(seed, epoch): tuple(key.index for key in keys(RASampler(300, seed=seed), epoch))
              for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16  # (0, 1) and (1, 0) differ too
    assert orders[2, 1] == tuple(key.index for key in keys(RASampler(300, seed=2), 1))


def test_unshuffled_keeps_the_order_of_the_data_set():
    assert [key.index for key in RASampler(6, shuffle=False, num_repeats=1)] == list(range(6))


@pytest.mark.parametrize("n, repeats", [(40, 3), (1437, 3), (41, 1)])
def test_a_position_yields_the_tail_of_the_full_order(n, repeats):
    for rank in range(3):
        sampler = RASampler(n, 3, rank, num_repeats=repeats, seed=1)
        full = keys(sampler, epoch=2)
        for done in (0, 1, 7, len(full) - 1, len(full)):
            assert keys(sampler, epoch=2, position=done * 3) == full[done:]
            assert len(sampler) == len(full)  # of the whole epoch: step counts must not change on a resume
        assert keys(sampler, epoch=2) == full  # a position does not stick
        assert keys(sampler, epoch=2, position=3 * len(full) + 5) == []


@pytest.mark.parametrize("n, repeats", [(41, 3), (300, 3), (300, 1)])
@pytest.mark.parametrize("before, after", [(1, 2), (1, 3), (2, 1), (2, 3), (3, 2), (4, 3)])
def test_the_order_goes_on_with_another_number_of_processes(n, repeats, before, after):
    """After each position at which the first processes may have stopped: what both draw is the order of the second alone."""
    uninterrupted = global_order(n, after, num_repeats=repeats)
    first = [keys(RASampler(n, before, rank, num_repeats=repeats), epoch=3) for rank in range(before)]
    second = [RASampler(n, after, rank, num_repeats=repeats) for rank in range(after)]
    for done in range(len(uninterrupted) // before + 1):   # of each process, whatever its batch size
        drawn = [key for share in first for key in share[:done]]
        position = len(drawn)
        rest = [keys(sampler, epoch=3, position=position) for sampler in second]
        assert max(map(len, rest)) - min(map(len, rest)) <= 1
        drawn += [key for share in rest for key in share]
        assert sorted(drawn, key=lambda key: key.position) == uninterrupted
        assert all(share == uninterrupted[position + rank::after] for rank, share in enumerate(rest))


def test_iterating_leaves_torchs_global_generator_alone():
    before = torch.get_rng_state()
    list(RASampler(300))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arguments", [{"dataset": 0}, {"dataset": 9, "rank": 1},
                                       {"dataset": 9, "num_repeats": 0}, {"dataset": 9, "rank": -1}])
def test_nonsense_is_refused(arguments):
    with pytest.raises(ValueError, match="RASampler"):
        RASampler(**arguments)


@pytest.mark.parametrize("n", range(1, 18))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_shards_hold_every_image_once(n, world):
    shards = [index for rank in range(world) for index in range(rank, n, world)]
    assert sorted(shards) == list(range(n))
