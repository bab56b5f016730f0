"""Magnitude: the norm of a unit's weights, a baseline without calibration data."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hfprune.criteria.base import WeightCriterion
from hfprune.criteria.channels import by_unit
from hfprune.criteria.weight_gradients import slice_weight
from hfprune.plan import Group
from hfprune.utils.settings import check_choice

_NUMBERS = 2**24
"""Weights that are converted to float64 at a time; all experts of a layer would take gigabytes."""


class Magnitude(WeightCriterion):
    """L1 or L2 norm of all weights of a unit (for a neuron, its rows of gate and up and its column of down).

    Biases do not count.

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
            rows = slice_weight(group, part, weight)
            chunks = rows.split(max(1, _NUMBERS // rows.shape[1]))
            by_channel = torch.cat([self._sums(chunk.to(torch.float64)) for chunk in chunks])
            total += by_unit(group, part, by_channel).cpu()
        return total if self.norm == "l1" else total.sqrt()

    def _sums(self, rows: Tensor) -> Tensor:
        return rows.abs().sum(1) if self.norm == "l1" else rows.square().sum(1)
