"""Sweeps over methods, ratios and seeds, with shared calibration passes and one table of results."""

from hfprune.sweep.grid import Method, SweepGrid
from hfprune.sweep.runner import Sweep

__all__ = ["Method", "Sweep", "SweepGrid"]
