"""The contract of a sparse method: one matrix and statistics of its inputs in, the same matrix with zeros out.

Shape legend: O outputs, C inputs, N tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hfprune.errors import CalibrationError
from hfprune.sparse.pattern import Sparsity

Needs = Literal["nothing", "norms", "products"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSums:
    """Sums over calibration tokens of what enters a projection: plain sums, so batches and ranks add up.

    Attributes:
        num_sequences: Calibration sequences.
        squares: [C] float64, sum of x^2; None for methods without data.
        products: [C, C] float64, sum of x x^T; None unless the method needs it.
    """

    num_sequences: int = 0
    squares: Tensor | None = None
    products: Tensor | None = None

    def norms(self) -> Tensor:
        """Returns ||x_j||_2 over all tokens, [C] float64.

        Raises:
            CalibrationError: A sum is not finite.
        """
        assert self.squares is not None
        if not bool(self.squares.isfinite().all()):
            raise CalibrationError("activations are not finite")
        return self.squares.sqrt()


class SparseMethod(ABC):
    """Turns a matrix into one with zeros. Instances hold settings, never sums.

    Attributes:
        needs: Which sums of the inputs it reads.
    """

    needs: ClassVar[Needs] = "nothing"

    @abstractmethod
    def prune(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Tensor:
        """Returns the weights [O, C] with zeros, in the dtype of ``weight``, which stays as it is.

        Args:
            weight: [O, C].
            sums: Of its inputs.
            sparsity: How many zeros.

        Raises:
            CalibrationError: The sums are not finite.
        """

    def describe(self) -> dict[str, Any]:
        """Returns name and settings, for reports."""
        return {"name": type(self).__name__, **vars(self)}


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

    def prune(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Tensor:
        """Returns the weights with those of the lowest scores zero."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight.masked_fill(self.mask(self.score(wide, sums), sparsity), 0.0)
