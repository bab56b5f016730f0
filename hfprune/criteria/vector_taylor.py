"""First-order Taylor scores of weight vectors: LLM-Pruner's ``vectorize``, computed without weight gradients."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hfprune.criteria.base import (
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
from hfprune.criteria.channels import (
    MatrixReduction,
    channel_counts,
    channels,
    check_foldable,
    check_matrix_reduction,
    reduce_matrices,
    slice_name,
    slice_names,
)
from hfprune.plan import Group, Slice


class VectorTaylor(GradientCriterion):
    """abs(sum of w dw) over each row or column of a unit, with dw the gradient on the whole calibration set.

    The sum over a weight vector follows from activations (docs/methods.md, VectorTaylor). For a column of the consumer,
    sum_i w dw = sum_t a g, with a the channel's activation and g its gradient. For a row of a producer with bias b,
    sum_k w dw = sum_t (y - b) g at its output y. The down column and the up row of a bias-free MLP therefore score the
    same; only the gate row differs. Biases are not scored, as in the published code.

    Args:
        matrices: Reduction over a unit's matrices: ``sum`` (published default), ``mean``, ``max``, ``prod``, or
            ``first``, ``second`` or ``last`` in the order of the group's slices (gate, up, down).
        weighting: ``sequence``: the mean objective of every sequence counts the same, as published; ``token``: every
            token counts the same.

    Raises:
        ConfigError: A value is unknown.

    Source: LLM-Pruner (Ma et al., 2023, arXiv:2305.11627).

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
        >>> score_batch(VectorTaylor(), group, signals)
        tensor([4., 5.], dtype=torch.float64)
    """

    outside_layers = True
    norms = True

    def __init__(self, *, matrices: MatrixReduction = "sum", weighting: Weighting = "sequence") -> None:
        check_matrix_reduction(matrices)
        check_weighting(weighting)
        self.matrices, self.weighting = matrices, weighting

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` if the channels of a unit's matrices do not correspond."""
        check_foldable(group)

    def reads(self, part: Slice) -> Literal["input", "output"]:
        """Returns ``input`` for consumers and ``output`` for producers, the side with the unit's channels."""
        return "input" if part.side == "in" else "output"

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the number of channels of every slice."""
        return channel_counts(group)

    def rows(self, group: Group, signals: Mapping[Slice, Signal], batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the signed sums over the tokens of each sequence, by channel, [B, channels]."""
        ((part, signal),) = signals.items()
        where = channels(group, part)
        if part.side == "in":
            value = batch.wide(signal.input)[..., where]
        else:
            assert signal.output is not None
            value = batch.wide(signal.output)[..., where]
            value = value if signal.bias is None else value - signal.bias.detach()[where].to(value.dtype)
        product = value * batch.wide(signal.grad)[..., where]
        if batch.padding is not None:
            product = product.masked_fill_(batch.padding.unsqueeze(-1), 0.0)
        found = product.sum(dim=1).to(torch.float64)
        return {slice_name(group, part): found * batch.weights(self.weighting).to(found.device)[:, None]}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns the absolute sums, reduced over matrices and added over the channels of each unit."""
        divisor = sums.totals.divisor(self.weighting)
        by_channel = [sums.rows[name].abs() / divisor for name in slice_names(group)]
        return reduce_matrices(group, by_channel, self.matrices)
