"""Checkpoints between steps of the optimizer, never within one."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that waits while the batches of an accumulated step are being gathered.

    Gradients that were gathered are in no checkpoint: what is saved in between would be continued without them. So a
    validation in between, or the first batches after a resume, which still have the number of the step before, save
    nothing.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves as a ``ModelCheckpoint`` does, after a step."""
        if not _within_step(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves as a ``ModelCheckpoint`` does, after a step."""
        if not _within_step(trainer):
            super().on_validation_end(trainer, pl_module)


def _within_step(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._should_accumulate()
