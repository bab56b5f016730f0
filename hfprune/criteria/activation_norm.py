"""Activation norms: scores from one forward pass, without an objective."""

import torch
from torch import Tensor

from hfprune.criteria.base import UNITS, Activation, ActivationCriterion, BatchInfo, LargeSums, Rows, Sums
from hfprune.criteria.channels import by_unit, channels
from hfprune.plan import Group, Slice


class ActivationNorm(ActivationCriterion):
    """Root mean square over tokens of the L2 norm of a unit's activation, at the input of the consumers.

    With a_t the unit's channels at token t, the score is sqrt(sum_t norm(a_t)^2 / tokens). Up to the factor
    sqrt(tokens), which changes no ranking, this is the norm of the unit's activation over the calibration set. The
    activation of an expert is its contribution to the layer's output: its output times its router weight, and 0 for
    tokens that are not routed to it.

    Source: the norm of the activation is the data-dependent factor of Wanda (Sun et al., 2024, arXiv:2306.11695).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=(Slice(module="down_proj", side="in"),))
        >>> seen = Activation(input=torch.tensor([[[3.0, 1.0], [4.0, 1.0]]]), output=torch.ones(1, 2, 2))
        >>> score_batch(ActivationNorm(), group, [seen])
        tensor([3.5355, 1.0000], dtype=torch.float64)
    """

    experts = True

    def reads(self, part: Slice) -> bool:
        """Returns whether the projection consumes the units."""
        return part.side == "in"

    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the sum of squares of each sequence, [B, U]."""
        return {UNITS: by_unit(group, part, squares(seen.input, batch)[:, channels(group, part)])}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns sqrt(sum / tokens)."""
        return (sums.rows[UNITS] / sums.totals.num_tokens).sqrt()


def squares(signal: Tensor, batch: BatchInfo) -> Tensor:
    """Returns the sum of squares of every channel over the real tokens of each sequence, [B, C] float64."""
    if signal.is_cuda and signal.dtype.itemsize < 4:  # one pass over the signal, products and sums in float32
        found = batch.by_sequence(signal)
        if batch.padding is not None:
            found = found.masked_fill(batch.padding.unsqueeze(-1), 0.0)
        norms: Tensor = torch.linalg.vector_norm(found, dim=1, dtype=torch.float32)
        return norms.double().square_()
    value = batch.wide(signal, zero_padding=True)
    return value.square().sum(dim=1).double()
