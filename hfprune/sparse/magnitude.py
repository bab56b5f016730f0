"""The absolute value of a weight: needs no data."""

import torch
from torch import Tensor

from hfprune.errors import ConfigError
from hfprune.sparse.base import InputSums, ScoreMethod
from hfprune.sparse.pattern import Scope, Sparsity, drop


def check_scope(scope: str) -> None:
    """Raises ``ConfigError`` unless ``scope`` is one."""
    if scope not in ("row", "matrix"):
        raise ConfigError(f"Unknown scope '{scope}'. Known: row, matrix.")


class MagnitudeSparsity(ScoreMethod):
    """|w|, one ranking per matrix as published; exactly int(O * C * ratio) zeros, ties to the first weights.

    Args:
        scope: Which weights compete.
    """

    def __init__(self, *, scope: Scope = "matrix") -> None:
        check_scope(scope)
        self.scope = scope

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns |w|."""
        return weight.abs()

    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns the lowest of each row or of the matrix."""
        return drop(scores, sparsity, scope=self.scope)


class RelativeImportance(ScoreMethod):
    """|w| relative to its row and to its column: RIA without data (methods section 7, ``a = 0``).

    Args:
        scope: Which weights compete.
    """

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
