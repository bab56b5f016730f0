"""What a model is worth: perplexity, fidelity to the dense model, size and speed."""

from hfprune.evaluation.fidelity import DenseReference, Reference, TopKReference, fidelity
from hfprune.evaluation.hidden import final_hidden
from hfprune.evaluation.latency import Latency, measure_latency
from hfprune.evaluation.metrics import Fidelity, FidelityMetric
from hfprune.evaluation.perplexity import Perplexity, perplexity
from hfprune.evaluation.stage import Measurement, measure
from hfprune.evaluation.table import stage_table
from hfprune.evaluation.windows import Windows

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
    "final_hidden",
    "measure",
    "measure_latency",
    "perplexity",
    "stage_table",
]
