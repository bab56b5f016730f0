"""Magnitude scores of single weights, without calibration data."""

from typing import ClassVar, get_args

import torch
from torch import Tensor

from hfprune.sparse.base import InputSums, Presets, ScoreMethod
from hfprune.sparse.pattern import Scope, WideScope, check_scope


class MagnitudeSparsity(ScoreMethod):
    """|w|, ranked per matrix as published: exactly int(O * C * ratio) zeros; of equal weights the first are dropped.

    Args:
        scope: Weights that are ranked together; ``model`` ranks all matrices, so that their shares of zeros differ.

    Source: magnitude baseline of Wanda (Sun et al., 2024, arXiv:2306.11695) and SparseGPT.

    Example:
        >>> from hfprune.sparse.pattern import Sparsity
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> MagnitudeSparsity().prune(weight, InputSums(), Sparsity(0.5))
        tensor([[ 0.,  0.,  0.,  0.],
                [ 8.,  6., -5.,  7.]])
    """

    presets: ClassVar[Presets] = {"magnitude": {}, "magnitude_model": {"scope": "model"}}

    def __init__(self, *, scope: WideScope = "matrix") -> None:
        check_scope(scope, get_args(WideScope))
        self.scope = scope

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns |w|."""
        return weight.abs()


class RelativeImportance(ScoreMethod):
    """|w| relative to its row and column: RIA without calibration data (``a = 0``).

    Args:
        scope: Weights that are ranked together.

    Source: RIA (Zhang et al., ICLR 2024).

    Example:
        >>> from hfprune.sparse.pattern import Sparsity
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


def relative(weight: Tensor) -> Tensor:
    """Returns |w| / (column sum of |w|) + |w| / (row sum of |w|), [O, C]; 0 for rows and columns of zeros."""
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    return size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
