"""How weights, gradients and activations become scores of units, one file per criterion."""

from hfprune.criteria.activation_taylor import ActivationTaylor
from hfprune.criteria.base import BatchInfo, Criterion, GradientCriterion, Signal, Totals, WeightCriterion
from hfprune.criteria.magnitude import Magnitude
from hfprune.criteria.random import Random
from hfprune.criteria.weight_taylor import WeightTaylor

__all__ = [
    "ActivationTaylor",
    "BatchInfo",
    "Criterion",
    "GradientCriterion",
    "Magnitude",
    "Random",
    "Signal",
    "Totals",
    "WeightCriterion",
    "WeightTaylor",
]
