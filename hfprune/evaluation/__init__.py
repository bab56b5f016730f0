"""What a model is worth: perplexity, fidelity to the dense model, size and speed."""

from hfprune.evaluation.evaluate import Measurement, measure
from hfprune.evaluation.fidelity import DenseReference, Reference, TopKReference, fidelity
from hfprune.evaluation.metrics import Fidelity, FidelityMetric
from hfprune.evaluation.perplexity import Perplexity, Windows, perplexity
from hfprune.evaluation.size_and_speed import Latency, measure_latency
from hfprune.evaluation.table import stage_table
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
    "stage_table",
    "window_hidden",
]
