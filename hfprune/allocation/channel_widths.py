"""Hidden channels: their number is chosen first, because the parameters of all other units depend on it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from hfprune.allocation.base import Allotment, Inventory, Scores
from hfprune.models import CHANNELS
from hfprune.utils.errors import ConfigError

_TRIES = 8
"""Number of hidden sizes to try, the nearest ones first."""


class Spend(Protocol):
    """Spends a budget on units within layers."""

    def __call__(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns the allotment; as ``Allocation.allot``."""


def with_channels(
    inventory: Inventory, target: int, spend: Spend, *, round_to: int, scores: Scores | None
) -> Allotment:
    """Returns the allotment that removes about the same share of hidden channels as of the other units.

    The hidden size is the one nearest to that share for which ``spend``, on the model of that size, meets the target
    within half a step, and which a stock config can state together with the number of heads. Where MLP neurons are not
    pruned, the hidden size absorbs the remainder of the budget.

    Args:
        inventory: The groups, hidden channels among them.
        target: Number of parameters to leave.
        spend: Spends the rest of the budget on the other units.
        round_to: MLP widths and hidden sizes are multiples of this.
        scores: As for ``Allocation.allot``.
    """
    units = inventory.groups[inventory.stream].num_units
    others = [kind for kind in inventory.kinds() if kind != CHANNELS]
    sizes = sorted({*range(round_to, units + 1, round_to), units})
    wished = _wished(inventory, target, sizes) if others else _solved(inventory, target, inventory.dense_widths(), ())

    def at(size: int) -> Allotment:
        return _at(inventory, target, size, spend if others else None, round_to=round_to, scores=scores)

    step = _step(inventory, at(_nearest(sizes, wished, 1)[0]).widths)  # heads hardly depend on the size
    found: list[tuple[tuple[bool, float, float], Allotment]] = []
    for size in _fitting(sizes, wished, step, round_to):
        allotment = at(size)
        if others and "mlp" not in others:
            exact = _solved(inventory, target, allotment.widths, allotment.removed_layers)
            size = _nearest(sizes, exact, _step(inventory, allotment.widths))[0]
            allotment = _resized(inventory, allotment, size)
        error = abs(inventory.params(allotment.widths, allotment.removed_layers) - target)
        excess = max(error - _half_step(inventory, allotment, round_to), 0.0)
        stated = size % _step(inventory, allotment.widths) == 0 or size == units
        found.append(((not stated, excess, abs(size - wished)), allotment))
        if stated and not excess:
            break
    return min(found, key=lambda item: item[0])[1]


def _wished(inventory: Inventory, target: int, sizes: Sequence[int]) -> float:
    """Returns the hidden size at which channels and the other units would lose the same share."""
    units, low, high = inventory.groups[inventory.stream].num_units, 0, len(sizes) - 1
    while low < high:  # a larger hidden size: fewer channels and more of the other units are removed
        middle = (low + high) // 2
        more = 1 - sizes[middle] / units > inventory.at(sizes[middle]).common_share(target)
        low, high = (middle + 1, high) if more else (low, middle)
    return float(sizes[low])


def _solved(inventory: Inventory, target: int, widths: Sequence[int], removed: Sequence[int]) -> float:
    """Returns the hidden size that meets the target with given widths of the other units (the count is linear)."""
    place = inventory.stream
    units = inventory.groups[place].num_units
    most, least = (inventory.params([*widths[:place], n, *widths[place + 1 :]], removed) for n in (units, 0))
    return min(max((target - least) / (most - least), 0.0), 1.0) * units


def _nearest(sizes: Sequence[int], wished: float, step: int) -> list[int]:
    """Returns the multiples of ``step`` and the dense size, nearest first; in ties, the larger one."""
    fitting = [size for size in sizes if size % step == 0 or size == sizes[-1]]
    return sorted(fitting, key=lambda size: (abs(size - wished), -size))


def _fitting(sizes: Sequence[int], wished: float, step: int, round_to: int) -> list[int]:
    """Returns the sizes to try; raises ``ConfigError`` if only the dense size is possible."""
    found = _nearest(sizes, wished, step)
    if len(found) == 1:
        raise ConfigError(
            f"round_to={round_to} allows no hidden size below the dense {sizes[-1]}: hidden sizes are also multiples "
            f"of the number of query heads, {step}. Give a smaller `round_to`."
        )
    return found[:_TRIES]


def _at(
    inventory: Inventory, target: int, size: int, spend: Spend | None, *, round_to: int, scores: Scores | None
) -> Allotment:
    """Returns the allotment with ``size`` hidden channels."""
    if spend is None:
        return Allotment(widths=(size,))
    found = spend(inventory.at(size), target, round_to=round_to, scores=scores)
    place = inventory.stream
    return replace(found, widths=(*found.widths[:place], size, *found.widths[place:]))


def _resized(inventory: Inventory, allotment: Allotment, size: int) -> Allotment:
    place = inventory.stream
    return replace(allotment, widths=(*allotment.widths[:place], size, *allotment.widths[place + 1 :]))


def _step(inventory: Inventory, widths: Sequence[int]) -> int:
    """Returns the step of the hidden sizes that a stock config can state with given numbers of heads."""
    assert inventory.channels is not None
    heads = [(w, g.num_units) for w, g in zip(widths, inventory.groups, strict=True) if g.kind == "heads"]
    kept, dense = min(heads, default=(1, 1))  # removed layers list all of their heads
    return max(inventory.channels.step * kept // dense, 1)


def _half_step(inventory: Inventory, allotment: Allotment, round_to: int) -> float:
    """Returns half of the parameters of the finest step: one MLP step in all layers, or hidden channels."""
    inner = inventory.at(allotment.widths[inventory.stream])
    members = inner.numbers("mlp", removed_layers=allotment.removed_layers)
    if members:
        return sum(inner.costs[i] for i in members) * round_to / 2
    assert inventory.channels is not None
    return inventory.channels.per_model * math.lcm(round_to, _step(inventory, allotment.widths)) / 2
