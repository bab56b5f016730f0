"""Least-squares fit of the experts that are kept, on the output of the layer's experts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfprune.compensation.base import ExpertCompensation, Sweep
from hfprune.models.expert_neurons import expert_tokens
from hfprune.models.layer_stream import Reduce
from hfprune.models.mixture_pass import MixturePass
from hfprune.models.projection import weight_of
from hfprune.utils.errors import ConfigError


class ExpertLeastSquares(ExpertCompensation):
    """Fits the output weights of every kept expert so that the layer's experts give the output before pruning.

    With y the summed output of the dense experts at a token, a_e the weighted activations of the neurons of expert e
    when the router chooses among the kept experts, and r = y - sum D_e a_e, each expert is fitted to the residual at
    its own tokens: G_e = (sum r a_e^T) (sum a_e a_e^T + damping I)^-1. The experts of a token would correct the same
    residual, so all steps are scaled by one factor s = sum <r, d> / sum norm(d)^2 with d = sum G_e a_e, the exact
    minimum along this direction: D_e becomes D_e + s G_e. The squared error on the calibration tokens never rises.

    Cost: two passes over the calibration tokens per layer, an [I, I] and an [H, I] matrix per kept expert, and a
    Cholesky factorisation for each. Biases are not fitted.

    Args:
        damping: Ridge, relative to the mean second moment of the activations of an expert.

    Raises:
        ConfigError: ``damping`` is not positive.

    Example:
        >>> ExpertLeastSquares(damping=0.5).describe()
        {'name': 'ExpertLeastSquares', 'damping': 0.5}
    """

    fits_inputs = True

    def __init__(self, *, damping: float = 0.1) -> None:
        super().__init__()
        if not damping > 0:
            raise ConfigError(f"damping={damping} must be positive: the moments of few tokens have no inverse.")
        self.damping = damping

    def compensate(self, experts: Any, keep: Sequence[int], sweep: Sweep, reduce: Reduce) -> None:
        """Fits the output weights of the kept experts in place."""
        outputs, width = weight_of(experts, f"down_proj.{keep[0]}").shape
        zeros = experts.down_proj.new_zeros
        inner = {e: zeros(width, width, dtype=torch.float64) for e in keep}
        cross = {e: zeros(outputs, width, dtype=torch.float64) for e in keep}

        def moments(seen: MixturePass) -> None:
            args, residual = seen.restricted(keep), self._residual(experts, seen, keep)
            for e in keep:
                own = expert_tokens(experts, args, e)
                values = own.values.double()
                inner[e] += values.T @ values
                cross[e] += residual[own.tokens].T @ values

        sweep(moments)
        steps = {e: self._step(reduce(inner[e]), reduce(cross[e])) for e in keep}
        found = zeros(2, dtype=torch.float64)

        def along(seen: MixturePass) -> None:
            args, residual = seen.restricted(keep), self._residual(experts, seen, keep)
            change = torch.zeros_like(residual)
            for e in keep:
                own = expert_tokens(experts, args, e)
                change.index_add_(0, own.tokens, own.values.double() @ steps[e].T)
            found.add_(torch.stack([(residual * change).sum(), change.square().sum()]))

        sweep(along)
        product, square = reduce(found).tolist()
        for e, step in steps.items():
            weight = weight_of(experts, f"down_proj.{e}").detach()
            weight.copy_((weight.double() + step * (product / square if square else 0.0)).to(weight.dtype))

    def _residual(self, experts: Any, seen: MixturePass, keep: Sequence[int]) -> Tensor:
        """Returns the output before pruning minus that of the kept experts, [N, H] float64."""
        kept = experts.forward(*seen.restricted(keep))
        return seen.summed(experts, seen.output).double() - seen.summed(experts, kept).double()

    def _step(self, inner: Tensor, cross: Tensor) -> Tensor:
        """Returns the change of the output weights of one expert, [H, I]; zero without tokens."""
        ridge = self.damping * float(inner.diagonal().mean())
        if not ridge > 0:
            return torch.zeros_like(cross)
        damped = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T
