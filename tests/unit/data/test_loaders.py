"""Shuffling that depends on seed and epoch only, and a loader whose position can be saved."""

import pytest
import torch

from hfprune.data.loaders import EpochShuffle, ResumableLoader


def shuffle(size=20, *, seed=0, epoch=0, num_replicas=1, rank=0):
    sampler = EpochShuffle(range(size), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def loader(size=20, *, batch_size=3, num_replicas=1, rank=0, **kwargs):
    return ResumableLoader.over(
        list(range(size)), batch_size=batch_size, seed=0, num_replicas=num_replicas, rank=rank, **kwargs
    )


def test_shuffling_depends_on_seed_and_epoch_only():
    torch.manual_seed(1)
    first = shuffle()
    torch.manual_seed(2)
    assert shuffle() == first
    assert sorted(first) == list(range(20))
    assert shuffle(epoch=1) != first
    assert shuffle(seed=1) != first


def test_ranks_share_a_permutation():
    parts = [shuffle(num_replicas=2, rank=rank) for rank in range(2)]
    assert [i for pair in zip(*parts, strict=True) for i in pair] == shuffle()


def batches(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_position_is_taken_up_again(taken, workers):
    whole = batches(loader())
    left = loader(num_workers=workers)
    iterator = iter(left)
    for _ in range(taken):
        next(iterator)
    state = left.state_dict()
    again = loader(num_workers=workers)
    again.load_state_dict(state)
    assert batches(again) == whole[taken:]
    assert batches(again) == whole  # the next epoch is whole again (same permutation: no set_epoch)


def test_end_of_epoch_is_the_start_of_the_next():
    whole = loader()
    assert len(batches(whole)) == len(whole) == 7
    assert whole.state_dict() == {"samples": 0, "epoch": 0}


def test_position_counts_samples_of_all_ranks():
    """Two ranks took two batches of 3 each: one process goes on after 12 samples."""
    two = loader(num_replicas=2)
    iterator = iter(two)
    next(iterator), next(iterator)
    assert two.state_dict() == {"samples": 12, "epoch": 0}
    one = loader()
    one.load_state_dict(two.state_dict())
    assert [i for batch in batches(one) for i in batch] == shuffle()[12:]


def test_an_epoch_that_was_ended_early_leaves_nothing_for_the_next():
    """As under ``limit_train_batches``: the position is of epoch 0, and epoch 1 is what follows."""
    early = loader()
    iterator = iter(early)
    next(iterator), next(iterator)
    again = loader()
    again.load_state_dict(early.state_dict())
    again.sampler.set_epoch(1)
    assert [i for batch in batches(again) for i in batch] == shuffle(epoch=1)
