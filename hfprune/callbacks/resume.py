"""Settings of a pruning run that are stored in checkpoints and must not change on resume."""

import json
from dataclasses import asdict
from typing import Any

from lightning import Trainer

from hfprune.callbacks.target import Target
from hfprune.criteria import GradientCriterion, SelfDistillation
from hfprune.io.checkpoint_record import Record
from hfprune.modules import PruningModule
from hfprune.modules.resume import data_fingerprint, differences, given_seed, refuse
from hfprune.pruning.options import PruningOptions
from hfprune.pruning.rounds import Rounds

_ARGUMENTS = {"distillation": "self_distillation", "stop_when_settled": "early_stop_overlap"}
"""Setting in checkpoints -> the argument, where it has another name."""


def pruning_settings(trainer: Trainer, target: Target, options: PruningOptions, asked: str) -> dict[str, Any]:
    """Returns the settings that determine the kept units and their weights, as plain data.

    Args:
        trainer: The trainer, with its data set up.
        target: The pruning target.
        options: The options of structured pruning.
        asked: The requested budget.
    """
    settings = describe_options(options) | {
        "budget": asked,
        "objective": target.objective_name if isinstance(options.criterion, GradientCriterion) else None,
        "calibration data": data_fingerprint(trainer, "calibration") if options.calibrates else None,
        "precision": str(trainer.precision),
        "seed": given_seed(),
    }
    if not isinstance(target.module, PruningModule):  # a PruningModule compares its own settings
        settings["training"] = _training_settings(trainer)
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def describe_options(options: PruningOptions) -> dict[str, Any]:
    """Returns the options of structured pruning as plain data."""
    calibration = options.calibration
    distillation = calibration.self_distillation
    return {
        "budget": options.budget.describe(),
        "round_to": options.budget.round_to,
        "units": list(options.units),
        "allocation": options.allocation.describe() if options.allocation else None,
        "skip_layers": options.skip_layers.describe() if options.skip_layers else None,
        "criterion": options.criterion.describe(),
        "objective": options.objective,
        "distillation": asdict(distillation) if distillation else None,
        "rounds": asdict(calibration.removal),
        "depth_scores": asdict(calibration.depth) if calibration.depth else None,
        "compensation": options.compensation.describe() if options.compensation else None,
        "calibration_batches": calibration.batches,
        "exact": calibration.exact,
        "stop_when_settled": calibration.early_stop_overlap,
    }


def _training_settings(trainer: Trainer) -> dict[str, Any]:
    """Returns the optimizer settings of a user's module, before a checkpoint is restored into it."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {
        "optimizer": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "learning_rate": [float(group.get("initial_lr", group.get("lr", 0))) for group in groups],
        "weight_decay": [group.get("weight_decay") for group in groups],
        "recovery data": data_fingerprint(trainer, "recovery"),
    }


def check_settings(record: Record, now: dict[str, Any]) -> None:
    """Raises ``ConfigError`` if the settings differ from those of the resumed checkpoint."""
    if record.plan is None and record.phase != "calibrating":
        return
    before, now = dict(record.settings), dict(now)
    trained, trains = before.pop("training", {}), now.pop("training", {})
    changes = {
        _ARGUMENTS.get(name, name): [_named(name, value) for value in pair]
        for name, pair in differences(before, now).items()
    }
    refuse(changes, "calibrated" if record.phase == "calibrating" else "pruned")
    if record.phase == "training":  # the restored optimizer would keep the old values
        refuse(differences(trained, trains), "trained")


def _named(setting: str, value: Any) -> Any:
    """Returns the value of a setting for a message, with the name of its class."""
    if value is None:
        return None
    if setting == "distillation":
        return {"name": SelfDistillation.__name__, **value}
    return str(Rounds(**value)) if setting == "rounds" else value


def resumed_from(trainer: Trainer) -> str:
    """Returns " from PATH" for log lines of a resumed run, or an empty text."""
    return f" from {trainer.ckpt_path}" if trainer.ckpt_path else ""
