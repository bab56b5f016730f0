"""Shuffling that a resumed run repeats."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochShuffle(Sampler[int]):
    """A permutation that depends on the seed and the epoch only; Lightning calls ``set_epoch``.

    ``RandomSampler`` with a generator would start over from the first epoch's permutation after a resume.

    Args:
        size: Number of examples.
        seed: Seed; 0 is a seed.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self._size, self._seed, self._epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of ``epoch``."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Iterates over the permutation."""
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch)
        return iter(torch.randperm(self._size, generator=generator).tolist())

    def __len__(self) -> int:
        """Returns the number of examples."""
        return self._size
