"""RIA: relative importance times a power of the input norm (Zhang et al., ICLR 2024)."""

from typing import ClassVar, get_args

from torch import Tensor

from hfprune.sparse.base import InputSums, Needs, Presets, ScoreMethod
from hfprune.sparse.magnitude import relative
from hfprune.sparse.pattern import Scope, Sparsity, check_scope
from hfprune.sparse.permutation import Permutation, permute
from hfprune.utils.settings import check_choice


class RIA(ScoreMethod):
    """(|w_ij| / sum_i' |w_i'j| + |w_ij| / sum_j' |w_ij'|) * ||x_j||^a.

    With a permutation, n:m groups are not consecutive in the saved matrix: hardware that skips the zeros must gather
    the inputs in the recorded order first.

    Args:
        power: Exponent a, 0.5 as published.
        scope: ``matrix`` as published; ``row`` ranks the weights of each output.
        permutation: Assignment of inputs to n:m groups: ``none`` (stored order), ``dealt`` (by total score), or
            ``assigned`` (refined by linear assignment).

    Source: Zhang et al. (ICLR 2024).

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> sums = InputSums(num_sequences=1, squares=torch.tensor([16.0, 1.0, 1.0, 1.0], dtype=torch.float64))
        >>> RIA().prune(weight, sums, Sparsity(0.5))
        tensor([[ 0.,  0.,  0.,  0.],
                [ 8.,  6., -5.,  7.]])
    """

    needs: ClassVar[Needs] = "norms"
    presets: ClassVar[Presets] = {"ria": {}, "ria_assigned": {"permutation": "assigned"}}

    def __init__(self, *, power: float = 0.5, scope: Scope = "matrix", permutation: Permutation = "none") -> None:
        check_scope(scope)
        check_choice("permutation", permutation, get_args(Permutation))
        self.power, self.scope = power, scope
        self.permutation: Permutation = permutation

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the relative importance times the power of the norm."""
        return relative(weight) * sums.norms().to(weight) ** self.power

    def order(self, scores: Tensor, sparsity: Sparsity) -> Tensor | None:
        """Returns the order of the selected permutation."""
        return permute(scores, sparsity, self.permutation)
