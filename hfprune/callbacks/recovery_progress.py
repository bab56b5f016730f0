"""Progress of recovery: step, loss, learning rate, tokens per second and time left."""

import time
from contextlib import ExitStack
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar

from hfprune.utils.progress import Phase, phase


class RecoveryLines(Callback):
    """Reports training and validation as phases of the run; see :mod:`hfprune.utils.progress`."""

    def __init__(self) -> None:
        super().__init__()
        self._recovering, self._validating = ExitStack(), ExitStack()
        self._training: Phase | None = None
        self._validation: Phase | None = None
        self._start: tuple[float, int] = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announces recovery."""
        total = trainer.estimated_stepping_batches
        known = int(total) if total not in (-1, float("inf")) and total > 0 else None
        self._training = self._recovering.enter_context(phase("recovering", total=known))
        self._training.before = self._training.done = trainer.global_step
        self._start = (time.perf_counter(), _tokens(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the step."""
        if self._training is not None:
            self._training.update(trainer.global_step, facts=lambda: self._facts(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announces validation within training."""
        if self._training is not None:
            self._validation = self._validating.enter_context(phase("validating", unit="batch"))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Notes the batch."""
        if self._validation is not None:
            self._validation.update(self._validation.done + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the validation phase and returns to recovery."""
        self._validation = None
        self._validating.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends recovery."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends recovery."""
        self._close()

    def _close(self) -> None:
        self._training = self._validation = None
        self._validating.close()
        self._recovering.close()

    def _facts(self, trainer: Trainer, module: LightningModule) -> str:
        since, tokens = self._start
        seconds, seen = time.perf_counter() - since, _tokens(module) - tokens
        loss, groups = trainer.callback_metrics.get("train_loss"), [o.param_groups for o in trainer.optimizers]
        parts = [] if loss is None else [f"loss {float(torch.as_tensor(loss)):.3f}"]
        parts += [f"lr {groups[0][0]['lr']:.3g}"] if groups and groups[0] else []
        parts += [f"{seen / seconds:,.0f} tokens/s"] if seen and seconds else []
        return ", ".join(parts)


class RecoveryProgress(RecoveryLines, ProgressBar):
    """The same in the place of Lightning's progress bar, which a pipe shows at its end only."""


def _tokens(module: LightningModule) -> int:
    """Returns the tokens that a module has trained on so far; 0 where it does not count them."""
    return int(getattr(module, "seen_tokens", 0))
