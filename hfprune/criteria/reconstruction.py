"""Reconstruction: greedy removal of the units whose loss changes the refitted layer output least."""

from torch import Tensor

from hfprune.criteria.base import LayerwiseCriterion
from hfprune.plan import Group
from hfprune.utils.errors import ConfigError
from hfprune.utils.least_squares import eliminate
from hfprune.utils.second_moments import Moments


class Reconstruction(LayerwiseCriterion):
    """Removes units greedily by the error of the layer's output after a least-squares fit of the remaining ones.

    Label-free and without a backward pass. Selection and fit read the same second moments, so it belongs with
    ``LeastSquares`` of the same damping (:func:`hfprune.utils.least_squares.eliminate`). It minimises each layer's own
    error, every output counting the same, and knows nothing of what the model's predictions depend on.

    Args:
        damping: Ridge, relative to the mean second moment.
        step: Units removed before costs are recomputed; 1 is exact greedy elimination.

    Raises:
        ConfigError: A value is not positive.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1992), for whole units.
    """

    def __init__(self, *, damping: float = 0.01, step: int = 1) -> None:
        if not damping > 0 or step < 1:
            raise ConfigError(f"Reconstruction needs damping > 0 and step >= 1; got {damping} and {step}.")
        self.damping, self.step = damping, step

    def select(self, group: Group, weight: Tensor, moments: Moments, width: int) -> tuple[Tensor, Tensor]:
        """Returns the kept units and what each unit's loss costs."""
        (part,) = group.inputs()
        return eliminate(weight, moments, width, unit_width=part.width, damping=self.damping, step=self.step)
