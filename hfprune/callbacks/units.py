"""Which units are scored, and which would be left, were the scores known so far the last ones."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from hfprune.allocation import Allocation, kept_units
from hfprune.allocation.history import Select
from hfprune.calibration import check_criterion
from hfprune.callbacks.target import Target
from hfprune.criteria import Criterion, scored_groups, with_blocks
from hfprune.types import Budget


def check_scored(target: Target, criterion: Criterion, *, settles: bool) -> None:
    """Raises ``ConfigError`` where ``criterion`` does not score units, or what units hold; reads shapes alone."""
    model = target.shapes()
    check_criterion(model, target.groups(model), criterion, settles=settles)


def final_units(target: Target, budget: Budget, allocation: Allocation | None, criterion: Criterion) -> Select:
    """Returns what tells which of the scored units would be in the model, pruned by given scores.

    Args:
        target: The model.
        budget: What was asked.
        allocation: How it is spent.
        criterion: How units are scored.
    """
    groups = target.groups(target.model)
    scored = scored_groups(target.model, groups, criterion)

    def select(scores: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        known = with_blocks(scores, groups, scored)
        resolved = target.resolve(budget, allocation, known)
        keep = kept_units(known, groups, resolved)
        gone = resolved.removed_layers
        return {g.name: () if g.layer in gone else keep.get(g.name, range(g.num_units)) for g in scored}

    return select
