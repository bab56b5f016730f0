"""Pruning in rounds: each scores the units that the rounds before it left, on the model without those that went."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hfprune.allocation import Allocation, uniform_keep
from hfprune.criteria import CalibratedCriterion, Criterion
from hfprune.plan import Budget, Group
from hfprune.pruning.calibration import Calibration
from hfprune.pruning.hooks import UnitMask
from hfprune.utils.errors import ConfigError

if TYPE_CHECKING:
    from hfprune.callbacks.target import Target


Schedule = Literal["linear", "cubic"]
"""Share of the removal that is done after a share x of the rounds: x, or 1 - (1 - x)^3, most of it early."""

Kept = Mapping[str, Sequence[int]]
"""Group -> kept units."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """In how many rounds units go.

    Attributes:
        number: Rounds; 1 removes all units by scores of the dense model.
        schedule: How fast.
    """

    number: int = 1
    schedule: Schedule = "cubic"

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for values out of range."""
        if self.number < 1:
            raise ConfigError(f"--importance.rounds {self.number} is not positive.")
        if self.schedule not in ("linear", "cubic"):
            raise ConfigError(f"--importance.schedule '{self.schedule}' is not one of linear, cubic.")

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

    def check(self, target: "Target", budget: Budget, allocation: Allocation | None, criterion: Criterion) -> None:
        """Raises ``ConfigError`` where rounds do not fit what is pruned, before anything is loaded.

        Args:
            target: What is pruned.
            budget: What was asked.
            allocation: How it is spent.
            criterion: How units are scored.
        """
        if self.number == 1:
            return
        if not isinstance(criterion, CalibratedCriterion):
            raise ConfigError(
                f"--importance.rounds scores all layers again and again on the calibration data, which "
                f"{type(criterion).__name__} does not do."
            )
        for name in ("layers", "channels"):
            if name in target.units:
                raise ConfigError(f"--importance.rounds takes units of every layer: leave '{name}' out of the units.")
        if budget.allocated:
            raise ConfigError(f"--importance.rounds spends a budget step by step, and {allocation} says how much goes.")
        if target.known and target.resolve(budget, allocation).provisional:
            raise ConfigError(
                f"--importance.rounds needs the widths of every round before it, and {allocation} waits for scores."
            )

    def widths(
        self, target: "Target", budget: Budget, allocation: Allocation | None, final: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Returns how many units each group keeps after each round, never more than after the one before.

        Args:
            target: What is pruned.
            budget: What was asked.
            allocation: How it is spent.
            final: What is left in the end.
        """
        found = [tuple(final)]
        resolved = target.resolve(budget, allocation)
        for share in reversed(self.shares()[:-1]):
            left = resolved.dense_params - round(share * (resolved.dense_params - resolved.target_params))
            step = Budget(target_params=left, round_to=budget.round_to)
            wished = target.resolve(step, allocation).widths
            found.append(tuple(max(pair) for pair in zip(wished, found[-1], strict=True)))
        return found[::-1]


def in_rounds(
    target: "Target",
    groups: tuple[Group, ...],
    widths: Sequence[Sequence[int]],
    saved: dict[str, Any] | None,
    run: Callable[[Kept | None, dict[str, Any] | None], Calibration],
) -> tuple[Calibration, dict[str, Tensor]]:
    """Returns the last round's calibration, and importance in which units that went before come behind all others.

    Units that went are held at zero where they are read, which is what the pruned model computes.

    Args:
        target: What is scored.
        groups: Its groups.
        widths: How many units each group keeps after each round.
        saved: State of a round that was left.
        run: Runs one pass over the calibration data: what is kept, saved state.
    """
    kept: Kept | None = saved.get("first_stage") if saved else None
    first = _after(kept, groups, widths)
    for number in range(first, len(widths)):
        with UnitMask(target.model, groups, kept).active() if kept is not None else nullcontext():
            calibration = run(kept, saved)
        saved = None
        scores = _behind(calibration.accumulator.scores(), groups, kept)
        if number < len(widths) - 1:
            kept = uniform_keep(scores, groups, widths[number])
    return calibration, scores


def _after(kept: Kept | None, groups: tuple[Group, ...], widths: Sequence[Sequence[int]]) -> int:
    """Returns the round that begins with ``kept``; the first where it is of another run, which loading will tell."""
    left = () if kept is None else tuple(len(kept[group.name]) for group in groups)
    return next((number + 1 for number, found in enumerate(widths) if tuple(found) == left), 0)


def _behind(scores: dict[str, Tensor], groups: tuple[Group, ...], kept: Kept | None) -> dict[str, Tensor]:
    """Returns the scores with those of units that went at 0, and of the others above it."""
    if kept is None:
        return scores
    least = torch.finfo(torch.float64).tiny
    found = {}
    for group in groups:
        stays = torch.zeros(group.num_units, dtype=torch.bool)
        stays[list(kept[group.name])] = True
        found[group.name] = torch.where(stays, scores[group.name].clamp(min=least), 0.0)
    return found
