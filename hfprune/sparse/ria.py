"""RIA: relative importance times a power of the input's norm (methods section 7)."""

from typing import ClassVar

from torch import Tensor

from hfprune.sparse.base import InputSums, Needs, ScoreMethod
from hfprune.sparse.magnitude import check_scope, relative
from hfprune.sparse.pattern import Scope, Sparsity, drop


class RIA(ScoreMethod):
    """(|w_ij| / sum_i' |w_i'j| + |w_ij| / sum_j' |w_ij'|) * ||x_j||^a.

    Args:
        power: a, 0.5 as published.
        scope: ``matrix`` as published; ``row`` compares the weights of one output.
    """

    needs: ClassVar[Needs] = "norms"

    def __init__(self, *, power: float = 0.5, scope: Scope = "matrix") -> None:
        check_scope(scope)
        self.power, self.scope = power, scope

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the relative importance times the power of the norm."""
        return relative(weight) * sums.norms().to(weight) ** self.power

    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns the lowest of the matrix or of each row."""
        return drop(scores, sparsity, scope=self.scope)
