"""Unstructured and N:M sparsity: weights become zero, shapes stay. One file per method."""

from hfprune.sparse.base import InputSums, ScoreMethod, SparseMethod
from hfprune.sparse.magnitude import MagnitudeSparsity, RelativeImportance
from hfprune.sparse.pattern import Sparsity, drop
from hfprune.sparse.ria import RIA
from hfprune.sparse.sparsegpt import SparseGPT
from hfprune.sparse.wanda import Wanda
from hfprune.sparse.z_pruner import ZPruner

__all__ = [
    "RIA",
    "InputSums",
    "MagnitudeSparsity",
    "RelativeImportance",
    "ScoreMethod",
    "SparseGPT",
    "SparseMethod",
    "Sparsity",
    "Wanda",
    "ZPruner",
    "drop",
]
