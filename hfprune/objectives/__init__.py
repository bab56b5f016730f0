"""What scalar is differentiated: functions of the logits with closed-form gradients, one file each."""

from hfprune.objectives.base import OBJECTIVES, Objective, ValueAndGrad
from hfprune.objectives.chunked import OutputHead, chunked_objective

__all__ = ["OBJECTIVES", "Objective", "OutputHead", "ValueAndGrad", "chunked_objective"]
