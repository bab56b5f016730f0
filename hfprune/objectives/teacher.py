"""Distillation of recovery: a pruned model follows the predictions of the dense one."""

import torch
from torch import Tensor, nn

from hfprune.objectives.base import Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import CrossEntropy
from hfprune.utils.errors import ConfigError


class TeacherDistillation(Objective):
    """(1 - alpha) CE + alpha t^2 KL(softmax(z_T / t) || softmax(z / t)) at every supervised position.

    The temperature t is that of teacher and student, and t^2 keeps the size of the gradients (Hinton et al., 2015).

    Args:
        alpha: Weight of KL, in [0, 1].
        temperature: t > 0.
        teacher_model: A Hugging Face causal LM with the student's vocabulary.

    Raises:
        ConfigError: A value out of range.
    """

    def __init__(self, *, alpha: float, temperature: float, teacher_model: nn.Module) -> None:
        if not 0 <= alpha <= 1 or not temperature > 0:
            raise ConfigError(
                f"Distillation needs alpha in [0, 1] and temperature > 0; got alpha {alpha}, temperature {temperature}."
            )
        self.alpha, self.temperature, self.teacher_model = alpha, temperature, teacher_model
        self.name = f"distillation from the dense model (alpha {alpha:g}, temperature {temperature:g})"

    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None = None) -> ValueAndGrad:
        """Returns the mixture; ``targets`` holds the labels [T]."""
        assert targets is not None
        assert teacher is not None
        t = self.temperature
        p, lse = softmax_statistics(logits / t)
        q, teacher_lse = softmax_statistics(teacher.div_(t))
        ratio = (teacher - teacher_lse) - (logits / t - lse)
        kl = torch.where(q > 0, q * ratio, 0.0).sum(-1)  # 0 log 0 = 0
        value = self.alpha * t * t * kl
        grad = p.sub_(q).mul_(self.alpha * t)
        hard = CrossEntropy().value_and_grad(logits, targets)
        self.note(kl=kl, ce=hard.value)
        return ValueAndGrad(value + (1 - self.alpha) * hard.value, grad.add_(hard.grad, alpha=1 - self.alpha))

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the next token of every position and where it is supervised, as cross-entropy has it."""
        return CrossEntropy().targets(input_ids, attention_mask, labels)
