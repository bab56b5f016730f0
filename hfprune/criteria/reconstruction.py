"""Reconstruction: greedy removal of the units whose removal changes the refitted layer output least."""

from torch import Tensor

from hfprune.criteria.base import LayerwiseCriterion
from hfprune.plan import Group
from hfprune.utils.errors import ConfigError
from hfprune.utils.least_squares import eliminate
from hfprune.utils.second_moments import Moments


class Reconstruction(LayerwiseCriterion):
    """Removes units greedily by the error of the layer's output after a least-squares fit of the remaining units.

    The criterion needs no labels and no backward pass. Selection and fit read the same second moments, so use it with
    ``LeastSquares`` of the same damping (:func:`hfprune.utils.least_squares.eliminate`). It minimises the error of each
    layer, with equal weight for all outputs, independent of the effect on the model's predictions.

    Args:
        damping: Ridge, relative to the mean second moment.
        step: Number of units removed before costs are recomputed; 1 is exact greedy elimination.

    Raises:
        ConfigError: A value is not positive.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1992), for whole units.
    """

    def __init__(self, *, damping: float = 0.01, step: int = 1) -> None:
        if not damping > 0 or step < 1:
            raise ConfigError(f"Reconstruction needs damping > 0 and step >= 1; got {damping} and {step}.")
        self.damping, self.step = damping, step

    def select(self, group: Group, weight: Tensor, moments: Moments, width: int) -> tuple[Tensor, Tensor]:
        """Returns the kept units and the cost of removing each unit."""
        (part,) = group.inputs()
        return eliminate(weight, moments, width, unit_width=part.width, damping=self.damping, step=self.step)
