"""The settings of a pruning run that its checkpoints carry, and that a resumed run must share."""

import json
from dataclasses import asdict
from typing import Any

from lightning import Trainer

from hfprune.callbacks.target import Target
from hfprune.criteria import GradientCriterion, SelfDistillation
from hfprune.io.checkpoint_record import Record
from hfprune.modules import PruningModule
from hfprune.modules.resume import data_fingerprint, differences, given_seed, refuse
from hfprune.pruning.planner import PruningOptions
from hfprune.pruning.rounds import Rounds


def pruning_settings(trainer: Trainer, target: Target, options: PruningOptions, asked: str) -> dict[str, Any]:
    """Returns what decides which units are kept, and with which weights, as plain data.

    Args:
        trainer: The trainer, its data set up.
        target: What is pruned.
        options: How.
        asked: The budget.
    """
    found = {
        "budget": asked,
        "round_to": options.budget.round_to,
        "units": list(options.units),
        "allocation": options.allocation.describe() if options.allocation else None,
        "criterion": options.criterion.describe(),
        "objective": target.objective_name if isinstance(options.criterion, GradientCriterion) else None,
        "distillation": asdict(options.distillation) if options.distillation else None,
        "rounds": asdict(options.rounds),
        "compensation": options.compensation.describe() if options.compensation else None,
        "calibration_batches": options.calibration_batches,
        "exact": options.exact,
        "stop_when_settled": options.stop_when_settled,
        "calibration data": data_fingerprint(trainer, "calibration") if options.calibrates else None,
        "precision": str(trainer.precision),
        "seed": given_seed(),
    }
    if not isinstance(target.module, PruningModule):  # which compares its own
        found["training"] = _training_settings(trainer)
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _training_settings(trainer: Trainer) -> dict[str, Any]:
    """Returns what the training of a module of one's own was given, before a checkpoint is restored into it."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {
        "optimizer": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "learning_rate": [float(group.get("initial_lr", group.get("lr", 0))) for group in groups],
        "weight_decay": [group.get("weight_decay") for group in groups],
        "recovery data": data_fingerprint(trainer, "recovery"),
    }


def check_settings(record: Record, now: dict[str, Any]) -> None:
    """Raises ``ConfigError`` where a run goes on from a checkpoint with settings that its pruning did not have."""
    if record.plan is None and record.phase != "calibrating":
        return
    before, now = dict(record.settings), dict(now)
    trained, trains = before.pop("training", {}), now.pop("training", {})
    changes = {name: [_named(name, value) for value in pair] for name, pair in differences(before, now).items()}
    refuse(changes, "calibrated" if record.phase == "calibrating" else "pruned")
    if record.phase == "training":  # the restored optimizer would keep the old values
        refuse(differences(trained, trains), "trained")


def _named(setting: str, value: Any) -> Any:
    """Returns a value of a setting for a message: with the name of its class, or as that class says it."""
    if value is None:
        return None
    if setting == "distillation":
        return {"name": SelfDistillation.__name__, **value}
    return str(Rounds(**value)) if setting == "rounds" else value


def whence(trainer: Trainer) -> str:
    """Returns which checkpoint a trainer has resumed from, for a log line; an empty text without one."""
    return f" from {trainer.ckpt_path}" if trainer.ckpt_path else ""
