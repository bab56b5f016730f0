"""Random scores: the baseline for all other criteria."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune.criteria.base import WeightCriterion
from hfprune.plan import Group
from hfprune.utils.errors import ConfigError


class Random(WeightCriterion):
    """Uniform random scores, determined by the seed and the group's name on every machine and rank.

    Args:
        seed: Seed of the random numbers.

    Raises:
        ConfigError: The seed is negative.

    Example:
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=())
        >>> bool((Random(seed=1).score(group, []) == Random(seed=1).score(group, [])).all())
        True
    """

    outside_layers = True
    experts = True

    def __init__(self, *, seed: int = 0) -> None:
        if seed < 0:
            raise ConfigError(f"seed={seed} must not be negative.")
        self.seed = seed

    def score(self, group: Group, weights: Sequence[Tensor]) -> Tensor:
        """Returns random numbers in [0, 1), [U]; the weights are not read."""
        digest = hashlib.sha256(f"{self.seed} {group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        return torch.rand(group.num_units, generator=generator, dtype=torch.float64)
