"""Going through a model one layer at a time: inputs of each layer come from the pruned layers before it."""

from hfprune.layerwise.check import check_together
from hfprune.layerwise.prune import LayerwisePass, LayerwiseResult
from hfprune.layerwise.sparse import Offload, check_sparse, matrices_of, prune_sparse
from hfprune.layerwise.sparse_layer import SparseLayer, SparseMatrix
from hfprune.layerwise.state import LayerState
from hfprune.layerwise.stream import LayerStream

__all__ = [
    "LayerState",
    "LayerStream",
    "LayerwisePass",
    "LayerwiseResult",
    "Offload",
    "SparseLayer",
    "SparseMatrix",
    "check_sparse",
    "check_together",
    "matrices_of",
    "prune_sparse",
]
