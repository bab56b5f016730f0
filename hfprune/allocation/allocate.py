"""Allocation of a budget: kept widths for every group, and the kept units with the largest scores."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import lcm

from hfprune.allocation.base import Allocation, Allotment, Inventory, Scores, keep_top
from hfprune.allocation.budget import KindWidths, ResolvedBudget, check_reach, common, target_params
from hfprune.allocation.round_to import auto_rounded
from hfprune.allocation.ties import Ties
from hfprune.allocation.uniform import Uniform
from hfprune.plan import LAYERS, Budget, Group
from hfprune.utils.errors import ConfigError


def allocate(
    inventory: Inventory, budget: Budget, allocation: Allocation | None = None, *, scores: Scores | None = None
) -> ResolvedBudget:
    """Returns how many units each group keeps, and which layers are removed.

    Args:
        inventory: The groups of the dense model.
        budget: The budget.
        allocation: How the budget is spread over groups; ``Uniform()`` if not given.
        scores: Group name -> importance [U]. None before calibration: the result is then provisional where widths or
            removed layers depend on scores, and its parameter count is right up to one rounding step.

    Raises:
        ConfigError: The budget is out of reach (the message gives the limit), or it does not fit the allocation or the
            units.

    Example:
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4, layer_params=(80, 80))
        >>> allocate(inventory, Budget(pruning_ratio=0.25)).widths
        (6, 6)
    """
    if budget.auto_round:
        from_shapes = partial(allocate, inventory, allocation=allocation)
        return auto_rounded(budget, partial(from_shapes, scores=scores), shapes=from_shapes)
    asked, ties = _asked(inventory, budget, allocation), Ties.of(inventory)
    open_to = inventory.open_groups()
    ties.check_skipped({group.name for group in inventory.skipped})
    inner = Ties.of(inventory.select(open_to)) if inventory.skipped else ties
    joint, chosen = inner.inventory, inner.adapted(allocation or Uniform())
    chosen.check(joint)
    _check_budget(joint, budget, chosen)
    allot = partial(chosen.allot, joint, round_to=lcm(budget.round_to, inner.step), scores=inner.scores(scores))
    if chosen.own_budget:
        found = allot(0)
        target = joint.params_of(found)
        if target == inventory.dense_params:
            raise ConfigError(f"{asked} removes nothing: every group keeps all of its units.")
    else:
        target = target_params(budget, joint)
        found = check_reach(asked, budget, joint, target, allot)
    inner.check(found.widths)
    note, waits = _limits(joint, chosen), chosen.needs_scores(joint)
    found = replace(found, widths=inner.spread(found.widths))
    found = found.within(inventory, open_to) if inventory.skipped else found
    return ResolvedBudget(
        asked=asked,
        widths=found.widths,
        dense_widths=ties.single.dense_widths(),
        exact_width=found.exact_width,
        dense_params=inventory.dense_params,
        target_params=target,
        params=inventory.params_of(found),
        kinds=_by_kind(ties, found),
        removed_layers=found.removed_layers,
        provisional=scores is None and waits,
        note=note,
        skipped=tuple(group.name for group in inventory.skipped),
    )


def kept_units(scores: Scores, groups: Sequence[Group], resolved: ResolvedBudget) -> dict[str, tuple[int, ...]]:
    """Returns the kept units of every group: those with the largest scores, or all units of removed layers.

    Args:
        scores: Group name -> importance [U], for the groups that lose units.
        groups: The groups.
        resolved: How many units each group keeps.
    """
    kept = {}
    for group, width in zip(groups, resolved.widths, strict=True):
        if group.kind == LAYERS:
            kept[group.name] = tuple(i for i in range(group.num_units) if i not in resolved.removed_layers)
        else:
            whole = width == group.num_units
            kept[group.name] = tuple(range(width)) if whole else keep_top(scores[group.name], width)
    return kept


def _check_budget(inventory: Inventory, budget: Budget, allocation: Allocation) -> None:
    """Raises ``ConfigError`` where the budget does not fit the allocation or the units."""
    if budget.allocated != allocation.own_budget:
        found = "sets the number of units itself: give no budget" if allocation.own_budget else "needs a budget"
        raise ConfigError(f"{allocation} {found}.")
    if budget.intermediate_size is None and budget.mlp_ratio is None:
        return
    widths = inventory.dense_widths()
    if inventory.kinds() != ("mlp",):
        problem = f"the units are {', '.join(inventory.kinds())}"
    elif common(widths) is None:
        problem = f"the dense widths are {', '.join(map(str, sorted(set(widths))))}"
    elif type(allocation) is not Uniform:
        problem = f"{type(allocation).__name__} gives each layer its own"
    elif budget.mlp_ratio is not None and inventory.hidden_size is None:
        problem = "this module has no hidden size"
    else:
        return
    raise ConfigError(
        f"{budget.describe()} sets one MLP width for all layers, but {problem}. Use `pruning_ratio`, `target_params` "
        "or allocation=Explicit(...)."
    )


def _asked(inventory: Inventory, budget: Budget, allocation: Allocation | None) -> str:
    """Returns budget, units and allocation as the user wrote them."""
    parts = [budget.describe()]
    if inventory.kinds() != ("mlp",):
        parts.append(f"units={'+'.join(inventory.kinds())}")
    parts += [str(allocation) if allocation is not None else "", inventory.skip]
    return ", ".join(part for part in parts if part)


def _limits(inventory: Inventory, allocation: Allocation) -> str:
    """Returns the numbers of key-value heads that could be chosen, where a stock config restricts them."""
    counts = inventory.head_counts
    heads = inventory.numbers("heads")
    if counts is None or not isinstance(allocation, Uniform) or allocation.own_budget or "mlp" not in inventory.kinds():
        return ""
    if len(counts) == max(inventory.groups[i].num_units for i in heads):
        return ""
    numbers = ", ".join(map(str, counts))
    return f"a stock config states {numbers} key-value heads, other layouts any number"


def _by_kind(ties: Ties, found: Allotment) -> tuple[KindWidths, ...]:
    inventory, kinds = ties.inventory, []
    for kind in inventory.kinds():
        joint = ties.joined(found.widths)
        members = inventory.numbers(kind, removed_layers=found.removed_layers, widths=joint)
        dense, kept = (
            tuple(widths[i] * ties.factor(i) for i in members) for widths in (inventory.dense_widths(), joint)
        )
        kinds.append(KindWidths(kind=kind, dense=dense, kept=kept))
    return tuple(kinds)
