"""Helpers that map channels of projections to units.

Shape legend: B sequences, T tokens, C channels, U units.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hfprune.criteria.base import BatchInfo
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import check_choice

MatrixReduction = Literal["sum", "mean", "max", "prod", "first", "second", "last"]
"""Reduction of the scores of a unit's coupled matrices to one score; positions follow the order of the slices."""


def channels(group: Group, part: Slice) -> slice:
    """Returns the range of channels of all units of ``group`` in the projection of ``part``."""
    return slice(part.offset, part.offset + group.num_units * part.width)


def by_unit(group: Group, part: Slice, by_channel: Tensor) -> Tensor:
    """Sums channels [..., U * width] over each unit, to [..., U]."""
    return by_channel if part.width == 1 else by_channel.unflatten(-1, (group.num_units, part.width)).sum(-1)


def unit_products(value: Tensor, grad: Tensor, group: Group, part: Slice, batch: BatchInfo) -> Tensor:
    """Returns the sum of value * grad over the channels of each unit, [B, T, U], in the operands' dtype.

    Args:
        value: Activations [B, T, C].
        grad: Gradients [B, T, C], 0 at padding. The product is set to 0 there (guards inf * 0).
        group: The group.
        part: The slice.
        batch: The batch.
    """
    where = channels(group, part)
    product = value[..., where] * grad[..., where]
    if batch.padding is not None:
        product = product.masked_fill_(batch.padding.unsqueeze(-1), 0.0)
    return by_unit(group, part, product)


def slice_names(group: Group) -> list[str]:
    """Returns the name of the sums of each slice."""
    return [f"{part.module} {part.side} {part.offset}" for part in group.slices]


def channel_counts(group: Group) -> dict[str, int]:
    """Returns slice name -> number of channels that the units own."""
    counts = [group.num_units * part.width for part in group.slices]
    return dict(zip(slice_names(group), counts, strict=True))


def slice_name(group: Group, part: Slice) -> str:
    """Returns the name of the sums of ``part``."""
    return slice_names(group)[group.slices.index(part)]


def check_matrix_reduction(how: str) -> None:
    """Raises ``ConfigError`` unless ``how`` is a :data:`MatrixReduction`."""
    check_choice("matrices", how, get_args(MatrixReduction))


def reduce_matrices(group: Group, by_channel: Sequence[Tensor], how: MatrixReduction) -> Tensor:
    """Reduces channel scores to one score per unit, in the order of LLM-Pruner (Ma et al., 2023, arXiv:2305.11627).

    Matrices are reduced channel by channel, then the channels of each unit are added. If a unit owns more channels in
    one matrix than in another (the query heads of a KV group), channel c of every query head is first added to channel
    c of its KV head.

    Args:
        group: The group.
        by_channel: Channel scores [C] of each slice.
        how: Reduction over matrices.

    Returns:
        Scores [U].
    """
    width = min(part.width for part in group.slices)
    folded = torch.stack([scores.unflatten(0, (group.num_units, -1, width)).sum(1) for scores in by_channel])
    if how == "sum":
        chosen = folded.sum(0)
    elif how == "mean":
        chosen = folded.mean(0)
    elif how == "max":
        chosen = folded.amax(0)
    elif how == "prod":
        chosen = folded.prod(0)
    else:
        chosen = folded[{"first": 0, "second": 1, "last": -1}[how]]
    return chosen.sum(-1)


def check_foldable(group: Group) -> None:
    """Raises ``ConfigError`` unless the channels per unit of every slice are a multiple of the smallest number."""
    widths = [part.width for part in group.slices]
    if any(width % min(widths) for width in widths):
        raise ConfigError(
            f"The units of {group.name} own {widths} channels per matrix; each must be a multiple of the smallest."
        )
