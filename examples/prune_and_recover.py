"""Prune and recover a model from Python: the same phases as `hfprune fit`, in a script of your own.

python examples/prune_and_recover.py MODEL_DIR OUT_DIR
"""

import sys

from lightning import Trainer

from hfprune import LoraRecovery, PruningModule, ReportCallback, TaylorImportanceCallback, TextDataModule


def main(model: str, out: str) -> None:
    """Removes 20 % of all parameters and trains adapters for one short epoch on Python's documentation."""
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=8))
    report = ReportCallback(out, latency=False)
    data = TextDataModule(seq_len=32, calibration_sequences=8, recovery_sequences=16, eval_window=32, eval_windows=4)
    trainer = Trainer(max_epochs=1, devices=1, logger=False, enable_checkpointing=False, callbacks=[report, importance])
    trainer.fit(PruningModule(model), datamodule=data)


if __name__ == "__main__":
    main(*sys.argv[1:])
