"""RIA's channel permutation against groups tried one by one."""

from itertools import permutations

import pytest
import torch

from hfprune.sparse import RIA, Sparsity
from hfprune.sparse.permutation import _retained, assign, deal, permute
from hfprune.utils.errors import ConfigError
from tests.reference import sparse as reference
from tests.unit.sparse.test_methods import problem, sums_of

PATTERNS = ["2:4", "1:4", "3:4"]


def scores(outputs=5, inputs=12, seed=0):
    return torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dealing_equals_the_loop():
    table = scores()
    assert deal(table, 4).view(-1, 4).tolist() == reference.dealt(table.tolist(), 4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_slot_is_assigned_as_well_as_any_permutation_does(pattern):
    table, sparsity = scores(), Sparsity.parse(pattern)
    groups = deal(table, 4).view(-1, 4)
    for slot in range(4):
        best = 0.0
        for order in permutations(range(3)):
            tried = groups.clone()
            tried[:, slot] = groups[list(order), slot]
            best = max(best, reference.retained(table.tolist(), tried.tolist(), sparsity.zeros))
        others = torch.cat([groups[:, :slot], groups[:, slot + 1 :]], dim=1)
        found = _retained(table, groups[:, slot], others, 4 - sparsity.zeros)
        assert max(sum(float(found[g, order[g]]) for g in range(3)) for order in permutations(range(3))) == (
            pytest.approx(best, rel=1e-12)
        )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_assignment_keeps_more_than_dealing_and_that_more_than_nothing(pattern):
    table, sparsity = scores(16, 64), Sparsity.parse(pattern)
    kept = [
        reference.retained(table.tolist(), order.view(-1, 4).tolist(), sparsity.zeros)
        for order in (torch.arange(64), deal(table, 4), assign(table, deal(table, 4), sparsity))
    ]
    assert kept[2] > kept[1]
    assert kept[2] > kept[0]


@pytest.mark.parametrize("permutation", ["dealt", "assigned"])
def test_groups_in_the_recorded_order_have_exactly_n_zeros(permutation):
    weight, x = problem()
    found = RIA(permutation=permutation).apply(weight, sums_of(x), Sparsity.parse("2:4"))
    assert sorted(found.order.tolist()) == list(range(16))
    zeros = (found.weight == 0)[:, found.order].unflatten(1, (-1, 4)).sum(-1)
    assert (zeros == 2).all()
    assert torch.equal(found.weight[~found.dropped], weight[~found.dropped])
    table = RIA().score(weight, sums_of(x))
    groups = found.order.view(-1, 4).tolist()
    assert float(table[~found.dropped].sum()) == pytest.approx(reference.retained(table.tolist(), groups, 2))


def test_no_order_without_a_pattern():
    weight, x = problem()
    assert RIA(permutation="assigned").apply(weight, sums_of(x), Sparsity.parse(0.5)).order is None
    assert permute(scores(), Sparsity.parse("2:4"), "none") is None
    with pytest.raises(ConfigError, match="permutation='best' is unknown; choose one of none, dealt, assigned"):
        RIA(permutation="best")
    with pytest.raises(ConfigError, match="not a multiple of 8"):
        permute(scores(), Sparsity.parse("4:8"), "dealt")
