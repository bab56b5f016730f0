"""The grid of a sweep."""

import pytest

from hfprune.plan import Budget
from hfprune.sweep.grid import SweepGrid, default_methods
from hfprune.utils.errors import ConfigError


def grid(round_to):
    return SweepGrid(methods=default_methods(), pruning_ratios=[0.2], seeds=[1], texts={"a": "b"}, round_to=round_to)


def test_budgets_round_as_the_grid_says():
    assert grid("auto").budget(0.2) == Budget(pruning_ratio=0.2, auto_round=True)
    assert grid(64).budget(0.2) == Budget(pruning_ratio=0.2, round_to=64)
    with pytest.raises(ConfigError, match="neither a number nor 'auto'"):
        grid("much").budget(0.2)
