"""Fits a tiny model under a strategy and writes what each rank ended with. Run by test_ddp.py, one thread per process."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from hfprune import LoraRecovery, PruneTrainer, PruningModule, ReportCallback, TaylorImportanceCallback, TextDataModule


class Record(Callback):
    """Saves importance, kept units and final weights of this rank."""

    def __init__(self, folder, importance):
        self.folder, self.importance = folder, importance

    def on_train_end(self, trainer, pl_module):
        torch.save(
            {
                "scores": self.importance.importance,
                "keep": dict(pl_module.plan.keep),
                "weights": {n: p.detach().clone() for n, p in pl_module.named_parameters()},
                "steps": trainer.global_step,
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def main(model, out, devices, sequences):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=2))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    callbacks = [importance, Record(out, importance), ReportCallback(str(out / "run"), latency=False)]
    trainer = PruneTrainer(
        accelerator="cpu",
        devices=int(devices),
        strategy="ddp" if int(devices) > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    data = TextDataModule(
        seq_len=16, calibration_sequences=int(sequences), batch_size=2, recovery_sequences=8, validation_sequences=2,
        eval_windows=2, eval_window=16,
    )  # fmt: skip
    trainer.fit(PruningModule(model, dtype="float64", learning_rate=1e-2), datamodule=data)


if __name__ == "__main__":
    main(*sys.argv[1:])
