"""Derivation: the architecture table of an unknown class, from the behaviour of a small model of it.

Projections that feed each other are found by changing single channels in forward passes, config keys by building models
with other values. Names of modules and of config keys are never evidence.
"""

from hfprune.models.derivation.assembly import derive

__all__ = ["derive"]
