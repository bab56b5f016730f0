"""Resuming of recovery: settings in checkpoints, changes accepted on resume, and the learning-rate schedule."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer

from hfprune.utils.errors import ConfigError

FIXED = ("recovery data", "distillation", "trainable", "optimizer", "precision", "seed")
"""Settings that cannot change after recovery has started; changes of others apply from the next step."""


def recovery_settings(module: Any) -> dict[str, Any]:
    """Returns the settings that determine the result of a ``PruningModule``'s recovery, as plain data.

    Args:
        module: The module, with its trainer attached and its data set up.
    """
    trainer = module.trainer
    datamodule = trainer.datamodule
    return {
        "recovery data": data_fingerprint(trainer, "recovery"),
        "distillation": _distillation(module.distillation),
        "trainable": module.trainable,
        "optimizer": module.optimizer_name,
        "precision": str(trainer.precision),
        "seed": given_seed(),
        "learning_rate": module.learning_rate,
        "weight_decay": module.weight_decay,
        "warmup_ratio": module.warmup_ratio,
        "batch_size": getattr(datamodule, "batch_size", None),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "limit_train_batches": trainer.limit_train_batches,
    }


def data_fingerprint(trainer: Trainer, role: str) -> Any:
    """Returns the hash of the data of ``role``, or their source and seed; None if the datamodule has no summary."""
    summary = getattr(trainer.datamodule, "summary", None)  # type: ignore[attr-defined]
    found = summary().get(role) if callable(summary) else None
    if not isinstance(found, dict):
        return None
    return found.get("sha256") or {name: found.get(name) for name in ("source", "shuffle_buffer", "seed")}


def given_seed() -> int | None:
    """Returns the seed passed to ``seed_everything``, or None."""
    found = os.environ.get("PL_GLOBAL_SEED")
    return int(found) if found else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns setting -> [old, new] for the common settings with different values."""
    return {
        name: [before[name], value]
        for name, value in now.items()
        if name in before and before[name] != value and not (name == "seed" and None in (before[name], value))
    }


def refuse(changes: Mapping[str, list[Any]], done: str) -> None:
    """Raises a ``ConfigError`` that lists every changed setting with its old and new value, if there is any.

    Args:
        changes: Setting -> [old, new].
        done: ``calibrated``, ``pruned`` or ``trained``.
    """
    if changes:
        summary = "; ".join(f"{name} {_words(old)} -> {_words(new)}" for name, (old, new) in changes.items())
        raise ConfigError(
            f"The checkpoint's run {done} with other settings: {summary}. Resume with the old settings, or start a new "
            "run without ckpt_path."
        )


def _words(value: Any) -> str:
    """Returns a setting for a message: ``Name(option=value)`` for settings of a class, ``none`` for None."""
    if value is None:
        return "none"
    if not isinstance(value, Mapping):
        return str(value)
    options = ", ".join(f"{name}={option!r}" for name, option in value.items() if name != "name")
    return f"{value.get('name', '')}({options})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning-rate schedule: linear warm-up, then cosine decay to zero, per optimizer step.

    ``transformers.get_cosine_schedule_with_warmup`` is not used. Its first step has a learning rate of zero, its length
    cannot change after a resume with another batch size, and its cosine (``math.cos``) differs in the last bit for some
    steps, so that checkpoints would not resume to the same weights.

    Attributes:
        total: Number of steps until the rate is zero.
        warmup: Number of warm-up steps.
        offset: Number added to the optimizer's step, which converts steps before a resume to steps of this run.
    """

    total: int
    warmup: int
    offset: int = 0

    @classmethod
    def of(cls, trainer: Trainer, warmup_ratio: float, offset: int = 0) -> "Schedule":
        """Returns the schedule of a trainer's ``fit``."""
        total = _total_steps(trainer, offset)
        return cls(total=total, warmup=int(warmup_ratio * total), offset=offset)

    def factor(self, step: int) -> float:
        """Returns the learning rate at an optimizer step, relative to its peak."""
        step += self.offset
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))))

    def apply(self, trainer: Trainer, *, learning_rate: float, weight_decay: float) -> None:
        """Sets the peak rate, the weight decay and the current rate in restored optimizers and schedulers."""
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            rate = learning_rate * self.factor(scheduler.last_epoch)
            groups = scheduler.optimizer.param_groups
            for group in groups:
                group.update(initial_lr=learning_rate, lr=rate, weight_decay=weight_decay)
            scheduler.base_lrs, scheduler._last_lr = [learning_rate] * len(groups), [rate] * len(groups)


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Returns the number of optimizer steps per epoch, or None if the length of the data is unknown."""
    number = trainer.num_training_batches
    return None if math.isinf(number) else math.ceil(number / trainer.accumulate_grad_batches)


def _total_steps(trainer: Trainer, offset: int) -> int:
    estimated = trainer.estimated_stepping_batches
    if math.isinf(estimated):
        raise ConfigError(
            "max_epochs or max_steps is required: the learning rate decays to zero over a known number of steps."
        )
    if not offset:
        return max(int(estimated), 1)
    ends = [trainer.max_steps + offset] if trainer.max_steps > 0 else []
    per_epoch = steps_per_epoch(trainer)
    if per_epoch is not None and trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(per_epoch * trainer.max_epochs)
    return max(min(ends, default=int(estimated)), 1)


def moved_offset(saved: Mapping[str, Any], *, step: int, per_epoch: int | None) -> int:
    """Returns the schedule's offset after a resume, which preserves the number of epochs trained so far.

    Args:
        saved: ``steps_per_epoch`` and ``offset`` of the run that wrote the checkpoint.
        step: Optimizer step of the checkpoint.
        per_epoch: Optimizer steps per epoch of this run.
    """
    before: int | None = saved["steps_per_epoch"]
    offset = int(saved["offset"])
    if not before or not per_epoch or before == per_epoch:
        return offset
    return round((step + offset) / before * per_epoch) - step


def reopen_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Changes the checkpoint of an interrupted epoch so that a resumed run continues that epoch.

    If ``max_steps``, ``max_time`` or a callback stops training within an epoch, Lightning counts the epoch as finished
    before it writes checkpoints, and a resumed run would start the next epoch.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint, changed in place.
    """
    state = checkpoint.get("loops", {}).get("fit_loop")
    if state is None:
        return
    epoch, batches = state["epoch_progress"], state["epoch_loop.batch_progress"]
    if not 0 < batches["current"]["processed"] < trainer.num_training_batches:
        return
    if epoch["current"]["processed"] < epoch["current"]["started"]:  # the epoch is unfinished
        return
    for count in (epoch["current"], epoch["total"]):
        count["processed"] = count["started"] - 1
        count["completed"] = min(count["completed"], count["processed"])
    checkpoint["epoch"] = epoch["current"]["processed"]


def _distillation(settings: Any) -> dict[str, Any] | None:
    """Returns the settings of distillation that determine its result, without the folder of the cache."""
    if settings is None:
        return None
    found: dict[str, Any] = settings.to_dict()
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    return plain | {"cache": found["cache"] is not None}
