"""Results of sparse pruning per layer, in memory and on disk.

Shape legend: C inputs of a projection.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.projection import weight_of
from hfprune.sparse.state import LayerState
from hfprune.sparse.statistics import projections


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseMatrix:
    """Result of one projection.

    Attributes:
        sparsity: Requested sparsity as text, for example ``0.5`` or ``2:4``.
        weights: Number of weights.
        zeros: Number of zero weights.
        permuted: Whether n:m groups are consecutive in a permuted order of the inputs only.
    """

    sparsity: str
    weights: int
    zeros: int
    permuted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLayer:
    """Result of one layer.

    Attributes:
        index: Index of the layer.
        matrices: Name of a projection within the layer -> its result.
        orders: Name of a projection -> permuted order of inputs [C] in which its n:m groups are consecutive.
        error: ||output before - output after||^2 / ||output before||^2 on the calibration tokens of all ranks.
        resumed: Whether the layer was loaded from an earlier run.
    """

    index: int
    matrices: dict[str, SparseMatrix]
    orders: dict[str, Tensor]
    error: float
    resumed: bool = False

    @property
    def zeros(self) -> dict[str, float]:
        """Name of a projection -> share of zero weights."""
        return {name: matrix.zeros / matrix.weights for name, matrix in self.matrices.items()}


def layer_file(index: int) -> str:
    """Returns the name of the saved entry of a finished layer."""
    return f"layer-{index:05}"


def save_layer(state: LayerState, layer: nn.Module, found: SparseLayer) -> None:
    """Saves the weights and the result of a finished layer."""
    weights = {f"weight.{name}": weight_of(module) for name, module in projections(layer).items()}
    orders = {f"order.{name}": order for name, order in found.orders.items()}
    matrices = {name: asdict(matrix) for name, matrix in found.matrices.items()}
    state.save(layer_file(found.index), weights | orders, {"error": found.error, "matrices": matrices})


def restore_layer(index: int, layer: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> SparseLayer:
    """Loads the weights of an earlier run into a layer and returns its result.

    Args:
        index: Index of the layer.
        layer: The layer, changed in place.
        tensors: Tensors written by :func:`save_layer`.
        data: Plain data written by :func:`save_layer`.
    """
    with torch.no_grad():
        for name, module in projections(layer).items():
            weight_of(module).copy_(tensors[f"weight.{name}"])
    return SparseLayer(
        index=index,
        matrices={name: SparseMatrix(**matrix) for name, matrix in data["matrices"].items()},
        orders={key.removeprefix("order."): order for key, order in tensors.items() if key.startswith("order.")},
        error=data["error"],
        resumed=True,
    )
