"""Loaders of training and validation batches, with a position that is saved in checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from hfprune.data.build import Builder
from hfprune.data.examples import Example, collate, collate_examples, pack
from hfprune.data.stream import POSITION, ExampleStream, StreamLoader, StreamSource


class EpochShuffle(DistributedSampler[Any]):
    """Permutation of the samples by seed and epoch, distributed over ranks, which can start within an epoch.

    Lightning calls ``set_epoch``, and does not replace the sampler since it is a ``DistributedSampler``.

    Attributes:
        start: Number of this rank's samples to skip in the next iteration.
    """

    start: int = 0

    def __iter__(self) -> Iterator[Any]:
        """Iterates over this rank's indices, beginning at ``start``."""
        start, self.start = self.start, 0
        return iter(list(super().__iter__())[start:])


class ResumableLoader(DataLoader[Any]):
    """``DataLoader`` over an ``EpochShuffle``, whose position Lightning saves and restores.

    The position is the number of samples over all ranks: a run can be resumed with another number of processes or batch
    size, and continues at the next full batch. The state of ``torchdata.stateful_dataloader.StatefulDataLoader``
    belongs to one rank and its workers.

    >>> loader = ResumableLoader.over(range(8), batch_size=2, seed=0, num_replicas=1, rank=0)
    >>> batches = iter(loader)
    >>> first = next(batches)
    >>> other = ResumableLoader.over(range(8), batch_size=2, seed=0, num_replicas=1, rank=0)
    >>> other.load_state_dict(loader.state_dict())
    >>> [b.tolist() for b in other] == [b.tolist() for b in batches]
    True
    """

    _batches = 0  # batches of this epoch so far
    _skip = 0
    _epoch: int | None = None  # epoch of ``_skip``

    @classmethod
    def over(
        cls, examples: Any, *, batch_size: int, seed: int, num_replicas: int, rank: int, **kwargs: Any
    ) -> "ResumableLoader":
        """Returns the loader of one rank.

        Args:
            examples: A sized, indexable collection.
            batch_size: Number of samples per batch and rank.
            seed: Seed of the permutations.
            num_replicas: Number of ranks.
            rank: Index of this rank.
            **kwargs: Arguments of ``DataLoader``.
        """
        dataset: Dataset[Any] = examples
        sampler: EpochShuffle = EpochShuffle(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        return cls(dataset, batch_size=batch_size, sampler=sampler, **kwargs)

    def __iter__(self) -> Any:
        """Iterates over the remaining batches of the epoch."""
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
        """Epoch of the sampler, or 0 for a sampler without epochs (``overfit_batches``)."""
        return int(getattr(self.sampler, "epoch", 0))

    def _per_step(self) -> int:
        return (self.batch_size or 1) * int(getattr(self.sampler, "num_replicas", 1))

    def state_dict(self) -> dict[str, int]:
        """Returns the number of samples so far in this epoch over all ranks (0 at its end), and the epoch."""
        taken = 0 if self._batches >= len(self) else self._batches * self._per_step()
        return {"samples": taken, "epoch": self._sampler_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues at the next full batch after a saved position."""
        self._skip, self._epoch = -(-state_dict["samples"] // self._per_step()), state_dict.get("epoch")


TrainingLoader = ResumableLoader | StreamLoader


class ResumableDataModule(LightningDataModule):
    """Datamodule whose training loader continues at the position of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self._loader: TrainingLoader | None = None
        self._position: dict[str, int] | None = None

    def _resumed(self, loader: TrainingLoader) -> TrainingLoader:
        """Returns ``loader`` at the position of a restored checkpoint."""
        self._loader = loader
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training data.

        Lightning does not restore the state of a loader if the number of training steps was computed before, as for
        schedulers.
        """
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the position of the checkpoint."""
        self._position = state_dict.get("train")
        if self._loader is not None and self._position is not None:
            self._loader.load_state_dict(self._position)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Records the position of the current batch in a stream, since batches are prefetched."""
        if isinstance(batch, dict) and POSITION in batch and isinstance(self._loader, StreamLoader):
            return self._loader.trained(batch)
        return batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaders:
    """Factory of the loaders.

    Attributes:
        build: Builder with tokenizer and options.
        batch_size: Number of rows per batch and device.
        seed: Seed of the order.
        num_workers: Number of worker processes.
    """

    build: Builder
    batch_size: int
    seed: int
    num_workers: int

    def training(self, examples: list[Example], *, num_replicas: int, rank: int) -> ResumableLoader:
        """Returns shuffled batches of one rank."""
        return ResumableLoader.over(
            self._rows(examples),
            batch_size=self.batch_size,
            seed=self.seed,
            num_replicas=num_replicas,
            rank=rank,
            collate_fn=self._collate,
            num_workers=self.num_workers,
        )

    def validation(self, examples: list[Example]) -> DataLoader[Any]:
        """Returns batches in order."""
        rows: Any = self._rows(examples)
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self._collate, num_workers=self.num_workers)

    def stream(self, source: StreamSource, *, shuffle_buffer: int, num_replicas: int, rank: int) -> StreamLoader:
        """Returns the batches of one rank from a streamed source."""
        build = self.build
        build.check_length(build.seq_len, "seq_len")
        build.warn_of_bos_setting("recovery")
        stream = ExampleStream(
            source=source,
            tokenizer=build.tokenizer,
            options=build.options,
            seen=build.roles.seen(),
            shuffle_buffer=shuffle_buffer,
            batch_size=self.batch_size,
            seed=self.seed,
            num_replicas=num_replicas,
            rank=rank,
            filler=self._filler,
        )
        return StreamLoader(stream)

    def _rows(self, examples: list[Example]) -> Any:
        return list(pack(examples, size=self.build.seq_len)) if self.build.options.packing else examples

    @property
    def _collate(self) -> Any:
        return partial(collate if self.build.options.packing else collate_examples, filler=self._filler)

    @property
    def _filler(self) -> int:
        tokenizer = self.build.tokenizer
        token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return int(token or 0)
