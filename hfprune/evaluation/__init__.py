"""Evaluation of a model: perplexity, fidelity to the dense model, zero-shot tasks, size and speed."""

import warnings
from typing import Any

from hfprune.evaluation.evaluate import Measurement, measure
from hfprune.evaluation.fidelity import DenseReference, Reference, TopKReference, fidelity
from hfprune.evaluation.metrics import Fidelity, FidelityMetric
from hfprune.evaluation.perplexity import Perplexity, Windows, perplexity
from hfprune.evaluation.size_and_speed import Latency, measure_latency
from hfprune.models.forward import window_hidden

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
    """Imports ``stage_table`` from its new module, with a warning."""
    if name != "stage_table":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    new = "hfprune.report.table"
    text = f"{__name__}.{name} is now {new}.{name}; the old path will be removed in the next release."
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return getattr(import_module(new), name)
