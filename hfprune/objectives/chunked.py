"""Chunked objectives: computed from the final hidden states, one chunk of tokens at a time.

The [T, V] logits of a batch are the largest tensor of a calibration step (525 MB in fp32 for T = 1024, V = 128256).
Only one chunk of them exists at a time. The gradient of each chunk is propagated through the output head immediately,
and the backward pass of autograd starts at the hidden states.

Shape legend: N tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune.objectives.base import Objective
from hfprune.objectives.output_head import OutputHead
from hfprune.objectives.teacher import TokenPredictions

CHUNK_BYTES = 16 * 2**20
"""Size of one chunk of fp32 logits on the CPU. Peak memory of the head is about three chunks for any vocabulary."""
ACCELERATOR_CHUNK_BYTES = 128 * 2**20
"""Size of one chunk on accelerators, which small matrix products do not saturate."""


def chunk_tokens(vocab_size: int, *, chunk_bytes: int | None = None, device: torch.device | None = None) -> int:
    """Returns the number of tokens (at least one) whose fp32 logits fit into one chunk.

    Args:
        vocab_size: V.
        chunk_bytes: Size of a chunk in bytes; defaults to the chunk size of ``device``.
        device: Device of the logits; defaults to the CPU.

    >>> chunk_tokens(1024, chunk_bytes=2**20)
    256
    """
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES if device is None or device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * vocab_size))


@dataclass(frozen=True, slots=True)
class Term:
    """One objective over some of the tokens.

    Attributes:
        objective: The objective.
        targets: [N] or [N, K] int64, or None if the objective needs no targets.
        tokens: [N] boolean, the tokens that count; None for all.
        teacher: Predictions of the teacher for the tokens that count; None without a teacher.
    """

    objective: Objective
    targets: Tensor | None = None
    tokens: Tensor | None = None
    teacher: TokenPredictions | None = None

    def part(self, part: slice, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the logits and targets of the term's tokens in a chunk."""
        targets = None if self.targets is None else self.targets[part]
        if self.tokens is None:
            return logits, targets
        chosen = self.tokens[part]
        return logits[chosen], None if targets is None else targets[chosen]

    def teacher_logits(self, part: slice) -> Any:
        """Returns the teacher's predictions for the term's tokens in a chunk; None without a teacher."""
        if self.teacher is None:
            return None
        if self.tokens is not None:  # the teacher's predictions hold the tokens that count only
            start = int(self.tokens[: part.start].sum())
            part = slice(start, start + int(self.tokens[part].sum()))
        return self.teacher.logits(part)


class _ChunkedObjectives(torch.autograd.Function):
    """Sums objectives over tokens. Gradients are computed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        terms: Sequence[Term],
        size: int,
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(weight.dtype, torch.float32)
        totals, saved = [], []
        for _ in terms:
            totals.append(torch.zeros((), dtype=torch.float64, device=hidden.device))
            saved += [
                torch.zeros_like(hidden) if need_hidden else None,
                torch.zeros_like(weight, dtype=wide) if need_weight else None,
                torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None,
            ]
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            logits = head.logits(hidden[part])
            for index, term in enumerate(terms):
                last = index == len(terms) - 1
                rows, targets = term.part(part, logits if last or term.tokens is not None else logits.clone())
                teacher = term.teacher_logits(part)
                value, grad = _value_and_grad(head, term.objective, rows, targets, teacher, hidden.dtype)
                totals[index] += value
                inputs = hidden[part] if term.tokens is None else hidden[part][term.tokens[part]]
                _add(saved[3 * index : 3 * index + 3], part, term.tokens, grad, inputs, weight)
                del rows, grad, teacher  # free them before the next chunk's logits exist
            del logits
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        sums: list[Tensor | None] = [None, None, None]
        for index, scale in enumerate(grad_outputs):
            if scale is None:  # this objective is not differentiated in this backward pass
                continue
            for kind in range(3):
                grad = saved[3 * index + kind]
                if grad is not None:
                    scaled = grad * scale.to(grad.dtype)
                    before = sums[kind]
                    sums[kind] = scaled if before is None else before + scaled
        hidden, weight, bias = sums
        return (
            hidden,
            None if weight is None else weight.to(weight_dtype),
            None if bias is None else bias.to(bias_dtype),
            *(None,) * 3,
        )


def _value_and_grad(
    head: OutputHead,
    objective: Objective,
    logits: Tensor,
    targets: Tensor | None,
    teacher: Any,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the objective's sum over a chunk, float64, and its gradient at the output projection, [C, V]."""
    saved = logits.clone() if head.softcap is not None else None
    value, grad = objective.value_and_grad(logits, targets, teacher)
    return value.sum(dtype=torch.float64), head.pull_back(grad, saved).to(dtype)


def _add(
    sums: list[Tensor | None], part: slice, tokens: Tensor | None, grad: Tensor, inputs: Tensor, weight: Tensor
) -> None:
    """Adds the gradients of a chunk to those of hidden states, weight and bias."""
    grad_hidden, grad_weight, grad_bias = sums
    if grad_hidden is not None and tokens is None:
        torch.mm(grad, weight.to(grad.dtype), out=grad_hidden[part])
    elif grad_hidden is not None and tokens is not None:
        grad_hidden[part][tokens[part]] = grad @ weight.to(grad.dtype)
    if grad_weight is not None:
        grad_weight += grad.T @ inputs
    if grad_bias is not None:
        grad_bias += grad.sum(0)


def chunked_objective(
    objective: Objective,
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor | None = None,
    teacher: TokenPredictions | None = None,
    *,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Returns the sum of an objective over tokens; see :func:`chunked_objectives`.

    Args:
        objective: The objective.
        hidden: [N, D], final hidden states of the tokens that count, without padding.
        head: The output head.
        targets: [N] or [N, K] int64, or None if the objective needs no targets.
        teacher: Predictions of the teacher for the N tokens; None without a teacher.
        chunk_bytes: Size of one chunk of fp32 logits; defaults to the chunk size of the device.

    Returns:
        Float64 scalar, differentiable with respect to ``hidden`` and the head.
    """
    (total,) = chunked_objectives([Term(objective, targets, teacher=teacher)], hidden, head, chunk_bytes=chunk_bytes)
    return total


def chunked_objectives(
    terms: Sequence[Term], hidden: Tensor, head: OutputHead, *, chunk_bytes: int | None = None
) -> tuple[Tensor, ...]:
    """Sums several objectives over their tokens, from one computation of the logits.

    Arithmetic on the logits is float32 for every model dtype, except float64 for float64 models. Results depend on the
    chunk size by rounding only.

    Args:
        terms: Objectives and their tokens.
        hidden: [N, D], final hidden states.
        head: The output head.
        chunk_bytes: Size of one chunk of fp32 logits; defaults to the chunk size of the device.

    Returns:
        Float64 scalars, one for each term, differentiable with respect to ``hidden`` and the head.
    """
    size = chunk_tokens(head.weight.shape[0], chunk_bytes=chunk_bytes, device=hidden.device)
    totals: tuple[Tensor, ...] = _ChunkedObjectives.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, tuple(terms), size
    )
    return totals
