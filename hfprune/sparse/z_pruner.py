"""Z-Pruner: z-scores of row- and column-normalised weights (Bhuiyan et al., 2025, arXiv:2508.15828)."""

from typing import ClassVar

import torch
from torch import Tensor

from hfprune.sparse.base import InputSums, Needs, Presets, ScoreMethod
from hfprune.sparse.pattern import Scope, check_scope


class ZPruner(ScoreMethod):
    """(alpha |z_R|^3 + (1 - alpha) |z_K|^3) * ||x_j||^1.5.

    R is W divided by the norms of its rows, K is W divided by the norms of its columns, and z_R and z_K are their
    z-scores over the whole matrix (unbiased). alpha = 0.7 (1 - 0.3 sigma), with sigma the share of weights below a
    tenth of the mean magnitude. Scores are float32 or wider: in the float16 of the published code, |z| > 40 overflows.
    N:M patterns are supported; the published code parses but ignores them.

    Args:
        scope: ``matrix`` as published; ``row`` ranks the weights of each output.

    Source: Bhuiyan et al. (2025, arXiv:2508.15828).

    Example:
        >>> from hfprune.sparse.pattern import Sparsity
        >>> import torch
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> sums = InputSums(num_sequences=1, squares=torch.tensor([16.0, 1.0, 1.0, 1.0], dtype=torch.float64))
        >>> ZPruner().prune(weight, sums, Sparsity(0.5))
        tensor([[ 0., -2.,  0.,  4.],
                [ 8.,  0., -5.,  0.]])
    """

    needs: ClassVar[Needs] = "norms"
    presets: ClassVar[Presets] = {"z_pruner": {}}

    def __init__(self, *, scope: Scope = "matrix") -> None:
        check_scope(scope)
        self.scope = scope

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the combined z-scores times the power of the norm."""
        tiny = torch.finfo(weight.dtype).tiny
        rows = _cubed_z(weight / weight.norm(dim=1, keepdim=True).clamp(min=tiny))
        columns = _cubed_z(weight / weight.norm(dim=0, keepdim=True).clamp(min=tiny))
        size = weight.abs()
        small = (size < 0.1 * size.mean()).to(weight.dtype).mean()
        alpha = 0.7 * (1 - 0.3 * small)
        return (alpha * rows + (1 - alpha) * columns) * sums.norms().to(weight) ** 1.5


def _cubed_z(values: Tensor) -> Tensor:
    """Returns |(v - mean) / std|^3 over all entries."""
    return ((values - values.mean()) / values.std()).abs() ** 3
