"""Lightning callbacks: when things happen. What happens is computed elsewhere."""

from hfprune.callbacks.events import PruningEvents
from hfprune.callbacks.importance import TaylorImportanceCallback
from hfprune.callbacks.lora_prune import LoraPruneCallback
from hfprune.callbacks.report import ReportCallback
from hfprune.callbacks.saving import StepCheckpoint
from hfprune.callbacks.sparse import SparsityCallback

__all__ = [
    "LoraPruneCallback",
    "PruningEvents",
    "ReportCallback",
    "SparsityCallback",
    "StepCheckpoint",
    "TaylorImportanceCallback",
]
