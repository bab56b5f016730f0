"""Sums whose bits do not depend on order, grouping or the number of ranks."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfprune.utils.exact_sums import GRID, LIMIT, Bfloat16Sum, ExactSum, GridSum

CPU = torch.device("cpu")
terms = st.floats(min_value=-1e15, max_value=1e15, allow_nan=False).filter(lambda x: abs(x) < LIMIT)


def rows(values):
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1)


def summed(values):
    total = ExactSum(1, device=CPU)
    for value in values:
        total.add(rows([value]))
    return total


@given(st.lists(terms, max_size=30), st.randoms())
def test_any_order_and_grouping_gives_the_same_bits(values, random):
    expected = summed(values)
    shuffled = random.sample(values, len(values))
    cut = random.randint(0, len(values))
    first, second = summed(shuffled[:cut]), summed([])
    if shuffled[cut:]:
        second.add(rows(shuffled[cut:]))
    ranks = [a + b for a, b in zip(first.tensors(), second.tensors(), strict=True)]  # what an all-reduce does
    both = ExactSum(1, device=CPU)
    both.load(tuple(ranks))
    assert torch.equal(both.total(), expected.total())
    assert torch.equal(both.tensors()[0], expected.tensors()[0])


@given(st.lists(terms, max_size=30))
def test_it_is_the_exact_sum_of_truncated_terms(values):
    """Against rational numbers: each term truncated to the grid, nothing else lost until the final rounding."""
    grid = Fraction(GRID)
    exact = sum((int(Fraction(v) / grid) * grid for v in values), Fraction(0))
    found = float(summed(values).total())
    assert abs(Fraction(found) - exact) <= abs(exact) * Fraction(2, 2**52)


def test_floating_point_would_not_do():
    """What the fixed point is for: these terms have different float64 sums in different orders."""
    values = [1e15, 0.1, -1e15, 0.1]
    assert sum(values) != sum(sorted(values))
    assert float(summed(values).total()) == float(summed(sorted(values)).total()) == 0.2


def test_head_room_is_carried():
    total = ExactSum(1, device=CPU)
    row = rows([0.999999] * 2**18)
    for _ in range(9):  # more rows than the limbs' head room
        total.add(row)
    assert float(total.total()) == pytest.approx(0.999999 * 9 * 2**18, rel=1e-12)


def test_bfloat16_sum_stalls():
    total = Bfloat16Sum(2, device=CPU)
    total.add(torch.ones(1024, 2))
    assert total.total().tolist() == [256.0, 256.0]
    other = Bfloat16Sum(2, device=CPU)
    other.load(total.tensors())
    assert torch.equal(other.total(), total.total())


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e6])
def test_grid_sums_have_the_same_bits_in_any_order_and_grouping(scale):
    generator = torch.Generator().manual_seed(0)
    terms = (torch.randn(3000, 2, 3, generator=generator) * scale).float()
    terms[::7] *= 1e-5

    def added(part):
        total = GridSum((2, 3), device=CPU)
        for term in part:
            total.add(term)
        return total

    one = added(terms).total()
    assert torch.equal(added(terms.flip(0)).total(), one)
    ranks = [added(terms[rank::3]) for rank in range(3)]
    for rank in ranks:
        rank._carry()
    shared = iter(list(zip(*[(r._high, r._low) for r in ranks], strict=True)))
    assert torch.equal(ranks[0].reduced(lambda tensor: sum(next(shared))), one)
    exact = [[math.fsum(terms[:, i, j].tolist()) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(one, torch.tensor(exact, dtype=torch.float64), atol=3000 * 2.0**-53, rtol=1e-15)


def test_grid_sums_show_what_is_not_finite():
    total = GridSum((2,), device=CPU)
    total.add(torch.tensor([torch.inf, torch.nan]))
    assert not total.total().isfinite().any()
