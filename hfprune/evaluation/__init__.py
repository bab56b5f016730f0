"""Evaluation of a model: perplexity, fidelity to the dense model, zero-shot tasks, size and speed."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfprune.evaluation.evaluate import Measurement, measure
from hfprune.evaluation.fidelity import DenseReference, Reference, TopKReference, fidelity
from hfprune.evaluation.perplexity import Perplexity, Windows, perplexity
from hfprune.evaluation.predictions import Fidelity
from hfprune.evaluation.size_and_speed import Latency, measure_latency
from hfprune.models.forward import window_hidden

if TYPE_CHECKING:
    from hfprune.evaluation.metrics import FidelityMetric

__all__ = [
    "DenseReference",
    "Fidelity",
    "FidelityMetric",
    "Latency",
    "Measurement",
    "Perplexity",
    "Reference",
    "TopKReference",
    "Windows",
    "fidelity",
    "measure",
    "measure_latency",
    "perplexity",
    "window_hidden",
]


def __getattr__(name: str) -> Any:
    """Imports ``FidelityMetric`` at first use, since torchmetrics takes long to import; old names warn."""
    if name == "FidelityMetric":
        return import_module("hfprune.evaluation.metrics").FidelityMetric
    if name != "stage_table":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    new = "hfprune.report.table"
    text = f"{__name__}.{name} is now {new}.{name}; the old path will be removed in the next release."
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return getattr(import_module(new), name)
