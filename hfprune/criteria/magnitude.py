"""Magnitude: the norm of a unit's weights, a baseline without data."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hfprune.criteria.base import WeightCriterion
from hfprune.plan import Group
from hfprune.utils.settings import check_choice

_NUMBERS = 2**24
"""Weights that are held in float64 at a time."""


class Magnitude(WeightCriterion):
    """L1 or L2 norm of all weights of a unit: its rows of gate and up and its column of down. Biases do not count.

    Args:
        norm: ``l2`` or ``l1``.

    Raises:
        ConfigError: The norm is unknown.

    Example:
        >>> from hfprune.plan import Slice
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=(Slice(module="down_proj", side="in"),))
        >>> Magnitude().score(group, [torch.tensor([[3.0, 1.0], [4.0, 0.0]])])
        tensor([5., 1.], dtype=torch.float64)
    """

    outside_layers = True
    experts = True

    def __init__(self, *, norm: Literal["l1", "l2"] = "l2") -> None:
        check_choice("norm", norm, ("l1", "l2"))
        self.norm = norm

    def score(self, group: Group, weights: Sequence[Tensor]) -> Tensor:
        """Returns the norms [U]."""
        total = torch.zeros(group.num_units, dtype=torch.float64)
        for part, weight in zip(group.slices, weights, strict=True):
            channels = slice(part.offset, part.offset + group.num_units * part.width)
            rows = weight[channels] if part.side == "out" else weight[:, channels].T
            by_channel = torch.cat([self._sums(some.to(torch.float64)) for some in rows.split(_at_once(rows))])
            total += by_channel.unflatten(0, (group.num_units, part.width)).sum(1).cpu()
        return total if self.norm == "l1" else total.sqrt()

    def _sums(self, rows: Tensor) -> Tensor:
        return rows.abs().sum(1) if self.norm == "l1" else rows.square().sum(1)


def _at_once(rows: Tensor) -> int:
    """Returns how many rows are held in float64 at a time: all experts of a layer would take gigabytes."""
    return max(1, _NUMBERS // rows.shape[1])
