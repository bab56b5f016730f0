"""Weight ranges (OptiPFair): the range of a unit's weights times the norm of its activation."""

import torch
from torch import Tensor

from hfprune.criteria.activation_norm import ActivationNorm
from hfprune.criteria.base import Sums
from hfprune.criteria.weight_gradients import slice_weight
from hfprune.plan import Group


class WeightRange(ActivationNorm):
    """(sum over a unit's matrices of range / largest range in that matrix) * norm of its activation.

    The range of a unit in one matrix is max(w) + abs(min(w)) over its row or column; for a unit of several channels,
    over all of them. OptiPFair calls it peak-to-peak magnitude (earlier MAW) and adds up the norms of single batches,
    so that its score depends on the batch size. This implementation uses the norm over the whole calibration set.

    Source: OptiPFair (Martra, 2025, arXiv:2512.22671).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> from hfprune.criteria.base import Activation
        >>> from hfprune.plan import Slice
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=(Slice(module="down_proj", side="in"),))
        >>> seen = Activation(input=torch.tensor([[[3.0, 1.0], [4.0, 1.0]]]), output=torch.ones(1, 2, 2))
        >>> score_batch(WeightRange(), group, [seen], [torch.tensor([[1.0, 2.0], [-1.0, 1.0]])])
        tensor([2.3570, 1.0000], dtype=torch.float64)
    """

    experts = False

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns the ranges times the activation norms."""
        norm = super().score(group, sums)
        structure = torch.zeros_like(norm)
        for part, weight in zip(group.slices, sums.weights(), strict=True):
            owned = slice_weight(group, part, weight).to(torch.float64).reshape(group.num_units, -1)
            size = owned.amax(1) + owned.amin(1).abs()
            structure += size / size.max()
        return structure * norm
