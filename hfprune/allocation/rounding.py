"""Rounding of fractional widths to whole units that meet a budget.

Coarse units (layers, heads) are rounded first; MLP neurons absorb the remainder.

Shape legend: S slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hfprune.plan import UNIT_KINDS

Desired = Callable[[float], Sequence[float]]
"""Position in [0, 1] -> units [S] that each slot should lose there; rises with the position."""


def bisected(below: Callable[[float], bool]) -> tuple[float, float]:
    """Returns two neighbouring positions in [0, 1]: the condition holds at the first and not at the second.

    Args:
        below: The condition, true up to some position and false from there on.

    Example:
        >>> low, high = bisected(lambda position: position < 0.3)
        >>> low < 0.3 <= high, high - low < 1e-15
        (True, True)
    """
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


def round_width(exact: float, round_to: int) -> int:
    """Returns the multiple of ``round_to`` nearest to ``exact``; halves are rounded up.

    >>> [round_width(7580.66, 1), round_width(7580.66, 128)]
    [7581, 7552]
    """
    return int(exact / round_to + 0.5) * round_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The numbers of units that a group may keep.

    Attributes:
        kind: Unit kind.
        units: Units of the dense model.
        cost: Parameters of one unit.
        step: Kept numbers are multiples of this, or ``high``.
        low: Smallest allowed number, a multiple of ``step``.
        high: Largest allowed number.
    """

    kind: str
    units: int
    cost: int
    step: int
    low: int
    high: int

    def up(self, kept: float) -> int:
        """Returns the smallest allowed number that is at least ``kept``."""
        number = -int(-kept // self.step) * self.step
        return max(self.low, number) if number <= self.high else self.high

    def below(self, kept: int) -> int | None:
        """Returns the next smaller allowed number, or None."""
        number = (kept - 1) // self.step * self.step
        return number if number >= self.low else None

    def above(self, kept: int) -> int | None:
        """Returns the next larger allowed number, or None."""
        number = (kept // self.step + 1) * self.step
        return None if kept >= self.high else min(number, self.high)


def slot(
    kind: str, units: int, cost: int, *, round_to: int, floor: float = 0.0, ceiling: float = 1.0, least: int = 1
) -> Slot:
    """Returns the slot of a group.

    Args:
        kind: Its unit kind; MLP neurons and hidden channels are rounded.
        units: Units of the dense model.
        cost: Parameters of one unit.
        round_to: Kept MLP widths and hidden sizes are multiples of this.
        floor: Smallest share of the units to keep; at least one step is kept.
        ceiling: Largest share of the units to keep.
        least: Smallest number of units to keep, even below ``floor`` or above ``ceiling``; 0 for a whole sub-layer.
    """
    if not least:  # a sub-layer, kept or not
        return Slot(kind=kind, units=units, cost=cost, step=units, low=0 if floor < 1 else units, high=units)
    step = min(round_to, units) if UNIT_KINDS[kind].rounded else 1
    high = units if ceiling == 1 else max(int(ceiling * units) // step * step, step)
    high = max(high, least)
    low = min(max(-int(-floor * units // step) * step, step, least), high)
    return Slot(kind=kind, units=units, cost=cost, step=step, low=low, high=high)


def fill(slots: Sequence[Slot], desired: Desired, removal: int) -> list[int]:
    """Returns the kept units [S], close to ``desired``, that remove about ``removal`` parameters.

    Kinds are rounded one after another, from the largest step in parameters to the smallest. For each, the position is
    found at which the desired numbers remove ``removal`` parameters, and the kind is rounded there with the smallest
    error in its total (largest remainders first, the lower slot in ties). Later kinds absorb the error; single steps
    absorb the rest.
    """
    kept: dict[int, int] = {}
    for kind in sorted({s.kind for s in slots}, key=lambda k: (-max(s.cost * s.step for s in slots if s.kind == k), k)):
        wished = _wishes(slots, desired, _position(slots, desired, kept, removal))
        members = [i for i, s in enumerate(slots) if s.kind == kind]
        room = sum(slots[i].cost * (slots[i].units - wished[i]) for i in members)
        kept |= _rounded(slots, members, wished, room)
    return _made_up(slots, [kept[i] for i in range(len(slots))], removal)


def _wishes(slots: Sequence[Slot], desired: Desired, position: float) -> list[float]:
    """Returns the numbers [S] to keep at a position, within bounds and not rounded."""
    wished = desired(position)
    return [min(max(s.units - w, s.low), s.high) for s, w in zip(slots, wished, strict=True)]


def _position(slots: Sequence[Slot], desired: Desired, kept: dict[int, int], removal: int) -> float:
    """Returns where the rounded kinds, and the desired numbers of the others, remove ``removal`` parameters."""

    def too_small(position: float) -> bool:
        numbers = enumerate(zip(slots, _wishes(slots, desired, position), strict=True))
        return sum(s.cost * (s.units - kept.get(i, number)) for i, (s, number) in numbers) < removal

    return bisected(too_small)[1]


def _rounded(slots: Sequence[Slot], members: Sequence[int], wished: Sequence[float], room: float) -> dict[int, int]:
    """Returns allowed numbers next to the desired ones of some slots; they remove about ``room`` parameters."""
    kept = {i: slots[i].up(wished[i]) for i in members}
    room -= sum(slots[i].cost * (slots[i].units - kept[i]) for i in members)
    gaps = {i: kept[i] - wished[i] for i in members if kept[i] > wished[i]}
    for i in sorted(gaps, key=lambda i: (-gaps[i] / slots[i].step, i)):
        below = slots[i].below(kept[i])
        if below is None:
            continue
        gain = slots[i].cost * (kept[i] - below)
        if abs(room - gain) < abs(room):
            kept[i], room = below, room - gain
    return kept


def _made_up(slots: Sequence[Slot], kept: list[int], removal: int) -> list[int]:
    """Returns ``kept`` after single steps, coarse ones first, that bring the total closer to ``removal``."""
    order = sorted(range(len(slots)), key=lambda i: (-slots[i].cost * slots[i].step, i))
    kept = _stepped(slots, kept, removal, order)
    finest = min(s.cost * s.step for s in slots)
    for i in order:  # where fine steps did not suffice: one coarse step too far, then fine steps back
        error = _error(slots, kept, removal)
        if abs(error) <= finest / 2:
            break
        beyond = slots[i].below(kept[i]) if error > 0 else slots[i].above(kept[i])
        if beyond is not None:
            others = [j for j in order if j != i]
            tried = _stepped(slots, [*kept[:i], beyond, *kept[i + 1 :]], removal, others)
            kept = min(kept, tried, key=lambda k: abs(_error(slots, k, removal)))
    return kept


def _error(slots: Sequence[Slot], kept: Sequence[int], removal: int) -> int:
    """Returns how many more parameters have to be removed."""
    return removal - sum(s.cost * (s.units - k) for s, k in zip(slots, kept, strict=True))


def _stepped(slots: Sequence[Slot], kept: Sequence[int], removal: int, order: Sequence[int]) -> list[int]:
    found, error = list(kept), _error(slots, kept, removal)
    for i in order:
        while True:
            step = slots[i].below(found[i]) if error > 0 else slots[i].above(found[i])
            gain = 0 if step is None else slots[i].cost * (found[i] - step)
            if step is None or abs(error - gain) >= abs(error):
                break
            found[i], error = step, error - gain
    return found
