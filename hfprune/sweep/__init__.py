"""Many widths, objectives, criteria and seeds from as few calibration passes as possible, in one table."""

from hfprune.sweep.grid import Method, SweepGrid
from hfprune.sweep.runner import Sweep

__all__ = ["Method", "Sweep", "SweepGrid"]
