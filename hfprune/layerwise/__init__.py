"""Going through a model one layer at a time: inputs of each layer come from the pruned layers before it."""

from hfprune.layerwise.prune import LayerwisePass, LayerwiseResult
from hfprune.layerwise.stream import LayerStream

__all__ = ["LayerStream", "LayerwisePass", "LayerwiseResult"]
