"""The best units of each group, once their number is known."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfprune.types import Group


def keep_top(scores: Tensor, width: int) -> tuple[int, ...]:
    """Returns the ``width`` units with the largest scores, ascending; equal scores: the lower index stays.

    >>> keep_top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
    (1, 2)
    """
    order = torch.sort(scores.cpu(), descending=True, stable=True).indices
    return tuple(sorted(order[:width].tolist()))


def uniform_keep(
    scores: Mapping[str, Tensor], groups: Sequence[Group], widths: int | Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Returns the kept units of every group, at one width or at a width for each."""
    listed = [widths] * len(groups) if isinstance(widths, int) else widths
    return {group.name: keep_top(scores[group.name], width) for group, width in zip(groups, listed, strict=True)}
