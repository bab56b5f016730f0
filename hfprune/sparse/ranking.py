"""One ranking over all matrices of a model, without holding their scores at once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hfprune.sparse.pattern import Sparsity

_DIGIT = 16
"""Bits that one pass over the scores tells apart."""


def zeros_across(scores: Callable[[], Iterator[tuple[str, Tensor]]], sparsity: Sparsity) -> dict[str, Sparsity]:
    """Returns, for each matrix, the share with which the lowest scores of the whole model become zero.

    Exactly int(total * ratio) weights go; of equal scores those of the first matrices do. Scores are compared as
    float32, whose bits, as integers, are ordered as they are: two passes count them by 16 bits each.

    Args:
        scores: Yields name and scores [O, C] >= 0 of every matrix, the same each time that it is called.
        sparsity: A share, no pattern.
    """
    sizes = {name: found.numel() for name, found in scores()}
    count = int(sum(sizes.values()) * sparsity.ratio)
    high, before = _digit((_bits(s) >> _DIGIT for _, s in scores()), count)
    low, below = _digit(
        (b[b >> _DIGIT == high] & (2**_DIGIT - 1) for b in (_bits(s) for _, s in scores())), count - before
    )
    threshold, ties = (high << _DIGIT) + low, count - before - below
    found = {}
    for name, values in scores():
        bits = _bits(values)
        tied = min(ties, int((bits == threshold).sum()))
        ties -= tied
        found[name] = Sparsity.exactly(int((bits < threshold).sum()) + tied, sizes[name])
    return found


def _bits(scores: Tensor) -> Tensor:
    return scores.flatten().to(torch.float32).view(torch.int32)


def _digit(values: Iterator[Tensor], count: int) -> tuple[int, int]:
    """Returns the digit of the value that comes after ``count`` lower ones, and how many have lower digits."""
    counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
    for part in values:
        counts += torch.bincount(part, minlength=2**_DIGIT).cpu()
    reached = counts.cumsum(0)
    digit = min(int((reached <= count).sum()), 2**_DIGIT - 1)
    return digit, int(reached[digit] - counts[digit])
