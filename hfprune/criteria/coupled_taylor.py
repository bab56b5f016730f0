"""Coupled Taylor scores (SDMPrune): signed Taylor terms of a neuron's matrices, summed before the absolute value."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hfprune.criteria.base import (
    UNITS,
    BatchInfo,
    GradientCriterion,
    LargeSums,
    Rows,
    Shape,
    Signal,
    Sums,
    Weighting,
    check_weighting,
)
from hfprune.criteria.weight_gradients import slice_gradients, slice_shape, slice_weight
from hfprune.models import CHANNELS
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError


class CoupledTaylor(GradientCriterion):
    """mean_k sum_n abs(D_kj dD_kj + U_jk dU_jk + G_jk dG_jk) of neuron j (SDMPrune).

    The gradients are those of sequence n's objective. The absolute value is taken per sequence, after the sum over its
    tokens, for every batch size. The published code multiplies by 100 and accumulates an [I, H] matrix per layer in
    bfloat16. The mean over k is additive, so this implementation keeps one exact sum per neuron.

    Index k is an output coordinate of the down projection and an input coordinate of the other matrices. The score
    therefore depends on the basis of the residual stream.

    Args:
        weighting: ``sequence``: the mean objective of every sequence counts the same, as published; ``token``: every
            token counts the same.

    Raises:
        ConfigError: The weighting is unknown.

    Source: SDMPrune (Zhu and Shen, 2025, arXiv:2506.11120).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> slices = (Slice(module="up_proj", side="out"), Slice(module="down_proj", side="in"))
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=slices)
        >>> x, a = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 1.0]]])
        >>> up, down = torch.eye(2), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
        >>> signals = [
        ...     Signal(input=x, output=x @ up.T, grad=torch.tensor([[[1.0, 2.0]]]), weight=up),
        ...     Signal(input=a, output=a, grad=torch.tensor([[[1.0, -1.0]]]), weight=down),
        ... ]
        >>> score_batch(CoupledTaylor(), group, signals)
        tensor([3.5000, 2.5000], dtype=torch.float64)
    """

    joint = True

    def __init__(self, *, weighting: Weighting = "sequence") -> None:
        check_weighting(weighting)
        self.weighting = weighting

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` unless all matrices of a unit have the same shape."""
        sized = [slice_shape(group, part, shape) for part, shape in zip(group.slices, shapes, strict=True)]
        if len(set(sized)) > 1 or group.kind == CHANNELS:
            raise ConfigError(
                f"CoupledTaylor requires matrices of one shape per unit; those of {group.name} have shapes "
                f"{', '.join(map(str, dict.fromkeys(sized)))}. Use WeightTaylor or VectorTaylor for these units."
            )

    def reads(self, part: Slice) -> Literal["output"]:
        """Returns ``output``: output gradient and input give the gradient of the weight."""
        return "output"

    def rows(self, group: Group, signals: Mapping[Slice, Signal], batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the mean over k of the absolute sums of every sequence, [B, U]."""
        weights = [slice_weight(group, part, signal.weight) for part, signal in signals.items()]
        rows = []
        for gradients in zip(*(slice_gradients(group, p, s, batch) for p, s in signals.items()), strict=True):
            added = sum(grad.mul_(weight) for grad, weight in zip(gradients, weights, strict=True))
            assert isinstance(added, Tensor)
            by_channel = added.abs_().mean(1).to(torch.float64)
            rows.append(by_channel.unflatten(0, (group.num_units, -1)).sum(1))
        return {UNITS: torch.stack(rows).mul_(batch.weights(self.weighting).to(rows[0].device)[:, None])}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns sum / count."""
        return sums.rows[UNITS] / sums.totals.divisor(self.weighting)
