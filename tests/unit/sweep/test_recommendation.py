"""The recommendation of a sweep."""

import math

import pytest

from hfprune.sweep.recommendation import choices, kl_error
from hfprune.sweep.results import chance_overlap, overlap


def row(method, ratio, kl):
    return {"method": method, "pruning_ratio": ratio, "t_kl": kl}


def test_the_lowest_kl_wins_at_every_ratio():
    rows = [
        row("dense", None, 0.0),
        row("a", 0.1, 0.3),
        row("b", 0.1, 0.2),
        row("a", 0.2, 0.4),
        row("b", 0.2, math.inf),
    ]
    found = choices(rows, "t", {})
    assert [(c.pruning_ratio, c.method, c.kl, c.alike) for c in found] == [(0.1, "b", 0.2, ()), (0.2, "a", 0.4, ())]
    assert choices([row("a", 0.1, math.nan)], "t", {}) == []


def test_methods_within_two_standard_errors_are_not_distinguished():
    rows = [row("a", 0.1, 1.0), row("b", 0.1, 1.27), row("c", 0.1, 1.29)]
    errors = dict.fromkeys((("a", 0.1), ("b", 0.1), ("c", 0.1)), 0.1)  # 2 sqrt(2) 0.1 = 0.283
    assert choices(rows, "t", errors)[0].alike == ("b",)


def test_the_error_of_the_mean_holds_windows_and_seeds():
    def cell(kl, error):
        return {"texts": {"t": {"fidelity": {"kl": kl, "kl_stderr": error}}}}

    assert kl_error([cell(0.5, 0.03)], "t") == pytest.approx(0.03)
    assert kl_error([cell(0.5, None)], "t") == 0.0
    assert kl_error([cell(0.4, 0.03), cell(0.6, 0.03)], "t") == pytest.approx(math.hypot(0.03, 0.1))


def test_chance_overlap_is_the_mean_overlap_of_random_choices():
    import random

    generator, units = random.Random(0), {"x": 12, "y": 6}
    kept = [{"x": generator.sample(range(12), 5), "y": generator.sample(range(6), 4)} for _ in range(4000)]
    fixed = {"x": list(range(9)), "y": [0, 1]}
    found = sum(overlap(fixed, other) for other in kept) / len(kept)
    assert chance_overlap(fixed, kept[0], units) == pytest.approx(found, abs=0.01)
