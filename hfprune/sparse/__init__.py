"""Unstructured and N:M sparsity: weights become zero, shapes stay. One file per method."""

from hfprune.sparse.allocation import ExplicitSparsity, Matrix, OutlierWeighed, SparseAllocation, UniformSparsity
from hfprune.sparse.base import InputSums, Pruned, ScoreMethod, SparseMethod
from hfprune.sparse.magnitude import MagnitudeSparsity, RelativeImportance
from hfprune.sparse.names import METHODS, sparse_method
from hfprune.sparse.pattern import Sparsity, drop
from hfprune.sparse.ranking import zeros_across
from hfprune.sparse.ria import RIA
from hfprune.sparse.sparsegpt import SparseGPT
from hfprune.sparse.taylor import TaylorSparsity
from hfprune.sparse.wanda import Wanda
from hfprune.sparse.z_pruner import ZPruner

__all__ = [
    "METHODS",
    "RIA",
    "ExplicitSparsity",
    "InputSums",
    "MagnitudeSparsity",
    "Matrix",
    "OutlierWeighed",
    "Pruned",
    "RelativeImportance",
    "ScoreMethod",
    "SparseAllocation",
    "SparseGPT",
    "SparseMethod",
    "Sparsity",
    "TaylorSparsity",
    "UniformSparsity",
    "Wanda",
    "ZPruner",
    "drop",
    "sparse_method",
    "zeros_across",
]
