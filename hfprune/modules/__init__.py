"""LightningModules."""

from hfprune.modules.causal_lm import PruningModule

__all__ = ["PruningModule"]
