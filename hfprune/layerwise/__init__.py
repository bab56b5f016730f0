"""Going through a model one layer at a time: inputs of each layer come from the pruned layers before it."""

from hfprune.layerwise.check import check_together
from hfprune.layerwise.prune import LayerwisePass, LayerwiseResult
from hfprune.layerwise.sparse import SparseLayer, prune_sparse
from hfprune.layerwise.stream import LayerStream

__all__ = [
    "LayerStream",
    "LayerwisePass",
    "LayerwiseResult",
    "SparseLayer",
    "check_together",
    "prune_sparse",
]
