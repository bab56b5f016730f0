"""First-order Taylor scores of activations, without weight gradients (HFPrune, Zhu et al., 2026, arXiv:2603.08083)."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from hfprune.criteria.base import (
    UNITS,
    BatchInfo,
    GradientCriterion,
    LargeSums,
    Rows,
    Signal,
    Sums,
    Weighting,
    check_weighting,
)
from hfprune.criteria.channels import unit_products
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError
from hfprune.utils.exact_sums import Bfloat16Sum, UnitSum
from hfprune.utils.settings import check_choice

Reduction = Literal["per_token", "per_sequence", "signed"]


class ActivationTaylor(GradientCriterion):
    """|activation * gradient| of a unit, with the absolute value per token, per sequence or over the data set.

    With a_nt the unit's activation at token t of sequence n and g_nt the gradient of the sequence's summed objective:

    - ``per_token`` (HFPrune): sum_n sum_t |a g|;
    - ``per_sequence``: sum_n |sum_t a g|;
    - ``signed``: |sum_n sum_t a g|, the first-order effect of removing the unit on the whole data set.

    The activation of an expert is its router weight, 0 for tokens that are not routed to it. Then a g is the
    first-order change of the objective when the expert's contribution is removed.

    Sums are divided by the number of tokens, or of sequences (``weighting="sequence"``, the official normalisation).

    Args:
        reduction: Scope of the absolute value.
        weighting: ``token`` or ``sequence``.
        compat: ``official`` accumulates the per-token form in bfloat16 as the published code does, including its
            rounding errors: the running sum stalls after 256 to 512 equal increments. For comparisons only.

    Raises:
        ConfigError: A value is unknown, or ``compat`` is set with a reduction other than ``per_token``.

    Source: Molchanov et al. (2017, arXiv:1611.06440); with the entropy as the objective HFPrune (Zhu et al., 2026,
    arXiv:2603.08083, Eq. 4).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=(Slice(module="down_proj", side="in"),))
        >>> values, gradients = torch.tensor([[[1.0, 1.0], [2.0, 1.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 3.0]]])
        >>> signal = Signal(input=values, grad=gradients, weight=torch.ones(2, 2))
        >>> score_batch(ActivationTaylor(), group, [signal])
        tensor([1.5000, 2.0000], dtype=torch.float64)
        >>> score_batch(ActivationTaylor(reduction="signed"), group, [signal])
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """

    outside_layers = True
    experts = True

    def __init__(
        self,
        *,
        reduction: Reduction = "per_token",
        weighting: Weighting = "token",
        compat: Literal["official"] | None = None,
    ) -> None:
        check_choice("reduction", reduction, get_args(Reduction))
        check_weighting(weighting)
        check_choice("compat", compat, (None, "official"))
        if compat and reduction != "per_token":
            raise ConfigError(f"compat='official' requires reduction='per_token', not reduction='{reduction}'.")
        self.reduction, self.weighting, self.compat = reduction, weighting, compat

    def reads(self, part: Slice) -> Literal["input"] | None:
        """Returns ``input`` for consumers, whose input holds the unit's activation."""
        return "input" if part.side == "in" else None

    def new_sum(self, length: int, device: torch.device) -> UnitSum:
        """Returns an empty sum; ``compat="official"`` rounds it to bfloat16 after every sequence."""
        return Bfloat16Sum(length, device=device) if self.compat else super().new_sum(length, device)

    def rows(self, group: Group, signals: Mapping[Slice, Signal], batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the products of every sequence, reduced over its tokens, [B, U]."""
        ((part, signal),) = signals.items()
        if self.compat:
            return {UNITS: self._official_rows(group, part, signal, batch)}
        value = batch.by_sequence(signal.input)  # widened within the product, which saves a copy
        product = unit_products(value, batch.wide(signal.grad), group, part, batch)
        if self.reduction == "per_token":
            product = product.abs_()
        by_sequence = product.sum(dim=1).to(torch.float64)
        if self.reduction == "per_sequence":
            by_sequence = by_sequence.abs_()
        return {UNITS: by_sequence.mul_(batch.weights(self.weighting).to(by_sequence.device)[:, None])}

    def _official_rows(self, group: Group, part: Slice, signal: Signal, batch: BatchInfo) -> Tensor:
        """Returns the rows for the gradient of each sequence's mean objective, with operands rounded to bfloat16."""
        counts = batch.num_tokens.clamp(min=1).to(signal.grad.device, signal.grad.dtype)
        grad = batch.by_sequence(signal.grad) / counts[:, None, None]
        value = batch.by_sequence(signal.input)
        return unit_products(value.bfloat16(), grad.bfloat16(), group, part, batch).abs_().sum(dim=1)

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns |sum| / count; the absolute value matters for ``signed`` only."""
        return sums.rows[UNITS].abs() / sums.totals.divisor(self.weighting)
