"""What sparse pruning made of a layer, in memory and on disk.

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
    """What became of one projection.

    Attributes:
        sparsity: What was asked of it, as one types it.
        weights: Their number.
        zeros: How many of them are zero.
        permuted: Whether n:m groups are made in an order of inputs of their own.
    """

    sparsity: str
    weights: int
    zeros: int
    permuted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLayer:
    """What became of one layer.

    Attributes:
        index: The layer.
        matrices: Projection, by its name within the layer -> what became of it.
        orders: Projection -> order of inputs [C] in which its n:m groups are made, where that is not the stored one.
        error: ||output before - output after||^2 / ||output before||^2 on the calibration tokens of all ranks.
        resumed: Whether an earlier run had pruned it.
    """

    index: int
    matrices: dict[str, SparseMatrix]
    orders: dict[str, Tensor]
    error: float
    resumed: bool = False

    @property
    def zeros(self) -> dict[str, float]:
        """Share of the weights that are zero, by projection."""
        return {name: matrix.zeros / matrix.weights for name, matrix in self.matrices.items()}


def layer_file(index: int) -> str:
    """Returns the name under which a finished layer is saved."""
    return f"layer-{index:05}"


def save_layer(state: LayerState, layer: nn.Module, found: SparseLayer) -> None:
    """Saves a finished layer's weights and what became of it."""
    weights = {f"weight.{name}": weight_of(module) for name, module in projections(layer).items()}
    orders = {f"order.{name}": order for name, order in found.orders.items()}
    matrices = {name: asdict(matrix) for name, matrix in found.matrices.items()}
    state.save(layer_file(found.index), weights | orders, {"error": found.error, "matrices": matrices})


def restore_layer(index: int, layer: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> SparseLayer:
    """Gives a layer the weights that an earlier run found."""
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
