"""Output regression (SlimLLM): one factor per output channel."""

import torch
from torch import Tensor

from hfprune.compensation.base import Compensation, Fit, Target, Tokens
from hfprune.compensation.least_squares import mean_output
from hfprune.utils.second_moments import Moments


class OutputRegression(Compensation):
    """Scales each output to the best fit of the unpruned one.

    With o = W_K x_K the output of the kept inputs and t the target, the factor of output d is
    A_d = cov(o_d, t_d) / var(o_d), and the new weights are diag(A) W_K. A bias absorbs mean(t) - A mean(o), as in the
    published method. Without a bias the regression line passes through the origin (A_d = sum o t / sum o^2): SlimLLM
    would add a bias, which stock configs of bias-free models cannot describe.

    Args:
        target: See :class:`Compensation`.
        sequential: See :class:`Compensation`.
        tokens: See :class:`Compensation`; the default ``equal`` is SlimLLM's regression.

    Source: SlimLLM (Guo et al., 2025, arXiv:2505.22689).

    Example:
        >>> moments = Moments(2, device=torch.device("cpu"))
        >>> moments.add(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))  # input 1 is twice input 0
        >>> OutputRegression().fit(torch.ones(1, 2), None, moments, torch.tensor([0])).weight
        tensor([[3.]], dtype=torch.float64)
    """

    def __init__(self, *, target: Target = "module", sequential: bool = True, tokens: Tokens = "equal") -> None:
        super().__init__(target=target, sequential=sequential, tokens=tokens)

    def fit(self, weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor) -> Fit:
        """Returns the scaled weights."""
        used = moments if bias is None else moments.centred()
        w = weight.to(torch.float64)
        kept = w[:, keep]
        target = used.xy if used.paired else used.xx
        covariance = ((kept @ target[keep]) * w).sum(1)
        variance = ((kept @ used.xx[keep][:, keep]) * kept).sum(1)
        factor = torch.where(variance > 0, covariance / variance, 1.0)
        new = factor[:, None] * kept
        return Fit(new, None if bias is None else bias + mean_output(weight, moments) - new @ moments.mean(keep))
