"""What tests of whole runs share: flags of tiny runs and callbacks that look on."""

from lightning.pytorch.callbacks import Callback

TINY_DATA_FLAGS = (
    "--data.seq_len=16",
    "--data.calibration_sequences=4",
    "--data.eval_window=16",
    "--data.eval_windows=2",
)
"""Little data of the built-in text."""
TINY_FLAGS = (
    *TINY_DATA_FLAGS,
    "--latency=false",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
)
"""A run on the CPU with this data, which measures no speed."""
EVALUATE_FLAGS = tuple(f for f in TINY_FLAGS if "calibration" not in f and "progress_bar" not in f)
"""Those of them that evaluate takes."""


class Losses(Callback):
    """Keeps the training loss of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(trainer.callback_metrics["train_loss"]))
