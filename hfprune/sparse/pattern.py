"""Sparsity patterns (ratios and N:M) and the selection of the weights to drop.

Shape legend: O outputs, C inputs.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import check_choice

Scope = Literal["row", "matrix"]
"""Weights that are ranked together: those of one output (``row``), or of one ``matrix``."""

WideScope = Literal["row", "matrix", "model"]
"""A :data:`Scope`, or all pruned matrices (``model``) for scores that are comparable between matrices."""


def check_scope(scope: str, known: Sequence[str] = ("row", "matrix")) -> None:
    """Raises ``ConfigError`` unless ``scope`` is one of ``known``."""
    check_choice("scope", scope, known)


@dataclass(frozen=True, slots=True)
class Sparsity:
    """A share of zeros, or N:M: exactly n zeros in every m consecutive inputs of an output.

    Attributes:
        ratio: Share of zeros, in [0, 1).
        zeros: n of n:m, None without a pattern.
        of: m of n:m, None without a pattern.
    """

    ratio: float
    zeros: int | None = None
    of: int | None = None

    @classmethod
    def parse(cls, text: str | float) -> "Sparsity":
        """Parses a share (``0.5``) or a pattern (``1:4``: one ZERO in every 4 weights, as in the papers, not 3).

        Raises:
            ConfigError: The text is neither.

        >>> Sparsity.parse("4:8").ratio
        0.5
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if found:
            n, m = int(found[1]), int(found[2])
            if not 0 < n < m:
                raise ConfigError(f"sparsity={text}: n:m means n zeros in every m weights, with 0 < n < m.")
            return cls(n / m, n, m)
        try:
            ratio = float(text)
        except ValueError:
            raise ConfigError(f"sparsity='{text}' is neither a share of zeros (0.5) nor a pattern (2:4).") from None
        if not 0 <= ratio < 1:
            hint = ' (YAML reads an unquoted 2:4 as 124: write "2:4".)' if ratio > 60 else ""
            raise ConfigError(f"sparsity={text} is not in [0, 1): it is the share of weights that become zero.{hint}")
        return cls(ratio)

    @classmethod
    def exactly(cls, count: int, size: int) -> "Sparsity":
        """Returns the share for which ``drop`` selects exactly ``count`` of ``size`` weights.

        >>> int(49 * Sparsity.exactly(29, 49).ratio)
        29
        """
        return cls(math.nextafter(count / size, 1.0))

    def __str__(self) -> str:
        """Returns the text that :meth:`parse` reads."""
        return f"{self.ratio:g}" if self.of is None else f"{self.zeros}:{self.of}"

    def check(self, inputs: int, name: str) -> None:
        """Raises ``ConfigError`` unless ``inputs`` is a multiple of the pattern's group size.

        Args:
            inputs: Number of inputs.
            name: Name of the matrix in the message.
        """
        if self.of is not None and inputs % self.of:
            raise ConfigError(f"sparsity={self}: {name} has {inputs} inputs, not a multiple of {self.of}.")


def drop(scores: Tensor, sparsity: Sparsity, *, scope: Scope) -> Tensor:
    """Returns the mask [O, C] of the weights with the lowest scores; of equal scores the first are selected.

    Counts are exact: int(C * ratio) of every row, int(O * C * ratio) of a matrix, or n of every m inputs.

    Args:
        scores: [O, C].
        sparsity: Share or pattern of zeros.
        scope: Weights that are ranked together; n:m patterns always rank within their groups.

    Raises:
        ConfigError: The number of inputs is not a multiple of m.

    >>> drop(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), Sparsity(0.5), scope="row")
    tensor([[False,  True,  True, False]])
    """
    sparsity.check(scores.shape[1], "the matrix")
    if sparsity.of is not None:
        groups = scores.unflatten(1, (-1, sparsity.of))
        return _lowest(groups, int(sparsity.zeros or 0)).flatten(1)
    if scope == "row":
        return _lowest(scores, int(scores.shape[1] * sparsity.ratio))
    return _lowest(scores.flatten(), int(scores.numel() * sparsity.ratio)).view_as(scores)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Returns the mask of the ``count`` lowest entries along the last axis."""
    order = torch.sort(scores, dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


_DIGIT = 16
"""Bits that one pass over the scores resolves."""


def zeros_across(scores: Callable[[], Iterator[tuple[str, Tensor]]], sparsity: Sparsity) -> dict[str, Sparsity]:
    """Returns the share of each matrix for which the lowest scores of the whole model become zero.

    Exactly int(total * ratio) weights are dropped; of equal scores, those of the first matrices. Scores are compared as
    float32. Non-negative floats have the order of their bits as integers, so two passes of 16 bits each find the
    threshold.

    Args:
        scores: Function that yields name and scores [O, C] >= 0 of every matrix, the same ones in every call.
        sparsity: A share, not a pattern.

    Returns:
        Name -> share of zeros.
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
    """Returns the digit of the value at position ``count`` of the sorted values, and the number of lower digits."""
    counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
    for part in values:
        counts += torch.bincount(part, minlength=2**_DIGIT).cpu()
    reached = counts.cumsum(0)
    digit = min(int((reached <= count).sum()), 2**_DIGIT - 1)
    return digit, int(reached[digit] - counts[digit])
