"""Plans that keep different numbers of units in each layer."""

from hfprune.models import find_groups, find_spec
from hfprune.plan import PruningPlan

WIDTHS = (11, 7, 18)


def spread(count, units):
    """Returns ``count`` of ``units`` units, sorted, here and there."""
    return tuple(sorted((1 + 7 * index) % units for index in range(count)))


def mlp_plan(model, widths=WIDTHS):
    """Returns a plan that keeps another number of MLP neurons in each layer."""
    groups = find_groups(model)
    keep = {g.name: spread(width, g.num_units) for g, width in zip(groups, widths, strict=True)}
    return PruningPlan(model_class=find_spec(model).model_class, groups=groups, keep=keep, config={})


def head_plan(model, keep):
    """Returns a plan that keeps ``keep[i]`` of the key-value heads of layer i, each with its query heads."""
    groups = find_groups(model, ("heads",))
    kept = {group.name: units for group, units in zip(groups, keep, strict=True)}
    return PruningPlan(model_class=find_spec(model).model_class, groups=groups, keep=kept, config={})
