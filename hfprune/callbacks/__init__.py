"""Lightning callbacks: when things happen. What happens is computed elsewhere."""

from hfprune.callbacks.base import PruningEvents
from hfprune.callbacks.checkpointing import StepCheckpoint
from hfprune.callbacks.lora_prune import LoraPruneCallback
from hfprune.callbacks.report import ReportCallback
from hfprune.callbacks.sparse import SparsityCallback
from hfprune.callbacks.structured import TaylorImportanceCallback

__all__ = [
    "LoraPruneCallback",
    "PruningEvents",
    "ReportCallback",
    "SparsityCallback",
    "StepCheckpoint",
    "TaylorImportanceCallback",
]
