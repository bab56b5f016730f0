"""What a run with ``TaylorImportanceCallback`` is checked for before any weight is loaded."""

import os
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)

from hfprune.callbacks.calibrate import check_source
from hfprune.callbacks.curves import check_curves
from hfprune.callbacks.distil import check_stages
from hfprune.callbacks.layerwise import check_layerwise
from hfprune.callbacks.planner import PruningOptions
from hfprune.callbacks.strategies import check_strategy
from hfprune.callbacks.target import Target
from hfprune.errors import ConfigError
from hfprune.modules.causal_lm import PruningModule
from hfprune.recovery.lora import LoraRecovery


def check_fit(trainer: Trainer, target: Target, options: PruningOptions, *, recovery: LoraRecovery | None) -> None:
    """Raises ``ConfigError`` where a trainer, what it prunes and how do not go together.

    Args:
        trainer: Before its ``fit`` loads anything.
        target: What is pruned.
        options: How.
        recovery: Adapters that it gets afterwards; None for none.
    """
    check_trainer(trainer, target.module, pruned=target.plan is not None)
    check_strategy(trainer, target, options.compensation or options.criterion)
    check_layerwise(target, options.criterion, options.compensation, options.allocation)
    check_curves(target, options.allocation)
    if options.distillation is not None:
        check_stages(target, options.distillation, options.budget, options.allocation)
    options.rounds.check(target, options.budget, options.allocation, options.criterion)
    target.check_recovery(recovery)
    if target.plan is None and options.calibrates:
        check_source(trainer, limit=options.calibration_batches)
    every, number = options.look_every, trainer.world_size
    if options.stop_when_settled is not None and every and every % number:
        raise ConfigError(f"--importance.look_every {every} is not a multiple of {number} processes.")


def check_trainer(trainer: Trainer, module: LightningModule, *, pruned: bool = False) -> None:
    """Raises ``ConfigError`` for settings of a trainer under which pruning or recovery would not do what they say.

    Args:
        trainer: Before its ``fit`` loads anything.
        module: What it trains.
        pruned: Whether the module is pruned already.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    finder = next((c for c in callbacks if isinstance(c, LearningRateFinder | BatchSizeFinder)), None)
    if finder is not None and not pruned:
        raise ConfigError(
            f"{type(finder).__name__} would run on the dense model with all of its weights, before pruning, and not on "
            "what recovery trains. Prune first, then use it on a module that holds the pruned model."
        )
    endless = trainer.max_epochs == -1 and trainer.max_steps == -1 and trainer.limit_train_batches != 0
    if endless and isinstance(module, PruningModule):
        raise ConfigError(
            "The learning rate of recovery decays to zero over a known number of steps: give max_epochs or max_steps."
        )
    if trainer.limit_train_batches != 0:
        _check_loggers(trainer)
        _check_monitors(trainer, module)
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"num_nodes={trainer.num_nodes} waits for processes on other machines, and MASTER_ADDR does not say where: "
            "start every process with torchrun or srun, or give num_nodes=1."
        )


def _check_loggers(trainer: Trainer) -> None:
    """Raises ``ConfigError`` for a callback that finds out after calibration that there is no logger to write to."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not trainer.loggers and any(isinstance(callback, LearningRateMonitor) for callback in callbacks):
        raise ConfigError("LearningRateMonitor writes to a logger, and logger=False: give a logger, or leave it out.")


def _check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Raises ``ConfigError`` for a callback that monitors a figure which a ``PruningModule`` will not log.

    A callback of the user's own may log any figure: with one, unknown names are accepted.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not isinstance(module, PruningModule):
        return
    logged = module.logged_figures()
    silent = trainer.limit_val_batches == 0
    known = [name for name in logged if not (silent and name.startswith("val_"))]
    own = any(type(c).__module__.partition(".")[0] not in ("lightning", "hfprune") for c in callbacks)
    rates = any(isinstance(c, LearningRateMonitor) for c in callbacks)
    for callback in callbacks:
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or not getattr(callback, "strict", True):
            continue
        name = callback.monitor
        if name is None or name in known or (rates and name.startswith("lr-")):
            continue
        who = f"{type(callback).__name__}(monitor='{name}')"
        if name in logged:
            raise ConfigError(f"{who} waits for a figure of validation, and limit_val_batches=0 leaves that out.")
        if not own:
            raise ConfigError(f"{who} waits for a figure that is not logged. Logged are: {', '.join(known)}.")
