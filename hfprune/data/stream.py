"""Streaming: recovery text from files larger than memory, and its position for checkpoints.

A block is ``shuffle_buffer`` consecutive rows. It is shuffled by seed, epoch and number, and is encoded and packed on
its own. Any position of the stream can therefore be reached by skipping rows and encoding one block, and the order does
not depend on where a run was interrupted.

The state of a shuffled ``datasets.IterableDataset`` leaves out its shuffle buffer: after a resume the samples in the
buffer are lost, and the state is that of one rank. Here a resumed run sees every example once, also on another number
of processes, which take the rows of a block in turns.
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
"""Key of a batch: epoch, block, and rows of the block that all ranks have taken when the batch is done, int64 [3]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSource:
    """Rows of a source, one after another.

    Attributes:
        source: JSON lines, ``.csv`` or ``.parquet``: a file, a folder or a glob; a ``save_to_disk`` folder; a hub id.
        split: Split of saved or hub data sets.
        text_field: Column of the text.
    """

    source: str
    split: str
    text_field: str | None

    def check(self) -> None:
        """Raises ``ConfigError`` for a source that can only be read whole."""
        place = find_place(self.source, "recovery", self.split)
        whole = place.kind == "name" or place.type in ("text", "tensors")
        if whole or (place.type == "json" and any(is_whole(path) for path in place.files)):
            raise ConfigError(
                f"recovery='{self.source}' can only be read as a whole, not with streaming=True. Give JSON lines, .csv "
                "or .parquet files, a folder written by save_to_disk, or a hub id."
            )

    def rows(self, start: int) -> Iterator[Any]:
        """Yields the rows from number ``start`` on."""
        return open_rows(find_place(self.source, "recovery", self.split), self.split, start)


@dataclass(slots=True)
class Place:
    """Position of a stream.

    Attributes:
        epoch: Passes done.
        block: Blocks done in this pass.
        taken: Rows of the block that all ranks have taken.
    """

    epoch: int = 0
    block: int = 0
    taken: int = 0


@dataclass(kw_only=True)
class ExampleStream(IterableDataset[Any]):
    """Batches of one rank, endlessly: after the last block the first comes again, in another order.

    Attributes:
        source: Where rows come from.
        tokenizer: The model's.
        options: How documents become examples.
        seen: Digests of the documents of other roles, which are left out.
        shuffle_buffer: Rows of a block.
        batch_size: Rows of a batch.
        seed: Seed of the order within the blocks.
        num_replicas: Number of ranks.
        rank: This one.
        filler: Token id of padding.
        place: Where to begin.
        counts: Reason -> rows left out or changed so far, in the first pass.
        counted: Blocks of the first pass that ``counts`` knows.
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
        """What rows hold; plain text before the first one is read."""
        return self._layout.kind if self._layout else "text"

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields the batches that are left of a pass; at its very end, those of the next one.

        Raises:
            ConfigError: A whole pass gives nothing.
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
        """Yields the shuffled, encoded rows of each block from ``place`` on."""
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
        """Adds what one more block of the first pass left out; says reasons when they are met first."""
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
        """Returns the layout of a block's rows; None where no row could be decoded."""
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
    """The batches of an ``ExampleStream``; its state is the position of training, without batches read ahead.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: ExampleStream) -> None:
        super().__init__(stream, batch_size=None)
        self.stream = stream
        self._trained: list[int] | None = None

    def __iter__(self) -> Any:
        """Iterates from where training is, where that is known, else from where reading is."""
        if self._trained is not None:
            self.stream.place = Place(*self._trained)
        return super().__iter__()

    def trained(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Records the position of ``batch``, which is trained on next, and returns it without its position."""
        self._trained = batch[POSITION].tolist()
        return {name: value for name, value in batch.items() if name != POSITION}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position behind the last batch that went into training, and what was left out so far."""
        epoch, block, taken = self._trained or (0, 0, 0)
        place = {"epoch": epoch, "block": block, "taken": taken}
        return place | {"counts": dict(self.stream.counts), "counted": self.stream.counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues behind the position."""
        self._trained = [state_dict[name] for name in ("epoch", "block", "taken")]
        self.stream.counts = Counter(state_dict.get("counts", {}))
        self.stream.counted = state_dict.get("counted", 0)
