"""Every supervised token of an optimizer step counts alike, whichever batch and rank it was in."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from hfprune.modules.events import PruningEvents

_SCALE = 1024.0
"""Sums of losses are divided by this, so that their gradients are about as large as those of means (for float16)."""


class TokenWeighted(LightningModule):
    """Steps along the gradient of the mean over all tokens of a step.

    Lightning averages over accumulated batches, DDP and FSDP over ranks. With a mean per batch, a token of a short
    batch would count more than one of a long batch. So each batch's mean is turned back into a sum for the backward
    pass, and before the optimizer steps its gradients are divided by the number of tokens of all its batches on all
    ranks, which is known only then. A ``training_step`` returns the mean over its tokens and calls ``weigh`` with
    their number. The ``on_gradients_ready`` hooks of callbacks run then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._batch_tokens: int | None = None
        self._step_tokens = 0
        self.trained_tokens = 0
        """Supervised tokens of all steps so far, on all ranks."""
        self._step_seen = 0
        self.seen_tokens = 0
        """Tokens of all steps so far, on all ranks, supervised or not; padding left out."""

    def weigh(self, num_tokens: int, *, seen: int | None = None) -> None:
        """Says over how many tokens the loss that ``training_step`` is about to return is a mean.

        Args:
            num_tokens: Supervised tokens.
            seen: Tokens that the model has read for it; as many if not given.
        """
        self._batch_tokens = num_tokens
        self._step_seen += num_tokens if seen is None else seen

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs the backward pass of the batch's sum."""
        if self._batch_tokens is not None:
            loss = loss * (self._batch_tokens / _SCALE)
            self._step_tokens += self._batch_tokens
            self._batch_tokens = None
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the number of tokens of the step; before they are clipped."""
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
