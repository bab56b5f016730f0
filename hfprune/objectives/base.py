"""Base class of objectives.

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
"""Label of unsupervised positions, as in PyTorch and transformers."""


class ValueAndGrad(NamedTuple):
    """Value of an objective per token, and its gradient.

    Attributes:
        value: [T], nats.
        grad: [T, V], gradient of ``value.sum()`` with respect to the logits; may reuse the memory of the logits.
    """

    value: Tensor
    grad: Tensor


class Objective(ABC):
    """A scalar function of the logits of each token. The caller sums it over tokens and divides by their number.

    ``value_and_grad`` receives logits of at least float32 and may overwrite them, since a chunk of logits is the
    largest tensor of a calibration step.
    """

    name: str
    teacher: "Teacher | None" = None
    """Teacher of a distillation objective, else None."""
    parts: dict[str, Tensor] | None = None
    """Term name -> accumulated sum over tokens, for objectives with several terms; None for a single term."""

    @abstractmethod
    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Any = None) -> ValueAndGrad:
        """Returns the value per token and the gradient of their sum.

        Args:
            logits: [T, V], float32 or float64; ``-inf`` marks masked-out vocabulary. May be overwritten.
            targets: [T] or [T, K], int64, or None if the objective needs no targets.
            teacher: Logits [T, V] of the teacher (may be overwritten), or their
                :class:`~hfprune.objectives.top_k.KnownTop`; None without a teacher.
        """

    def note(self, **terms: Tensor) -> None:
        """Adds the values per token [T] of the given terms to ``parts``, in float64."""
        parts = self.parts or {}
        for name, value in terms.items():
            total = value.detach().sum(dtype=torch.float64)
            parts[name] = parts[name] + total if name in parts else total
        self.parts = parts

    @abstractmethod
    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Returns the target of every position and the positions that count.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B, T], 1 for real tokens.
            labels: [B, T] with ``-100`` at unsupervised positions; None uses ``input_ids``.

        Returns:
            Targets [B, T] or [B, T, K] int64 (None if the objective needs no targets) and a boolean mask [B, T].
        """


OBJECTIVES: Registry[Objective] = Registry("objective", package="hfprune.objectives")


def softmax_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax [T, V] and the log-sum-exp [T, 1] of ``logits`` [T, V], both finite where logits are -inf."""
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    return (logits - lse).exp_(), lse
