"""Checks of the trainer: settings, strategies and callbacks that pruning or recovery does not support."""

import os

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from hfprune.callbacks.calibration_data import check_source
from hfprune.callbacks.target import Target
from hfprune.compensation import Compensation
from hfprune.criteria import Criterion, LayerwiseCriterion
from hfprune.models import find_spec, is_supported
from hfprune.modules.causal_lm import PruningModule
from hfprune.pruning.layerwise import check_layerwise
from hfprune.pruning.options import PruningOptions
from hfprune.pruning.removal_scores import check_depth
from hfprune.pruning.sensitivity_curves import check_curves
from hfprune.pruning.two_stages import check_stages
from hfprune.utils.errors import ConfigError


def check_positive(**values: float | None) -> None:
    """Raises ``ConfigError`` for the first argument that is not None and not positive."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value} must be positive.")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def check_strategy(trainer: Trainer, target: Target, method: Compensation | Criterion) -> None:
    """Raises ``ConfigError`` unless the trainer's strategy can prune ``target``; loads no weights.

    Args:
        trainer: The trainer.
        target: The model to prune.
        method: The compensation, else the criterion.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        if isinstance(method, Compensation | LayerwiseCriterion):
            raise ConfigError(
                f"{type(method).__name__} runs layer by layer, which is not supported under ModelParallelStrategy. Use "
                "a single device or DDP."
            )
        if "channels" in target.units:
            raise ConfigError(
                "units='channels' is not supported under ModelParallelStrategy: hidden channels run through embedding, "
                "layers and head, which are gathered one at a time. Use a single device or DDP."
            )
        if _holds_experts(target):
            raise ConfigError(
                "Mixture-of-experts models are not supported under ModelParallelStrategy: their weights are stored in "
                "other tensors than they have in memory. Use a single device or DDP."
            )
        if not target.reloads_weights:
            raise ConfigError(
                f"{type(target.module).__name__} shards its model itself, so that hfprune cannot shard the pruned one. "
                "Use a PruningModule under ModelParallelStrategy, or DDP."
            )
        size = strategy.device_mesh["tensor_parallel"].size()
        if size != 1:
            raise ConfigError(
                f"hfprune shards data-parallel (FSDP2), not tensor-parallel ({size}): use ModelParallelStrategy("
                f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
            )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            "Structured pruning runs on a single device, under DDP and under FSDP2 (ModelParallelStrategy); "
            f"{type(strategy).__name__} is not supported: it wraps or partitions the parameters that surgery "
            "replaces. To shard, use ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)."
        )


def _holds_experts(target: Target) -> bool:
    """Returns whether the model is known to have mixtures of experts."""
    if not target.known:
        return False
    model = target.shapes()
    return is_supported(model) and find_spec(model).experts is not None


def check_fit(trainer: Trainer, target: Target, options: PruningOptions) -> None:
    """Raises ``ConfigError`` if trainer, model and options of structured pruning are incompatible.

    Args:
        trainer: The trainer, before ``fit`` loads weights.
        target: The pruning target.
        options: The options of structured pruning.
    """
    check_strategy(trainer, target, options.compensation or options.criterion)
    check_layerwise(target, options.criterion, options.compensation, options.allocation)
    sharded = target.sharded or isinstance(trainer.strategy, ModelParallelStrategy)  # no model before it is loaded
    check_curves(target, options.allocation, sharded=sharded)
    check_depth(target, options.calibration.depth, sharded=sharded)
    calibration = options.calibration
    if calibration.self_distillation is not None:
        check_stages(target, calibration.self_distillation, options.budget, options.allocation)
    calibration.removal.check(target, options.budget, options.allocation, options.criterion)
    if target.plan is None and options.calibrates:
        check_source(trainer, limit=calibration.batches)
    every, number = calibration.check_every, trainer.world_size
    if calibration.early_stop_overlap is not None and every and every % number:
        raise ConfigError(
            f"check_every={every} must be a multiple of the {number} processes, so that early "
            "stopping ends every run at the same sequence."
        )


def check_trainer(trainer: Trainer, module: LightningModule, *, pruned: bool = False) -> None:
    """Raises ``ConfigError`` for trainer settings that pruning or recovery does not support.

    Args:
        trainer: The trainer, before ``fit`` loads weights.
        module: The module that it trains.
        pruned: Whether the module is already pruned.
    """
    callbacks = callbacks_of(trainer)
    finder = next((c for c in callbacks if isinstance(c, LearningRateFinder | BatchSizeFinder)), None)
    if finder is not None and not pruned:
        raise ConfigError(
            f"{type(finder).__name__} runs before pruning, on the dense model. Prune first, then use it with a module "
            "of the pruned model."
        )
    endless = trainer.max_epochs == -1 and trainer.max_steps == -1 and trainer.limit_train_batches != 0
    if endless and isinstance(module, PruningModule):
        raise ConfigError(
            "max_epochs or max_steps is required: the learning rate decays to zero over a known number of steps."
        )
    if trainer.limit_train_batches != 0:
        _check_loggers(trainer)
        _check_monitors(trainer, module)
    check_nodes(trainer)


def check_nodes(trainer: Trainer) -> None:
    """Raises ``ConfigError`` for several nodes that no launcher connects: Lightning would wait for the others."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"num_nodes={trainer.num_nodes} requires the environment variable MASTER_ADDR: start every process with "
            "torchrun or srun, or use num_nodes=1."
        )


def _check_loggers(trainer: Trainer) -> None:
    """Raises ``ConfigError`` for a callback that needs a logger; Lightning only checks after calibration."""
    callbacks = callbacks_of(trainer)
    if not trainer.loggers and any(isinstance(callback, LearningRateMonitor) for callback in callbacks):
        raise ConfigError("LearningRateMonitor needs a logger, and logger=False: set a logger, or remove the callback.")


def _check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Raises ``ConfigError`` for a callback that monitors a metric not logged by a ``PruningModule``.

    Unknown names are accepted if other callbacks are present, which may log any metric.
    """
    callbacks = callbacks_of(trainer)
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
            raise ConfigError(f"{who} needs a validation metric, and limit_val_batches=0 disables validation.")
        if not own:
            raise ConfigError(f"{who} needs a metric that is not logged. Logged are: {', '.join(known)}.")
