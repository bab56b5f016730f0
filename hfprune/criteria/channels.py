"""From channels of projections to units: what criteria share.

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
"""How the scores of a unit's coupled matrices become one, in the order of the group's slices."""


def channels(group: Group, part: Slice) -> slice:
    """Returns where the channels of all units of ``group`` lie in ``part``'s projection."""
    return slice(part.offset, part.offset + group.num_units * part.width)


def by_unit(group: Group, part: Slice, by_channel: Tensor) -> Tensor:
    """Returns the sums [..., U] over each unit's channels [..., U * width]."""
    return by_channel if part.width == 1 else by_channel.unflatten(-1, (group.num_units, part.width)).sum(-1)


def unit_products(value: Tensor, grad: Tensor, group: Group, part: Slice, batch: BatchInfo) -> Tensor:
    """Returns the sum over a unit's channels of value * grad, [B, T, U], in the operands' type.

    Args:
        value: [B, T, C].
        grad: [B, T, C]; it is 0 at padding, where the product is set to 0 (guards inf * 0).
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
    """Returns what sums of each slice are called."""
    return [f"{part.module} {part.side} {part.offset}" for part in group.slices]


def channel_counts(group: Group) -> dict[str, int]:
    """Returns the number of channels that the units own of each slice, by the slice's name."""
    counts = [group.num_units * part.width for part in group.slices]
    return dict(zip(slice_names(group), counts, strict=True))


def slice_name(group: Group, part: Slice) -> str:
    """Returns what sums of ``part`` are called."""
    return slice_names(group)[group.slices.index(part)]


def check_matrix_reduction(how: str) -> None:
    """Raises ``ConfigError`` unless ``how`` is a known reduction."""
    check_choice("matrices", how, get_args(MatrixReduction))


def reduce_matrices(group: Group, by_channel: Sequence[Tensor], how: MatrixReduction) -> Tensor:
    """Returns one score per unit [U] from the channel scores [C] of each of its slices.

    The order of the reductions is that of LLM-Pruner (Ma et al., 2023, arXiv:2305.11627).

    Matrices are reduced channel by channel, then a unit's channels are added. Where a unit owns more channels of one
    matrix than of another (the query heads of one KV group), these are first folded onto the fewest: channel c of every
    query head onto channel c of its own KV head.
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
    """Raises ``ConfigError`` unless every slice's channels per unit are a multiple of the fewest."""
    widths = [part.width for part in group.slices]
    if any(width % min(widths) for width in widths):
        raise ConfigError(f"The units of {group.name} own {widths} channels, which cannot be folded onto each other.")
