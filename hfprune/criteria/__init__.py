"""Criteria: scores of units from weights, activations and gradients.

Every criterion has a file of its own; the other files hold their base classes and what several of them compute. The
package discovers the classes; there is no other list of them.
"""

from typing import Any

from hfprune import _moved
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
from hfprune.criteria.layers import layer_sums, scored_groups, with_layers
from hfprune.criteria.magnitude import Magnitude
from hfprune.criteria.random import Random
from hfprune.criteria.self_distillation import SelfDistillation
from hfprune.criteria.weight_taylor import WeightTaylor
from hfprune.utils.settings import discover

_FOUND = discover(__name__, Criterion)
globals().update(_FOUND)

CRITERIA = {criterion.name: criterion for criterion in _FOUND.values()}
"""Name of a criterion in plans and reports -> its class."""

__all__ = [
    "CRITERIA",
    "Activation",
    "ActivationCriterion",
    "ActivationTaylor",
    "BatchInfo",
    "CalibratedCriterion",
    "Criterion",
    "GradientCriterion",
    "LayerwiseCriterion",
    "Magnitude",
    "Random",
    "SelfDistillation",
    "Signal",
    "Sums",
    "Totals",
    "WeightCriterion",
    "WeightTaylor",
    "check_experts",
    "layer_sums",
    "resolve_objective",
    "scored_groups",
    "with_layers",
    *(name for name in _FOUND if name not in ("ActivationTaylor", "Magnitude", "Random", "WeightTaylor")),
]


def __getattr__(name: str) -> Any:
    """Returns a renamed function; declares the discovered classes to type checkers."""
    return _moved.renamed(__name__, name)
