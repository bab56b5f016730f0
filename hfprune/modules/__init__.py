"""LightningModules."""

from hfprune.modules.causal_lm import PruningModule
from hfprune.modules.optimization import OptimizationOptions

__all__ = ["OptimizationOptions", "PruningModule"]
