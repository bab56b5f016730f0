"""Prunes a tiny model with a sparse method and writes what each rank ended with. Run by ``tests.helpers.warm``.

For its arguments see ``DEFAULTS``.
"""

import os
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hfprune import LoraRecovery, PruneTrainer, PruningModule, SparsePruningCallback, TextDataModule
from hfprune.sparse.state import LayerState
from tests.integration.distributed.fit_script import strategy

DEFAULTS = {
    "model": None,
    "out": None,
    "strategy": "auto",  # auto, ddp
    "devices": 1,
    "calibration_batch_size": 1,
    "sequences": 7,
    "sparse": None,  # arguments of the callback
    "die": {},  # leave without a word when so many ``layers`` were saved, or at that ``step`` of recovery
    "lora": False,
    "ckpt_path": None,
}


def die_after(layers):
    original, seen = LayerState.save, []

    def save(state, name, *args):
        original(state, name, *args)
        seen.extend([name] if name.startswith("layer") else [])
        if len(seen) == layers:
            os._exit(9)

    LayerState.save = save


class DieInStep(ModelCheckpoint):
    """Saves every step, and leaves at one of them."""

    def __init__(self, folder, step):
        super().__init__(dirpath=folder, save_last=True, every_n_train_steps=1)
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os._exit(9)


def main(**kwargs):
    c = DEFAULTS | kwargs
    out = Path(c["out"])
    out.mkdir(parents=True, exist_ok=True)
    if "layers" in c["die"]:
        die_after(c["die"]["layers"])
    callback = SparsePruningCallback(
        state_dir=out / "layers", recovery=LoraRecovery(rank=2) if c["lora"] else None, **c["sparse"]
    )
    callbacks = [callback, DieInStep(out / "checkpoints", c["die"].get("step"))] if c["lora"] else [callback]
    trainer = PruneTrainer(
        accelerator="cpu", devices=c["devices"], strategy=strategy(c["strategy"], c["devices"]), max_epochs=2,
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=c["lora"], callbacks=callbacks,
    )  # fmt: skip
    data = TextDataModule(
        seq_len=16, calibration_sequences=c["sequences"], calibration_batch_size=c["calibration_batch_size"],
        recovery_sequences=8, batch_size=2, validation_sequences=2, eval_windows=2, eval_window=16,
    )  # fmt: skip
    module = PruningModule(c["model"], dtype="float32", learning_rate=1e-2)
    torch.manual_seed(0)
    run = trainer.fit if c["lora"] else trainer.prune
    run(module, datamodule=data, ckpt_path=c["ckpt_path"])
    torch.save(
        {
            "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
            "errors": [layer.error for layer in callback.layers],
            "resumed": [layer.resumed for layer in callback.layers],
            "left": (out / "layers").exists(),
        },
        out / f"rank{trainer.global_rank}.pt",
    )
