"""Prune and recover with two processes: DDP, or FSDP2, where no process ever holds the whole model.

python examples/two_processes.py MODEL_DIR OUT_DIR [ddp|fsdp2]

Runs on two CPU processes (gloo), or on two GPUs when there are any; the kept neurons are those of one process.
"""

import sys

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from hfprune import LoraRecovery, PruningModule, ReportCallback, TaylorImportanceCallback, TextDataModule


def main(model: str, out: str, strategy: str = "ddp") -> None:
    """Fits on two processes."""
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=8))
    data = TextDataModule(seq_len=32, calibration_sequences=8, recovery_sequences=16, eval_window=32, eval_windows=4)
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.device_count() > 1 else "cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else "ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[importance, ReportCallback(out, latency=False)],
    )
    trainer.fit(PruningModule(model), datamodule=data)


if __name__ == "__main__":
    main(*sys.argv[1:])
