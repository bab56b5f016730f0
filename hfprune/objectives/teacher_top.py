"""Distillation from a teacher of which only the most likely tokens are known.

Shape legend: T tokens, V vocabulary, K tokens that are known of the teacher.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hfprune.objectives.base import Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import CrossEntropy


@dataclass(frozen=True, slots=True)
class KnownTop:
    """The K most likely tokens of a teacher's predictions.

    Attributes:
        log_p: [T, K], their log-probabilities at the temperature of the distillation.
        tokens: [T, K], int64.
        log_rest: [T], the log-probability of all other tokens together; -inf where there are none.
    """

    log_p: Tensor
    tokens: Tensor
    log_rest: Tensor

    @classmethod
    def restored(cls, values: Tensor, tokens: Tensor, odds: Tensor, *, dtype: torch.dtype) -> "KnownTop":
        """Returns what :func:`rounded_top` took apart: probabilities that add up to one, however values were rounded.

        p_k = (1 - r) softmax(values)_k, with r = sigmoid(odds).
        """
        log_p = values.to(dtype).log_softmax(-1) + F.logsigmoid(-odds.to(dtype)).unsqueeze(-1)
        return cls(log_p, tokens.long(), F.logsigmoid(odds.to(dtype)))

    @classmethod
    def joined(cls, parts: "Sequence[KnownTop]") -> "KnownTop":
        """Returns what is known of all ``parts``, one after the other."""
        return cls(
            torch.cat([part.log_p for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.log_rest for part in parts]),
        )

    def __getitem__(self, part: slice) -> "KnownTop":
        """Returns a part of the tokens."""
        return KnownTop(self.log_p[part], self.tokens[part], self.log_rest[part])

    def __len__(self) -> int:
        """Returns T."""
        return len(self.tokens)


def rounded_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the ``k`` most likely tokens of softmax(z) in 6 bytes each, and 4 bytes for all others.

    Logits relative to the largest are rounded to float16, by at most 2^-11 of themselves; the share of the others, a
    difference of log-sum-exps, is kept in float32, so that rounding moves nothing between the known and the others.

    Args:
        logits: z [T, V], float32 or float64, divided by the temperature.
        k: K; V where that is smaller.

    Returns:
        Values [T, K], float16; tokens [T, K], int32; log-odds [T] of all other tokens, float32.
    """
    top, tokens = logits.topk(min(k, logits.shape[-1]), dim=-1)
    others = logits.scatter(-1, tokens, -torch.inf)
    odds = others.logsumexp(-1) - top.logsumexp(-1)
    values = (top - top[:, :1]).clamp(min=torch.finfo(torch.float16).min)
    return values.to(torch.float16), tokens.to(torch.int32), odds.to(torch.float32)


def top_kl(logits: Tensor, top: KnownTop) -> ValueAndGrad:
    """Returns KL(p || softmax(z)) per token, everything outside the known K being one token, and its gradient.

    sum_k p_k (log p_k - log q_k) + r (log r - log q_r), with r = 1 - sum_k p_k and q_r what q gives to all other
    tokens: a lower bound of the KL from the whole p (data-processing inequality), equal to it where K = V. What it
    leaves out is r times the KL between p and q within the others. The gradient is q - p at the known tokens and
    q (1 - r / q_r) at the others.

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
    log_rest = top.log_rest.to(logits.dtype)
    rest = log_rest.exp()
    there = rest > 0  # 0 log 0 = 0
    value += torch.where(there, rest * (log_rest - others.clamp(min=1e-30).log()), 0.0)
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
        self.note(kl=value, ce=hard.value)
        weight, scale = 1 - self.alpha, self.alpha * self.temperature
        return ValueAndGrad(
            scale * self.temperature * value + weight * hard.value, grad.mul_(scale).add_(hard.grad, alpha=weight)
        )

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the next token of every position and where it is supervised, as cross-entropy has it."""
        return CrossEntropy().targets(input_ids, attention_mask, labels)
