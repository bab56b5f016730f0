"""What scalar is differentiated: functions of the logits with closed-form gradients, one file each."""

from hfprune.objectives.base import OBJECTIVES, Objective, ValueAndGrad
from hfprune.objectives.chunked import OutputHead, Term, chunked_objective, chunked_objectives

__all__ = ["OBJECTIVES", "Objective", "OutputHead", "Term", "ValueAndGrad", "chunked_objective", "chunked_objectives"]
