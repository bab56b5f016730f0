"""Iterative pruning: each round scores the remaining units on the model without the units removed before."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hfprune.allocation import Allocation, uniform_keep
from hfprune.criteria import CalibratedCriterion, Criterion
from hfprune.plan import DEPTH_KINDS, Budget, Group
from hfprune.pruning.hooks import UnitMask
from hfprune.utils.errors import ConfigError

if TYPE_CHECKING:
    from hfprune.pruning.prunable import Prunable


Kept = Mapping[str, Sequence[int]]
"""Group -> kept units."""

State = dict[str, Any]
"""State of an interrupted calibration."""

Pass = Callable[[Kept | None, State | None], dict[str, Tensor]]
"""One pass over the calibration data: unmasked units of each group, saved state -> scores."""

Schedule = Literal["linear", "cubic"]
"""Share of the removal after a share x of the rounds: x for ``linear``, 1 - (1 - x)^3 for ``cubic``."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Number and schedule of the pruning rounds.

    Attributes:
        number: Number of rounds; 1 removes all units by the scores of the dense model.
        schedule: Distribution of the removal over the rounds.
    """

    number: int = 1
    schedule: Schedule = "cubic"

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` if a value is out of range."""
        if self.number < 1:
            raise ConfigError(f"rounds={self.number} must be positive.")
        if self.schedule not in ("linear", "cubic"):
            raise ConfigError(f"schedule='{self.schedule}' is not one of linear, cubic.")

    def __str__(self) -> str:
        """Returns the settings as text."""
        return f"{self.number} rounds, {self.schedule}"

    def shares(self) -> list[float]:
        """Returns the share of the removal after each round; the last is 1.

        >>> Rounds(number=2).shares()
        [0.875, 1.0]
        """
        done = [(number + 1) / self.number for number in range(self.number)]
        return done if self.schedule == "linear" else [1 - (1 - x) ** 3 for x in done]

    def check(self, model: "Prunable", budget: Budget, allocation: Allocation | None, criterion: Criterion) -> None:
        """Raises ``ConfigError`` if rounds do not support the other settings; the model need not be loaded.

        Args:
            model: Model to prune.
            budget: The budget.
            allocation: Allocation of the budget.
            criterion: The criterion.
        """
        if self.number == 1:
            return
        if not isinstance(criterion, CalibratedCriterion):
            raise ConfigError(
                f"rounds={self.number} requires a criterion that scores all layers on calibration data; "
                f"{type(criterion).__name__} does not."
            )
        for name in (*DEPTH_KINDS, "channels"):
            if name in model.units:
                raise ConfigError(f"rounds={self.number} prunes every layer: leave '{name}' out of the units.")
        if budget.allocated:
            raise ConfigError(f"rounds={self.number} requires a budget, but {allocation} sets the widths itself.")
        if model.known and model.resolve(budget, allocation).provisional:
            raise ConfigError(
                f"rounds={self.number} needs the widths of every round in advance, but {allocation} needs scores."
            )

    def widths(
        self, model: "Prunable", budget: Budget, allocation: Allocation | None, final: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Returns the number of kept units of each group after each round; widths never increase.

        Args:
            model: Model to prune.
            budget: The budget.
            allocation: Allocation of the budget.
            final: Widths after the last round.
        """
        widths = [tuple(final)]
        resolved = model.resolve(budget, allocation)
        for share in reversed(self.shares()[:-1]):
            left = resolved.dense_params - round(share * (resolved.dense_params - resolved.target_params))
            step = Budget(target_params=left, round_to=budget.round_to, auto_round=budget.auto_round)
            wanted = model.resolve(step, allocation).widths
            widths.append(tuple(max(pair) for pair in zip(wanted, widths[-1], strict=True)))
        return widths[::-1]


def in_rounds(
    model: "Prunable",
    groups: tuple[Group, ...],
    widths: Sequence[Sequence[int]],
    saved: "State | None",
    run: "Pass",
) -> dict[str, Tensor]:
    """Runs all rounds and returns scores in which units removed in earlier rounds rank below all others.

    Removed units are masked at the inputs of their consumers, which gives the outputs of the pruned model.

    Args:
        model: Model to score.
        groups: Groups of the model.
        widths: Number of kept units of each group after each round.
        saved: State of an interrupted round, or None.
        run: Function that runs one pass over the calibration data.

    Returns:
        Group name -> importance [U].
    """
    kept: Kept | None = saved.get("first_stage") if saved else None
    for number in range(_next_round(kept, groups, widths), len(widths)):
        with UnitMask(model.model, groups, kept).active() if kept is not None else nullcontext():
            found = run(kept, saved)
        saved = None
        scores = _removed_last(found, groups, kept)
        if number < len(widths) - 1:
            kept = uniform_keep(scores, groups, widths[number])
    return scores


def _next_round(kept: "Kept | None", groups: tuple[Group, ...], widths: Sequence[Sequence[int]]) -> int:
    """Returns the round that begins with ``kept``; the first for units of another run, which loading refuses."""
    left = () if kept is None else tuple(len(kept[group.name]) for group in groups)
    return next((number + 1 for number, after in enumerate(widths) if tuple(after) == left), 0)


def _removed_last(scores: dict[str, Tensor], groups: tuple[Group, ...], kept: "Kept | None") -> dict[str, Tensor]:
    """Returns the scores with removed units at 0 and all others above 0."""
    if kept is None:
        return scores
    smallest = torch.finfo(torch.float64).tiny
    ranked = {}
    for group in groups:
        stays = torch.zeros(group.num_units, dtype=torch.bool)
        stays[list(kept[group.name])] = True
        ranked[group.name] = torch.where(stays, scores[group.name].clamp(min=smallest), 0.0)
    return ranked
