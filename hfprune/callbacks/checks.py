"""What a run with ``TaylorImportanceCallback`` is checked for before any weight is loaded."""

from lightning import Trainer

from hfprune.callbacks.calibrate import check_source
from hfprune.callbacks.curves import check_curves
from hfprune.callbacks.distil import check_stages
from hfprune.callbacks.layerwise import check_layerwise
from hfprune.callbacks.planner import PruningOptions
from hfprune.callbacks.strategies import check_strategy
from hfprune.callbacks.target import Target
from hfprune.errors import ConfigError
from hfprune.recovery.lora import LoraRecovery


def check_fit(trainer: Trainer, target: Target, options: PruningOptions, *, recovery: LoraRecovery | None) -> None:
    """Raises ``ConfigError`` where a trainer, what it prunes and how do not go together.

    Args:
        trainer: Before its ``fit`` loads anything.
        target: What is pruned.
        options: How.
        recovery: Adapters that it gets afterwards; None for none.
    """
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
