"""Objectives: scalar functions of the logits with closed-form gradients, one file each."""

from hfprune.objectives.base import OBJECTIVES, Objective, ValueAndGrad
from hfprune.objectives.chunked import Term, chunked_objective, chunked_objectives
from hfprune.objectives.output_head import OutputHead

__all__ = ["OBJECTIVES", "Objective", "OutputHead", "Term", "ValueAndGrad", "chunked_objective", "chunked_objectives"]
