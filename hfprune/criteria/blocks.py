"""Which groups are scored for the units that may go, and what their scores say of whole layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hfprune.arch import find_groups
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


def scored_groups(model: nn.Module, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Returns the groups to score: those with slices; for whole layers, everything in them."""
    if all(group.slices for group in groups):
        return groups
    return find_groups(model, ("mlp", "heads"))


def with_blocks(scores: Mapping[str, Tensor], groups: Sequence[Group], scored: Sequence[Group]) -> dict[str, Tensor]:
    """Returns the scores of ``groups``, those of whole layers added up from what is in them.

    Args:
        scores: Scores of ``scored``.
        groups: The groups that may lose units.
        scored: The groups that were scored.
    """
    return {group.name: scores[group.name] if group.slices else block_scores(scores, scored, group) for group in groups}
