"""The contract of a sparse method: one matrix and statistics of its inputs in, the same matrix with zeros out.

Shape legend: O outputs, C inputs, N tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hfprune.sparse.pattern import Sparsity
from hfprune.utils.errors import CalibrationError
from hfprune.utils.settings import Configured

Needs = Literal["nothing", "norms", "products", "importance"]
"""What a method reads beside the weights: nothing, sums of squares of the inputs, of their products, or scores of every
weight that gradients gave beforehand."""

Presets = Mapping[str, Mapping[str, Any]]
"""Name on the command line -> arguments of the method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSums:
    """Sums over calibration tokens of what enters a projection: plain sums, so batches and ranks add up.

    Attributes:
        num_sequences: Calibration sequences.
        squares: [C] float64, sum of x^2; None for methods without data.
        products: [C, C] float64, sum of x x^T; None unless the method needs it.
        importance: [O, C], scores of the weights from gradients; None unless the method needs it.
    """

    num_sequences: int = 0
    squares: Tensor | None = None
    products: Tensor | None = None
    importance: Tensor | None = None

    def norms(self) -> Tensor:
        """Returns ||x_j||_2 over all tokens, [C] float64.

        Raises:
            CalibrationError: A sum is not finite.
        """
        assert self.squares is not None
        if not bool(self.squares.isfinite().all()):
            raise CalibrationError("activations are not finite")
        return self.squares.sqrt()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a method made of a matrix.

    Attributes:
        weight: [O, C], with zeros.
        gone: [O, C] boolean, what was dropped.
        order: [C], the order of inputs in which n:m groups are consecutive; None: as they are stored.
    """

    weight: Tensor
    gone: Tensor
    order: Tensor | None = None


class SparseMethod(Configured, ABC):
    """Turns a matrix into one with zeros. Instances hold settings, never sums.

    Attributes:
        needs: What it reads in addition to the weights.
        presets: Name on the command line -> settings; the first is the method with its defaults.
    """

    needs: ClassVar[Needs] = "nothing"
    presets: ClassVar[Presets] = {}

    @property
    def across(self) -> bool:
        """Whether one ranking covers all matrices, which then lose different shares."""
        return False

    def prune(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Tensor:
        """Returns the weights [O, C] with zeros; see ``apply``."""
        return self.apply(weight, sums, sparsity).weight

    @abstractmethod
    def apply(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Pruned:
        """Returns the weights with zeros, in the dtype of ``weight``, which stays as it is, and which were dropped.

        Args:
            weight: [O, C].
            sums: Of its inputs.
            sparsity: How many zeros.

        Raises:
            CalibrationError: The sums are not finite.
        """

    def describe(self) -> dict[str, Any]:
        """Returns name and settings, for reports."""
        return {"name": type(self).__name__, **self.settings(unset=True)}


class ScoreMethod(SparseMethod):
    """A method that drops the weights with the lowest scores and leaves the others as they are."""

    @abstractmethod
    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the scores [O, C], float32 or wider.

        Args:
            weight: [O, C], float32 or wider.
            sums: Of its inputs.
        """

    @abstractmethod
    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns which weights become zero, [O, C] boolean."""

    def order(self, scores: Tensor, sparsity: Sparsity) -> Tensor | None:
        """Returns the order of inputs [C] in which n:m groups are made; None: as they are stored."""
        return None

    def ranked(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the scores [O, C] of ``weight`` after checking that they rank its entries.

        Raises:
            CalibrationError: A score is NaN or infinite, or all are equal though the weights are not all zero.
        """
        scores, name = (
            self.score(weight.to(torch.promote_types(weight.dtype, torch.float32)), sums),
            type(self).__name__,
        )
        if scores.shape != weight.shape or not bool(scores.isfinite().all()):
            what = "not finite" if scores.shape == weight.shape else f"{list(scores.shape)}, not {list(weight.shape)}"
            raise CalibrationError(f"the scores by {name} are {what}")
        if self.across:  # a matrix may be ranked below all others
            return scores
        if scores.numel() > 1 and bool((scores == scores.flatten()[0]).all()) and bool(weight.any()):
            raise CalibrationError(f"the scores by {name} are all equal ({float(scores.flatten()[0]):.4g})")
        return scores

    def apply(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Pruned:
        """Returns the weights with those of the lowest scores zero."""
        scores = self.ranked(weight, sums)
        order = None if sparsity.of is None else self.order(scores, sparsity)
        if order is None:
            gone = self.mask(scores, sparsity)
        else:
            gone = torch.empty_like(scores, dtype=torch.bool)
            gone[:, order] = self.mask(scores[:, order], sparsity)
        return Pruned(weight=weight.masked_fill(gone, 0.0), gone=gone, order=order)
