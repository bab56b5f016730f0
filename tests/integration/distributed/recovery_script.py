"""Recovers a tiny model in one of several ways and writes what each rank ended with. Run by ``tests.helpers.warm``.

For its arguments see ``DEFAULTS``.
"""

from pathlib import Path

import torch

from hfprune import (
    LoraPruningCallback,
    LoraRecovery,
    PruneTrainer,
    PruningModule,
    TaylorImportanceCallback,
    TextDataModule,
)
from hfprune.recovery import DistillationRecovery
from tests.integration.distributed.fit_script import strategy

DEFAULTS = {"model": None, "out": None, "strategy": "auto", "devices": 1, "way": "lora_prune", "cache": None}
LORA = LoraRecovery(rank=2, alpha=4, dropout=0.0)


def main(**kwargs):
    c = DEFAULTS | kwargs
    out = Path(c["out"])
    out.mkdir(parents=True, exist_ok=True)
    distillation = None
    if c["way"] == "lora_prune":
        pruning = LoraPruningCallback(pruning_ratio=0.25, lora=LORA, every=1)
    else:
        pruning = TaylorImportanceCallback(pruning_ratio=0.25, recovery=LORA)
        distillation = DistillationRecovery(cache=c["cache"], top_k=8)
    module = PruningModule(c["model"], dtype="float64", learning_rate=5e-3, distillation=distillation)
    trainer = PruneTrainer(
        callbacks=[pruning], accelerator="cpu", devices=c["devices"], logger=False, max_epochs=2,
        strategy=strategy(c["strategy"], c["devices"]), enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(0)
    data = TextDataModule(
        seq_len=16, batch_size=4 // c["devices"], calibration_sequences=4, recovery_sequences=16,
        validation_sequences=2, eval_windows=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    found = {"weights": {n: p.detach() for n, p in module.named_parameters()}, "keep": module.plan.keep}
    torch.save(found | {"importance": dict(pruning.importance)}, out / f"rank{trainer.global_rank}.pt")
