"""Sparsity allocations: the share of zeros of each matrix, uniform, by outliers (OWL) or explicit."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hfprune.sparse.pattern import Sparsity
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import Configured


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One projection to prune.

    Attributes:
        layer: Index of its layer.
        name: Name within the layer.
        shape: Numbers of outputs and inputs.
    """

    layer: int
    name: str
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def path(self) -> str:
        """Layer and name, the text that patterns match: ``3.mlp.down_proj``."""
        return f"{self.layer}.{self.name}"


class SparseAllocation(Configured, ABC):
    """Base class: distributes the sparsity of the run over the matrices.

    Attributes:
        threshold: Weights whose |w| * ||x|| exceeds ``threshold`` times the mean of their layer are outliers; the
            allocation then receives the share of outliers of each layer. None if outliers are not needed.
    """

    threshold: float | None = None

    @abstractmethod
    def spread(
        self, matrices: Sequence[Matrix], sparsity: Sparsity, outliers: Sequence[float] | None
    ) -> dict[str, Sparsity]:
        """Returns path -> sparsity.

        Args:
            matrices: Matrices of all layers.
            sparsity: Sparsity of the run.
            outliers: Share of outliers of each layer; None if ``threshold`` is None.

        Raises:
            ConfigError: The allocation does not apply to the matrices or the sparsity.
        """

    def describe(self) -> dict[str, Any]:
        """Returns name and settings for reports."""
        return {"name": type(self).__name__, **self.settings(unset=True)}


class UniformSparsity(SparseAllocation):
    """The same sparsity for every matrix, as in all papers except OWL.

    Example:
        >>> matrices = [Matrix(layer=layer, name="mlp.up_proj", shape=(4, 2)) for layer in range(2)]
        >>> {path: str(s) for path, s in UniformSparsity().spread(matrices, Sparsity(0.5), None).items()}
        {'0.mlp.up_proj': '0.5', '1.mlp.up_proj': '0.5'}
    """

    def spread(
        self, matrices: Sequence[Matrix], sparsity: Sparsity, outliers: Sequence[float] | None
    ) -> dict[str, Sparsity]:
        """Returns ``sparsity`` for every matrix."""
        return {matrix.path: sparsity for matrix in matrices}


class OutlierWeighed(SparseAllocation):
    """OWL: layers with more outliers get a lower sparsity.

    The share of zeros of layer l is s - 2 spread (D_l - mean D) / (max D - min D), with D_l the share of its weights
    whose |w| * ||x|| exceeds ``threshold`` times the layer's mean on the dense model. The mean over layers, weighted by
    their numbers of weights, is s.

    Args:
        threshold: M of the paper, where it is 5 or 7.
        spread: Lambda of the paper; the sparsities of two layers differ by at most 2 lambda.

    Source: OWL (Yin et al., 2023, arXiv:2310.05175).

    Example:
        >>> matrices = [Matrix(layer=layer, name="mlp.up_proj", shape=(4, 2)) for layer in range(2)]
        >>> {path: str(s) for path, s in OutlierWeighed().spread(matrices, Sparsity(0.5), [0.1, 0.3]).items()}
        {'0.mlp.up_proj': '0.58', '1.mlp.up_proj': '0.42'}
    """

    def __init__(self, *, threshold: float = 5.0, spread: float = 0.08) -> None:
        if not threshold > 0 or not 0 <= spread < 1:
            raise ConfigError(f"OutlierWeighed needs threshold > 0 and spread in [0, 1); got {threshold} and {spread}.")
        self.threshold, self.width = threshold, spread

    def describe(self) -> dict[str, Any]:
        """Returns name and settings for reports."""
        return {"name": "OutlierWeighed", "threshold": self.threshold, "spread": self.width}

    def spread(
        self, matrices: Sequence[Matrix], sparsity: Sparsity, outliers: Sequence[float] | None
    ) -> dict[str, Sparsity]:
        """Returns the share of its layer for every matrix."""
        if sparsity.of is not None:
            raise ConfigError(
                f"sparsity={sparsity} fixes the zeros of every group; OutlierWeighed needs a share such as 0.5."
            )
        assert outliers is not None
        found = {matrix.layer: outliers[matrix.layer] for matrix in matrices}
        low, wide = min(found.values()), max(found.values()) - min(found.values())
        scaled = {layer: (share - low) / wide * 2 * self.width if wide else 0.0 for layer, share in found.items()}
        total = sum(matrix.size for matrix in matrices)
        mean = sum(scaled[matrix.layer] * matrix.size for matrix in matrices) / total
        ratios = {layer: sparsity.ratio + mean - value for layer, value in scaled.items()}
        if not all(0 <= ratio < 1 for ratio in ratios.values()):
            low, high = min(ratios.values()), max(ratios.values())
            raise ConfigError(
                f"OutlierWeighed would spread sparsity={sparsity} from {low:.3f} to {high:.3f}, which "
                "is not in [0, 1). Use a smaller spread."
            )
        return {matrix.path: Sparsity(ratios[matrix.layer]) for matrix in matrices}


class ExplicitSparsity(SparseAllocation):
    """Explicit sparsities for some matrices; all others get the sparsity of the run.

    Args:
        sparsities: Pattern -> share or n:m. Patterns are matched against ``LAYER.NAME``, for example ``0.*`` (all of
            layer 0), ``*.mlp.down_proj``, ``*.q_proj``. The last matching pattern applies.

    Example:
        >>> matrices = [Matrix(layer=layer, name="mlp.up_proj", shape=(4, 2)) for layer in range(2)]
        >>> {path: str(s) for path, s in ExplicitSparsity({"1.*": 0.25}).spread(matrices, Sparsity(0.5), None).items()}
        {'0.mlp.up_proj': '0.5', '1.mlp.up_proj': '0.25'}
    """

    def __init__(self, sparsities: Mapping[str, str | float]) -> None:
        self.sparsities = {pattern: str(value) for pattern, value in sparsities.items()}
        self._parsed = {pattern: Sparsity.parse(value) for pattern, value in sparsities.items()}

    def spread(
        self, matrices: Sequence[Matrix], sparsity: Sparsity, outliers: Sequence[float] | None
    ) -> dict[str, Sparsity]:
        """Returns the sparsity of the last matching pattern for every matrix."""
        for pattern in self._parsed:
            if not any(fnmatchcase(matrix.path, pattern) for matrix in matrices):
                raise ConfigError(
                    f"ExplicitSparsity: the pattern '{pattern}' matches no projection. Names of projections are "
                    f"'{matrices[0].path}', '{matrices[-1].path}', and so on."
                )
        found = {}
        for matrix in matrices:
            fitting = [value for pattern, value in self._parsed.items() if fnmatchcase(matrix.path, pattern)]
            found[matrix.path] = fitting[-1] if fitting else sparsity
        return found
