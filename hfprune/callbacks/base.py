"""PruningCallback: common base class of structured, sparse and LoRA pruning in a Lightning ``fit``."""

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from hfprune.allocation import ResolvedBudget
from hfprune.callbacks.checkpointing import CheckpointHook, count_epoch
from hfprune.callbacks.checks import callbacks_of, check_trainer
from hfprune.callbacks.metrics import log_pruning, pruning_metrics
from hfprune.callbacks.target import Target
from hfprune.io.checkpoint_record import KEY, Record
from hfprune.io.layouts import pruned_shapes
from hfprune.models import parameter_count
from hfprune.models.surgery import cut_optimizer_state, new_names, plan_cuts
from hfprune.modules.events import PruningEvents
from hfprune.modules.resume import reopen_epoch
from hfprune.plan import PruningPlan
from hfprune.recovery.lora import LoraRecovery
from hfprune.recovery.mode import RecoveryMode, RecoverySetting
from hfprune.utils.progress import phase


def pruning_callbacks(trainer: Trainer) -> list["PruningCallback"]:
    """Returns the trainer's callbacks that prune."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, PruningCallback)]


def listeners(trainer: Trainer) -> list[PruningEvents]:
    """Returns the trainer's callbacks with pruning hooks."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, PruningEvents)]


def needs_stock(trainer: Trainer) -> bool:
    """Returns whether a callback of the trainer saves the pruned model with a stock config."""
    return any(listener.needs_stock for listener in listeners(trainer))


