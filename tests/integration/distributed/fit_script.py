"""Fits a tiny model under a strategy and writes what each rank ended with. Run by ``tests.helpers.warm``.

For its arguments see ``DEFAULTS``.
"""

import logging
import os
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from matplotlib.figure import Figure

from hfprune import (
    LoraRecovery,
    PruneTrainer,
    PruningModule,
    ReportCallback,
    TaylorImportanceCallback,
    TextDataModule,
    criteria,
)
from hfprune.compensation import LeastSquares
from hfprune.io.load_sharded import whole
from hfprune.pruning.accumulator import ImportanceAccumulator
from hfprune.recovery import DistillationRecovery, teacher_cache
from tests.helpers.foreign import FineTuner
from tests.helpers.ragged import RaggedData

DEFAULTS = {
    "model": None,
    "out": None,
    "strategy": "auto",  # auto, ddp, fsdp2
    "devices": 1,
    "sequences": 6,
    "calibration_batch_size": 1,
    "seq_len": 16,
    "lora": True,
    "prune_only": False,
    "dtype": "float64",
    "precision": "32-true",
    "die": None,  # [phase, step]: leave without a word there
    "ckpt_path": None,
    "report": True,
    "plain_trainer": False,
    "ragged": None,  # [batch size, layout] of calibration sequences of different lengths
    "exact": True,
    "criterion": "ActivationTaylor",
    "distil": False,  # two stages
    "callbacks": (),
    "pruning_ratio": 0.2,
    "units": ("mlp",),
    "depth_scores": None,
    "compensation": None,  # settings of LeastSquares
    "layout": "uniform",
    "allow_pruned": False,
    "teacher": None,  # settings of DistillationRecovery
    "foreign": False,  # a LightningModule of somebody else, with shuffled training data as its calibration data
}


class Record(Callback):
    """Saves importance, kept units and final weights of this rank."""

    def __init__(self, folder, importance, foreign):
        self.folder, self.importance, self.foreign = folder, importance, foreign

    def on_fit_end(self, trainer, pl_module):
        torch.save(
            {
                "scores": self.importance.importance,
                "keep": dict(trainer.lightning_module._hfprune["plan"].keep if self.foreign else pl_module.plan.keep),
                "weights": {n: whole(p.detach()).clone() for n, p in pl_module.named_parameters()},
                "local": sum(getattr(p, "_local_tensor", p).numel() for p in pl_module.parameters()),
                "steps": trainer.global_step,
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


class Die(Callback):
    """Ends the process at a moment: ``pruned`` before the first step, ``recovery`` before step n, or before file n
    of two rows of the dense model's predictions, ``teacher``."""

    def __init__(self, phase, step):
        self.phase, self.step = phase, step
        if phase == "calibration":
            self._count(ImportanceAccumulator, "step")
        if phase == "teacher":
            teacher_cache.ROWS_PER_FILE = 2
            self._count(teacher_cache.TeacherCache, "_write")

    def _count(self, kind, method):
        original, seen = getattr(kind, method), []

        def counted(*args, **kwargs):
            if len(seen) == self.step:
                os._exit(9)
            seen.append(1)
            return original(*args, **kwargs)

        setattr(kind, method, counted)

    def on_train_start(self, trainer, pl_module):
        if self.phase == "pruned":
            os._exit(9)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.phase == "recovery" and trainer.global_step == self.step:
            os._exit(9)


def strategy(name, devices):
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    return name


def main(**given):
    c = DEFAULTS | given
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hfprune").setLevel(logging.INFO)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = Path(c["out"])
    out.mkdir(parents=True, exist_ok=True)
    recovery = LoraRecovery(rank=2, dropout=0.2) if c["lora"] and not c["foreign"] else None
    importance = TaylorImportanceCallback(
        pruning_ratio=c["pruning_ratio"],
        units=c["units"],
        depth_scores=c["depth_scores"],
        recovery=recovery or "full",
        checkpoint_every=1,
        calibration_batches=5 if c["foreign"] else None,
        exact=c["exact"],
        compensation=LeastSquares(**c["compensation"]) if c["compensation"] else None,
        criterion=getattr(criteria, c["criterion"])(),
        self_distillation=criteria.SelfDistillation(first_stage=0.1) if c["distil"] else None,
    )
    callbacks = [importance, Record(out, importance, c["foreign"])]
    if c["report"] and not c["foreign"]:
        Figure.savefig = lambda *args, **kwargs: None  # nobody looks at them: see the fixture ``undrawn``
        callbacks.append(ReportCallback(str(out / "run"), latency=False, overwrite=True, layout=c["layout"]))
    if c["die"]:
        callbacks.append(Die(*c["die"]))
    callbacks.append(ModelCheckpoint(dirpath=out / "checkpoints", save_last=True, every_n_train_steps=1))
    callbacks.extend(c["callbacks"])
    trainer = PruneTrainer(
        accelerator="cpu",
        devices=c["devices"],
        strategy=strategy(c["strategy"], c["devices"]),
        precision=c["precision"],
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=callbacks,
    )
    if c["foreign"]:
        trainer.fit(FineTuner().double(), ckpt_path=c["ckpt_path"])
        return
    data = TextDataModule(
        seq_len=c["seq_len"], calibration_sequences=c["sequences"], batch_size=2, recovery_sequences=8,
        validation_sequences=2, eval_windows=2, eval_window=16, calibration_batch_size=c["calibration_batch_size"],
    )  # fmt: skip
    if c["ragged"]:
        data = RaggedData(*c["ragged"])
    module = PruningModule(
        c["model"], dtype=c["dtype"], learning_rate=1e-2, allow_pruned=c["allow_pruned"],
        distillation=DistillationRecovery(**c["teacher"]) if c["teacher"] else None,
    )  # fmt: skip
    if c["prune_only"]:
        trainer.prune(module, datamodule=data, ckpt_path=c["ckpt_path"])
    elif c["plain_trainer"]:
        super(PruneTrainer, trainer).fit(module, datamodule=data, ckpt_path=c["ckpt_path"])
    else:
        trainer.fit(module, datamodule=data, ckpt_path=c["ckpt_path"])
