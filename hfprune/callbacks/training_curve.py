"""The training curve of a run: losses of training and validation by step and tokens."""

from typing import Any

import torch
from lightning import LightningModule, Trainer

MOST_POINTS = 1000
"""Points that a curve keeps at most; a longer one keeps every second, fourth, ... step."""

Point = tuple[int, int, Any]
"""Optimizer steps, tokens seen, loss (a number, or a tensor that nobody has waited for yet)."""


class TrainingCurve:
    """Records ``train_loss`` once per optimizer step, as the mean of its batches, and every ``val_loss``.

    Losses stay on their device until they are read, so that recording does not make the device wait.
    """

    def __init__(self) -> None:
        self._train: list[Point] = []
        self._validation: list[Point] = []
        self._sum: Any = 0.0
        self._batches, self._every, self._step = 0, 1, 0

    def batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Notes the loss of the batch that was just trained on."""
        loss = trainer.callback_metrics.get("train_loss")
        if loss is None:
            return
        self._sum, self._batches = self._sum + torch.as_tensor(loss).detach(), self._batches + 1
        step = trainer.global_step
        if step == self._step:
            return  # within an accumulated step
        self._step = step
        if step % self._every == 0:
            self._train.append((step, _tokens(module), self._sum / self._batches))
        self._sum, self._batches = 0.0, 0
        if len(self._train) >= 2 * MOST_POINTS:
            self._every *= 2
            self._train = [point for point in self._train if point[0] % self._every == 0]

    def validation(self, trainer: Trainer, module: LightningModule) -> None:
        """Notes the loss of the validation that has just ended."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not trainer.sanity_checking:
            self._validation.append((trainer.global_step, _tokens(module), torch.as_tensor(loss).detach()))

    def to_dict(self) -> dict[str, list[list[float]]]:
        """Returns ``train`` and ``validation``, each [steps, tokens, loss] per point; empty where nothing was noted."""
        found = {"train": self._train, "validation": self._validation}
        return {
            name: [[step, tokens, float(loss)] for step, tokens, loss in points]
            for name, points in found.items()
            if points
        }

    def load(self, state: dict[str, list[list[float]]]) -> None:
        """Takes over what :meth:`to_dict` returned before an interruption."""
        self._train, self._validation = (
            [(int(step), int(tokens), loss) for step, tokens, loss in state.get(name, ())]
            for name in ("train", "validation")
        )
        self._step = self._train[-1][0] if self._train else 0


def _tokens(module: LightningModule) -> int:
    """Returns the tokens that a module has trained on; 0 where it does not count them."""
    return int(getattr(module, "seen_tokens", 0))
