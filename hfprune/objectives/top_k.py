"""Predictions of which only the most likely tokens are known, and how they are stored.

Shape legend: T tokens, V vocabulary, K tokens that are known of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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

    def logits(self, part: slice) -> "KnownTop":
        """Returns what is known of a part of the tokens, in place of their logits."""
        return self[part]

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
