"""Mean compensation: the bias absorbs the mean contribution of the removed inputs."""

import torch
from torch import Tensor

from hfprune.compensation.base import Compensation, Fit, Target, Tokens
from hfprune.compensation.least_squares import mean_output
from hfprune.utils.errors import ConfigError
from hfprune.utils.second_moments import Moments


class MeanCompensation(Compensation):
    """Keeps the weights and adds W_R E[x_R] to the bias, with R the removed inputs.

    Requires projections with a bias (OPT, GPT-2, GPT-NeoX). Other architectures have no parameter for it.

    Args:
        target: See :class:`Compensation`.
        sequential: See :class:`Compensation`.
        tokens: See :class:`Compensation`; the default ``equal`` is the plain mean.

    Source: FLAP (An et al., 2023, arXiv:2312.11983).

    Example:
        >>> moments = Moments(2, device=torch.device("cpu"))
        >>> moments.add(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))  # input 1 is twice input 0
        >>> MeanCompensation().fit(torch.ones(1, 2), torch.zeros(1), moments, torch.tensor([0])).bias
        tensor([4.], dtype=torch.float64)
    """

    needs_bias = True

    def __init__(self, *, target: Target = "module", sequential: bool = True, tokens: Tokens = "equal") -> None:
        super().__init__(target=target, sequential=sequential, tokens=tokens)

    def fit(self, weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor) -> Fit:
        """Returns the kept weights and the new bias.

        Raises:
            ConfigError: The projection has no bias.
        """
        if bias is None:
            raise ConfigError(
                "MeanCompensation requires projections with a bias; those of this model have none. Use LeastSquares or "
                "OutputRegression."
            )
        kept = weight.to(torch.float64)[:, keep]
        return Fit(kept, bias + mean_output(weight, moments) - kept @ moments.mean(keep))
