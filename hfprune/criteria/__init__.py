"""How gradients and activations become scores of units, one file per criterion."""

from hfprune.criteria.activation_taylor import ActivationTaylor
from hfprune.criteria.base import BatchInfo, Criterion, Signal, Totals
from hfprune.criteria.weight_taylor import WeightTaylor

__all__ = ["ActivationTaylor", "BatchInfo", "Criterion", "Signal", "Totals", "WeightTaylor"]
