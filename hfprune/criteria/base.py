"""The contract of a criterion: signals in, one score per unit out, everything in between a plain sum over sequences.

So scores do not depend on how sequences are batched, and ranks are combined by adding their sums; whatever is not
additive (an absolute value, a division) happens in ``score``, once.

Shape legend: B sequences, T tokens, C channels, U units.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hfprune.moments import Moments
from hfprune.sums import ExactSum, UnitSum
from hfprune.types import Group, Slice

Weighting = Literal["token", "sequence"]
"""``token``: every token counts the same. ``sequence``: every sequence does (the paper's mean over its tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInfo:
    """What a criterion must know about the batch that a signal belongs to.

    Attributes:
        num_sequences: B.
        num_tokens: [B], tokens that the objective counted in each sequence.
        padding: [B, T] boolean, True at padding; None when there is none.
    """

    num_sequences: int
    num_tokens: Tensor
    padding: Tensor | None

    def by_sequence(self, signal: Tensor) -> Tensor:
        """Returns ``signal`` as [B, T, C], also where a model flattens its batch to [B * T, C] (OPT)."""
        return signal.reshape(self.num_sequences, -1, signal.shape[-1])

    def weights(self, weighting: Weighting) -> Tensor:
        """Returns the weight [B] of each sequence's token sum, float64."""
        counts = self.num_tokens.to(torch.float64)
        return torch.ones_like(counts) if weighting == "token" else 1 / counts.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What was recorded at one projection during one backward pass of a summed objective.

    Attributes:
        input: Input of the projection, [B, T, in] or [B * T, in].
        grad: Gradient at the projection's input (``activation`` criteria) or output (``weight`` criteria).
        weight: The projection's weight as [out, in].
    """

    input: Tensor
    grad: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """How much was accumulated, over all ranks."""

    num_tokens: int
    num_sequences: int

    def divisor(self, weighting: Weighting) -> int:
        """Returns what a sum is divided by, once, at the end."""
        return self.num_tokens if weighting == "token" else self.num_sequences


class Criterion(ABC):
    """Turns what is known about units into scores. One instance serves all groups; it holds settings, never sums."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Returns the criterion's name and settings for the plan's provenance."""


class WeightCriterion(Criterion):
    """Scores that follow from the weights alone: no calibration data is run."""

    @abstractmethod
    def score(self, group: Group, weights: Sequence[Tensor]) -> Tensor:
        """Returns the importance [U] float64, >= 0.

        Args:
            group: The group.
            weights: The weight [out, in] of each of its slices' projections.
        """


class GradientCriterion(Criterion):
    """Scores from activations or weights and the objective's gradients, summed over the calibration set.

    Attributes:
        signal: ``activation`` reads the gradient at the input of the group's ``in`` slices; ``weight`` reads the input
            and the output gradient of every projection of the group, from which weight gradients follow per sequence.
    """

    signal: ClassVar[Literal["activation", "weight"]]

    def new_sum(self, num_units: int, device: torch.device) -> UnitSum:
        """Returns the empty sum that rows are added to: exact unless a criterion says otherwise."""
        return ExactSum(num_units, device=device)

    @abstractmethod
    def rows(self, group: Group, part: Slice, signal: Signal, batch: BatchInfo) -> Tensor:
        """Returns what one slice of one batch adds: [B, U], one row per sequence, float64."""

    @abstractmethod
    def score(self, total: Tensor, totals: Totals) -> Tensor:
        """Returns the importance [U] float64, >= 0, of rows that were summed over all batches and ranks."""


class LayerwiseCriterion(Criterion):
    """Chooses the units of one layer after another, from activations that the pruned layers before it give."""

    @abstractmethod
    def select(self, group: Group, weight: Tensor, moments: Moments, width: int) -> tuple[Tensor, Tensor]:
        """Returns the kept units [width], int64 and ascending, and the importance [U] float64, >= 0.

        Args:
            group: The group.
            weight: [O, C], of the projection that reads it.
            moments: Of that projection's inputs, unit j owning inputs j * w up to (j + 1) * w.
            width: Units that stay.
        """
