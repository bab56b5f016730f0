"""First-order Taylor scores of single weights: |w dw| of an objective."""

from typing import ClassVar

from torch import Tensor

from hfprune.objectives import OBJECTIVES
from hfprune.sparse.base import InputSums, Needs, ScoreMethod
from hfprune.sparse.pattern import Sparsity, WideScope, check_scope, drop


class TaylorSparsity(ScoreMethod):
    """Sum over sequences of |w_ij * d objective / d w_ij|, taken on the dense model.

    The elementwise form of LLM-Pruner's ``param_first`` at batch size 1 (Ma et al., 2023, arXiv:2305.11627), for any
    objective: the gradient of a sequence is summed over its tokens, then the absolute value is taken.

    Args:
        objective: What is differentiated: ``entropy`` or ``cross_entropy``.
        scope: Which weights compete; scores share a unit, so that ``model`` ranks all of them together.
        layers_at_once: Layers whose scores are summed in one pass over the data, 16 bytes a weight; None: all of them.
    """

    needs: ClassVar[Needs] = "importance"

    def __init__(
        self, *, objective: str = "entropy", scope: WideScope = "row", layers_at_once: int | None = None
    ) -> None:
        OBJECTIVES.get(objective)
        check_scope(scope, ("row", "matrix", "model"))
        self.objective, self.layers_at_once = objective, layers_at_once
        self.scope: WideScope = scope

    @property
    def across(self) -> bool:
        """Whether all matrices share a ranking."""
        return self.scope == "model"

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the scores that were summed beforehand."""
        assert sums.importance is not None
        return sums.importance

    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns the lowest of each row or of the matrix."""
        return drop(scores, sparsity, scope="row" if self.scope == "row" else "matrix")
