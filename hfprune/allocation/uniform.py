"""Uniform allocation: the same share of every group of a kind."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Literal

from hfprune.allocation.base import Allocation, Allotment, Inventory, Scores
from hfprune.allocation.channel_widths import with_channels
from hfprune.allocation.rounding import Slot, bisected, round_width, slot
from hfprune.models import CHANNELS
from hfprune.plan import DEPTH_KINDS, LAYERS, SUBLAYERS, UNIT_KINDS, Group, unit_kinds
from hfprune.utils.errors import ConfigError

Compat = Literal["llm_pruner", "slimllm"]


class Uniform(Allocation):
    """Removes the same share of every group of a kind: one MLP width and one number of heads for all layers.

    With a budget, all kinds lose about the same share: layers, sub-layers, heads and hidden channels are rounded to the
    nearest whole number, and MLP neurons absorb the remainder (hidden channels, where MLP neurons are not pruned).
    MLPs of one width keep the exact width that meets the budget, rounded to the nearest multiple of ``round_to``,
    halves up. A layout that needs a stock config restricts the number of heads to those that it can state. With
    ``share``, that share of the units is removed, independent of their parameters.

    Args:
        share: Share of the units of every group to remove, in [0, 1), in place of a budget; or a share for each kind
            (``mlp``, ``heads``, ``attention_sublayers``, ``layers``, ...), 0 for kinds that are not listed.
        compat: Rounding of ``share``. None: nearest, halves remove less. ``llm_pruner``: C - int(C (1 - share)) of a
            group's C channels, and as many whole heads as these fill. ``slimllm``: Python's ``round(share U)``.

    Raises:
        ConfigError: A share is out of range or names an unknown kind, or ``compat`` is given without ``share``.

    Example:
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4, layer_params=(80, 80))
        >>> Uniform().allot(inventory, 160, round_to=1, scores=None).widths
        (6, 6)
    """

    takes_layers = True
    takes_sublayers = True
    takes_channels = True

    def __init__(self, *, share: float | dict[str, float] | None = None, compat: Compat | None = None) -> None:
        if isinstance(share, Mapping):
            share = dict(zip(unit_kinds(share), share.values(), strict=True))
        shares = share if isinstance(share, dict) else dict.fromkeys(UNIT_KINDS, share or 0.0)
        if not set(shares) <= set(UNIT_KINDS) or not all(0 <= value < 1 for value in shares.values()):
            known = ", ".join(UNIT_KINDS)
            raise ConfigError(f"Uniform: share={share} must be in [0, 1), for kinds among {known}.")
        if compat is not None and (compat not in _COMPAT or share is None):
            raise ConfigError(f"Uniform: compat='{compat}' must be one of {', '.join(_COMPAT)}. It needs `share`.")
        self.share, self.compat = share, compat
        self._shares = {kind: shares.get(kind, 0.0) for kind in UNIT_KINDS}

    @property
    def own_budget(self) -> bool:
        """Whether a share was given."""
        return self.share is not None

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` if a share is given for units that are not pruned."""
        super().check(inventory)
        named = self.share if isinstance(self.share, Mapping) else {}
        idle = sorted(kind for kind, share in named.items() if share and kind not in inventory.kinds())
        if idle:
            pruned = ", ".join(inventory.kinds())
            raise ConfigError(f"{self} names {', '.join(idle)}, units that are not pruned. The units are {pruned}.")

    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns the same share of every group of a kind."""
        if self.share is not None:
            return self._by_share(inventory, round_to=round_to, scores=scores)
        if inventory.channels is not None:
            return with_channels(inventory, target, _by_budget, round_to=round_to, scores=scores)
        return _by_budget(inventory, target, round_to=round_to, scores=scores)

    def _by_share(self, inventory: Inventory, *, round_to: int, scores: Scores | None) -> Allotment:
        removed: tuple[int, ...] = ()
        if inventory.layers is not None:
            number = removed_units(inventory.layers, self._shares[LAYERS], self.compat)
            removed = inventory.worst_layers(scores, min(number, _most_layers(inventory)))
        widths = list(inventory.dense_widths())
        for kind in (kind for kind in inventory.depth_kinds if kind != LAYERS):
            members = inventory.numbers(kind, removed_layers=removed)
            together = replace(inventory.groups[members[0]], num_units=len(members))
            count = min(removed_units(together, self._shares[kind], self.compat), len(members) - 1)
            for number in inventory.worst_sublayers(kind, scores, count, removed_layers=removed):
                widths[number] = 0
        absent = inventory.absent(widths, removed)
        for number, group in enumerate(inventory.groups):
            if group.kind not in DEPTH_KINDS and number not in absent:
                kept = group.num_units - removed_units(group, self._shares[group.kind], self.compat)
                step = round_to if UNIT_KINDS[group.kind].rounded else 1
                if group.kind == CHANNELS and inventory.channels is not None and self.compat is None:
                    step = math.lcm(step, inventory.channels.step)
                widths[number] = min(max(round_width(kept, step), step, group.least), group.num_units)
        return settled(inventory, widths, removed)


_COMPAT = ("llm_pruner", "slimllm")


def removed_units(group: Group, share: float, compat: str | None) -> int:
    """Returns how many units of ``group`` a share removes; see :class:`Uniform`.

    >>> from hfprune.plan import Slice
    >>> heads = Group(name="a", kind="heads", num_units=32, slices=(Slice(module="k", side="out", width=128),))
    >>> [removed_units(heads, 0.6, how) for how in (None, "llm_pruner", "slimllm")]
    [19, 19, 19]
    """
    if compat == "llm_pruner":
        channels = min((s.width for s in group.slices), default=1)
        total = group.num_units * channels
        return (total - int(total * (1 - share))) // channels
    if compat == "slimllm":
        return round(share * group.num_units)
    return group.num_units - round_width(group.num_units * (1 - share), 1)


def settled(
    inventory: Inventory, widths: Sequence[int], removed: Sequence[int], exact: float | None = None
) -> Allotment:
    """Returns the allotment of these widths; the ``layers`` group gets the number of kept layers."""
    left = len(inventory.layer_params) - len(removed)
    found = [left if g.kind == LAYERS else width for g, width in zip(inventory.groups, widths, strict=True)]
    return Allotment(widths=tuple(found), removed_layers=tuple(removed), exact_width=exact)


def _most_layers(inventory: Inventory) -> int:
    """Returns how many layers can be removed; one is always kept."""
    return min(_free_layers(inventory), len(inventory.layer_params) - 1)


def _free_layers(inventory: Inventory) -> int:
    return len(inventory.layer_params) - len(inventory.fixed_layers)


def _by_budget(inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
    """Returns the allotment that meets the budget with the most equal shares that whole layers and heads allow."""
    share = inventory.common_share(target)
    found: list[tuple[_Distance, Allotment]] = []
    for window in (1, _WINDOW, math.inf):
        counts = [_numbers_near(inventory, kind, share, window) for kind in inventory.depth_kinds]
        if found and math.prod(map(len, counts)) > _MOST:
            break
        tried = (dict(zip(inventory.depth_kinds, numbers, strict=True)) for numbers in product(*counts))
        found = [_at(inventory, target, numbers, share, round_to, scores) for numbers in tried]
        if found and min(distance for distance, _ in found)[0] == 0:
            break
    return min(found, key=lambda item: item[0])[1]


_WINDOW = 4
"""Distance from the exact number of layers and sub-layers that is tried where the nearest numbers miss the budget."""
_MOST = 2000
"""Largest number of combinations of layers and sub-layers that is tried."""


def _numbers_near(inventory: Inventory, kind: str, share: float, window: float) -> list[int]:
    """Returns the numbers of layers or sub-layers to remove that differ by less than ``window`` from a share."""
    free, most = _free_layers(inventory), _most_layers(inventory)
    if kind != LAYERS:
        free = len(inventory.numbers(kind))
        most = free - 1
    return [number for number in range(most + 1) if abs(number - share * free) < window]


_Distance = tuple[float, float, int]
"""Error in parameters beyond half a step, distance of the kinds from equal shares (summed), error in parameters."""


def _at(
    inventory: Inventory,
    target: int,
    numbers: Mapping[str, int],
    share: float,
    round_to: int,
    scores: Scores | None,
) -> tuple[_Distance, Allotment]:
    """Returns the best allotment that removes given numbers of layers and sub-layers."""
    number = numbers.get(LAYERS, 0)
    removed = inventory.worst_layers(scores, number) if number else ()
    start, away = _without_sublayers(inventory, numbers, removed, scores, share)
    members = {
        kind: inventory.numbers(kind, removed_layers=removed, widths=start)
        for kind in inventory.kinds()
        if kind not in DEPTH_KINDS
    }
    kinds = sorted((k for k in members if members[k]), key=lambda k: -max(inventory.costs[i] for i in members[k]))
    tolerance, found = _half_step(inventory, round_to), []
    for chosen in product(*(_widths_of(inventory, k, members[k], round_to) for k in kinds[:-1])):
        widths, exact = list(start), None
        for kind, part in zip(kinds, chosen, strict=False):
            for i, width in zip(members[kind], part, strict=True):
                widths[i] = width
        if kinds:
            exact = _fill_last(inventory, target, members[kinds[-1]], removed, widths, round_to)
        unequal = away + sum(_share_away(inventory, members[kind], widths, share) for kind in kinds)
        error = abs(inventory.params(widths, removed) - target)
        allotment = settled(inventory, widths, removed, exact if kinds and kinds[-1] == "mlp" else None)
        found.append(((max(error - tolerance, 0.0), unequal, error), allotment))
    return min(found, key=lambda item: item[0])


def _without_sublayers(
    inventory: Inventory,
    numbers: Mapping[str, int],
    removed: Sequence[int],
    scores: Scores | None,
    share: float,
) -> tuple[list[int], float]:
    """Returns the widths without the sub-layers of lowest score, and the distance from equal shares of depth."""
    widths, away = list(inventory.dense_widths()), 0.0
    if LAYERS in numbers:
        away += abs(numbers[LAYERS] / _free_layers(inventory) - share)
    for kind in (kind for kind in numbers if kind != LAYERS):
        left = len(inventory.numbers(kind, removed_layers=removed))
        count = min(numbers[kind], max(left - 1, 0))
        for i in inventory.worst_sublayers(kind, scores, count, removed_layers=removed):
            widths[i] = 0
        away += abs(count / max(left, 1) - share)
    return widths, away


def _widths_of(inventory: Inventory, kind: str, members: Sequence[int], round_to: int) -> list[list[int]]:
    """Returns every list of widths that one share can give to the groups of a kind."""
    if kind == "heads" and inventory.head_counts is not None:
        return [[number] * len(members) for number in inventory.head_counts]
    slots = [_slot(inventory, i, round_to) for i in members]
    shares = {1 - kept / s.units for s in slots for kept in range(s.low, s.units + 1, s.step)}
    found = ([_nearest(s, s.units * (1 - share)) for s in slots] for share in sorted(shares | {0.0}))
    return [list(widths) for widths in dict.fromkeys(map(tuple, found))]


def _fill_last(
    inventory: Inventory,
    target: int,
    members: Sequence[int],
    removed: Sequence[int],
    widths: list[int],
    round_to: int,
) -> float | None:
    """Sets the widths of the last kind to meet the target; returns its exact width where groups have the same one."""
    slots = [_slot(inventory, i, round_to) for i in members]
    need = inventory.params(widths, removed) - target
    share: float | Fraction = Fraction(need, sum(s.units * s.cost for s in slots))  # exact, so that halves round up

    def count(share: float | Fraction) -> int:
        number, of = share.as_integer_ratio()
        for i, s in zip(members, slots, strict=True):
            widths[i] = _nearest(s, s.units * (of - number) / of)
        return inventory.params(widths, removed)

    if inventory.count is not None:
        share = min(bisected(lambda x: count(x) > target), key=lambda x: abs(count(x) - target))
    count(min(max(share, 0), 1))
    dense = {s.units for s in slots}
    return float(dense.pop() * (1 - share)) if len(dense) == 1 and inventory.count is None else None


def _slot(inventory: Inventory, number: int, round_to: int) -> Slot:
    group = inventory.groups[number]
    return slot(group.kind, group.num_units, inventory.costs[number], round_to=round_to, least=group.least)


def _nearest(s: Slot, exact: float) -> int:
    """Returns the multiple of the slot's step nearest to ``exact``, within its bounds."""
    return min(max(round_width(exact, s.step), s.low), s.units)


def _share_away(inventory: Inventory, members: Sequence[int], widths: Sequence[int], share: float) -> float:
    units = sum(inventory.groups[i].num_units for i in members)
    return abs(1 - sum(widths[i] for i in members) / units - share)


def _half_step(inventory: Inventory, round_to: int) -> float:
    """Returns half of the parameters of the finest step: one step of every group of a kind, or one layer."""
    steps = {}
    for kind in inventory.kinds():
        members = inventory.numbers(kind)
        if kind == LAYERS:
            steps[kind] = max(inventory.layer_params)
        elif kind in SUBLAYERS:
            steps[kind] = max(inventory.costs[i] for i in members)
        else:
            steps[kind] = sum(inventory.costs[i] * _slot(inventory, i, round_to).step for i in members)
    return min(steps.values()) / 2
