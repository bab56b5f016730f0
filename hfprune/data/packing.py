"""Several examples in one row: which ones, and how the row looks."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hfprune.data.encode import pad
from hfprune.data.examples import Example
from hfprune.objectives.base import IGNORE_INDEX

Pack = list[Example]


def pack(examples: Iterable[Example], *, size: int) -> Iterator[Pack]:
    """Yields rows of at most ``size`` tokens: consecutive examples, never reordered (as HFPrune packs).

    >>> [[len(ids) for ids, _ in row] for row in pack([([1] * n, [1] * n) for n in (3, 4, 2, 9)], size=8)]
    [[3, 4], [2], [9]]
    """
    row: Pack = []
    used = 0
    for example in examples:
        if row and used + len(example[0]) > size:
            yield row
            row, used = [], 0
        row.append(example)
        used += len(example[0])
    if row:
        yield row


def collate(rows: Sequence[Pack], *, filler: int) -> dict[str, Tensor]:
    """Returns rows as ``input_ids``, ``attention_mask``, ``labels`` and ``position_ids``, [B, T], padded on the right.

    Position ids start again at each example, and the first token of each is no target: see
        :mod:`hfprune.models.forward`.
    """
    ids = [[token for example in row for token in example[0]] for row in rows]
    labels = [[label for example in row for label in (IGNORE_INDEX, *example[1][1:])] for row in rows]
    positions = [[position for example in row for position in range(len(example[0]))] for row in rows]
    found = {"input_ids": pad(ids, filler), "labels": pad(labels, IGNORE_INDEX), "position_ids": pad(positions, 0)}
    mask = torch.zeros_like(found["input_ids"])
    for number, row in enumerate(ids):
        mask[number, : len(row)] = 1
    return found | {"attention_mask": mask}


def collate_examples(examples: Sequence[Example], *, filler: int) -> dict[str, Tensor]:
    """Returns examples, a row each, as ``input_ids``, ``attention_mask`` and ``labels``, [B, T]."""
    found = {"input_ids": pad([e[0] for e in examples], filler), "labels": pad([e[1] for e in examples], IGNORE_INDEX)}
    return found | {"attention_mask": pad([[1] * len(e[0]) for e in examples], 0)}
