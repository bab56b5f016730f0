"""Interrupt a run in the middle of calibration and in the middle of recovery, and go on from its checkpoints.

python examples/resume.py MODEL_DIR OUT_DIR

The third fit ends with the kept neurons, and on a CPU with the very bits, of a run that nobody interrupted.
"""

import sys

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hfprune import LoraRecovery, PruningModule, ReportCallback, TaylorImportanceCallback, TextDataModule
from hfprune.pruning.accumulator import ImportanceAccumulator


class Interrupted(Exception):  # noqa: N818  # an event, no error
    """Stands for a crash, a preemption, a reboot."""


class InterruptRecovery(Callback):
    """Ends the fit before a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Raises at the step."""
        if trainer.global_step == self.step:
            raise Interrupted


def interrupt_calibration(after: int) -> None:
    """Lets the next calibration fail after some sequences."""
    original, seen = ImportanceAccumulator.step, []

    def step(*args: object, **kwargs: object) -> object:
        if len(seen) == after:
            ImportanceAccumulator.step = original
            raise Interrupted
        seen.append(1)
        return original(*args, **kwargs)

    ImportanceAccumulator.step = step


def fit(model: str, out: str, *extra: Callback) -> None:
    """Starts the run, or goes on with it: `ckpt_path="last"` is the newest checkpoint, if there is one."""
    callbacks = [
        TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=8), checkpoint_every=4),
        ReportCallback(out, latency=False, overwrite=True),
        ModelCheckpoint(dirpath=f"{out}/checkpoints", save_last=True, every_n_train_steps=1),
        *extra,
    ]
    data = TextDataModule(seq_len=32, calibration_sequences=16, recovery_sequences=24, eval_window=32, eval_windows=4)
    trainer = Trainer(max_epochs=1, devices=1, logger=False, callbacks=callbacks)
    trainer.fit(PruningModule(model), datamodule=data, ckpt_path="last")


def main(model: str, out: str) -> None:
    """Interrupts twice."""
    interrupt_calibration(after=9)
    for extra in ([], [InterruptRecovery(step=2)], []):
        try:
            fit(model, out, *extra)
        except Interrupted:
            print("interrupted: going on from the newest checkpoint")


if __name__ == "__main__":
    main(*sys.argv[1:])
