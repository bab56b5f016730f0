"""How weights, gradients and activations become scores of units, one file per criterion."""

from hfprune.criteria.activation_taylor import ActivationTaylor
from hfprune.criteria.base import (
    BatchInfo,
    Criterion,
    GradientCriterion,
    LayerwiseCriterion,
    Signal,
    Totals,
    WeightCriterion,
)
from hfprune.criteria.blocks import block_scores
from hfprune.criteria.magnitude import Magnitude
from hfprune.criteria.random import Random
from hfprune.criteria.reconstruction import Reconstruction
from hfprune.criteria.weight_taylor import WeightTaylor

__all__ = [
    "ActivationTaylor",
    "BatchInfo",
    "Criterion",
    "GradientCriterion",
    "LayerwiseCriterion",
    "Magnitude",
    "Random",
    "Reconstruction",
    "Signal",
    "Totals",
    "WeightCriterion",
    "WeightTaylor",
    "block_scores",
]
