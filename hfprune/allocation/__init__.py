"""Which units stay: budget to widths, scores to kept units."""

from hfprune.allocation.allocate import allocate, kept_units
from hfprune.allocation.base import Allocation, Allotment, Inventory, keep_top, uniform_keep
from hfprune.allocation.budget import ResolvedBudget, resolve, resolve_shares
from hfprune.allocation.convergence import KeptHistory
from hfprune.allocation.cosine_softmax import CosineSoftmax
from hfprune.allocation.explicit import Explicit
from hfprune.allocation.global_rank import GlobalRank
from hfprune.allocation.protected import Protected
from hfprune.allocation.sensitivity import Sensitivity, measure_curves
from hfprune.allocation.uniform import Uniform

__all__ = [
    "Allocation",
    "Allotment",
    "CosineSoftmax",
    "Explicit",
    "GlobalRank",
    "Inventory",
    "KeptHistory",
    "Protected",
    "ResolvedBudget",
    "Sensitivity",
    "Uniform",
    "allocate",
    "keep_top",
    "kept_units",
    "measure_curves",
    "resolve",
    "resolve_shares",
    "uniform_keep",
]
