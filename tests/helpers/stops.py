"""Interruptions of runs, at a step that a test chooses."""

from lightning.pytorch.callbacks import Callback

from hfprune.pruning.accumulator import ImportanceAccumulator


class Stop(Exception):
    """An interruption."""


class StopAt(Callback):
    """Leaves before a step of the optimizer."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Stop


class StopInCalibration:
    """Leaves after so many calibration items, once; counts them."""

    def __init__(self, monkeypatch, after):
        self.count, self.left = 0, after
        step = ImportanceAccumulator.step

        def failing(accumulator, *args, **kwargs):
            if self.count == self.left:
                self.left = -1  # counts on, and does not stop again
                raise Stop
            self.count += 1
            return step(accumulator, *args, **kwargs)

        monkeypatch.setattr(ImportanceAccumulator, "step", failing)
