"""Checkpoints between steps of the optimizer, never within one; those of an earlier run do not mix with them."""

import os
import re
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hfprune.outputs import EARLIER_CHECKPOINTS

_OURS = re.compile(r"(last(-pruning)?|epoch=\d+-step=\d+|step-\d+)\.ckpt")


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


class OneRun(Callback):
    """Keeps the checkpoints of one run apart from those of an earlier one in the same folder.

    A new run moves what is there out of the way, so that ``ckpt_path="last"`` continues the new run, or starts it
    again, and never brings the earlier model back. When a run has ended, files of earlier runs and of attempts that
    were killed are removed.

    Args:
        folder: Where the run saves.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.aside = self.folder / EARLIER_CHECKPOINTS

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves what is there, where nothing is resumed."""
        if trainer.ckpt_path is not None or not trainer.is_global_zero:
            return
        found = checkpoints_in(self.folder, links=True)
        if found:
            self.aside.mkdir(exist_ok=True)
        for path in found:
            target = self.aside / path.name
            if target.is_dir() and not target.is_symlink():
                trainer.strategy.remove_checkpoint(target)
            os.replace(path, target)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes stale files; those under names that hfprune does not give stay."""
        if not trainer.is_global_zero:
            return
        for path in (*checkpoints_in(self.aside, links=True), *self._stale(trainer)):
            if path.is_symlink():
                path.unlink()
            elif _OURS.fullmatch(path.name):
                trainer.strategy.remove_checkpoint(path)
        if self.aside.is_dir() and not any(self.aside.iterdir()):
            self.aside.rmdir()

    def _stale(self, trainer: Trainer) -> list[Path]:
        """Returns files that attempts left behind: no callback of the run knows them."""
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if any(not isinstance(c, StepCheckpoint) and c.dirpath == str(self.folder.absolute()) for c in found):
            return []
        known = {Path(p).resolve() for c in found for p in (c.best_model_path, c.last_model_path) if p}
        every = checkpoints_in(self.folder)
        return [path for path in every if path.resolve() not in known and path.resolve() != every[-1].resolve()]


def checkpoints_in(folder: Path, *, links: bool = False) -> list[Path]:
    """Returns the checkpoints in ``folder``, the oldest first.

    Args:
        folder: A run's.
        links: Include symbolic links, which name one of the others.
    """
    found = [path for path in folder.glob("[!.]*.ckpt") if links or (path.exists() and not path.is_symlink())]
    return sorted(found, key=lambda path: path.lstat().st_mtime)


def _within_step(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._should_accumulate()
