"""Loaders of training and validation batches, from examples in memory or from a stream."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from hfprune.data.build import Builder
from hfprune.data.examples import Example
from hfprune.data.packing import collate, collate_examples, pack
from hfprune.data.sampler import ResumableLoader
from hfprune.data.stream import ExampleStream, StreamLoader, StreamSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaders:
    """How batches are made.

    Attributes:
        build: Tokenizer and options.
        batch_size: Rows of a batch, per device.
        seed: Seed of the order.
        num_workers: Worker processes.
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
        """Returns batches in the order of the examples."""
        rows: Any = self._rows(examples)
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self._collate, num_workers=self.num_workers)

    def stream(self, source: StreamSource, *, shuffle_buffer: int, num_replicas: int, rank: int) -> StreamLoader:
        """Returns the batches of one rank from a source that is read row by row."""
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
        found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return int(found or 0)
