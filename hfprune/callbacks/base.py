"""What the pruning callbacks share: events, checks, strategies and the optimizer state after a cut."""

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
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from hfprune.callbacks.calibration_data import check_source
from hfprune.callbacks.target import Target
from hfprune.compensation import Compensation
from hfprune.criteria import Criterion, LayerwiseCriterion
from hfprune.models import find_spec, is_supported
from hfprune.models.surgery import cut_optimizer_state, new_names, plan_cuts
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import PruningPlan
from hfprune.pruning.calibration import check_stages
from hfprune.pruning.layerwise import check_layerwise
from hfprune.pruning.options import PruningOptions
from hfprune.pruning.sensitivity_curves import check_curves
from hfprune.recovery.lora import LoraRecovery
from hfprune.utils.errors import ConfigError


class PruningEvents:
    """Mix into a callback to be told when a model is about to be calibrated and when it has been pruned.

    Both run inside ``on_fit_start``, on every rank, in the order of ``trainer.callbacks``.
    """

    @property
    def needs_stock(self) -> bool:
        """Whether what the callback writes is described by a stock config of the model's class."""
        return False

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with the dense model in place, before calibration."""

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, plan: PruningPlan) -> None:
        """Called with the pruned model in place, before adapters are added and optimizers rebuilt."""


def listeners(trainer: Trainer) -> list[PruningEvents]:
    """Returns the trainer's callbacks that listen."""
    return [callback for callback in trainer.callbacks if isinstance(callback, PruningEvents)]  # type: ignore[attr-defined]


def needs_stock(trainer: Trainer) -> bool:
    """Returns whether a stock config has to describe what pruning leaves, because a callback writes it so."""
    return any(listener.needs_stock for listener in listeners(trainer))


def cut_restored_optimizers(checkpoint: dict[str, Any], target: Target, plan: PruningPlan, *, keep: bool) -> None:
    """Cuts, in place, the optimizer states of a dense checkpoint, which Lightning restores after pruning.

    Args:
        checkpoint: The checkpoint that Lightning is restoring.
        target: The model, still dense, and the trainer's optimizers for it.
        plan: What will be cut.
        keep: False drops states and schedules with a warning: adapters will train in place of these weights.
    """
    states = checkpoint.get("optimizer_states")
    if not states or not any(state["state"] for state in states):
        return
    if not keep:
        rank_zero_warn("The checkpoint's optimizer states belong to weights that adapters now replace: dropped.")
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        return
    cuts = plan_cuts(target.model, plan)
    gone = {name for name, after in new_names(target.model, plan).items() if after is None}
    names = {id(p): name for name, p in target.model.named_parameters()}
    lost = 0
    for optimizer, state in zip(target.module.trainer.optimizers, states, strict=True):
        order = [(names.get(id(p), ""), p.shape) for group in optimizer.param_groups for p in group["params"]]
        lost += cut_optimizer_state(state, order, cuts, gone=gone)
    if lost:
        rank_zero_warn(f"The optimizer starts afresh for {lost} parameters: its state is not of their shape.")


def average_anew(trainer: Trainer, module: LightningModule) -> None:
    """Lets weight averaging take its copy of the pruned model; the one it took in ``setup`` was dense."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.setup(trainer, module, "fit")


def check_strategy(trainer: Trainer, target: Target, method: Compensation | Criterion) -> None:
    """Raises ``ConfigError`` unless the trainer's strategy can prune ``target``; looks at nothing that is loaded.

    Args:
        trainer: The trainer.
        target: What is pruned.
        method: What runs layer by layer, if anything does.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        if isinstance(method, Compensation | LayerwiseCriterion):
            raise ConfigError(
                f"{type(method).__name__} goes through the layers one at a time, which is not supported under "
                "ModelParallelStrategy. Use a single device or DDP."
            )
        if "channels" in target.units:
            raise ConfigError(
                "Hidden channels run through embedding, layers and head, which ModelParallelStrategy gathers one at a "
                "time: leave 'channels' out of the units, or use a single device or DDP."
            )
        if _holds_experts(target):
            raise ConfigError(
                "Mixtures of experts are saved in other pieces than they have in memory, which the sharded reader of "
                "ModelParallelStrategy does not know, whatever the units: use a single device or DDP."
            )
        if not target.reloads_weights:
            raise ConfigError(
                "Under ModelParallelStrategy the pruned model must be sharded anew, and only a PruningModule knows "
                f"how; {type(target.module).__name__} shards itself. Use a PruningModule, or DDP."
            )
        size = strategy.device_mesh["tensor_parallel"].size()
        if size != 1:
            raise ConfigError(
                f"hfprune shards data-parallel (FSDP2), not tensor-parallel ({size}): use ModelParallelStrategy("
                f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
            )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            "TaylorImportanceCallback runs on a single device, under DDP, and under FSDP2 (ModelParallelStrategy); "
            f"{type(strategy).__name__} is not supported: it wraps or partitions the parameters that surgery "
            "replaces. To shard, use ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)."
        )


def _holds_experts(target: Target) -> bool:
    """Returns whether the model is known to have mixtures of experts."""
    if not target.known:
        return False
    model = target.shapes()
    return is_supported(model) and find_spec(model).experts is not None


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
    calibration = options.calibration
    if calibration.self_distillation is not None:
        check_stages(target, calibration.self_distillation, options.budget, options.allocation)
    calibration.removal.check(target, options.budget, options.allocation, options.criterion)
    target.check_recovery(recovery)
    if target.plan is None and options.calibrates:
        check_source(trainer, limit=calibration.batches)
    every, number = calibration.check_every, trainer.world_size
    if calibration.early_stop_overlap is not None and every and every % number:
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
