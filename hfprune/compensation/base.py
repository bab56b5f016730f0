"""Base class of compensations: second moments of a projection's inputs in, weights on the kept inputs out.

Shape legend: O outputs, C inputs, K kept inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from hfprune.models.layer_stream import Reduce
from hfprune.models.mixture_pass import MixturePass
from hfprune.utils.errors import ConfigError
from hfprune.utils.second_moments import Moments
from hfprune.utils.settings import Configured, check_choice

Tokens = Literal["normalised", "equal"]
"""Weight of a token's error. ``normalised`` divides it by the mean square of the layer's output, as the next norm does:
the outputs of a few tokens are hundreds of times larger than others. ``equal`` weighs all tokens the same."""

Target = Literal["module", "dense"]
"""Target of a fit. ``module`` is the projection's output before pruning on the outputs of the pruned layers before it.
``dense`` is its output in the dense model, so that the fit also corrects errors of the layers before it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A projection after compensation.

    Attributes:
        weight: [O, K], float64.
        bias: [O], float64; None for projections without bias.
    """

    weight: Tensor
    bias: Tensor | None


class Compensation(Configured, ABC):
    """Base class. Updates the projections that read pruned units in place, without adding parameters.

    Args:
        target: Target of the fit, ``module`` or ``dense``.
        sequential: Fit each layer on the outputs of the pruned and fitted layers before it. False uses the inputs of
            the dense model in all layers.
        tokens: Weight of each token, ``normalised`` or ``equal``.

    Raises:
        ConfigError: A value is unknown, or ``target="dense"`` is used without ``sequential``.
    """

    needs_bias: ClassVar[bool] = False
    """Whether projections without bias are refused."""
    fits_inputs: ClassVar[bool] = False
    """Whether a separate weight is fitted for every pair of output and kept input; needs more tokens than inputs."""

    def __init__(self, *, target: Target = "module", sequential: bool = True, tokens: Tokens = "normalised") -> None:
        check_choice("target", target, get_args(Target))
        if target == "dense" and not sequential:
            raise ConfigError(
                "target='dense' needs sequential=True: on the dense model's inputs it equals target='module'."
            )
        check_choice("tokens", tokens, get_args(Tokens))
        self.target, self.sequential, self.tokens = target, sequential, tokens

    @abstractmethod
    def fit(self, weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor) -> Fit:
        """Returns the weights on the kept inputs.

        Args:
            weight: Dense weight [O, C].
            bias: Bias [O], or None.
            moments: Second moments of the C inputs, paired with the dense model's inputs for ``target="dense"``.
            keep: Kept inputs [K], int64, ascending.
        """

    def describe(self) -> dict[str, Any]:
        """Returns name and settings for the plan's provenance."""
        return {"name": type(self).__name__, **self.settings()}


Visit = Callable[[MixturePass], None]
"""Function that receives each forward pass of the dense mixture."""

Sweep = Callable[[Visit], None]
"""Function that runs the calibration tokens through a layer with its dense mixture."""


class ExpertCompensation(Compensation):
    """Base class of compensations for removed experts, which change the experts that are kept, in place.

    Layers are processed in order, each on the outputs of the pruned layers before it, and all tokens count the same.
    """

    target: ClassVar[Target] = "module"  # type: ignore[misc]
    sequential: ClassVar[bool] = True  # type: ignore[misc]
    tokens: ClassVar[Tokens] = "equal"  # type: ignore[misc]

    def __init__(self) -> None:
        """Sets nothing: subclasses store their own settings."""

    def fit(self, weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor) -> Fit:
        """Raises ``ConfigError``: no single projection is fitted."""
        raise ConfigError(f"{type(self).__name__} compensates for removed experts only: use units=['experts'].")

    @abstractmethod
    def compensate(self, experts: Any, keep: Sequence[int], sweep: Sweep, reduce: Reduce) -> None:
        """Changes the kept experts of one layer in place.

        Args:
            experts: The experts module.
            keep: Kept experts, ascending.
            sweep: Runs the calibration tokens through the layer before pruning.
            reduce: Adds a tensor up over ranks.
        """
