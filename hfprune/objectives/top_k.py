"""Top-k predictions: the most likely tokens of a teacher and their compact storage format.

Shape legend: T tokens, V vocabulary, K most likely tokens.
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
        log_p: [T, K], log-probabilities at the temperature of the distillation.
        tokens: [T, K], token ids, int64.
        log_rest: [T], log-probability of all other tokens together; -inf for K = V.
    """

    log_p: Tensor
    tokens: Tensor
    log_rest: Tensor

    @classmethod
    def restored(cls, values: Tensor, tokens: Tensor, odds: Tensor, *, dtype: torch.dtype) -> "KnownTop":
        """Inverts :func:`rounded_top`; probabilities add up to one in spite of the rounding.

        p_k = (1 - r) softmax(values)_k, with r = sigmoid(odds).

        Args:
            values: [T, K], float16.
            tokens: [T, K], int32.
            odds: [T], log-odds of all other tokens, float32.
            dtype: Type of the log-probabilities.
        """
        log_p = values.to(dtype).log_softmax(-1) + F.logsigmoid(-odds.to(dtype)).unsqueeze(-1)
        return cls(log_p, tokens.long(), F.logsigmoid(odds.to(dtype)))

    @classmethod
    def joined(cls, parts: "Sequence[KnownTop]") -> "KnownTop":
        """Concatenates ``parts`` along the tokens."""
        columns = zip(*((part.log_p, part.tokens, part.log_rest) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def __getitem__(self, part: slice) -> "KnownTop":
        """Returns a range of the tokens."""
        return KnownTop(self.log_p[part], self.tokens[part], self.log_rest[part])

    def logits(self, part: slice) -> "KnownTop":
        """Returns a range of the tokens (protocol of ``TokenPredictions``)."""
        return self[part]

    def __len__(self) -> int:
        """Returns T."""
        return len(self.tokens)


def rounded_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compresses the ``k`` most likely tokens of softmax(z) to 6 bytes each, and all other tokens to 4 bytes.

    Logits relative to the largest are rounded to float16, a relative error of at most 2^-11. The log-odds of the other
    tokens are float32, so that rounding moves no probability between the known tokens and the others.

    Args:
        logits: z [T, V], float32 or float64, divided by the temperature.
        k: Number of tokens, at most V.

    Returns:
        Values [T, K], float16; tokens [T, K], int32; log-odds [T] of all other tokens, float32.
    """
    top, tokens = logits.topk(min(k, logits.shape[-1]), dim=-1)
    others = logits.scatter(-1, tokens, -torch.inf)
    odds = others.logsumexp(-1) - top.logsumexp(-1)
    values = (top - top[:, :1]).clamp(min=torch.finfo(torch.float16).min)
    return values.to(torch.float16), tokens.to(torch.int32), odds.to(torch.float32)
