"""SlimLLM scores of attention heads: correlation of the attention output without a head with the full output."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune.criteria.base import UNITS, Activation, ActivationCriterion, BatchInfo, LargeSums, Rows, Shape, Sums
from hfprune.criteria.channels import channels
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError

_OUTER = "input products"


class SlimLLMHeads(ActivationCriterion):
    """Decorrelation of the attention output when a unit is removed, for heads and KV groups (SlimLLM).

    Let o_u be the contribution of unit u (a head, or all query heads of one KV head) to the output of ``o_proj``, O the
    sum of all contributions and rho_d the Pearson correlation over tokens in output dimension d. With
    R(S) = sum_d abs(rho_d(sum of S, O)), a unit scores H - R(all other units), where H is the number of dimensions.
    Constant dimensions count as 0.

    Correlations follow from the second moments of ``o_proj``'s input, an [in, in] float64 matrix per layer, so no
    contribution is stored per token. The published method scores a layer on the outputs of the pruned layers before
    it. This implementation scores all layers on the dense model, in one pass.

    Args:
        dropped: Share of the units to remove. If given, the choice of ``round(dropped * units)`` units is refined as in
            the published code: for each removed unit, lowest score first, every exchange with a kept unit is tried, and
            the best one is applied if it raises the best R so far. The result depends on the share, so use that of the
            budget. Scores are then ranks, with kept units above removed ones. None disables the refinement.

    Raises:
        ConfigError: The share is not in (0, 1).

    Source: SlimLLM (Guo et al., 2025, arXiv:2505.22689).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> group = Group(name="attn", kind="heads", num_units=2, slices=(Slice(module="o_proj", side="in", width=2),))
        >>> value = torch.tensor([[[1.0, 0.0, 0.5, 0.0], [0.0, 2.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]])
        >>> score_batch(SlimLLMHeads(), group, [Activation(input=value, output=value)], [torch.eye(4)[:2] + 0.5])
        tensor([0.4553, 0.0140], dtype=torch.float64)
    """

    name = "slimllm_heads"

    def __init__(self, *, dropped: float | None = None) -> None:
        if dropped is not None and not 0 < dropped < 1:
            raise ConfigError(f"dropped={dropped} is not a share in (0, 1).")
        self.dropped = dropped

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` unless the units are heads consumed by one projection."""
        if len(group.inputs()) != 1 or group.inputs()[0].width == 1:
            raise ConfigError(
                f"SlimLLMHeads scores attention heads; {group.name} has units of kind '{group.kind}'. Use "
                "SlimLLMChannels for MLP neurons."
            )

    def reads(self, part: Slice) -> bool:
        """Returns whether the projection consumes the units."""
        return part.side == "in"

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the number of channels of all units."""
        return {UNITS: group.num_units * group.inputs()[0].width}

    def moments(self, group: Group, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the outer products of these channels."""
        size = group.num_units * group.inputs()[0].width
        return {_OUTER: (size, size)}

    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the sums of the channels, [B, C]; adds their outer products."""
        value = batch.wide(seen.input, zero_padding=True)[..., channels(group, part)]
        flat = value.flatten(0, 1)
        moments[_OUTER].add_((flat.T @ flat).to(moments[_OUTER]))
        return {UNITS: value.sum(dim=1).double()}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns H - R(all other units), or the ranks of the refined choice."""
        covariance = contribution_covariance(group, sums)
        units = range(group.num_units)
        alone = torch.stack([correlation(covariance, [u for u in units if u != left]) for left in units])
        score = (covariance.shape[0] - alone).clamp(min=0)
        if self.dropped is None:
            return score
        order = torch.sort(score, stable=True).indices.tolist()
        count = round(self.dropped * group.num_units)
        kept = refine(covariance, kept=order[count:], dropped=order[:count])
        ranks = torch.empty_like(score)
        for rank, unit in enumerate([u for u in order if u not in kept] + [u for u in order if u in kept], start=1):
            ranks[unit] = rank
        return ranks

    def describe(self) -> dict[str, str]:
        """Returns name and settings for the plan's provenance."""
        return {"name": self.name} | ({"dropped": f"{self.dropped:g}"} if self.dropped is not None else {})


def contribution_covariance(group: Group, sums: Sums) -> Tensor:
    """Returns the covariance over tokens of the units' contributions in every output dimension, [H, U, U]."""
    (part,) = group.inputs()
    tokens = sums.totals.num_tokens
    mean = sums.rows[UNITS] / tokens
    inputs = sums.moments[_OUTER] / tokens - torch.outer(mean, mean)  # [C, C]
    weight = sums.weights()[group.slices.index(part)][:, channels(group, part)].to(inputs)
    blocks = weight.unflatten(1, (group.num_units, part.width))  # [H, U, w]
    by_unit = inputs.unflatten(0, (group.num_units, part.width))  # [U, w, C]
    found = []
    for unit in range(group.num_units):
        product = (blocks[:, unit] @ by_unit[unit]) * weight  # [H, C]
        found.append(product.unflatten(1, (group.num_units, part.width)).sum(-1))
    return torch.stack(found, dim=1)


def correlation(covariance: Tensor, units: Sequence[int]) -> Tensor:
    """Returns R, the sum over dimensions of abs(Pearson correlation) between the sum of ``units`` and that of all."""
    some = covariance[:, list(units)]
    with_all = some.sum((1, 2))
    variance = some[:, :, list(units)].sum((1, 2)) * covariance.sum((1, 2))
    return torch.where(variance > 0, with_all / variance.clamp(min=1e-300).sqrt(), 0.0).abs().sum()


def refine(covariance: Tensor, *, kept: Sequence[int], dropped: Sequence[int]) -> set[int]:
    """Returns the kept units after exchanges with removed units, in the order of ``dropped``, that raise R."""
    chosen = list(kept)
    best = float(correlation(covariance, chosen))
    for unit in dropped:
        trials = [[*chosen[:i], unit, *chosen[i + 1 :]] for i in range(len(chosen))]
        values = [float(correlation(covariance, trial)) for trial in trials]
        if values and max(values) > best:
            best = max(values)
            chosen = trials[values.index(best)]
    return set(chosen)
