"""Shuffled batches that a resumed run continues, on one process or several."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler


class EpochShuffle(DistributedSampler[Any]):
    """A permutation that depends on the seed and the epoch only, dealt out to the ranks; it can start within an epoch.

    Lightning calls ``set_epoch`` and, since this is a ``DistributedSampler``, puts no sampler of its own in its place.

    Attributes:
        start: Samples of this rank to skip when iterated next.
    """

    start: int = 0

    def __iter__(self) -> Iterator[Any]:
        """Iterates over this rank's indices, from ``start`` on."""
        start, self.start = self.start, 0
        return iter(list(super().__iter__())[start:])


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` over an ``EpochShuffle`` whose position Lightning saves and restores.

    The position is counted in samples over all ranks, so that a run can be resumed on another number of processes.
    """

    _batches = 0  # of this epoch, taken so far
    _skip = 0
    _epoch: int | None = None  # that ``_skip`` is of

    @classmethod
    def over(
        cls, examples: Any, *, batch_size: int, seed: int, num_replicas: int, rank: int, **kwargs: Any
    ) -> "ResumableLoader":
        """Returns the loader of one rank.

        Args:
            examples: A sized, indexable collection.
            batch_size: Samples per batch and rank.
            seed: Seed of the permutations; 0 is a seed.
            num_replicas: Number of ranks.
            rank: This one.
            **kwargs: Passed on to ``DataLoader``.
        """
        dataset: Dataset[Any] = examples
        sampler: EpochShuffle = EpochShuffle(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        return cls(dataset, batch_size=batch_size, sampler=sampler, **kwargs)

    def __iter__(self) -> Any:
        """Iterates over the batches that are left of the epoch."""
        sampler: Any = self.sampler
        again = self._epoch in (None, self._sampler_epoch)  # Lightning may end an epoch early
        skip, self._skip, self._epoch = self._skip if again else 0, 0, None
        self._batches = skip
        if isinstance(sampler, EpochShuffle):
            sampler.start, skip = skip * (self.batch_size or 1), 0
        for batch in islice(super().__iter__(), skip, None):
            self._batches += 1
            yield batch

    @property
    def _sampler_epoch(self) -> int:
        """The epoch whose order is read; 0 with a sampler that has one order, as ``overfit_batches`` puts in."""
        return int(getattr(self.sampler, "epoch", 0))

    def _per_step(self) -> int:
        return (self.batch_size or 1) * int(getattr(self.sampler, "num_replicas", 1))

    def state_dict(self) -> dict[str, int]:
        """Returns the position: samples taken in this epoch, over all ranks, 0 at its end; and the epoch."""
        taken = 0 if self._batches >= len(self) else self._batches * self._per_step()
        return {"samples": taken, "epoch": self._sampler_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues after ``state_dict``'s position, at the next whole batch; another epoch begins at its start."""
        self._skip, self._epoch = -(-state_dict["samples"] // self._per_step()), state_dict.get("epoch")
