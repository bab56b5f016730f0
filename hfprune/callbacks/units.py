"""Which groups are scored for the units that may go, and what their scores say of whole layers."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hfprune.allocation import Allocation, kept_units
from hfprune.allocation.history import Select
from hfprune.arch import find_groups
from hfprune.callbacks.target import Target
from hfprune.criteria import block_scores
from hfprune.types import Budget, Group


def scored_groups(model: nn.Module, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Returns the groups to score: those with slices; for whole layers, everything in them."""
    if all(group.slices for group in groups):
        return groups
    return find_groups(model, ("mlp", "heads"))


def with_blocks(scores: Mapping[str, Tensor], groups: Sequence[Group], scored: Sequence[Group]) -> dict[str, Tensor]:
    """Returns the scores of ``groups``, those of whole layers added up from what is in them.

    Args:
        scores: Scores of ``scored``.
        groups: The groups that may lose units.
        scored: The groups that were scored.
    """
    return {group.name: scores[group.name] if group.slices else block_scores(scores, scored, group) for group in groups}


def final_units(target: Target, budget: Budget, allocation: Allocation | None) -> Select:
    """Returns what tells which of the scored units would be in the model, pruned by given scores.

    Args:
        target: The model.
        budget: What was asked.
        allocation: How it is spent.
    """
    groups = target.groups(target.model)
    scored = scored_groups(target.model, groups)

    def select(scores: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        known = with_blocks(scores, groups, scored)
        resolved = target.resolve(budget, allocation, known)
        keep = kept_units(known, groups, resolved)
        gone = resolved.removed_layers
        return {g.name: () if g.layer in gone else keep.get(g.name, range(g.num_units)) for g in scored}

    return select
