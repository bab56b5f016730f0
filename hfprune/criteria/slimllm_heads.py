"""SlimLLM scores of attention heads: those whose sum correlates best with the whole attention output."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune.criteria.base import UNITS, Activation, ActivationCriterion, BatchInfo, LargeSums, Rows, Shape, Sums
from hfprune.criteria.channels import channels
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError

_OUTER = "input products"


class SlimLLMHeads(ActivationCriterion):
    """How much the attention output decorrelates from itself without a unit: SlimLLM, for heads and KV groups.

    With o_u the contribution of unit u (a head, or all query heads of one KV head) to the output of ``o_proj``, O their
    sum and rho_d the Pearson correlation over tokens in output dimension d: R(S) = sum_d abs(rho_d(sum of S, O)). A
    unit scores H - R(all without it), H the number of dimensions. Dimensions that do not vary count as 0.

    Correlations follow from the second moments of ``o_proj``'s input, an [in, in] float64 matrix per layer, so no
    contribution is stored per token. The published method (Guo et al., 2025, arXiv:2505.22689) scores a layer on the
    outputs of the pruned layers before it; here all layers are scored on the dense model, in one pass.

    Args:
        dropped: Share of the units that will be dropped: refines the choice of ``round(dropped * units)`` as the
            published code does. For each dropped unit, lowest score first, every exchange with a kept one is tried and
            the best one done if it raises the best R so far. The set depends on the number dropped, so give what the
            budget drops; scores are then ranks: kept units above dropped ones, each in the order of their scores. None
            does not refine.

    Raises:
        ConfigError: The share is not in (0, 1).

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
            raise ConfigError(f"dropped {dropped} is not a share in (0, 1).")
        self.dropped = dropped

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` unless one projection consumes the units, and there are few enough of them."""
        if len(group.inputs()) != 1 or group.inputs()[0].width == 1:
            raise ConfigError(
                f"SlimLLMHeads scores attention heads; {group.name} has units of kind '{group.kind}'. SlimLLMChannels "
                "scores MLP neurons."
            )

    def reads(self, part: Slice) -> bool:
        """Returns whether the projection consumes the units."""
        return part.side == "in"

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the number of channels of all units, for their sums."""
        return {UNITS: group.num_units * group.inputs()[0].width}

    def moments(self, group: Group, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Returns the products of these channels."""
        size = group.num_units * group.inputs()[0].width
        return {_OUTER: (size, size)}

    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the sums of the channels, [B, C]; adds their products."""
        value = batch.wide(seen.input, zero_padding=True)[..., channels(group, part)]
        flat = value.flatten(0, 1)
        moments[_OUTER].add_((flat.T @ flat).to(moments[_OUTER]))
        return {UNITS: value.sum(dim=1).double()}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns H - R(all without the unit), or ranks of the refined choice."""
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
        """Returns name and settings."""
        return {"name": self.name} | ({"dropped": f"{self.dropped:g}"} if self.dropped is not None else {})


def contribution_covariance(group: Group, sums: Sums) -> Tensor:
    """Returns the covariance over tokens of the units' contributions to every output dimension, [H, U, U]."""
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
    """Returns R: the sum over dimensions of abs(Pearson correlation) between the sum of ``units`` and that of all."""
    some = covariance[:, list(units)]
    with_all = some.sum((1, 2))
    variance = some[:, :, list(units)].sum((1, 2)) * covariance.sum((1, 2))
    return torch.where(variance > 0, with_all / variance.clamp(min=1e-300).sqrt(), 0.0).abs().sum()


def refine(covariance: Tensor, *, kept: Sequence[int], dropped: Sequence[int]) -> set[int]:
    """Returns the kept units after exchanging dropped ones, in their order, for kept ones where that raises R."""
    chosen = list(kept)
    best = float(correlation(covariance, chosen))
    for unit in dropped:
        trials = [[*chosen[:i], unit, *chosen[i + 1 :]] for i in range(len(chosen))]
        values = [float(correlation(covariance, trial)) for trial in trials]
        if values and max(values) > best:
            best = max(values)
            chosen = trials[values.index(best)]
    return set(chosen)
