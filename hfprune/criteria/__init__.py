"""How weights, gradients and activations become scores of units, one file per criterion."""

from hfprune.criteria.activation_norm import ActivationNorm
from hfprune.criteria.activation_taylor import ActivationTaylor
from hfprune.criteria.base import (
    Activation,
    ActivationCriterion,
    BatchInfo,
    CalibratedCriterion,
    Criterion,
    GradientCriterion,
    LayerwiseCriterion,
    Signal,
    Sums,
    Totals,
    WeightCriterion,
    check_experts,
    resolve_objective,
)
from hfprune.criteria.coupled_taylor import CoupledTaylor
from hfprune.criteria.fisher import Fisher
from hfprune.criteria.layers import layer_sums, scored_groups, with_layers
from hfprune.criteria.magnitude import Magnitude
from hfprune.criteria.random import Random
from hfprune.criteria.reconstruction import Reconstruction
from hfprune.criteria.self_distillation import SelfDistillation
from hfprune.criteria.slimllm_channels import SlimLLMChannels
from hfprune.criteria.slimllm_heads import SlimLLMHeads
from hfprune.criteria.vector_taylor import VectorTaylor
from hfprune.criteria.wanda_structured import WandaStructured
from hfprune.criteria.weight_range import WeightRange
from hfprune.criteria.weight_taylor import WeightTaylor

with_blocks = with_layers

__all__ = [
    "Activation",
    "ActivationCriterion",
    "ActivationNorm",
    "ActivationTaylor",
    "BatchInfo",
    "CalibratedCriterion",
    "CoupledTaylor",
    "Criterion",
    "Fisher",
    "GradientCriterion",
    "LayerwiseCriterion",
    "Magnitude",
    "Random",
    "Reconstruction",
    "SelfDistillation",
    "Signal",
    "SlimLLMChannels",
    "SlimLLMHeads",
    "Sums",
    "Totals",
    "VectorTaylor",
    "WandaStructured",
    "WeightCriterion",
    "WeightRange",
    "WeightTaylor",
    "check_experts",
    "layer_sums",
    "resolve_objective",
    "scored_groups",
    "with_layers",
]
