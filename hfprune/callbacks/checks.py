"""What a run with ``TaylorImportanceCallback`` is checked for before any weight is loaded."""

import os

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

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
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"num_nodes={trainer.num_nodes} waits for processes on other machines, and MASTER_ADDR does not say where: "
            "start every process with torchrun or srun, or give num_nodes=1."
        )
