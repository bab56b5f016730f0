"""Global ranking: the units of all layers are ranked together."""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from hfprune.allocation.base import Allocation, Allotment, Inventory, Scores
from hfprune.allocation.rounding import Slot, slot
from hfprune.allocation.uniform import settled
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import check_choice

Comparable = Literal["none", "per_parameter", "mean", "standard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """The removal steps of one group, or of all groups in the order of the ranking.

    Attributes:
        score: [N] float64, mean score of each step's units.
        params: [N] int64, parameters that the step removes.
        units: [N] int64, units that the step removes.
        kept: [N] int64, units that the group keeps after it.
        group: [N] int64, number of the group.
    """

    score: Tensor
    params: Tensor
    units: Tensor
    kept: Tensor
    group: Tensor


class GlobalRank(Allocation):
    """Removes the units with the lowest scores in the whole model.

    With ``round_to``, the units of a group are removed in steps of that size; the score of a step is the mean over its
    units. A step that would exceed the budget (a head, when only neurons still fit) is skipped with the rest of its
    group, and later steps in the ranking use up the budget.

    Args:
        comparable: How scores of different groups are made comparable. ``none``: unchanged; heads sum over more
            weights and are then rarely removed. ``per_parameter``: divided by the parameters of a unit. ``mean``:
            divided by the group's mean score. ``standard``: minus the group's mean, divided by its standard deviation.
        floor: Smallest share of its units that every group keeps; at least one step.
        ceiling: Largest share of its units that a group keeps.

    Raises:
        ConfigError: A setting is unknown or out of range; ``allot``: the ceiling removes more than the budget.

    Example:
        >>> from hfprune.plan import Group
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4, layer_params=(80, 80))
        >>> scores = {"0.mlp": torch.arange(1.0, 9.0), "1.mlp": torch.arange(8.0) ** 2}
        >>> GlobalRank().allot(inventory, 160, round_to=1, scores=scores).widths
        (7, 5)
    """

    def __init__(self, *, comparable: Comparable = "mean", floor: float = 0.1, ceiling: float = 1.0) -> None:
        check_choice("comparable", comparable, _COMPARABLE)
        if not 0 <= floor <= ceiling <= 1:
            raise ConfigError(f"GlobalRank: floor={floor} and ceiling={ceiling} need 0 <= floor <= ceiling <= 1.")
        self.comparable, self.floor, self.ceiling = comparable, floor, ceiling

    def needs_scores(self, inventory: Inventory) -> bool:
        """Always."""
        return True

    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns the widths after removal in the order of one ranking."""
        slots = [
            slot(
                g.kind,
                g.num_units,
                cost,
                round_to=round_to,
                floor=self.floor,
                ceiling=self.ceiling,
                least=g.least,
            )
            for g, cost in zip(inventory.groups, inventory.costs, strict=True)
        ]
        widths = [s.high for s in slots]
        left = inventory.params(widths) - target
        if left < -max(s.step * s.cost for s in slots):
            dense, most = inventory.dense_params, target + left
            raise ConfigError(
                f"GlobalRank: ceiling={self.ceiling:g} already removes more than the budget: it leaves {most:,} of "
                f"{dense:,} parameters, the budget {target:,}. Use a higher ceiling, or a `pruning_ratio` of at least "
                f"{1 - most / dense:.4f}."
            )
        parts = []
        for number, (group, s) in enumerate(zip(inventory.groups, slots, strict=True)):
            known = torch.ones(group.num_units) if scores is None else scores[group.name]
            parts.append(_steps(number, s, _COMPARABLE[self.comparable](known.double().cpu(), s.cost)))
        return settled(inventory, _taken(_ranking(parts), widths, left), ())


def _steps(number: int, s: Slot, scores: Tensor) -> _Steps:
    """Returns the steps of one group from its ceiling to its floor, by rising score."""
    kept = [s.high]
    while (below := s.below(kept[-1])) is not None:
        kept.append(below)
    edges = torch.tensor(kept)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), scores.sort(descending=True).values.cumsum(0)])
    units = edges[:-1] - edges[1:]
    score = (total[edges[:-1]] - total[edges[1:]]) / units
    if len(score):
        score = score.cummax(0).values  # rounding errors must not reorder steps
    return _Steps(score=score, params=units * s.cost, units=units, kept=edges[1:], group=torch.full_like(units, number))


def _ranking(parts: list[_Steps]) -> _Steps:
    """Returns the steps of all groups by rising score; of equal scores, the lower group first."""
    columns = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(_Steps)}
    order = columns["score"].sort(stable=True).indices
    return _Steps(**{name: column[order] for name, column in columns.items()})


def _taken(ranking: _Steps, widths: list[int], left: int) -> list[int]:
    """Returns the widths after all steps, in their order, that fit into ``left`` parameters."""
    if not len(ranking.params):
        return widths
    total = ranking.params.cumsum(0)
    whole = int(torch.searchsorted(total, left, right=True)) if left > 0 else 0  # steps that all fit
    for group, kept in zip(ranking.group[:whole].tolist(), ranking.kept[:whole].tolist(), strict=True):
        widths[group] = kept
    left -= int(total[whole - 1]) if whole else 0
    smallest, closed = int(ranking.params.min()), dict[int, tuple[int, int]]()
    for place in range(whole, len(total)):
        group, params, kept = (int(t[place]) for t in (ranking.group, ranking.params, ranking.kept))
        if group in closed:
            continue
        if params <= left:
            widths[group], left = kept, left - params
        else:
            closed[group] = params, kept
            if left < smallest and params == smallest:
                break
    over = min(((params, i, kept) for i, (params, kept) in enumerate(closed.values())), default=None)
    if over is None or 2 * left < smallest:
        return widths
    tried = list(widths)
    tried[list(closed)[over[1]]] = over[2]
    excess = _give_back(ranking, tried, over[0] - left, finer_than=over[0])
    return tried if abs(excess) < left else widths


def _give_back(ranking: _Steps, widths: list[int], excess: int, *, finer_than: int) -> int:
    """Undoes the last steps, in ``widths``, that bring the total closer to the target.

    Args:
        ranking: All steps.
        widths: Kept units of each group; changed in place.
        excess: Parameters that are removed beyond the target.
        finer_than: Only steps with fewer parameters than this are undone.

    Returns:
        The remaining excess; negative if too few parameters are removed.
    """
    for place in reversed(range(len(ranking.params))):
        group, params, units, kept = (
            int(column[place]) for column in (ranking.group, ranking.params, ranking.units, ranking.kept)
        )
        if widths[group] == kept and params < finer_than and abs(excess - params) < abs(excess):
            widths[group], excess = kept + units, excess - params
    return excess


def _centred(scores: Tensor, cost: int) -> Tensor:
    spread = scores.std(unbiased=False)
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def _by_mean(scores: Tensor, cost: int) -> Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


_COMPARABLE = {
    "none": lambda scores, cost: scores,
    "per_parameter": lambda scores, cost: scores / cost,
    "mean": _by_mean,
    "standard": _centred,
}
