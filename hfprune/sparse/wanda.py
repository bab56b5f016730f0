"""Wanda: weight magnitude times the norm of the input (Sun et al., 2023, arXiv:2306.11695)."""

from typing import ClassVar

import torch
from torch import Tensor

from hfprune.sparse.base import InputSums, Needs, Presets, ScoreMethod
from hfprune.sparse.pattern import Scope, Sparsity, check_scope


class Wanda(ScoreMethod):
    """|w_ij| * ||x_j||, ranked per row.

    Args:
        scope: ``row`` as published; ``matrix`` ranks all weights of a matrix.
        adaptive: Published variant for unstructured sparsity: every row drops the weights that make up the same share
            of its summed scores. The share is chosen so that the matrix reaches the requested sparsity within 0.001.

    Source: Sun et al. (2024, arXiv:2306.11695).

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> sums = InputSums(num_sequences=1, squares=torch.tensor([16.0, 1.0, 1.0, 1.0], dtype=torch.float64))
        >>> Wanda().prune(weight, sums, Sparsity.parse("2:4"))
        tensor([[1., 0., 0., 4.],
                [8., 0., 0., 7.]])
    """

    needs: ClassVar[Needs] = "norms"
    presets: ClassVar[Presets] = {"wanda": {}, "wanda_adaptive": {"adaptive": True}}

    def __init__(self, *, scope: Scope = "row", adaptive: bool = False) -> None:
        check_scope(scope)
        self.scope, self.adaptive = scope, adaptive

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns |w| times the norm of the input."""
        return weight.abs() * sums.norms().to(weight)

    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns the mask of the lowest scores of each row, or the adaptive choice."""
        if self.adaptive and sparsity.of is None:
            return _adaptive(scores, sparsity.ratio)
        return super().mask(scores, sparsity)


def _adaptive(scores: Tensor, ratio: float) -> Tensor:
    """Returns the mask of the smallest scores of each row that add up to a common share of the row's sum."""
    order = torch.sort(scores, dim=1, stable=True)
    cumulative = order.values.cumsum(1)
    places = torch.arange(scores.shape[1], device=scores.device)
    rank = torch.zeros_like(order.indices).scatter_(1, order.indices, places.expand_as(scores))

    def chosen(share: float) -> Tensor:
        count = (cumulative <= share * cumulative[:, -1:]).sum(1, keepdim=True)
        return rank < count

    low, high = 0.0, 1.0
    found = chosen(0.5)
    for _ in range(60):
        middle = (low + high) / 2
        found = chosen(middle)
        reached = float(found.double().mean())
        if abs(reached - ratio) <= 0.001:
            break
        low, high = (middle, high) if reached < ratio else (low, middle)
    return found