class PruningCallback(Callback, PruningEvents, ABC):
    """Base class of the callbacks that prune a model in ``fit``.

    Subclasses implement the methods in brackets.

    1. ``setup`` finds the model (``_find``), checks trainer, settings and shapes (``_check_run``, ``check``), and
       routes the strategy's checkpoints through the callback (``_save``, ``_load``).
    2. ``on_fit_start`` compares the settings with those of a resumed checkpoint (``_begin``). In a new run, it
       calibrates and plans (``_make_plan``), prunes (``_apply``) and adds the adapters of ``recovery``
       (``_add_adapters``). It then sets the strategy up for the pruned model (``_ready``).
    3. Lightning trains the model.
    4. ``teardown`` restores the strategy's methods and removes saved progress (``_finish``), which is kept after an
       exception.

    Attributes:
        prunes: ``units`` (neurons, heads, layers, ...), which are removed, or single ``weights``, which become zero.
        before_training: Whether the model is pruned in ``on_fit_start``, as ``PruneTrainer.prune`` requires.
        recovery_mode: The recovery mode.
        recovery: Settings of the adapters, or None without adapters.
        importance: Group name -> scores [units], after pruning; empty if single weights are pruned.
        orders: ``LAYER.NAME`` -> order of a projection's inputs, if a sparse method has permuted them.
        stock: Whether a stock config must describe the pruned model; set from the callbacks that save it.
        resume_from: Checkpoint that ``fit`` will restore, if known in advance; set by ``PruneTrainer``.
    """

    prunes: ClassVar[Literal["units", "weights"]] = "units"
    before_training: ClassVar[bool] = True

    def __init__(self, *, recovery: RecoverySetting = "full") -> None:
        self.recovery_mode = RecoveryMode(recovery)
        self.recovery: LoraRecovery | None = self.recovery_mode.lora
        self.importance: dict[str, torch.Tensor] = {}
        self.stock = False
        self.resume_from: str | Path | None = None
        self._target: Target | None = None
        self._record: Record | None = None
        self._checkpoints: CheckpointHook | None = None
        self._settings: dict[str, Any] = {}
        self._failed = False

    # ---- public interface --------------------------------------------------------------------------------------------

    @property
    def plan(self) -> PruningPlan | None:
        """Plan that was applied to the model, or None."""
        return None if self._target is None else self._target.plan

    @property
    def target(self) -> Target | None:
        """Target of this callback: the model and its LightningModule; None before ``setup``."""
        return self._target

    def find_target(self, module: LightningModule) -> Target:
        """Returns the target of this callback in ``module``.

        Raises:
            ConfigError: The module has nothing that this callback can prune.
        """
        return self._find(module)

    @property
    def orders(self) -> dict[str, torch.Tensor]:
        """Input orders of permuted sparse projections."""
        return {}

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine what is pruned, as plain data."""

    @abstractmethod
    def check(self, module: LightningModule) -> ResolvedBudget | None:
        """Checks the settings against the shapes of ``module``'s model; loads no weights.

        Args:
            module: The module to prune.

        Returns:
            The budget resolved for the model; None if the model is not known yet, or without a budget of units.

        Raises:
            ConfigError: The settings are impossible for the model.
            UnsupportedArchitectureError: The model's class is unknown.
        """

    def check_stock(self, module: LightningModule) -> None:
        """Raises ``UnsupportedArchitectureError`` unless a stock config can describe the pruned model."""
        resolved, target = self.check(module), self._find(module)
        if resolved is not None and target.plan is None:
            target.check_stock(resolved)

    def expected_model(self, module: LightningModule) -> Any:
        """Returns a Hugging Face model on the meta device with the shapes of the pruned model.

        None if the shapes are not known yet or do not change, and for a module that is already pruned.
        """
        resolved, target = self.check(module), self._find(module)
        if resolved is None or target.plan is not None or resolved.provisional:
            return None
        return pruned_shapes(target.shapes(), target.outline(resolved))

    # ---- implemented by subclasses -----------------------------------------------------------------------------------

    @abstractmethod
    def _find(self, module: LightningModule) -> Target:
        """Returns the pruning target in ``module``."""

    @abstractmethod
    def _check_run(self, trainer: Trainer, target: Target) -> None:
        """Raises ``ConfigError`` if trainer, model and settings are incompatible; loads no weights."""

    def _announce(self, trainer: Trainer, resolved: ResolvedBudget | None) -> None:
        """Logs the resolved budget at the end of ``setup``."""

    def _begin(self, trainer: Trainer, target: Target) -> None:
        """Raises ``ConfigError`` if the resumed checkpoint was pruned with other settings."""

    @abstractmethod
    def _make_plan(self, trainer: Trainer, target: Target) -> PruningPlan:
        """Calibrates and returns the plan, the same on every rank."""

    def _apply(self, target: Target, plan: PruningPlan) -> None:
        """Prunes the model."""
        target.apply_plan(plan)

    def _add_adapters(self, target: Target) -> None:
        """Adds the adapters of ``recovery``."""
        if self.recovery is not None:
            target.add_lora(self.recovery)

    def _ready(self, trainer: Trainer, target: Target, *, pruned: bool) -> None:
        """Called at the end of ``on_fit_start``; ``pruned`` is False if a pruned model was resumed."""

    def _finish(self, trainer: Trainer) -> None:
        """Removes the saved progress of a finished run; called on every rank."""

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks settings, trainer and model, before any weight is loaded."""
        self.stock = needs_stock(trainer)
        self._target, self._record, self._failed = self._find(pl_module), None, False
        if stage == "fit":
            self.recovery_mode.start(trainer, pl_module)
            check_trainer(trainer, pl_module, pruned=self.before_training and self._target.plan is not None)
            self._check_run(trainer, self._target)
            resolved = self.check(pl_module)
            self._target.check_recovery(self.recovery)
            self._announce(trainer, resolved)
        self._checkpoints = CheckpointHook(
            trainer, saving=lambda c: self._save(trainer, c), loaded=lambda c: self._load(trainer, c)
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrates, prunes, adds adapters and sets the strategy up again."""
        target = self._target
        assert target is not None
        self._begin(trainer, target)
        target.check_training(adapters=self.recovery is not None)
        pruned = target.plan is None
        if pruned:
            self._start(trainer, target)
            self._prune(trainer, pl_module, target)
            self._set_up_again(trainer)
        elif target.lacks_adapters(self.recovery, self._record):
            self._add_adapters(target)
            self._set_up_again(trainer)
        self._ready(trainer, target, pruned=pruned)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Corrects the epoch count of a resumed run."""
        count_epoch(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the strategy's methods and removes the saved progress of a finished run."""
        self._detach()
        self.recovery_mode.end(trainer)
        if stage == "fit" and not self._failed:
            self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the strategy's methods; saved progress is kept for a resume."""
        self._detach()
        self.recovery_mode.end(trainer)
        self._failed = True

    # ---- the work ----------------------------------------------------------------------------------------------------

    def _start(self, trainer: Trainer, target: Target) -> None:
        """Sets the seed of the run, equal on every rank; a resumed run has the seed of its checkpoint."""
        seed = self._record.seed if self._record else torch.initial_seed() % 2**32
        target.start(trainer.strategy.broadcast(seed))

    def _prune(self, trainer: Trainer, module: LightningModule, target: Target) -> None:
        for listener in listeners(trainer):
            listener.on_pruning_start(trainer, module)
        start = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):  # compiled modules call no hooks
            plan = self._make_plan(trainer, target)
        self._cut(trainer, module, plan, seconds=time.perf_counter() - start)
        self._add_adapters(target)

    def _cut(self, trainer: Trainer, module: LightningModule, plan: PruningPlan, *, seconds: float | None) -> None:
        """Applies the plan, logs the pruning metrics and calls the listeners."""
        target = self._target
        assert target is not None
        before = parameter_count(target.model)
        with phase("pruning"):
            self._apply(target, plan)
        after = parameter_count(target.model)
        log_pruning(trainer, pruning_metrics(plan, before=before, after=after, calibration_seconds=seconds))
        for listener in listeners(trainer):
            listener.on_pruning_end(trainer, module, plan)

    def _set_up_again(self, trainer: Trainer) -> None:
        """Sets the strategy up again: wraps the pruned model, and builds optimizers, schedulers and averages for it."""
        _average_again(trainer)
        trainer.strategy.model = trainer.lightning_module
        trainer.strategy.setup(trainer)

    def _detach(self) -> None:
        """Removes the callback's hooks from strategy and model."""
        if self._checkpoints is not None:
            self._checkpoints.detach()
            self._checkpoints = None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the pruning state to a checkpoint that is saved after the run: the strategy is not changed any more."""
        if self._checkpoints is None and self._target is not None and self._target.plan is not None:
            record = self._target.record("training", None)
            checkpoint[KEY] = replace(record, settings=self._settings).to_dict()

    def _save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Adds the pruning state to a checkpoint before it is written."""
        assert self._target is not None
        checkpoint[KEY] = replace(self._target.record("training", None), settings=self._settings).to_dict()
        reopen_epoch(trainer, checkpoint)

    def _load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the shapes of a checkpoint after it is read, before anything is restored from it."""
        self._record = Record.of(checkpoint)
        if self._record is not None:
            self._replay(trainer, self._record)

    def _replay(self, trainer: Trainer, record: Record) -> None:
        assert self._target is not None
        self._target.replay(record)
        _average_again(trainer)


def cut_restored_optimizers(checkpoint: dict[str, Any], target: Target, plan: PruningPlan, *, keep: bool) -> None:
    """Cuts the optimizer states of a dense checkpoint in place; Lightning restores them after pruning.

    Args:
        checkpoint: The checkpoint that Lightning is restoring.
        target: The dense model and its optimizers.
        plan: The pruning plan.
        keep: Whether states and schedules are kept; False drops them with a warning, since adapters are trained.
    """
    states = checkpoint.get("optimizer_states")
    if not states or not any(state["state"] for state in states):
        return
    if not keep:
        rank_zero_warn("The checkpoint's optimizer states are dropped: adapters are trained instead of the weights.")
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        return
    cuts = plan_cuts(target.model, plan)
    removed = {name for name, after in new_names(target.model, plan).items() if after is None}
    names = {id(p): name for name, p in target.model.named_parameters()}
    lost = 0
    for optimizer, state in zip(target.module.trainer.optimizers, states, strict=True):
        order = [(names.get(id(p), ""), p.shape) for group in optimizer.param_groups for p in group["params"]]
        lost += cut_optimizer_state(state, order, cuts, removed=removed)
    if lost:
        rank_zero_warn(f"The optimizer state of {lost} parameters is reset: its shapes do not match.")


def _average_again(trainer: Trainer) -> None:
    """Restarts weight averaging with the pruned model; its ``setup`` has copied the dense model."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging):
            callback.setup(trainer, trainer.lightning_module, "fit")
