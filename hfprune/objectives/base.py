"""The contract of an objective.

Shape legend: B batch, T tokens, V vocabulary, D hidden size.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hfprune.utils.registry import Registry

if TYPE_CHECKING:
    from hfprune.objectives.teacher import Teacher

IGNORE_INDEX = -100
"""Label of a position that is not supervised, as in PyTorch and transformers."""


class ValueAndGrad(NamedTuple):
    """An objective's value per token, and its gradient.

    Attributes:
        value: [T], nats.
        grad: [T, V], derivative of ``value.sum()`` with respect to the logits; it may reuse the logits' memory.
    """

    value: Tensor
    grad: Tensor


class Objective(ABC):
    """A scalar function of each token's logits, summed over tokens by the caller and divided once by their number.

    ``value_and_grad`` receives logits of at least float32 and may overwrite them: a chunk of logits is the largest
    tensor of a calibration step.
    """

    name: str
    teacher: "Teacher | None" = None
    """The model that the objective follows; None for objectives without a teacher."""
    parts: dict[str, Tensor] | None = None
    """Sums over tokens, so far, of the terms that a mixture is made of, by name; None for objectives of one term."""

    @abstractmethod
    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Any = None) -> ValueAndGrad:
        """Returns the value per token and the gradient of their sum.

        Args:
            logits: [T, V], float32 or float64; ``-inf`` marks masked-out vocabulary. May be overwritten.
            targets: [T] or [T, K], int64, or None when the objective needs none.
            teacher: Logits [T, V] of the objective's teacher, which may be overwritten, or the
                :class:`~hfprune.objectives.top_k.KnownTop` of them; None without a teacher.
        """

    def note(self, **terms: Tensor) -> None:
        """Adds the values per token [T] of a mixture's terms to ``parts``, in float64."""
        parts = self.parts or {}
        for name, value in terms.items():
            total = value.detach().sum(dtype=torch.float64)
            parts[name] = parts[name] + total if name in parts else total
        self.parts = parts

    @abstractmethod
    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Returns the target of every position and which positions count.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B, T], 1 for real tokens.
            labels: [B, T] with ``-100`` where not supervised, or None: every real token is its own label.

        Returns:
            Targets [B, T] or [B, T, K] int64 (None when the objective needs none) and a boolean mask [B, T].
        """


OBJECTIVES: Registry[Objective] = Registry("objective", package="hfprune.objectives")


def softmax_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax [T, V] and the log-sum-exp [T, 1] of ``logits`` [T, V], both finite where logits are -inf."""
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    return (logits - lse).exp_(), lse
