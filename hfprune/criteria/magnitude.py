"""The norm of the weights that a unit owns: the baseline that needs no data."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hfprune.criteria.base import WeightCriterion
from hfprune.errors import ConfigError
from hfprune.types import Group


class Magnitude(WeightCriterion):
    """L1 or L2 norm of all weights of a unit: its rows of gate and up and its column of down. Biases do not count.

    Args:
        norm: ``l2`` or ``l1``.
    """

    outside_layers = True
    experts = True

    def __init__(self, *, norm: Literal["l1", "l2"] = "l2") -> None:
        if norm not in ("l1", "l2"):
            raise ConfigError(f"Unknown norm '{norm}'. Known: l1, l2.")
        self.norm = norm

    def score(self, group: Group, weights: Sequence[Tensor]) -> Tensor:
        """Returns the norms [U]."""
        total = torch.zeros(group.num_units, dtype=torch.float64)
        for part, weight in zip(group.slices, weights, strict=True):
            channels = slice(part.offset, part.offset + group.num_units * part.width)
            rows = (weight[channels] if part.side == "out" else weight[:, channels].T).to(torch.float64)
            by_channel = rows.abs().sum(1) if self.norm == "l1" else rows.square().sum(1)
            total += by_channel.unflatten(0, (group.num_units, part.width)).sum(1).cpu()
        return total if self.norm == "l1" else total.sqrt()

    def describe(self) -> dict[str, str]:
        """Returns name and norm."""
        return {"name": "magnitude", "norm": self.norm}
