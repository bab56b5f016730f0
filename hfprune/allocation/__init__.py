"""Which units stay: budget to widths, scores to kept units."""

from hfprune.allocation.budget import ResolvedBudget, resolve, resolve_shares
from hfprune.allocation.history import KeptHistory
from hfprune.allocation.uniform import keep_top, uniform_keep

__all__ = ["KeptHistory", "ResolvedBudget", "keep_top", "resolve", "resolve_shares", "uniform_keep"]
