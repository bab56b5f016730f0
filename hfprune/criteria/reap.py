"""REAP: the mean contribution of an expert to the tokens that it receives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune.criteria.base import UNITS, Activation, ActivationCriterion, BatchInfo, LargeSums, Rows, Shape, Sums
from hfprune.criteria.channels import channels
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError

ROUTED = "routed"
"""Name of the rows with the numbers of tokens that are routed to each expert."""


class Reap(ActivationCriterion):
    """Mean, over the tokens that are routed to an expert, of router weight times the L2 norm of the expert's output.

    S_e = 1 / N_e * sum over the N_e tokens of expert e of g_e(x) * norm(f_e(x)); 0 for an expert without tokens. In
    contrast to :class:`~hfprune.criteria.activation_norm.ActivationNorm`, the mean is over an expert's own tokens: an
    expert that few tokens use but that contributes much to them has a high score. Where the router weight multiplies
    the input of an expert (Llama 4), the norm is that of the output for the scaled input.

    Only experts are scored.

    Source: router-weighted expert activation pruning (Lasby et al., 2025, arXiv:2510.13999).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> group = Group(name="experts", kind="experts", num_units=2, slices=(Slice(module="experts", side="in"),))
        >>> norms, routed = torch.tensor([[[2.0, 0.0], [4.0, 0.5]]]), torch.tensor([[[True, False], [True, True]]])
        >>> score_batch(Reap(), group, [Activation(input=norms, output=norms, routed=routed)])
        tensor([3.0000, 0.5000], dtype=torch.float64)
    """

    experts = True

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` unless the units are experts."""
        if group.kind != "experts":
            raise ConfigError(f"Reap scores experts, not the units of {group.name}: use units=['experts'].")

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the lengths of the sums of norms and of the numbers of tokens."""
        return {UNITS: group.num_units, ROUTED: group.num_units}

    def reads(self, part: Slice) -> bool:
        """Returns whether the slice is on the input side, where contributions are read."""
        return part.side == "in"

    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the sums of norms and the numbers of routed tokens of each sequence, [B, U]."""
        assert seen.routed is not None
        norms = batch.wide(seen.input, zero_padding=True)
        routed = batch.wide(seen.routed.to(norms.dtype), zero_padding=True)
        own = channels(group, part)
        return {UNITS: _sums(norms[..., own]), ROUTED: _sums(routed[..., own])}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns the sum of norms divided by the number of tokens, 0 without tokens."""
        return sums.rows[UNITS] / sums.rows[ROUTED].clamp(min=1)


def _sums(values: Tensor) -> Tensor:
    """Returns the sums over the tokens of each sequence, [B, U] float64."""
    return values.sum(dim=1, dtype=torch.float64)
