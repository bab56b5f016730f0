"""Least-squares fit of a projection on its kept inputs."""

import torch
from torch import Tensor

from hfprune.compensation.base import Compensation, Fit, Target, Tokens
from hfprune.utils.errors import ConfigError
from hfprune.utils.least_squares import refit
from hfprune.utils.second_moments import Moments


class LeastSquares(Compensation):
    """Fits all weights on the kept inputs by least squares over the calibration tokens.

    V = W_K + W_R M_RK (M_KK + damping I)^-1, with K the kept inputs, R the removed ones and M the second moments of the
    inputs (:mod:`hfprune.utils.least_squares`). With a bias, the moments are centred and the bias restores the mean
    output. Cost: one forward pass per unit kind, a [C, C] float64 matrix per layer, and a Cholesky factorisation.

    Args:
        damping: Ridge towards the dense weights, relative to the mean second moment of the inputs.
        target: See :class:`Compensation`.
        sequential: See :class:`Compensation`.
        tokens: See :class:`Compensation`.

    Raises:
        ConfigError: ``damping`` is not positive.

    Source: the layer-wise reconstruction of Optimal Brain Surgeon (Hassibi and Stork, 1992), for whole units.

    Example:
        >>> moments = Moments(2, device=torch.device("cpu"))
        >>> moments.add(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))  # input 1 is twice input 0
        >>> LeastSquares(damping=1e-9).fit(torch.ones(1, 2), None, moments, torch.tensor([0])).weight.round(decimals=4)
        tensor([[3.]], dtype=torch.float64)
    """

    fits_inputs = True

    def __init__(
        self,
        *,
        damping: float = 0.1,
        target: Target = "module",
        sequential: bool = True,
        tokens: Tokens = "normalised",
    ) -> None:
        super().__init__(target=target, sequential=sequential, tokens=tokens)
        if not damping > 0:
            raise ConfigError(f"damping={damping} must be positive: the moments of few tokens have no inverse.")
        self.damping = damping

    def fit(self, weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor) -> Fit:
        """Returns the least-squares weights and the bias that preserves the mean output."""
        used = moments if bias is None else moments.centred()
        new = refit(weight, used, keep, damping=self.damping)
        return Fit(new, None if bias is None else bias + mean_output(weight, moments) - new @ moments.mean(keep))


def mean_output(weight: Tensor, moments: Moments) -> Tensor:
    """Returns the mean over tokens of the fit's target without bias: W E[x], or W E[y] if paired, [O] float64."""
    mean = (moments.y if moments.paired else moments.x) / moments.count
    return weight.to(torch.float64) @ mean
