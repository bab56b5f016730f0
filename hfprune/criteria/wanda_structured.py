"""Structured Wanda: the weight score |W| times the input norm, summed over the weights of each unit."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hfprune.criteria.activation_norm import squares
from hfprune.criteria.base import Activation, ActivationCriterion, BatchInfo, LargeSums, Rows, Shape, Sums
from hfprune.criteria.channels import by_unit, channels, slice_name, slice_names
from hfprune.plan import Group, Slice
from hfprune.utils.settings import check_choice


class WandaStructured(ActivationCriterion):
    """Sum of abs(W_oi) norm(x_i) over the weights of a unit.

    norm(x_i) is the root mean square over tokens of input channel i. Wanda's own norm is larger by the factor
    sqrt(tokens), which changes no ranking.

    Args:
        projections: ``consumers`` reads the columns that consume the unit (``down_proj``): a neuron scores
            norm(a_j) sum_i abs(D_ij). ``all`` also reads the rows that produce it.

    Raises:
        ConfigError: The value is unknown.

    Source: weight score of Wanda (Sun et al., 2024, arXiv:2306.11695).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> slices = (Slice(module="up_proj", side="out"), Slice(module="down_proj", side="in"))
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=slices)
        >>> x, a = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 1.0]]])
        >>> up, down = torch.eye(2), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
        >>> seen = [Activation(input=x, output=x @ up.T), Activation(input=a, output=a @ down.T)]
        >>> score_batch(WandaStructured(projections="all"), group, seen, [up, down])
        tensor([7., 5.], dtype=torch.float64)
    """

    def __init__(self, *, projections: Literal["consumers", "all"] = "consumers") -> None:
        check_choice("projections", projections, ("consumers", "all"))
        self.projections = projections

    def reads(self, part: Slice) -> bool:
        """Returns whether the weights of the projection count."""
        return self.projections == "all" or part.side == "in"

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns slice name -> number of input channels that its weights read."""
        found = {}
        for name, part, shape in zip(slice_names(group), group.slices, shapes, strict=True):
            if self.reads(part):
                found[name] = shape[1] if part.side == "out" else group.num_units * part.width
        return found

    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the sums of squares of these input channels for each sequence."""
        found = squares(seen.input, batch)
        return {slice_name(group, part): found if part.side == "out" else found[:, channels(group, part)]}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns the sums over the weights of each unit."""
        total = torch.zeros(group.num_units, dtype=torch.float64)
        for name, part, weight in zip(slice_names(group), group.slices, sums.weights(), strict=True):
            if self.reads(part):
                norms = (sums.rows[name] / sums.totals.num_tokens).sqrt()
                where = channels(group, part)
                size = weight.abs().to(torch.float64)
                by_channel = size[where] @ norms if part.side == "out" else size[:, where].sum(0) * norms
                total += by_unit(group, part, by_channel).cpu()
        return total
