"""Fisher scores: second-order effect of a unit on the model's predictions, without labels."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hfprune.criteria.base import UNITS, BatchInfo, GradientCriterion, LargeSums, Rows, Signal, Sums
from hfprune.criteria.channels import unit_products
from hfprune.plan import Group, Slice
from hfprune.utils.settings import check_choice


class Fisher(GradientCriterion):
    """(activation * activation gradient)^2 of a unit, with labels sampled from the model's own output.

    Half the score estimates, to second order, the KL divergence in nats per token from the dense model's predictions
    to those with the unit's activation set to zero. With F the Fisher matrix of the logits z, KL is dz^T F dz / 2. F is
    the mean of e e^T over labels y drawn from the prediction, with e = p - e_y, and g = J^T e is the gradient at the
    activation. Labels are drawn independently at every position, so the cross terms of a squared gradient that
    collects from all later positions vanish in the mean. The first-order effect on KL is zero; the entropy score
    sees -z^T F dz, one projection of the same change (derivation: docs/theory.md).

    - ``per_token``: sum_n sum_t (a g)^2, the unit is set to zero at one token at a time;
    - ``per_sequence``: sum_n (sum_t a g)^2, the unit is set to zero in the whole sequence; a noisier estimate.

    One label is drawn for every token, by random numbers derived from the sequence itself (objective ``sampled``). With
    the objective ``cross_entropy`` the score is the diagonal empirical Fisher of the labels of the text.

    Source: squared gradients as second-order scores are those of Molchanov et al. (2019, arXiv:1906.10771).

    Args:
        reduction: ``per_token`` or ``per_sequence``.

    Raises:
        ConfigError: The reduction is unknown.

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=(Slice(module="down_proj", side="in"),))
        >>> values, gradients = torch.tensor([[[1.0, 1.0], [2.0, 1.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 3.0]]])
        >>> signal = Signal(input=values, grad=gradients, weight=torch.ones(2, 2))
        >>> score_batch(Fisher(), group, [signal])
        tensor([2.5000, 5.0000], dtype=torch.float64)
    """

    outside_layers = True
    experts = True
    objectives = ("sampled", "cross_entropy")

    def __init__(self, *, reduction: Literal["per_token", "per_sequence"] = "per_token") -> None:
        check_choice("reduction", reduction, ("per_token", "per_sequence"))
        self.reduction = reduction

    def reads(self, part: Slice) -> Literal["input"] | None:
        """Returns ``input`` for consumers, whose input holds the unit's activation."""
        return "input" if part.side == "in" else None

    def rows(self, group: Group, signals: Mapping[Slice, Signal], batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the squared products of every sequence, [B, U]."""
        ((part, signal),) = signals.items()
        product = unit_products(batch.wide(signal.input), batch.wide(signal.grad), group, part, batch)
        if self.reduction == "per_token":
            return {UNITS: product.square_().sum(dim=1).to(torch.float64)}
        return {UNITS: product.sum(dim=1).to(torch.float64).square_()}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns sum / tokens."""
        return sums.rows[UNITS] / sums.totals.num_tokens
