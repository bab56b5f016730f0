"""Allocations: how many units each group keeps within a budget, and which ones.

Each allocation is one file of this package; its class is discovered there and listed nowhere else.
"""

from typing import Any

from hfprune.allocation.allocate import allocate, kept_units
from hfprune.allocation.base import Allocation, Allotment, Inventory, keep_top, uniform_keep
from hfprune.allocation.budget import ResolvedBudget, target_params
from hfprune.allocation.convergence import KeptHistory
from hfprune.allocation.sensitivity import Sensitivity, measure_curves
from hfprune.allocation.uniform import Uniform
from hfprune.utils.settings import discover

_FOUND = discover(__name__, Allocation)  # type: ignore[type-abstract]
globals().update(_FOUND)

__all__ = [
    "Allocation",
    "Allotment",
    "Inventory",
    "KeptHistory",
    "ResolvedBudget",
    "Sensitivity",
    "Uniform",
    "allocate",
    "keep_top",
    "kept_units",
    "measure_curves",
    "target_params",
    "uniform_keep",
    *(name for name in _FOUND if name not in ("Sensitivity", "Uniform")),
]


def __getattr__(name: str) -> Any:
    """Raises ``AttributeError``; its presence lets type checkers accept the discovered classes."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
