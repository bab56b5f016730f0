"""Scores of whole layers from the scores of what is in them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfprune.types import Group


def block_scores(scores: Mapping[str, Tensor], parts: Sequence[Group], block: Group) -> Tensor:
    """Returns the importance [L] float64 of each layer: the sum of the scores of its units.

    With ``WeightTaylor`` that is |w dw| over all weights of the layer's projections; norms and biases are left out.

    Args:
        scores: Group name -> importance [U].
        parts: Groups of units within layers, each with its layer.
        block: The group of whole layers.
    """
    total = torch.zeros(block.num_units, dtype=torch.float64)
    for group in parts:
        if group.layer is not None:
            total[group.layer] += scores[group.name].double().sum().cpu()
    return total
