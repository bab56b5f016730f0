"""Prune inside a Lightning project of your own by adding one callback.

python examples/drop_in.py MODEL_DIR OUT_DIR

`FineTuner` knows nothing of hfprune. Its training loss is the objective (the cross-entropy Taylor criterion), its
training batches calibrate, and the pruned model then trains on as `configure_optimizers` says. The best checkpoint is
loaded with the pruned shapes and saved as a Hugging Face folder, with the plan.
"""

import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfprune


class FineTuner(LightningModule):
    """Fine-tunes a causal LM on a few lines of text."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lm = AutoModelForCausalLM.from_pretrained(path).train()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the model's own loss."""
        loss = self.lm(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def train_dataloader(self) -> DataLoader:
        """Returns batches of equal length."""
        text = "The quick brown fox jumps over the lazy dog. " * 200
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        rows = ids[: len(ids) // 32 * 32].view(-1, 32)
        return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Trains every weight."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(model: str, out: str) -> None:
    """Removes 20 % of the parameters before the first step, trains on, and saves what stock transformers loads."""
    importance = hfprune.TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=8)
    best = ModelCheckpoint(dirpath=Path(out) / "checkpoints", monitor="train/loss")
    Trainer(max_epochs=1, devices=1, logger=False, callbacks=[importance, best]).fit(FineTuner(model))

    module = hfprune.load_from_checkpoint(FineTuner, best.best_model_path)
    module.lm.save_pretrained(out)  # with plan.json
    module.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
