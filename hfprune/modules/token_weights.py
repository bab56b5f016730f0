"""Token-weighted gradients: all supervised tokens of an optimizer step have equal weight, across batches and ranks."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from hfprune.modules.events import PruningEvents

_SCALE = 1024.0
"""Divisor of summed losses, which keeps their gradients in the range of float16."""


class TokenWeighted(LightningModule):
    """LightningModule whose gradient is that of the mean loss over all tokens of an optimizer step.

    Lightning averages over accumulated batches, and DDP and FSDP over ranks, so that a token of a short batch would
    have a larger weight. The backward pass therefore uses the sum over a batch. Before the optimizer step, gradients
    are divided by the number of tokens of all batches on all ranks, and the ``on_gradients_ready`` hooks run.

    ``training_step`` must return the mean over its tokens and call :meth:`weigh` with their number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._batch_tokens: int | None = None
        self._step_tokens = 0
        self.trained_tokens = 0
        """Number of supervised tokens so far, on all ranks."""
        self._step_seen = 0
        self.seen_tokens = 0
        """Number of tokens so far on all ranks, without padding."""

    def weigh(self, num_tokens: int, *, seen: int | None = None) -> None:
        """Sets the number of tokens that the loss of the current ``training_step`` is averaged over.

        Args:
            num_tokens: Number of supervised tokens.
            seen: Number of all tokens without padding; ``num_tokens`` if not given.
        """
        self._batch_tokens = num_tokens
        self._step_seen += num_tokens if seen is None else seen

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs the backward pass of the loss summed over the batch."""
        if self._batch_tokens is not None:
            loss = loss * (self._batch_tokens / _SCALE)
            self._step_tokens += self._batch_tokens
            self._batch_tokens = None
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the number of tokens of the step, before clipping."""
        trainer = self.trainer
        counts = torch.tensor([self._step_tokens, self._step_seen], dtype=torch.float64)
        every, seen = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum").tolist()
        self.trained_tokens += int(every)
        self.seen_tokens += int(seen)
        if every:
            factor = _SCALE * trainer.accumulate_grad_batches * trainer.world_size / every
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self._step_tokens = self._step_seen = 0
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PruningEvents):
                callback.on_gradients_ready(trainer, self)
