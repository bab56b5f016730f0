"""Base classes of sparse methods: a matrix and statistics of its inputs in, the same matrix with zeros out.

Shape legend: O outputs, C inputs, N tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hfprune.sparse.pattern import Sparsity, WideScope, drop
from hfprune.utils.errors import CalibrationError
from hfprune.utils.settings import Configured

Needs = Literal["nothing", "norms", "products", "importance"]
"""Data that a method reads in addition to the weights: nothing, sums of squares of the inputs, sums of their products,
or a score of every weight from gradients."""

Presets = Mapping[str, Mapping[str, Any]]
"""Short name (``method="wanda"``) -> arguments of the method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSums:
    """Sums of a projection's inputs over calibration tokens; sums of batches and ranks are added.

    Attributes:
        num_sequences: Number of calibration sequences.
        squares: [C] float64, sum of x^2; None for methods without calibration data.
        products: [C, C] float64, sum of x x^T; None unless the method needs it.
        importance: [O, C], scores of the weights from gradients; None unless the method needs them.
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
    """A pruned matrix.

    Attributes:
        weight: [O, C], with zeros.
        dropped: [O, C] boolean, True at weights set to zero.
        order: [C], order of the inputs in which n:m groups are consecutive; None for the stored order.
    """

    weight: Tensor
    dropped: Tensor
    order: Tensor | None = None


class SparseMethod(Configured, ABC):
    """Base class of all sparse methods. An instance holds settings only, no sums.

    Attributes:
        needs: Data that the method reads in addition to the weights.
        presets: Short name -> settings; the first entry is the method with its defaults.
    """

    needs: ClassVar[Needs] = "nothing"
    presets: ClassVar[Presets] = {}

    @property
    def across(self) -> bool:
        """Whether all matrices are ranked together, so that their shares of zeros differ."""
        return False

    def prune(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Tensor:
        """Returns the weights [O, C] with zeros, see :meth:`apply`."""
        return self.apply(weight, sums, sparsity).weight

    @abstractmethod
    def apply(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Pruned:
        """Prunes a matrix; ``weight`` is not modified.

        Args:
            weight: [O, C].
            sums: Sums of its inputs.
            sparsity: Share or pattern of zeros.

        Returns:
            The weights with zeros, in the dtype of ``weight``, and the mask of dropped weights.

        Raises:
            CalibrationError: The sums are not finite.
        """

    def describe(self) -> dict[str, Any]:
        """Returns name and settings for reports."""
        return {"name": type(self).__name__, **self.settings(unset=True)}


class ScoreMethod(SparseMethod):
    """Method that drops the weights with the lowest scores and keeps the others unchanged.

    Attributes:
        scope: Weights that are ranked together; ``model`` ranks all matrices, so that their shares of zeros differ.
    """

    scope: WideScope = "matrix"

    @property
    def across(self) -> bool:
        """Whether all matrices are ranked together."""
        return self.scope == "model"

    @abstractmethod
    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the scores [O, C], float32 or wider.

        Args:
            weight: [O, C], float32 or wider.
            sums: Sums of its inputs.
        """

    def mask(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Returns the mask [O, C] of the weights to drop: by default the lowest scores within the scope."""
        return drop(scores, sparsity, scope="row" if self.scope == "row" else "matrix")

    def order(self, scores: Tensor, sparsity: Sparsity) -> Tensor | None:
        """Returns the order of inputs [C] in which n:m groups are consecutive; None for the stored order."""
        return None

    def ranked(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the scores [O, C] of ``weight`` after checking that they rank its entries.

        Raises:
            CalibrationError: A score is NaN or infinite, or all scores are equal although some weight is not zero.
        """
        scores = self.score(weight.to(torch.promote_types(weight.dtype, torch.float32)), sums)
        name = type(self).__name__
        if scores.shape != weight.shape or not bool(scores.isfinite().all()):
            what = "not finite" if scores.shape == weight.shape else f"{list(scores.shape)}, not {list(weight.shape)}"
            raise CalibrationError(f"the scores by {name} are {what}")
        if self.across:  # equal scores within one matrix still rank against other matrices
            return scores
        if scores.numel() > 1 and bool((scores == scores.flatten()[0]).all()) and bool(weight.any()):
            raise CalibrationError(f"the scores by {name} are all equal ({float(scores.flatten()[0]):.4g})")
        return scores

    def apply(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Pruned:
        """Returns the weights with the lowest scores set to zero."""
        scores = self.ranked(weight, sums)
        order = None if sparsity.of is None else self.order(scores, sparsity)
        if order is None:
            dropped = self.mask(scores, sparsity)
        else:
            dropped = torch.empty_like(scores, dtype=torch.bool)
            dropped[:, order] = self.mask(scores[:, order], sparsity)
        return Pruned(weight=weight.masked_fill(dropped, 0.0), dropped=dropped, order=order)
