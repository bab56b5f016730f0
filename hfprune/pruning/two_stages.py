"""Scoring in two stages with the dense model as the teacher (SDMPrune)."""

from collections.abc import Sequence

from torch import Tensor

from hfprune.allocation import Allocation, uniform_keep
from hfprune.criteria import SelfDistillation
from hfprune.objectives import OBJECTIVES
from hfprune.objectives.self_distillation import SelfDistillationObjective
from hfprune.plan import DEPTH_KINDS, Budget, Group
from hfprune.pruning.hooks import UnitMask
from hfprune.pruning.prunable import Prunable
from hfprune.pruning.rounds import Kept, Pass, State
from hfprune.utils.errors import ConfigError


def check_stages(model: Prunable, setting: SelfDistillation, budget: Budget, allocation: Allocation | None) -> None:
    """Raises ``ConfigError`` if the stages do not fit the units and the budget; the model need not be loaded.

    Args:
        model: Model to prune.
        setting: Settings of the stages.
        budget: The budget.
        allocation: Allocation of the budget.
    """
    for name in (*DEPTH_KINDS, "channels"):
        if name in model.units:
            raise ConfigError(f"self_distillation masks units in every layer: leave '{name}' out of the units.")
    if not model.known:
        return
    resolved = model.resolve(budget, allocation)
    if resolved.provisional:
        raise ConfigError(
            f"self_distillation needs all widths before its first stage, but {allocation} computes them from scores."
        )
    setting.first_widths(model.groups(model.shapes()), resolved.widths)


def two_stages(
    model: Prunable,
    groups: tuple[Group, ...],
    setting: SelfDistillation,
    widths: Sequence[int],
    saved: State | None,
    run: Pass,
) -> dict[str, Tensor]:
    """Runs both stages of self-distillation and returns the scores of the second.

    Args:
        model: Model to score; its objective is set to that of each stage.
        groups: Groups of the model.
        setting: Settings of the stages.
        widths: Number of units of each group that the budget keeps.
        saved: State of an interrupted pass of either stage, or None.
        run: Function that runs one pass with the model's objective.

    Returns:
        Group name -> importance [U].

    Raises:
        ConfigError: The first stage would keep fewer units than the budget.
    """
    first = setting.first_widths(groups, widths)
    kept: Kept | None = saved.get("first_stage") if saved else None
    if kept is None:
        model.objective = OBJECTIVES.get("cross_entropy")
        kept = uniform_keep(run(None, saved), groups, first)
        saved = None
    mask = UnitMask(model.model, groups, kept)
    model.objective = SelfDistillationObjective(
        alpha=setting.alpha, temperature=setting.temperature, unmasked=mask.lifted
    )
    with mask.active():
        return run(kept, saved)
