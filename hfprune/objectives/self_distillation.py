"""Self-distillation objective for scoring: KL to the unmasked model and cross-entropy (SDMPrune)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hfprune.objectives.base import IGNORE_INDEX, Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import CrossEntropy
from hfprune.objectives.distillation import check_mixture, distillation_kl
from hfprune.objectives.teacher import UnmaskedSelf


class SelfDistillationObjective(Objective):
    """(1 - alpha) CE + alpha KL(softmax(z_teacher / temperature) || softmax(z)) at every real position.

    The teacher is the model itself without masks. CE is the mean over the T - 1 targets of a sequence and KL the mean
    over its T positions, as published. In a sum over tokens, a CE term therefore counts T / (T - 1) times.

    Args:
        alpha: Weight of KL, in [0, 1].
        temperature: Temperature of the teacher, > 0.
        unmasked: Context manager that disables the masks for the teacher's forward pass.

    Raises:
        ConfigError: A value is out of range.

    Source: SDMPrune (Zhu and Shen, 2025, arXiv:2506.11120).
    """

    def __init__(
        self, *, alpha: float, temperature: float, unmasked: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        check_mixture(alpha, temperature)
        self.alpha, self.temperature, self.teacher = alpha, temperature, UnmaskedSelf(unmasked)
        self.name = f"distillation (alpha {alpha:g}, temperature {temperature:g})"

    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None = None) -> ValueAndGrad:
        """Returns the mixture; ``targets`` [T, 3] is the result of :meth:`targets`."""
        assert targets is not None
        assert teacher is not None
        value, grad = distillation_kl(logits, teacher, temperature=self.temperature)
        value, grad = value * self.alpha, grad.mul_(self.alpha)
        labels, counts, tokens = targets.unbind(-1)
        labelled = labels != IGNORE_INDEX
        weight = torch.where(labelled, (1 - self.alpha) * tokens.to(grad.dtype) / counts.clamp(min=1), 0.0)
        p, lse = softmax_statistics(logits)
        index = labels.clamp(min=0).unsqueeze(-1)
        value += torch.where(labelled, weight * (lse - logits.gather(-1, index)).squeeze(-1), 0.0)
        grad += p.mul_(weight.unsqueeze(-1))
        return ValueAndGrad(value, grad.scatter_add_(-1, index, -weight.unsqueeze(-1)))

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns label, targets and tokens of the sequence, [B, T, 3]; every real token counts."""
        found, supervised = CrossEntropy().targets(input_ids, attention_mask, labels)
        found = found.masked_fill(~supervised, IGNORE_INDEX)
        real = attention_mask.bool()
        counts = (n.sum(dim=1, keepdim=True).expand_as(found) for n in (supervised, real))
        return torch.stack([found, *counts], dim=-1), real
