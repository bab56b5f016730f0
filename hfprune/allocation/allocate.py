"""From a budget, an allocation and scores to the units that stay."""

from collections.abc import Sequence
from functools import partial

from hfprune.allocation.base import Allocation, Allotment, Inventory, Scores, keep_top
from hfprune.allocation.budget import KindWidths, ResolvedBudget, common, resolve
from hfprune.allocation.round_to import auto_rounded
from hfprune.allocation.uniform import Uniform
from hfprune.plan import LAYERS, Budget, Group
from hfprune.utils.errors import ConfigError


def allocate(
    inventory: Inventory, budget: Budget, allocation: Allocation | None = None, *, scores: Scores | None = None
) -> ResolvedBudget:
    """Returns how many units each group keeps, and which layers go.

    Args:
        inventory: The groups of the dense model.
        budget: What was asked.
        allocation: How it is spent; the same share of every group of a kind if not given.
        scores: Importance of the units. None before calibration: where widths or layers depend on scores the result is
            then provisional, and its parameters are right up to one step.

    Raises:
        ConfigError: The budget is out of reach, the message gives the largest possible value; or it does not go with
            the allocation or the units.
    """
    if budget.auto_round:
        from_shapes = partial(allocate, inventory, allocation=allocation)
        return auto_rounded(budget, partial(from_shapes, scores=scores), shapes=from_shapes)
    chosen = allocation or Uniform()
    chosen.check(inventory)
    _check_budget(inventory, budget, chosen)
    if _is_plain(inventory, allocation):
        params, hidden = inventory.dense_params, inventory.hidden_size
        return resolve(budget, inventory.groups, inventory.costs, dense_params=params, hidden_size=hidden)
    target = 0
    if not chosen.own_budget:
        target = _target(inventory, budget)
        _check_reach(inventory, budget, chosen, target, scores)
    found = chosen.allot(inventory, target, round_to=budget.round_to, scores=scores)
    params = inventory.params(found.widths, found.removed_layers)
    if params == inventory.dense_params:
        raise ConfigError(f"{_asked(inventory, budget, allocation)} removes nothing: it is less than half a unit.")
    return ResolvedBudget(
        asked=_asked(inventory, budget, allocation),
        widths=found.widths,
        dense_widths=inventory.dense_widths(),
        exact_width=found.exact_width,
        dense_params=inventory.dense_params,
        target_params=params if chosen.own_budget else target,
        params=params,
        kinds=_by_kind(inventory, found),
        removed_layers=found.removed_layers,
        provisional=scores is None and chosen.needs_scores(inventory),
        note=_limits(inventory, chosen),
    )


def kept_units(scores: Scores, groups: Sequence[Group], resolved: ResolvedBudget) -> dict[str, tuple[int, ...]]:
    """Returns the kept units of every group: those with the largest scores; all, where the whole layer goes.

    Args:
        scores: Importance of the units of groups that lose some.
        groups: The groups.
        resolved: How many units each keeps.
    """
    kept = {}
    for group, width in zip(groups, resolved.widths, strict=True):
        if group.kind == LAYERS:
            kept[group.name] = tuple(i for i in range(group.num_units) if i not in resolved.removed_layers)
        else:
            whole = width == group.num_units
            kept[group.name] = tuple(range(width)) if whole else keep_top(scores[group.name], width)
    return kept


def _is_plain(inventory: Inventory, allocation: Allocation | None) -> bool:
    """Returns whether one MLP width for all layers is asked for, and nothing else."""
    return allocation is None and inventory.kinds() == ("mlp",) and common(inventory.dense_widths()) is not None


def _check_budget(inventory: Inventory, budget: Budget, allocation: Allocation) -> None:
    if budget.allocated != allocation.own_budget:
        found = "says itself how much goes: give no budget" if allocation.own_budget else "needs a budget"
        raise ConfigError(f"{allocation} {found}.")
    if budget.pruning_ratio is None and budget.target_params is None and not budget.allocated:
        same = common(inventory.dense_widths()) is not None
        if inventory.kinds() != ("mlp",) or type(allocation) is not Uniform or not same:
            raise ConfigError(
                f"{budget.describe()} is one MLP width for all layers and says nothing of other units or widths. Give "
                "--pruning_ratio or --target_params, or Explicit(mlp=..., heads=..., layers=...)."
            )


def _target(inventory: Inventory, budget: Budget) -> int:
    """Returns the number of parameters to leave."""
    if budget.pruning_ratio is not None:
        return round(inventory.dense_params * (1 - budget.pruning_ratio))
    if budget.target_params is not None:
        return budget.target_params
    resolved = resolve(
        budget,
        inventory.groups,
        inventory.costs,
        dense_params=inventory.dense_params,
        hidden_size=inventory.hidden_size,
    )
    return resolved.target_params


def _check_reach(
    inventory: Inventory, budget: Budget, allocation: Allocation, target: int, scores: Scores | None
) -> None:
    """Raises ``ConfigError`` with the possible values unless ``target`` can be reached."""
    least = allocation.allot(inventory, 0, round_to=budget.round_to, scores=scores)
    smallest = inventory.params(least.widths, least.removed_layers)
    if smallest <= target < inventory.dense_params:
        return
    dense = inventory.dense_params
    possible = (
        f"the largest possible --pruning_ratio is {int((1 - smallest / dense) * 1e4) / 1e4:.4f}"
        if budget.target_params is None
        else f"the smallest possible --target_params is {smallest}, the largest {dense - 1}"
    )
    raise ConfigError(
        f"{_asked(inventory, budget, allocation)} is impossible here: these units can shrink the model from {dense:,} "
        f"to {smallest:,} parameters; {possible}."
    )


def _asked(inventory: Inventory, budget: Budget, allocation: Allocation | None) -> str:
    """Returns budget, units and allocation in the user's words."""
    parts = [budget.describe()]
    if inventory.kinds() != ("mlp",):
        parts.append(f"units={'+'.join(inventory.kinds())}")
    parts.append(str(allocation) if allocation is not None else "")
    return ", ".join(part for part in parts if part)


def _limits(inventory: Inventory, allocation: Allocation) -> str:
    """Returns which numbers of heads there were to choose from, where not any number was."""
    counts = inventory.head_counts
    heads = inventory.numbers("heads")
    if counts is None or not isinstance(allocation, Uniform) or allocation.own_budget or "mlp" not in inventory.kinds():
        return ""
    if len(counts) == max(inventory.groups[i].num_units for i in heads):
        return ""
    numbers = ", ".join(map(str, counts))
    return f"a stock config states {numbers} key-value heads, another --layout any number"


def _by_kind(inventory: Inventory, found: Allotment) -> tuple[KindWidths, ...]:
    kinds = []
    for kind in inventory.kinds():
        members = inventory.numbers(kind, removed_layers=found.removed_layers)
        dense, kept = (tuple(widths[i] for i in members) for widths in (inventory.dense_widths(), found.widths))
        kinds.append(KindWidths(kind=kind, dense=dense, kept=kept))
    return tuple(kinds)
