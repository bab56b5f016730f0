"""Distillation for recovery: the pruned model learns the predictions of the dense one.

Shape legend: T tokens, V vocabulary, K stored tokens of a teacher's prediction.
"""

import torch
from torch import Tensor

from hfprune.objectives.base import Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import CrossEntropy
from hfprune.objectives.teacher import Teacher
from hfprune.objectives.top_k import KnownTop
from hfprune.utils.errors import ConfigError


def check_mixture(alpha: float, temperature: float) -> None:
    """Raises ``ConfigError`` unless ``alpha`` lies in [0, 1] and ``temperature`` is positive."""
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise ConfigError(
            f"alpha={alpha} must lie in [0, 1] and temperature={temperature} must be positive: the objective is "
            "alpha KL + (1 - alpha) cross-entropy."
        )


def distillation_kl(logits: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> ValueAndGrad:
    """Returns KL(q || p) per token and its gradient p - q, with p = softmax(z) and q = softmax(teacher / temperature).

    The temperature applies to the teacher only, without a factor of its square, as in SDMPrune's code. Overwrites
    ``teacher``.

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


def top_kl(logits: Tensor, top: KnownTop) -> ValueAndGrad:
    """Returns KL(p || softmax(z)) per token and its gradient, with all but the K known tokens merged into one.

    sum_k p_k (log p_k - log q_k) + r (log r - log q_r), with r = 1 - sum_k p_k and q_r the probability of all other
    tokens under q. This is a lower bound of the KL from the full p (data-processing inequality), and equal to it for
    K = V. The difference is r times the KL between p and q within the other tokens. The gradient is q - p at the known
    tokens and q (1 - r / q_r) at the others.

    Args:
        logits: z [T, V], float32 or float64, divided by the temperature.
        top: The K most likely tokens of p.
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


class DistillationObjective(Objective):
    """(1 - alpha) CE + alpha t^2 KL(softmax(z_T / t) || softmax(z / t)) at every supervised position.

    The temperature t applies to teacher and student, and the factor t^2 preserves the size of the gradients. If only
    the K most likely tokens of the teacher are known, KL is :func:`top_kl`.

    Args:
        alpha: Weight of KL, in [0, 1].
        temperature: t > 0.
        teacher: The teacher, with the vocabulary of the student.

    Raises:
        ConfigError: A value is out of range.

    Source: Hinton et al. (2015, arXiv:1503.02531).

    >>> from hfprune.objectives.teacher import DenseModel
    >>> objective = DistillationObjective(alpha=1.0, temperature=2.0, teacher=DenseModel(torch.nn.Identity()))
    >>> z = torch.tensor([[0.0, 1.0, 2.0]])
    >>> objective.value_and_grad(z.clone(), torch.tensor([1]), teacher=z.clone()).value
    tensor([0.])
    """

    def __init__(self, *, alpha: float, temperature: float, teacher: Teacher) -> None:
        check_mixture(alpha, temperature)
        self.alpha, self.temperature, self.teacher = alpha, temperature, teacher
        self.name = f"distillation from {teacher.name} (alpha {alpha:g}, temperature {temperature:g})"

    def value_and_grad(
        self, logits: Tensor, targets: Tensor | None, teacher: Tensor | KnownTop | None = None
    ) -> ValueAndGrad:
        """Returns the mixture; ``targets`` holds the labels [T]."""
        assert targets is not None
        assert teacher is not None
        t = self.temperature
        if isinstance(teacher, KnownTop):
            kl, grad = top_kl(logits / t, teacher)
        else:
            kl, grad = distillation_kl(logits / t, teacher, temperature=t)
        hard = CrossEntropy().value_and_grad(logits, targets)
        self.note(kl=kl, ce=hard.value)
        value = self.alpha * t * t * kl + (1 - self.alpha) * hard.value
        return ValueAndGrad(value, grad.mul_(self.alpha * t).add_(hard.grad, alpha=1 - self.alpha))

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the targets of :class:`~hfprune.objectives.cross_entropy.CrossEntropy`."""
        return CrossEntropy().targets(input_ids, attention_mask, labels)
