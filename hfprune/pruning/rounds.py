"""Pruning in rounds: each round scores the remaining units on the model without those removed before."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hfprune.allocation import Allocation, uniform_keep
from hfprune.criteria import CalibratedCriterion, Criterion
from hfprune.plan import Budget, Group
from hfprune.pruning.hooks import UnitMask
from hfprune.utils.errors import ConfigError

if TYPE_CHECKING:
    from hfprune.pruning.calibration import Kept, Pass, State
    from hfprune.pruning.prunable import Prunable


Schedule = Literal["linear", "cubic"]
"""Share of the removal that is done after a share x of the rounds: x, or 1 - (1 - x)^3, most of it early."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Number of rounds in which units are removed.

    Attributes:
        number: Number of rounds; 1 removes all units by scores of the dense model.
        schedule: How the removal is spread over the rounds.
    """

    number: int = 1
    schedule: Schedule = "cubic"

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for values out of range."""
        if self.number < 1:
            raise ConfigError(f"rounds={self.number} must be positive.")
        if self.schedule not in ("linear", "cubic"):
            raise ConfigError(f"schedule='{self.schedule}' is not one of linear, cubic.")

    def __str__(self) -> str:
        """Returns the settings in words."""
        return f"{self.number} rounds, {self.schedule}"

    def shares(self) -> list[float]:
        """Returns the share of the removal that is done after each round; the last is 1.

        >>> Rounds(number=2).shares()
        [0.875, 1.0]
        """
        done = [(number + 1) / self.number for number in range(self.number)]
        return done if self.schedule == "linear" else [1 - (1 - x) ** 3 for x in done]

    def check(self, model: "Prunable", budget: Budget, allocation: Allocation | None, criterion: Criterion) -> None:
        """Raises ``ConfigError`` where rounds do not fit what is pruned, before anything is loaded.

        Args:
            model: What is pruned.
            budget: What was asked.
            allocation: How it is spent.
            criterion: How units are scored.
        """
        if self.number == 1:
            return
        if not isinstance(criterion, CalibratedCriterion):
            raise ConfigError(
                f"rounds={self.number} scores all layers several times on the calibration data, which "
                f"{type(criterion).__name__} does not do."
            )
        for name in ("layers", "channels"):
            if name in model.units:
                raise ConfigError(f"rounds={self.number} prunes every layer: leave '{name}' out of the units.")
        if budget.allocated:
            raise ConfigError(
                f"rounds={self.number} spends a budget in steps, and {allocation} sets the widths itself."
            )
        if model.known and model.resolve(budget, allocation).provisional:
            raise ConfigError(
                f"rounds={self.number} needs the widths of every round before it, and {allocation} waits for scores."
            )

    def widths(
        self, model: "Prunable", budget: Budget, allocation: Allocation | None, final: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Returns how many units each group keeps after each round, never more than after the one before.

        Args:
            model: What is pruned.
            budget: What was asked.
            allocation: How it is spent.
            final: What is left in the end.
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
    """Returns importance in which units that were removed in an earlier round rank behind all others.

    Removed units are held at zero where they are read, which is what the pruned model computes.

    Args:
        model: What is scored.
        groups: Its groups.
        widths: How many units each group keeps after each round.
        saved: State of a round that was interrupted.
        run: Runs one pass over the calibration data: what is kept, saved state.
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
    """Returns the round that begins with ``kept``; the first where it is of another run, which loading will refuse."""
    left = () if kept is None else tuple(len(kept[group.name]) for group in groups)
    return next((number + 1 for number, after in enumerate(widths) if tuple(after) == left), 0)


def _removed_last(scores: dict[str, Tensor], groups: tuple[Group, ...], kept: "Kept | None") -> dict[str, Tensor]:
    """Returns the scores with those of removed units at 0, and of the others above it."""
    if kept is None:
        return scores
    smallest = torch.finfo(torch.float64).tiny
    ranked = {}
    for group in groups:
        stays = torch.zeros(group.num_units, dtype=torch.bool)
        stays[list(kept[group.name])] = True
        ranked[group.name] = torch.where(stays, scores[group.name].clamp(min=smallest), 0.0)
    return ranked
