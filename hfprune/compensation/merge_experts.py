"""Merging of removed experts into those that are kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.compensation.base import ExpertCompensation, Sweep
from hfprune.models.experts import contribution_routing
from hfprune.models.layer_stream import Reduce
from hfprune.models.mixture_pass import MixturePass

_MERGED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


class MergeExperts(ExpertCompensation):
    """Averages each removed expert with the kept expert that is nearest to it, weighted by how often each is used.

    A removed expert joins the kept expert with the largest cosine similarity of router logits over the calibration
    tokens. With f_e the number of tokens that are routed to expert e, the weights of a kept expert become
    sum f_e W_e / sum f_e over itself and the experts that joined it. A group without tokens keeps its weights.

    The grouping by router logits and the weights by frequency are those of M-SMoE (Li et al., 2023, arXiv:2310.08334);
    neurons are averaged without a permutation, as in HC-SMoE (Chen et al., 2024, arXiv:2410.08589). Both papers let the
    router send tokens of removed experts to the merged one; a stock router has one row for each expert, so that only
    the row of the kept expert is left. Lasby et al. (2025, arXiv:2510.13999) find merged experts worse than pruned
    ones for generation: measure before you use it.

    Example:
        >>> MergeExperts().describe()
        {'name': 'MergeExperts'}
    """

    def compensate(self, experts: Any, keep: Sequence[int], sweep: Sweep, reduce: Reduce) -> None:
        """Averages the weights of kept experts with those that join them, in place."""
        count = experts.down_proj.shape[0]
        products = experts.down_proj.new_zeros(count, count, dtype=torch.float64)
        used = products.new_zeros(count)

        def visit(seen: MixturePass) -> None:
            logits = seen.logits.double()
            products.add_(logits.T @ logits)
            used.add_(contribution_routing(experts, seen.args).sum(0))

        sweep(visit)
        products, used = reduce(products), reduce(used)
        for kept, joined in joined_experts(products, keep).items():
            merge(experts, [kept, *joined], used)


def joined_experts(products: Tensor, keep: Sequence[int]) -> dict[int, list[int]]:
    """Returns kept expert -> removed experts that are nearest to it.

    Args:
        products: Sums over tokens of the products of router logits, [E, E].
        keep: Kept experts.

    >>> joined_experts(torch.tensor([[4.0, 0.0, 3.0], [0.0, 4.0, 1.0], [3.0, 1.0, 4.0]]), [0, 1])
    {0: [2], 1: []}
    """
    norms = products.diagonal().sqrt().clamp(min=torch.finfo(products.dtype).tiny)
    cosines = products / norms[:, None] / norms[None, :]
    found: dict[int, list[int]] = {kept: [] for kept in keep}
    for expert in range(len(products)):
        if expert not in found:
            found[keep[int(cosines[expert, list(keep)].argmax())]].append(expert)
    return found


def merge(experts: Any, group: Sequence[int], used: Tensor) -> None:
    """Replaces the weights of the first expert of a group by the average over the group, weighted by usage.

    Args:
        experts: The experts module.
        group: Indices of the experts.
        used: Number of tokens of each expert of the layer, [E] float64.
    """
    share = used[list(group)]
    if len(group) == 1 or not bool(share.any()):
        return
    share = share / share.sum()
    for name in _MERGED:
        stacked = getattr(experts, name, None)
        if isinstance(stacked, nn.Parameter):
            parts = stacked.detach()[list(group)].double()
            stacked.data[group[0]] = torch.tensordot(share, parts, dims=1).to(stacked.dtype)
