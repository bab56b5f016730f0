"""Unstructured and N:M sparsity: weights become zero, shapes are unchanged. One file per method."""

from hfprune.sparse.allocation import ExplicitSparsity, Matrix, OutlierWeighed, SparseAllocation, UniformSparsity
from hfprune.sparse.base import InputSums, Pruned, ScoreMethod, SparseMethod
from hfprune.sparse.engine import Offload, check_sparse, matrices_of, prune_sparse
from hfprune.sparse.layer import SparseLayer, SparseMatrix
from hfprune.sparse.magnitude import MagnitudeSparsity, RelativeImportance
from hfprune.sparse.names import METHODS, sparse_method
from hfprune.sparse.pattern import Sparsity, drop, zeros_across
from hfprune.sparse.ria import RIA
from hfprune.sparse.sparsegpt import SparseGPT
from hfprune.sparse.state import LayerState, SavedLayers
from hfprune.sparse.wanda import Wanda
from hfprune.sparse.weight_taylor import TaylorSparsity
from hfprune.sparse.z_pruner import ZPruner

__all__ = [
    "METHODS",
    "RIA",
    "ExplicitSparsity",
    "InputSums",
    "LayerState",
    "MagnitudeSparsity",
    "Matrix",
    "Offload",
    "OutlierWeighed",
    "Pruned",
    "RelativeImportance",
    "SavedLayers",
    "ScoreMethod",
    "SparseAllocation",
    "SparseGPT",
    "SparseLayer",
    "SparseMatrix",
    "SparseMethod",
    "Sparsity",
    "TaylorSparsity",
    "UniformSparsity",
    "Wanda",
    "ZPruner",
    "check_sparse",
    "drop",
    "matrices_of",
    "prune_sparse",
    "sparse_method",
    "zeros_across",
]
