"""From the final hidden states to the objective, a chunk of tokens at a time.

The [T, V] logits of a batch are the largest tensor of a calibration step (525 MB in fp32 for T = 1024, V = 128256).
Here they exist for one chunk only: each chunk's gradient is pushed through the output head at once, so that the
ordinary backward pass starts at the hidden states (methods section 9, identity 1).

Shape legend: N tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfprune.objectives.base import Objective

CHUNK_BYTES = 16 * 2**20
"""Size of one chunk of fp32 logits. Peak memory of the head is about three of these, whatever the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """The output projection and what the model does to its result.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        scale: Factor on the logits.
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
        """Returns d/d(projection) [C, V] for d/d(logits) [C, V]; ``logits`` are needed with a soft cap only."""
        if self.softcap is not None:
            assert logits is not None
            grad = grad.mul_(1 - (logits / self.softcap) ** 2)
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


def chunk_tokens(vocab_size: int, *, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Returns how many tokens' fp32 logits fit into ``chunk_bytes`` (at least one)."""
    return max(1, chunk_bytes // (4 * vocab_size))


def _chunk(head: OutputHead, objective: Objective, hidden: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the objective's sum over a chunk, float64, and its gradient at the projection, [C, V]."""
    logits = head.logits(hidden)
    saved = logits.clone() if head.softcap is not None else None
    value, grad = objective.value_and_grad(logits, targets)
    return value.sum(dtype=torch.float64), head.pull_back(grad, saved).to(hidden.dtype)


class _ChunkedObjective(torch.autograd.Function):
    """Sum of an objective over tokens; gradients are computed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        objective: Objective,
        targets: Tensor | None,
        size: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            value, grad = _chunk(head, objective, hidden[part], None if targets is None else targets[part])
            total += value
            if grad_hidden is not None:
                torch.mm(grad, weight.to(grad.dtype), out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad  # or it would live on beside the next chunk's logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_output).to(bias_dtype),
            *(None,) * 4,
        )


def chunked_objective(
    objective: Objective,
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Returns the sum of ``objective`` over tokens, a float64 scalar that is differentiable in ``hidden`` and the head.

    Arithmetic on logits is float32 whatever the model's dtype (float64 for a float64 model). The result does not depend
    on the chunk size beyond rounding.

    Args:
        objective: What to sum.
        hidden: [N, D], final hidden states of the tokens that count (padding already left out).
        head: The output head.
        targets: [N] int64, or None when the objective needs none.
        chunk_bytes: Size of one chunk of fp32 logits.
    """
    size = chunk_tokens(head.weight.shape[0], chunk_bytes=chunk_bytes)
    total: Tensor = _ChunkedObjective.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, objective, targets, size
    )
    return total
