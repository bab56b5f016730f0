"""Distillation from a teacher of which only the most likely tokens are known.

Shape legend: T tokens, V vocabulary, K tokens that are known of the teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune.objectives.base import Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import CrossEntropy


@dataclass(frozen=True, slots=True)
class KnownTop:
    """The K most likely tokens of a teacher's predictions.

    Attributes:
        log_p: [T, K], their log-probabilities at the temperature of the distillation.
        tokens: [T, K], int64.
    """

    log_p: Tensor
    tokens: Tensor

    def __getitem__(self, part: slice) -> "KnownTop":
        """Returns a part of the tokens."""
        return KnownTop(self.log_p[part], self.tokens[part])

    def __len__(self) -> int:
        """Returns T."""
        return len(self.tokens)


def top_kl(logits: Tensor, top: KnownTop) -> ValueAndGrad:
    """Returns KL(p || softmax(z)) per token, everything outside the known K being one token, and its gradient.

    sum_k p_k (log p_k - log q_k) + r (log r - log q_r), with r = 1 - sum_k p_k and q_r what q gives to all other
    tokens: a lower bound of the KL from the whole p (data-processing inequality), equal to it where K = V. The
    gradient is q - p at the known tokens and q (1 - r / q_r) at the others.

    Args:
        logits: z [T, V], float32 or float64, divided by the temperature.
        top: What is known of p.
    """
    log_p = top.log_p.to(logits.dtype)
    p = log_p.exp()
    q, lse = softmax_statistics(logits)
    q_known = q.gather(-1, top.tokens)
    value = (p * (log_p - (logits.gather(-1, top.tokens) - lse))).sum(-1)
    others = q.scatter(-1, top.tokens, 0.0).sum(-1)
    rest = (1 - p.sum(-1, dtype=torch.float64)).clamp(min=0.0).to(logits.dtype)
    if top.tokens.shape[-1] == logits.shape[-1]:
        rest = torch.zeros_like(rest)  # what rounding left
    there = rest > 0
    value += torch.where(there, rest * (rest.clamp(min=1e-30).log() - others.clamp(min=1e-30).log()), 0.0)
    q *= (1 - torch.where(there, rest / others.clamp(min=1e-30), 0.0)).unsqueeze(-1)
    return ValueAndGrad(value, q.scatter_(-1, top.tokens, q_known - p))


class CachedDistillation(Objective):
    """(1 - alpha) CE + alpha t^2 KL to the dense model's K most likely tokens, at every supervised position.

    Args:
        alpha: Weight of KL, in [0, 1].
        temperature: t > 0, of teacher and student.
        lookup: Takes a batch and where it is supervised, [B, T]; returns what is known there, row after row.
    """

    def __init__(
        self, *, alpha: float, temperature: float, lookup: Callable[[Mapping[str, Tensor], Tensor], KnownTop]
    ) -> None:
        self.alpha, self.temperature, self.known = alpha, temperature, lookup
        self.name = (
            f"distillation from the dense model's cached predictions (alpha {alpha:g}, temperature {temperature:g})"
        )

    def value_and_grad(
        self, logits: Tensor, targets: Tensor | None, teacher: Tensor | KnownTop | None = None
    ) -> ValueAndGrad:
        """Returns the mixture; ``targets`` holds the labels [T]."""
        assert targets is not None
        assert isinstance(teacher, KnownTop)
        value, grad = top_kl(logits / self.temperature, teacher)
        hard = CrossEntropy().value_and_grad(logits, targets)
        weight, scale = 1 - self.alpha, self.alpha * self.temperature
        return ValueAndGrad(
            scale * self.temperature * value + weight * hard.value, grad.mul_(scale).add_(hard.grad, alpha=weight)
        )

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the next token of every position and where it is supervised, as cross-entropy has it."""
        return CrossEntropy().targets(input_ids, attention_mask, labels)
