"""Output head: maps final hidden states to logits.

Shape legend: C tokens of a chunk, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """Output projection with logit scale and soft cap.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        scale: Factor of the logits.
        softcap: ``cap`` of ``cap * tanh(z / cap)`` (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, lm_head: nn.Linear, *, scale: float = 1.0, softcap: float | None = None) -> "OutputHead":
        """Returns the head of an ``nn.Linear``."""
        return cls(weight=lm_head.weight, bias=lm_head.bias, scale=scale, softcap=softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits [C, V] of ``hidden`` [C, D], in float32 or wider; the matmul runs in the head's dtype."""
        z = F.linear(hidden, self.weight, self.bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def pull_back(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """Returns the gradient at the projection [C, V] from the gradient at the logits [C, V].

        Args:
            grad: Gradient at the logits; overwritten.
            logits: Logits [C, V], required with a soft cap only.
        """
        if self.softcap is not None:
            assert logits is not None
            grad = grad.mul_(1 - (logits / self.softcap) ** 2)
        return grad.mul_(self.scale) if self.scale != 1.0 else grad
