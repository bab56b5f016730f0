import math

import pytest
import torch
from scipy.stats import spearmanr

from hfprune.sweep.results import overlap, rank_correlation


def test_rank_correlation_equals_scipy():
    generator = torch.Generator().manual_seed(0)
    one, other = ({n: torch.rand(50, generator=generator) for n in "ab"} for _ in range(2))
    one["a"] = one["a"].mul(5).round()  # ties
    expected = [spearmanr(one[n].numpy(), other[n].numpy()).statistic for n in "ab"]
    assert rank_correlation(one, other) == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert rank_correlation(one, one) == pytest.approx(1.0)
    assert rank_correlation({"a": one["b"]}, {"a": -one["b"]}) == pytest.approx(-1.0)
    assert math.isnan(rank_correlation({"a": torch.ones(5)}, {"a": torch.rand(5)}))


def test_overlap():
    assert overlap({"a": [0, 1, 2], "b": [4]}, {"a": [1, 2, 3], "b": [5]}) == 0.5
    assert overlap({"a": [0, 1]}, {"a": [0, 1]}) == 1.0
