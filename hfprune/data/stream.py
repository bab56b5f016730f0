"""Streaming: recovery data larger than memory, with a position for checkpoints.

A block of ``shuffle_buffer`` consecutive rows is shuffled by seed, epoch and number, and is encoded and packed
separately. Any position of the stream can therefore be restored by skipping rows and encoding one block, and the order
does not depend on interruptions.

A resumed run sees every example once, also with another number of processes, which take the rows of a block in turn.
The state of a shuffled ``datasets.IterableDataset`` does not contain the shuffle buffer, whose samples are lost on
resume, and belongs to one rank.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hfprune.data.examples import (
    Encoder,
    Example,
    ExampleOptions,
    Pack,
    check_template,
    collate,
    collate_examples,
    pack,
    warn_of_losses,
)
from hfprune.data.files import BadRow, is_whole
from hfprune.data.formats import Document, RowFormat
from hfprune.data.roles import plain, text_digest
from hfprune.data.sources import find_place, open_rows
from hfprune.utils.errors import ConfigError

POSITION = "stream_position"
"""Key of a batch's position: epoch, block, and rows of the block used by all ranks after the batch, int64 [3]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSource:
    """Source that is read row by row.

    Attributes:
        source: JSON lines, ``.csv`` or ``.parquet``: a file, a folder or a glob; a ``save_to_disk`` folder; a hub id.
        split: Split of saved or hub data sets.
        text_field: Column of the text.
    """

    source: str
    split: str
    text_field: str | None

    def check(self) -> None:
        """Raises ``ConfigError`` for a source that cannot be streamed."""
        place = find_place(self.source, "recovery", self.split)
        whole = place.kind == "name" or place.type in ("text", "tensors")
        if whole or (place.type == "json" and any(is_whole(path) for path in place.files)):
            raise ConfigError(
                f"recovery='{self.source}' cannot be read with streaming=True. Use JSON lines, .csv or .parquet files, "
                "a folder written by save_to_disk, or a hub id."
            )

    def rows(self, start: int) -> Iterator[Any]:
        """Yields the rows, beginning at number ``start``."""
        return open_rows(find_place(self.source, "recovery", self.split), self.split, start)


@dataclass(slots=True)
class Place:
    """Position of a stream.

    Attributes:
        epoch: Number of finished passes.
        block: Number of finished blocks in this pass.
        taken: Number of rows of the block used by all ranks.
    """

    epoch: int = 0
    block: int = 0
    taken: int = 0


