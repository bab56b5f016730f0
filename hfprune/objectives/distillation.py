"""SDMPrune's self-distillation loss: KL from a teacher's predictions, mixed with cross-entropy."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hfprune.objectives.base import IGNORE_INDEX, Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import CrossEntropy
from hfprune.utils.errors import ConfigError


def distillation_kl(logits: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> ValueAndGrad:
    """Returns KL(q || p) per token and its gradient p - q, with p = softmax(z) and q = softmax(teacher / temperature).

    The temperature is the teacher's alone, with no factor of its square, as in SDMPrune's code. Overwrites ``teacher``.

    Args:
        logits: [T, V], float32 or float64.
        teacher: [T, V].
        temperature: > 0.

    >>> z = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    >>> distillation_kl(z, z.clone()).grad.abs().max()
    tensor(0., dtype=torch.float64)
    """
    p, lse = softmax_statistics(logits)
    q, teacher_lse = softmax_statistics(teacher.div_(temperature))
    ratio = (teacher - teacher_lse) - (logits - lse)
    value = torch.where(q > 0, q * ratio, 0.0).sum(-1)  # 0 log 0 = 0, masked-out vocabulary included
    return ValueAndGrad(value, p.sub_(q))


class Distillation(Objective):
    """(1 - alpha) CE + alpha KL(softmax(z_teacher / temperature) || softmax(z)) at every real position (SDMPrune).

    The teacher is the model itself with nothing masked. CE is the mean over a sequence's T - 1 targets and KL the mean
    over its T positions, as published; summed over tokens, a CE term therefore counts T / (T - 1) times.

    Args:
        alpha: Weight of KL, in [0, 1].
        temperature: The teacher's temperature, > 0.
        teacher: Makes the model its own teacher while the context lasts.

    Raises:
        ConfigError: A value out of range.
    """

    def __init__(
        self, *, alpha: float, temperature: float, teacher: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        if not 0 <= alpha <= 1 or not temperature > 0:
            raise ConfigError(
                f"Distillation needs alpha in [0, 1] and temperature > 0; got alpha {alpha}, temperature {temperature}."
            )
        self.alpha, self.temperature, self.teacher = alpha, temperature, teacher
        self.name = f"distillation (alpha {alpha:g}, temperature {temperature:g})"

    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None = None) -> ValueAndGrad:
        """Returns the mixture; ``targets`` is what :meth:`targets` returns, [T, 3]."""
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
        """Returns label, number of targets and number of tokens of the sequence, [B, T, 3]; every real token counts."""
        found, supervised = CrossEntropy().targets(input_ids, attention_mask, labels)
        found = found.masked_fill(~supervised, IGNORE_INDEX)
        real = attention_mask.bool()
        counts = (n.sum(dim=1, keepdim=True).expand_as(found) for n in (supervised, real))
        return torch.stack([found, *counts], dim=-1), real
