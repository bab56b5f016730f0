"""The contract of a compensation: moments of a projection's inputs in, weights on the kept inputs out; no training.

Shape legend: O outputs, C inputs, K kept inputs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from hfprune.utils.errors import ConfigError
from hfprune.utils.second_moments import Moments
from hfprune.utils.settings import Configured, check_choice

Tokens = Literal["normalised", "equal"]
"""How much a token's error counts: ``normalised`` divides it by the mean square of the layer's output there, which is
what the next norm divides by (a few tokens carry outputs hundreds of times larger than others); ``equal`` does not."""

Target = Literal["module", "dense"]
"""What a projection is fitted to: ``module`` is its own output before pruning, on the inputs that the pruned layers
before it give; ``dense`` is its output in the dense model, so that errors of the layers before are made up for too."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A projection after compensation.

    Attributes:
        weight: [O, K], float64.
        bias: [O], float64; None where the projection has none.
    """

    weight: Tensor
    bias: Tensor | None


class Compensation(Configured, ABC):
    """Changes the projections that read pruned units, in place: no parameter and no bias is added.

    Args:
        target: What a projection is fitted to.
        sequential: Fit each layer on the inputs that the pruned and fitted layers before it give; False takes the dense
            model's inputs everywhere.
        tokens: How much each token counts.

    Raises:
        ConfigError: An unknown value, or ``target="dense"`` without ``sequential``, where it would say nothing.
    """

    needs_bias: ClassVar[bool] = False
    """Whether projections without bias are refused."""
    fits_inputs: ClassVar[bool] = False
    """Whether each output gets a weight of its own for every kept input, which takes more tokens than inputs."""

    def __init__(self, *, target: Target = "module", sequential: bool = True, tokens: Tokens = "normalised") -> None:
        check_choice("target", target, get_args(Target))
        if target == "dense" and not sequential:
            raise ConfigError(
                "target='dense' needs sequential=True: on the dense model's inputs it is target='module'."
            )
        check_choice("tokens", tokens, get_args(Tokens))
        self.target, self.sequential, self.tokens = target, sequential, tokens

    @abstractmethod
    def fit(self, weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor) -> Fit:
        """Returns the weights on the kept inputs.

        Args:
            weight: [O, C], dense.
            bias: [O] or None.
            moments: Of the C inputs; paired with the dense model's inputs when ``target="dense"``.
            keep: [K], int64, ascending.
        """

    def describe(self) -> dict[str, Any]:
        """Returns name and settings, for the plan's provenance."""
        return {"name": type(self).__name__, **self.settings()}
