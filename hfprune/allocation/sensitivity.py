"""Sensitivity allocation: spends the budget by measured curves of the KL divergence per group."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hfprune.allocation.base import Allocation, Allotment, Inventory, Measurements, Scores
from hfprune.allocation.rounding import fill, slot
from hfprune.allocation.uniform import settled
from hfprune.plan import PLAN_FORMAT, SUBLAYERS, UNIT_KINDS, Group
from hfprune.utils.errors import ConfigError

Curves = Mapping[str, Mapping[float, float]]
"""Group name -> kept share of its units -> KL to the dense model, nats per token, with that group alone pruned."""

_Piece = tuple[float, int, float, float]
"""KL per removed parameter, position of the group, removed units at its start and at its end."""


class Sensitivity(Allocation):
    """Removes units where the measured KL divergence increases least per removed parameter, until the budget is met.

    Each curve, over removed parameters, is replaced by its lower convex hull from (no unit removed, KL 0). The
    pieces of all hulls are taken in the order of their slopes. This minimises the sum of the hulls at the budget,
    which is the KL if the effects of several groups add up. No group loses more units than at its smallest measured
    share. Coarse kinds are rounded first; MLP neurons absorb the remainder.

    Args:
        curves: Group name -> kept share -> KL, as returned by :func:`measure_curves`; or the path of a JSON file, or of
            the ``plan.json`` of a run that measured them. None: measured after calibration on its first ``sequences``
            sequences, with one forward pass over them for every group and share.
        shares: Kept shares to measure at.
        sequences: Number of sequences to measure on.

    Raises:
        ConfigError: The file cannot be read, or a value is out of range.

    Example:
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4, layer_params=(80, 80))
        >>> curves = {"0.mlp": {0.5: 0.1}, "1.mlp": {0.5: 0.4}}
        >>> Sensitivity(curves).allot(inventory, 150, round_to=1, scores=None).widths
        (4, 7)
    """

    takes_sublayers = True

    def __init__(
        self,
        curves: dict[str, dict[float, float]] | str | None = None,
        *,
        shares: Sequence[float] = (0.75, 0.5, 0.25),
        sequences: int = 4,
    ) -> None:
        self.shares, self.sequences, self.measured = tuple(shares), sequences, False
        if not self.shares or not all(0 < share < 1 for share in self.shares) or sequences < 1:
            raise ConfigError(f"Sensitivity: shares={list(shares)} must be in (0, 1), sequences={sequences} positive.")
        if curves is None:
            self.curves: dict[str, dict[float, float]] | None = None
            return
        self.curves = _read(curves) if isinstance(curves, str) else {n: dict(c) for n, c in curves.items()}
        if not all(0 <= share <= 1 and kl == kl for curve in self.curves.values() for share, kl in curve.items()):
            raise ConfigError("Sensitivity: every kept share must be in [0, 1], and no KL NaN.")

    @property
    def measures(self) -> str:
        """``curves`` if none were given."""
        return "curves" if self.curves is None else ""

    def measure(self, on: Measurements) -> "Allocation":
        """Returns the allocation with the curves of the model."""
        return self if self.curves is not None else self.with_curves(on.kl_curves(self.shares))

    def with_curves(self, curves: Curves) -> "Sensitivity":
        """Returns the allocation with curves that were measured with its settings."""
        found = Sensitivity(
            {name: dict(curve) for name, curve in curves.items()}, shares=self.shares, sequences=self.sequences
        )
        found.measured = True
        return found

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` for units within sub-layers that are pruned, too: their curves would not add up."""
        super().check(inventory)
        kinds = inventory.kinds()
        for whole in (kind for kind in SUBLAYERS if kind in kinds):
            part = next((part for part in UNIT_KINDS[whole].parts if part in kinds), None)
            if part is not None:
                raise ConfigError(
                    f"Sensitivity measures each group alone: '{part}' are parts of '{whole}'. Leave one of them out of "
                    "the units, or use Uniform."
                )

    def needs_scores(self, inventory: Inventory) -> bool:
        """Returns whether widths depend on scores: the units removed at each point of a curve are chosen by score."""
        return self.curves is None or super().needs_scores(inventory)

    def describe(self) -> dict[str, Any]:
        """Returns name and curves, and the settings of their measurement."""
        found: dict[str, Any] = {"name": "Sensitivity"}
        if self.curves is None or self.measured:
            found |= {"shares": list(self.shares), "sequences": self.sequences}
        if self.curves is not None:
            found["curves"] = {n: {str(k): v for k, v in c.items()} for n, c in self.curves.items()}
        return found

    def __str__(self) -> str:
        """Returns name and settings; the same before and after the measurement."""
        if self.curves is None or self.measured:
            return f"Sensitivity(shares={list(self.shares)}, sequences={self.sequences})"
        return f"Sensitivity({len(self.curves)} curves)"

    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns the widths at the end of the cheapest pieces; straight lines replace curves not yet measured."""
        if self.curves is None:
            return self._provisional(inventory).allot(inventory, target, round_to=round_to, scores=scores)
        missing = [group.name for group in inventory.groups if group.name not in self.curves]
        if missing:
            raise ConfigError(f"Sensitivity: no curve for {', '.join(missing[:3])}{', ...' if missing[3:] else ''}.")
        pieces: list[_Piece] = []
        slots = []
        for number, (group, cost) in enumerate(zip(inventory.groups, inventory.costs, strict=True)):
            curve = self.curves[group.name]
            pieces += _hull(number, group.num_units, cost, curve)
            floor = min(1.0, *curve) if curve else 1.0
            step = round_to if floor < 1 else group.num_units
            slots.append(slot(group.kind, group.num_units, cost, round_to=step, floor=floor, least=group.least))
        pieces.sort()
        widths = fill(slots, _walk(pieces, inventory.costs), inventory.dense_params - target)
        return settled(inventory, widths, ())

    def _provisional(self, inventory: Inventory) -> "Sensitivity":
        """Returns an allocation with straight curves within the same limits."""
        lines = {}
        for group in inventory.groups:
            shares = [width / group.num_units for width in _measured(group, self.shares)]
            lines[group.name] = {share: 1 - share for share in shares}
        return Sensitivity(lines)


def measure_curves(
    groups: Sequence[Group], shares: Sequence[float], measure: Callable[[Group, Sequence[int]], Sequence[float]]
) -> dict[str, dict[float, float]]:
    """Returns the curves for :class:`Sensitivity`.

    Args:
        groups: The groups.
        shares: Kept shares to measure at, each in (0, 1).
        measure: Group and numbers of kept units, descending -> KL to the dense model for each, with that group alone
            pruned.
    """
    curves = {}
    for group in groups:
        widths = _measured(group, shares)
        found = zip(widths, measure(group, widths), strict=True)
        curves[group.name] = {width / group.num_units: kl for width, kl in found}
    return curves


def _measured(group: Group, shares: Sequence[float]) -> list[int]:
    """Returns the kept units at each share, descending; a sub-layer is measured without it."""
    if not group.least:
        return [0]
    widths = {max(group.least, int(share * group.num_units + 0.5)) for share in shares}
    return sorted((width for width in widths if width < group.num_units), reverse=True)


def _read(path: str) -> dict[str, dict[float, float]]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("format") == PLAN_FORMAT:
            data = ((data.get("provenance") or {}).get("allocation") or {})["curves"]
        return {name: {float(share): float(kl) for share, kl in curve.items()} for name, curve in data.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"Sensitivity: '{path}' contains no curves (group -> share -> KL): {error}.") from error


def _hull(number: int, units: int, cost: int, curve: Mapping[float, float]) -> list[_Piece]:
    """Returns the pieces of the lower convex hull of a curve, by rising slope."""
    points = sorted({(units * (1 - share), kl) for share, kl in curve.items() if share < 1})
    hull = [(0.0, 0.0)]
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b) / cost, number, a[0], b[0]) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _walk(pieces: Sequence[_Piece], costs: Sequence[int]) -> Callable[[float], list[float]]:
    """Returns the function from a position in [0, 1] to the units that each group has lost."""
    total = sum((end - start) * costs[group] for _, group, start, end in pieces)

    def desired(position: float) -> list[float]:
        removed, left = [0.0] * len(costs), position * total
        for _, group, start, end in pieces:
            part = min((end - start) * costs[group], left)
            removed[group] += part / costs[group]
            left -= part
            if left <= 0:
                break
        return removed

    return desired
