"""Next-token cross-entropy."""

import torch
from torch import Tensor

from hfprune.objectives.base import IGNORE_INDEX, OBJECTIVES, Objective, ValueAndGrad, softmax_statistics


def cross_entropy(logits: Tensor, targets: Tensor) -> ValueAndGrad:
    """Returns -log p_y per token and its gradient p - e_y, with p = softmax(z).

    Args:
        logits: [T, V], float32 or float64.
        targets: [T], int64 in [0, V).

    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).grad
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    p, lse = softmax_statistics(logits)
    index = targets.unsqueeze(-1)
    value = (lse - logits.gather(-1, index)).squeeze(-1)
    return ValueAndGrad(value, p.scatter_add_(-1, index, p.new_full((1, 1), -1.0).expand_as(index)))


class CrossEntropy(Objective):
    """Cross-entropy of the next token. A sequence of T real tokens has T - 1 targets."""

    name = "cross_entropy"

    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None = None) -> ValueAndGrad:
        """See :func:`cross_entropy`."""
        assert targets is not None
        return cross_entropy(logits, targets)

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns label t + 1 for position t; it counts if both tokens are real and the label is supervised."""
        labels = input_ids if labels is None else labels
        targets = torch.full_like(labels, IGNORE_INDEX)
        targets[:, :-1] = labels[:, 1:]
        real = attention_mask.bool()
        valid = torch.zeros_like(real)
        valid[:, :-1] = real[:, 1:] & real[:, :-1]
        return targets, valid & (targets != IGNORE_INDEX)


OBJECTIVES.add(CrossEntropy.name, CrossEntropy())
