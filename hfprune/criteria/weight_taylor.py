"""First-order Taylor scores from weights, elementwise (LLM-Pruner's ``param_first`` at batch size 1)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from hfprune.criteria.base import BatchInfo, GradientCriterion, Signal, Totals, Weighting
from hfprune.errors import ConfigError
from hfprune.types import Group, Slice


class WeightTaylor(GradientCriterion):
    """sum_n sum |w * dw_n| over every weight that a unit owns, dw_n the gradient of sequence n's objective.

    The absolute value is taken per weight and per sequence: with a larger batch it would depend on the batch size
    so gradients are formed sequence by sequence from each projection's input and output gradient. No ``weight.grad`` is
    ever allocated. Biases are not scored, as in the published code.

    Args:
        weighting: ``token`` or ``sequence`` (each sequence's mean objective, the published normalisation).
    """

    signal: ClassVar[Literal["activation", "weight"]] = "weight"

    def __init__(self, *, weighting: Weighting = "sequence") -> None:
        if weighting not in ("token", "sequence"):
            raise ConfigError(f"Unknown weighting '{weighting}'. Known: token, sequence.")
        self.weighting = weighting

    def rows(self, group: Group, part: Slice, signal: Signal, batch: BatchInfo) -> Tensor:
        """Returns |w * dw_n| of this projection, summed over each unit's channels, for every sequence n: [B, U]."""
        inputs, grads = batch.by_sequence(signal.input), batch.by_sequence(signal.grad)
        if inputs.dtype != torch.float64:
            inputs, grads = inputs.float(), grads.float()
        if batch.padding is not None:
            grads = grads.masked_fill(batch.padding.unsqueeze(-1), 0.0)
        channels = slice(part.offset, part.offset + group.num_units * part.width)
        weight = signal.weight.detach()[channels] if part.side == "out" else signal.weight.detach()[:, channels]
        rows = []
        for x, g in zip(inputs, grads, strict=True):
            if part.side == "out":
                by_channel = (g[:, channels].T @ x).mul_(weight).abs_().sum(dim=1)
            else:
                by_channel = (g.T @ x[:, channels]).mul_(weight).abs_().sum(dim=0)
            rows.append(by_channel.to(torch.float64).unflatten(0, (group.num_units, part.width)).sum(1))
        return torch.stack(rows).mul_(batch.weights(self.weighting).to(rows[0].device)[:, None])

    def score(self, total: Tensor, totals: Totals) -> Tensor:
        """Returns sum / count."""
        return total / totals.divisor(self.weighting)

    def describe(self) -> dict[str, str]:
        """Returns name and settings."""
        return {"name": "weight_taylor", "reduction": "elementwise", "weighting": self.weighting}
