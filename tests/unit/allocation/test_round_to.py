"""``round_to="auto"``: the coarsest multiple that costs at most 3 % of the budget."""

import pytest

from hfprune.allocation import allocate
from hfprune.allocation.base import Inventory
from hfprune.allocation.round_to import STEPS, TOLERANCE, rounding
from hfprune.plan import Budget, Group
from hfprune.utils.errors import ConfigError


def inventory(width, layers=4, cost=100, rest=100_000):
    groups = tuple(Group(name=f"layers.{i}.mlp", kind="mlp", num_units=width, slices=()) for i in range(layers))
    costs = (cost,) * layers
    return Inventory(groups=groups, costs=costs, dense_params=rest + layers * width * cost, hidden_size=64)


def missed(step, model, ratio):
    """Share of the removed parameters by which the nearest multiple of ``step`` misses the budget."""
    dense, cost = model.groups[0].num_units, sum(model.costs)
    removed = ratio * model.dense_params
    exact = dense - removed / cost
    return abs(round(exact / step) * step - exact) * cost / removed


@pytest.mark.parametrize("width", [1536, 2048, 8192])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.13, 0.2, 0.25, 0.3])
def test_the_largest_multiple_within_three_percent(width, ratio):
    model = inventory(width)
    found = allocate(model, Budget(pruning_ratio=ratio, auto_round=True))
    fitting = [step for step in STEPS if missed(step, model, ratio) <= TOLERANCE]
    exact = allocate(model, Budget(pruning_ratio=ratio))
    if not fitting:
        assert found.widths == exact.widths
        assert "the width is exact" in found.note
        return
    assert found.width % fitting[0] == 0
    assert abs(found.params - exact.target_params) <= TOLERANCE * (model.dense_params - exact.target_params)
    assert f"MLP width {found.width}, a multiple of {fitting[0]}, in place of {exact.width}" in found.note
    assert found.asked == f"pruning_ratio={ratio}, round_to=auto"
    assert found.describe().count("round_to auto") == 1


def test_a_narrow_model_is_pruned_exactly():
    found = allocate(inventory(48), Budget(pruning_ratio=0.05, auto_round=True))
    assert found.widths == allocate(inventory(48), Budget(pruning_ratio=0.05)).widths


def test_an_impossible_budget_is_refused_with_the_exact_limits():
    with pytest.raises(ConfigError, match="the largest possible"):
        allocate(inventory(2048), Budget(pruning_ratio=0.95, auto_round=True))


def test_only_numbers_and_auto():
    assert rounding("auto") == {"auto_round": True}
    with pytest.raises(ConfigError, match="round_to='atuo' is neither a number nor 'auto'"):
        rounding("atuo")
