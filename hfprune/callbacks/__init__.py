"""Lightning callbacks that prune a model in ``fit`` and report the results."""

from typing import Any

from hfprune import _moved
from hfprune.callbacks.base import PruningCallback
from hfprune.callbacks.checkpointing import StepCheckpoint
from hfprune.callbacks.lora_prune import LoraPruningCallback
from hfprune.callbacks.report import ReportCallback
from hfprune.callbacks.restore import load_from_checkpoint
from hfprune.callbacks.sparse import SparsePruningCallback
from hfprune.callbacks.structured import StructuredPruningCallback, TaylorImportanceCallback
from hfprune.modules.events import PruningEvents
from hfprune.pruning.options import CalibrationOptions

__all__ = [
    "CalibrationOptions",
    "LoraPruningCallback",
    "PruningCallback",
    "PruningEvents",
    "ReportCallback",
    "SparsePruningCallback",
    "StepCheckpoint",
    "StructuredPruningCallback",
    "TaylorImportanceCallback",
    "load_from_checkpoint",
]


def __getattr__(name: str) -> Any:
    return _moved.renamed(__name__, name)