@dataclass(kw_only=True)
class ExampleStream(IterableDataset[Any]):
    """Infinite stream of the batches of one rank; every pass has another order.

    Attributes:
        source: The source.
        tokenizer: The model's tokenizer.
        options: Options of training examples.
        seen: Digests of the documents of other roles, which are skipped.
        shuffle_buffer: Number of rows per block.
        batch_size: Number of rows per batch.
        seed: Seed of the order within blocks.
        num_replicas: Number of ranks.
        rank: Index of this rank.
        filler: Token id of padding.
        place: Initial position.
        counts: Reason -> number of dropped or changed rows in the first pass.
        counted: Number of blocks of the first pass included in ``counts``.
    """

    source: StreamSource
    tokenizer: Any
    options: ExampleOptions
    seen: frozenset[bytes]
    shuffle_buffer: int
    batch_size: int
    seed: int
    num_replicas: int
    rank: int
    filler: int
    place: Place = field(default_factory=Place)
    counts: Counter[str] = field(default_factory=Counter)
    counted: int = 0

    def __post_init__(self) -> None:
        self._layout: RowFormat | None = None

    @property
    def kind(self) -> str:
        """Kind of the rows; plain text before the first row is read."""
        return self._layout.kind if self._layout else "text"

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields the remaining batches of a pass; at the end of a pass, those of the next one.

        Raises:
            ConfigError: A pass has no examples.
        """
        while True:
            whole, empty = self.place.block == self.place.taken == 0, True
            for batch in self._pass():
                empty = False
                yield batch
            if not empty:
                return
            if whole:
                reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.counts.items())
                raise ConfigError(f"recovery='{self.source.source}' gives no example: {reasons or 'it has no rows'}.")

    def _pass(self) -> Iterator[dict[str, Tensor]]:
        place, waiting = self.place, []
        for block in self._blocks(place):
            whole = len(block) - len(block) % self.num_replicas
            first = -(-place.taken // self.num_replicas) * self.num_replicas + self.rank
            for index in range(first, whole, self.num_replicas):
                waiting.append(block[index])
                place.taken = index - self.rank + self.num_replicas
                if len(waiting) == self.batch_size:
                    yield self._batch(waiting)
                    waiting = []
            place.block, place.taken = place.block + 1, 0
        self.place = Place(epoch=place.epoch + 1)
        if waiting:
            yield self._batch(waiting)

    def _batch(self, rows: list[Pack]) -> dict[str, Tensor]:
        place = self.place
        if self.options.packing:
            batch = collate(rows, filler=self.filler)
        else:
            batch = collate_examples([row[0] for row in rows], filler=self.filler)
        return batch | {POSITION: torch.tensor([place.epoch, place.block, place.taken])}

    def _blocks(self, place: Place) -> Iterator[list[Pack]]:
        """Yields the shuffled, encoded rows of each block, beginning at ``place``."""
        rows = self.source.rows(place.block * self.shuffle_buffer)
        number = place.block
        while block := list(islice(rows, self.shuffle_buffer)):
            counts: Counter[str] = Counter()
            prepared = self._prepare(block, random.Random(f"{self.seed} {place.epoch} {number}"), counts)
            if place.epoch == 0 and number == self.counted:
                self._count(counts)
            yield prepared
            number += 1

    def _count(self, counts: Counter[str]) -> None:
        """Adds the dropped rows of a block of the first pass; warns of new reasons."""
        new = {reason: number for reason, number in counts.items() if reason not in self.counts}
        self.counts.update(counts)
        self.counted += 1
        rows = f" (rows {(self.counted - 1) * self.shuffle_buffer + 1:,} to {self.counted * self.shuffle_buffer:,})"
        warn_of_losses("recovery", self.source.source, new, self.options.seq_len, where=rows)

    def _prepare(self, rows: list[Any], order: random.Random, counts: Counter[str]) -> list[Pack]:
        documents = list(self._documents(rows, counts))
        order.shuffle(documents)
        encoder = Encoder(self.tokenizer, self.options, counts)
        examples = [example for document in documents for example in encoder(document)]
        return list(pack(examples, size=self.options.seq_len)) if self.options.packing else _alone(examples)

    def _documents(self, rows: list[Any], counts: Counter[str]) -> Iterator[Document]:
        layout = self._layout = self._layout or self._find_layout(rows)
        for row in rows:
            if layout is None or (fault := layout.fault(row)):
                counts[row.reason if layout is None else fault] += 1
                continue
            document: Any = layout.read(row)
            if text_digest(plain(document)) in self.seen:
                counts["repeated"] += 1
            else:
                yield document

    def _find_layout(self, rows: Iterable[Any]) -> RowFormat | None:
        """Returns the format of a block's rows, or None if no row could be decoded."""
        rows = [row for row in rows if not isinstance(row, BadRow)]
        objects = [row for row in rows if isinstance(row, Mapping)]
        if not objects:
            return RowFormat("text") if rows else None
        layout = RowFormat.of(objects, self.source.source, self.source.text_field)
        if layout.kind == "tokens":
            raise ConfigError(f"recovery='{self.source.source}' holds token ids, which streaming=True cannot read.")
        check_template(self.tokenizer, self.options, layout.kind, self.source.source)
        return layout


def _alone(examples: list[Example]) -> list[Pack]:
    return [[example] for example in examples]


class StreamLoader(DataLoader[Any]):
    """Loader of an ``ExampleStream``, whose state is the position of training, without prefetched batches.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: ExampleStream) -> None:
        super().__init__(stream, batch_size=None)
        self.stream = stream
        self._trained: list[int] | None = None

    def __iter__(self) -> Any:
        """Iterates from the position of training if it is known, otherwise from that of reading."""
        if self._trained is not None:
            self.stream.place = Place(*self._trained)
        return super().__iter__()

    def trained(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Records the position of the next training batch, and returns the batch without its position."""
        self._trained = batch[POSITION].tolist()
        return {name: value for name, value in batch.items() if name != POSITION}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last training batch, and the numbers of dropped rows by reason."""
        epoch, block, taken = self._trained or (0, 0, 0)
        place = {"epoch": epoch, "block": block, "taken": taken}
        return place | {"counts": dict(self.stream.counts), "counted": self.stream.counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after a saved position."""
        self._trained = [state_dict[name] for name in ("epoch", "block", "taken")]
        self.stream.counts = Counter(state_dict.get("counts", {}))
        self.stream.counted = state_dict.get("counted", 0)
