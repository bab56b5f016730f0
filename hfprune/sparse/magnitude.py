"""The absolute value of a weight: needs no data."""

from typing import ClassVar

import torch
from torch import Tensor

from hfprune.sparse.base import InputSums, Presets, ScoreMethod
from hfprune.sparse.pattern import Scope, Sparsity, WideScope, check_scope, drop


class MagnitudeSparsity(ScoreMethod):
    """|w|, one ranking per matrix as published; exactly int(O * C * ratio) zeros, ties to the first weights.

    Args:
        scope: Which weights compete; ``model`` ranks all of them together, so that matrices lose different shares.

    Source: the magnitude baseline of Wanda (Sun et al., 2024, arXiv:2306.11695) and SparseGPT.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> MagnitudeSparsity().prune(weight, InputSums(), Sparsity(0.5))
        tensor([[ 0.,  0.,  0.,  0.],
                [ 8.,  6., -5.,  7.]])
    """

    presets: ClassVar[Presets] = {"magnitude": {}, "magnitude_model": {"scope": "model"}}

    def __init__(self, *, scope: WideScope = "matrix") -> None:
        check_scope(scope, ("row", "matrix", "model"))
        self.scope: WideScope = scope

    @property
    def across(self) -> bool:
        """Whether all matrices share a ranking."""
        return self.scope == "model"

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns |w|."""
        return weight.abs()

    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns the lowest of each row or of the matrix."""
        return drop(scores, sparsity, scope="row" if self.scope == "row" else "matrix")


class RelativeImportance(ScoreMethod):
    """|w| relative to its row and to its column: RIA (Zhang et al., ICLR 2024) without data, ``a = 0``.

    Args:
        scope: Which weights compete.

    Source: RIA (Zhang et al., ICLR 2024).

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> RelativeImportance().prune(weight, InputSums(), Sparsity(0.5))
        tensor([[ 0.,  0.,  0.,  0.],
                [ 8.,  6., -5.,  7.]])
    """

    presets: ClassVar[Presets] = {"relative_importance": {}}

    def __init__(self, *, scope: Scope = "matrix") -> None:
        check_scope(scope)
        self.scope = scope

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns |w_ij| / sum_i' |w_i'j| + |w_ij| / sum_j' |w_ij'|."""
        return relative(weight)

    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns the lowest of each row or of the matrix."""
        return drop(scores, sparsity, scope=self.scope)


def relative(weight: Tensor) -> Tensor:
    """Returns |w| over the sum of its column plus |w| over the sum of its row, [O, C]; 0 where both are 0."""
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    return size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
