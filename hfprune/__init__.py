"""hfprune: prune Hugging Face causal language models and recover their quality, in one PyTorch Lightning fit.

Public names are loaded at first use, so that importing the package (and ``hfprune --help``) stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hfprune import _moved
from hfprune.version import __version__

_moved.install()


if TYPE_CHECKING:
    from hfprune.callbacks import (
        CalibrationOptions,
        LoraPruningCallback,
        PruningCallback,
        PruningEvents,
        ReportCallback,
        SparsePruningCallback,
        StructuredPruningCallback,
        TaylorImportanceCallback,
        load_from_checkpoint,
    )
    from hfprune.compensation import LeastSquares
    from hfprune.criteria import ActivationTaylor, WeightTaylor
    from hfprune.data import TextDataModule
    from hfprune.functional import make_plan, refit, save, score
    from hfprune.io.layouts import apply_plan
    from hfprune.io.load_any import load
    from hfprune.io.loading import LoadingOptions
    from hfprune.models import Neurons
    from hfprune.models.skip_layers import SkipLayers
    from hfprune.models.surgery import mask_plan
    from hfprune.modules import PruningModule
    from hfprune.plan import Budget, PruningPlan
    from hfprune.publishing.card import model_card
    from hfprune.publishing.push import push
    from hfprune.recovery import LoraRecovery
    from hfprune.trainer import PruneTrainer

_HOMES = {
    "ActivationTaylor": "hfprune.criteria",
    "Budget": "hfprune.plan",
    "CalibrationOptions": "hfprune.pruning.options",
    "LeastSquares": "hfprune.compensation",
    "LoadingOptions": "hfprune.io.loading",
    "LoraPruningCallback": "hfprune.callbacks",
    "LoraRecovery": "hfprune.recovery",
    "Neurons": "hfprune.models",
    "PruneTrainer": "hfprune.trainer",
    "PruningCallback": "hfprune.callbacks",
    "PruningEvents": "hfprune.callbacks",
    "PruningModule": "hfprune.modules",
    "PruningPlan": "hfprune.plan",
    "ReportCallback": "hfprune.callbacks",
    "SkipLayers": "hfprune.models.skip_layers",
    "SparsePruningCallback": "hfprune.callbacks",
    "StructuredPruningCallback": "hfprune.callbacks",
    "TaylorImportanceCallback": "hfprune.callbacks",
    "TextDataModule": "hfprune.data",
    "WeightTaylor": "hfprune.criteria",
    "apply_plan": "hfprune.io.layouts",
    "load": "hfprune.io.load_any",
    "load_from_checkpoint": "hfprune.callbacks",
    "make_plan": "hfprune.functional",
    "mask_plan": "hfprune.models.surgery",
    "model_card": "hfprune.publishing.card",
    "push": "hfprune.publishing.push",
    "refit": "hfprune.functional",
    "save": "hfprune.functional",
    "score": "hfprune.functional",
}

__all__ = [
    "ActivationTaylor",
    "Budget",
    "CalibrationOptions",
    "LeastSquares",
    "LoadingOptions",
    "LoraPruningCallback",
    "LoraRecovery",
    "Neurons",
    "PruneTrainer",
    "PruningCallback",
    "PruningEvents",
    "PruningModule",
    "PruningPlan",
    "ReportCallback",
    "SkipLayers",
    "SparsePruningCallback",
    "StructuredPruningCallback",
    "TaylorImportanceCallback",
    "TextDataModule",
    "WeightTaylor",
    "__version__",
    "apply_plan",
    "load",
    "load_from_checkpoint",
    "make_plan",
    "mask_plan",
    "model_card",
    "push",
    "refit",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    """Imports a public name at first use."""
    if name not in _HOMES:
        return _moved.renamed(__name__, name)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted({*globals(), *__all__})
