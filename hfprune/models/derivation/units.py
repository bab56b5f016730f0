"""Units of a reader: connected channels of a projection and of those that feed it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from hfprune.models.derivation.trace import Flow


@dataclass(frozen=True, slots=True)
class Block:
    """Channels of one side of a projection, in which unit u owns ``width`` channels from ``offset + u * width`` on."""

    offset: int
    width: int


@dataclass(frozen=True, slots=True)
class Units:
    """Sets of connected channels.

    Attributes:
        count: Number of units.
        reader: [I], unit of every input channel of the reader; -1 for channels that nothing reaches.
        sources: Name of a projection -> [O], unit of every output channel; -1 for channels that are not read.
    """

    count: int
    reader: Tensor
    sources: Mapping[str, Tensor]


def connected(flows: Mapping[str, Flow], rows: Mapping[str, Tensor] | None = None) -> Units:
    """Returns the units of a reader, numbered in the order of its channels.

    Args:
        flows: Name of a projection -> how it reaches the reader.
        rows: Name of a projection -> [O], the channels to use; all by default.
    """
    touches = {
        name: flow.touches if rows is None else flow.touches & rows[name][:, None] for name, flow in flows.items()
    }
    edges = torch.cat(list(touches.values()))
    sources, inputs = edges.shape
    out, into = edges.nonzero(as_tuple=True)
    pairs = (out.numpy() + inputs, into.numpy())
    graph = coo_array((np.ones(len(out)), pairs), shape=(inputs + sources, inputs + sources))
    _, labels = connected_components(graph, directed=False)
    place: dict[int, int] = {}
    used = edges.any(dim=0).tolist()
    reader = [place.setdefault(int(label), len(place)) if used[i] else -1 for i, label in enumerate(labels[:inputs])]
    feeds = torch.tensor([place.get(int(label), -1) for label in labels[inputs:]])
    split = feeds.split([len(t) for t in touches.values()])
    return Units(len(place), torch.tensor(reader), dict(zip(touches, split, strict=True)))


def blocks(units: Sequence[int], count: int) -> tuple[Block, ...] | None:
    """Returns the blocks that together cover all channels, or None if the channels have another order.

    >>> blocks([0, 0, 1, 1, 0, 1], 2)
    (Block(offset=0, width=2), Block(offset=4, width=1))
    >>> blocks([0, 1, 1, 0], 2) is None
    True

    Args:
        units: Unit of every channel.
        count: Number of units, at least 2.
    """
    found, start = list[Block](), 0
    while start < len(units):
        width = next((k for k, unit in enumerate(units[start:]) if unit != 0), 0)
        expected = [unit for unit in range(count) for _ in range(width)]
        if not width or list(units[start : start + count * width]) != expected:
            return None
        found.append(Block(start, width))
        start += count * width
    return tuple(found)
