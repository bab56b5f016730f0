"""Channel permutation: assigns inputs to n:m groups (RIA, Zhang et al., ICLR 2024).

Shape legend: O outputs, C inputs, G = C / m groups, K = m - n kept weights per group.
"""

from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hfprune.sparse.pattern import Sparsity

Permutation = Literal["none", "dealt", "assigned"]
"""``dealt`` sorts inputs by total score and deals them to the groups in alternating direction; ``assigned`` refines the
result by linear assignment."""

_CHUNK = 2**24
"""Size of the [O, groups, G] tensors that exist at once."""


def permute(scores: Tensor, sparsity: Sparsity, permutation: Permutation) -> Tensor | None:
    """Returns an order of inputs [C] whose consecutive groups of m retain more of the score; None for ``none``.

    Args:
        scores: [O, C].
        sparsity: The pattern n:m.
        permutation: ``none``, ``dealt`` or ``assigned``.
    """
    if permutation == "none" or sparsity.of is None:
        return None
    sparsity.check(scores.shape[1], "the matrix")
    order = deal(scores, sparsity.of)
    return assign(scores, order, sparsity) if permutation == "assigned" else order


def deal(scores: Tensor, of: int) -> Tensor:
    """Returns inputs [C] sorted by total score and dealt to groups of ``of`` in alternating direction."""
    by_total = torch.sort(scores.sum(0, dtype=torch.float64), stable=True).indices
    slots = list(by_total.view(of, -1))
    return torch.stack([slot.flip(0) if number % 2 else slot for number, slot in enumerate(slots)], dim=1).flatten()


def assign(scores: Tensor, order: Tensor, sparsity: Sparsity) -> Tensor:
    """Refines an order by linear assignment of the inputs of each slot to the groups, one slot at a time.

    Each assignment maximises the retained score for fixed other slots, so that the score never decreases.

    Args:
        scores: [O, C].
        order: Order of the inputs [C].
        sparsity: The pattern n:m.

    Returns:
        The refined order [C].
    """
    groups = order.view(-1, int(sparsity.of or 1)).clone()
    keep = groups.shape[1] - int(sparsity.zeros or 0)
    for slot in range(groups.shape[1]):
        candidates = groups[:, slot].clone()
        others = torch.cat([groups[:, :slot], groups[:, slot + 1 :]], dim=1)
        retained = _retained(scores, candidates, others, keep)
        _, chosen = linear_sum_assignment(retained.cpu().numpy(), maximize=True)
        groups[:, slot] = candidates[torch.from_numpy(chosen).to(candidates.device)]
    return groups.flatten()


def _retained(scores: Tensor, candidates: Tensor, others: Tensor, keep: int) -> Tensor:
    """Returns the retained score of group g with candidate c in place of the slot's input, [G, G] float64.

    Of m weights the K largest are kept: the K - 1 largest of the others, and the larger of the candidate and the next.
    """
    ranked = torch.sort(scores[:, others], dim=-1, descending=True).values.to(torch.float64)  # [O, G, m - 1]
    certain = ranked[..., : keep - 1].sum((0, 2))
    rival, joins = ranked[..., keep - 1], scores[:, candidates].to(torch.float64)
    step = max(1, _CHUNK // joins.numel())
    found = [torch.maximum(part[:, :, None], joins[:, None, :]).sum(0) for part in rival.split(step, dim=1)]
    return certain[:, None] + torch.cat(found)
