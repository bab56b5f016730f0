"""How alike two ways of scoring are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Kept = Mapping[str, Sequence[int]]
"""Group -> kept units."""


def rank_correlation(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Returns Spearman's rank correlation of the scores within each group of both, averaged; ties share a rank.

    >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])
    >>> round(rank_correlation({"x": a}, {"x": b}), 3)
    0.5
    """
    found = [_spearman(scores, other[name]) for name, scores in one.items() if name in other]
    return sum(found) / len(found) if found else float("nan")


def overlap(one: Kept, other: Kept) -> float:
    """Returns the share of the kept units of ``one`` that are kept by ``other``, over the groups of both.

    >>> overlap({"x": [0, 1]}, {"x": [1, 2]})
    0.5
    """
    shared = one.keys() & other.keys()
    common = sum(len(set(one[name]) & set(other[name])) for name in shared)
    return common / sum(len(one[name]) for name in shared) if shared else float("nan")


def _spearman(one: Tensor, other: Tensor) -> float:
    a, b = (_ranks(scores.to(torch.float64)) for scores in (one, other))
    a, b = a - a.mean(), b - b.mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale else float("nan")


def _ranks(scores: Tensor) -> Tensor:
    """Returns ranks from 0; equal scores share the mean of theirs."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    mean = last - (counts.to(torch.float64) + 1) / 2
    found: Tensor = mean[inverse]
    return found


def matrix(names: Sequence[str], value: Any) -> dict[str, dict[str, float]]:
    """Returns ``value(a, b)`` for every pair of names."""
    return {a: {b: value(a, b) for b in names} for a in names}
