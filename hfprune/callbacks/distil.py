"""Calibration in two stages, see :class:`hfprune.criteria.SelfDistillation`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hfprune.allocation import Allocation, uniform_keep
from hfprune.callbacks.calibrate import Calibration
from hfprune.callbacks.target import Target
from hfprune.criteria import SelfDistillation
from hfprune.errors import ConfigError
from hfprune.objectives import OBJECTIVES
from hfprune.objectives.distillation import Distillation
from hfprune.recording import UnitMask
from hfprune.types import Budget, Group

Kept = Mapping[str, Sequence[int]]
"""Group -> kept units."""

Pass = Callable[[Kept | None, dict[str, Any] | None], Calibration]
"""Runs the calibration data once: what the first stage kept (in the second), saved state."""


def check_stages(target: Target, setting: SelfDistillation, budget: Budget, allocation: Allocation | None) -> None:
    """Raises ``ConfigError`` when the stages do not fit what is pruned, before anything is loaded.

    Args:
        target: What is pruned.
        setting: The stages.
        budget: What was asked.
        allocation: How it is spent.
    """
    for name in ("blocks", "channels"):
        if name in target.units:
            raise ConfigError(f"distillation cuts units of every layer first: leave '{name}' out of the units.")
    if not target.known:
        return
    resolved = target.resolve(budget, allocation)
    if resolved.provisional:
        raise ConfigError(
            f"distillation needs every width before its first stage, and {allocation} takes them from scores."
        )
    setting.first_widths(target.groups(target.shapes()), resolved.widths)


def two_stages(
    target: Target,
    groups: tuple[Group, ...],
    setting: SelfDistillation,
    widths: Sequence[int],
    saved: dict[str, Any] | None,
    run: Pass,
) -> Calibration:
    """Returns the finished second stage.

    Args:
        target: What is scored; its objective becomes each stage's.
        groups: Its groups.
        setting: The stages.
        widths: How many units of each group are kept in the end.
        saved: State of a pass that was left, of either stage.
        run: Runs one pass with the target's objective.

    Raises:
        ConfigError: The first stage would keep fewer units than the second.
    """
    first = setting.first_widths(groups, widths)
    kept: Kept | None = saved.get("first_stage") if saved else None
    if kept is None:
        target.objective = OBJECTIVES.get("cross_entropy")
        kept = uniform_keep(run(None, saved).accumulator.scores(), groups, first)
        saved = None
    mask = UnitMask(target.model, groups, kept)
    target.objective = Distillation(alpha=setting.alpha, temperature=setting.temperature, teacher=mask.lifted)
    with mask.active():
        return run(kept, saved)
