"""Entropy of the output distribution, without labels or teacher (HFPrune, Zhu et al., 2026, arXiv:2603.08083)."""

import torch
from torch import Tensor

from hfprune.objectives.base import OBJECTIVES, Objective, ValueAndGrad, softmax_statistics


def entropy(logits: Tensor) -> ValueAndGrad:
    """Returns Ent(p) = -sum_v p_v log p_v per token and its gradient -p * (z - E_p[z]), with p = softmax(z).

    The gradient needs no logarithm: a probability that underflows to zero contributes exactly zero. Columns of ``-inf``
    (masked-out vocabulary) have probability and gradient zero. Overwrites ``logits``. This is Eq. 3 and 4 of HFPrune,
    in nats.

    Args:
        logits: [T, V], float32 or float64.

    >>> entropy(torch.zeros(1, 8, dtype=torch.float64)).value.exp()
    tensor([8.0000], dtype=torch.float64)
    """
    p, lse = softmax_statistics(logits)
    mean = torch.linalg.vecdot(p, logits).unsqueeze(-1)
    if mean.isnan().any():  # 0 * -inf: some columns are masked out
        logits.masked_fill_(logits == -torch.inf, 0.0)
        mean = torch.linalg.vecdot(p, logits).unsqueeze(-1)
    return ValueAndGrad((lse - mean).squeeze(-1), logits.sub_(mean).mul_(p).neg_())


class Entropy(Objective):
    """Entropy at every real position, the last one included."""

    name = "entropy"

    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None = None) -> ValueAndGrad:
        """See :func:`entropy`; ``targets`` is not used."""
        return entropy(logits)

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[None, Tensor]:
        """Returns no targets; every real token counts, also where ``labels`` is masked."""
        return None, attention_mask.bool()


OBJECTIVES.add(Entropy.name, Entropy())
