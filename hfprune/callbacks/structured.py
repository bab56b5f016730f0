"""``TaylorImportanceCallback``: calibrates and prunes inside ``fit``, before the first training step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from hfprune.allocation import Allocation, ResolvedBudget
from hfprune.callbacks.base import average_anew, check_fit, cut_restored_optimizers, listeners, needs_stock
from hfprune.callbacks.calibration_data import calibration_data
from hfprune.callbacks.checkpointing import CheckpointTap, count_epoch
from hfprune.callbacks.communicator import LightningCommunicator, say, warn
from hfprune.callbacks.resume import check_settings, pruning_settings, whence
from hfprune.callbacks.target import Target
from hfprune.callbacks.user_module import find_target
from hfprune.compensation import Compensation
from hfprune.criteria import ActivationTaylor, Criterion, SelfDistillation
from hfprune.io.checkpoint_record import KEY, Phase, Record, read_metadata
from hfprune.io.layouts import pruned_shapes
from hfprune.models import Neurons, check_units, parameter_count
from hfprune.modules.resume import keep_cut_epoch
from hfprune.plan import Budget, UnitKind, unit_kinds
from hfprune.pruning.options import CalibrationOptions, PruningOptions
from hfprune.pruning.planner import Planner, check_scored
from hfprune.pruning.rounds import Schedule
from hfprune.recovery.mode import RecoveryMode, RecoverySetting
from hfprune.utils.errors import ConfigError

PROGRESS_CHECKPOINT = "last-pruning.ckpt"
"""Written beside the checkpoints of a ``ModelCheckpoint`` until the fit has ended; ``ckpt_path="last"`` finds it."""


class TaylorImportanceCallback(Callback):
    """Accumulates importance over the calibration batches in ``on_fit_start``, prunes, and hands over to recovery.

    After it, the strategy is set up a second time: it wraps the small model and rebuilds optimizers and schedulers, so
    ``global_step``, schedules and checkpoints count recovery only.

    It works on a ``PruningModule`` or on any LightningModule that contains one supported Hugging Face model, or neurons
    described by ``neurons``, on a single device, under DDP, and, with a ``PruningModule``, under FSDP2
    (``ModelParallelStrategy``).

    With a ``ModelCheckpoint`` in the trainer, progress is saved beside its checkpoints, and ``fit(ckpt_path="last")``
    continues within the calibration data, between pruning and recovery, or in recovery, also with another number of
    processes.

    Args:
        pruning_ratio: Share of ALL parameters to remove, in (0, 1).
        target_params: Number of parameters to keep.
        intermediate_size: MLP width to keep.
        mlp_ratio: MLP width to keep as a multiple of the hidden size (the HFPrune script's flag).
        round_to: Kept MLP widths and hidden sizes are multiples of this; 1 gives exact numbers, 64 or 128 fast kernels.
        units: What may be removed: ``mlp`` (neurons), ``heads`` (a key-value head with the query heads that read it),
            ``experts`` (of mixtures), ``layers`` (whole layers), ``channels`` (hidden channels of the residual
            stream), or several of these.
        allocation: How the budget is spread over groups: ``Uniform()`` by default, ``Protected``, ``GlobalRank``,
            ``CosineSoftmax``, ``Sensitivity``. ``Explicit(...)`` and ``share=...`` say themselves how much goes, and
            take the place of a budget.
        criterion: How activations and gradients become scores; HFPrune's per-token activation Taylor by default.
        objective: ``entropy``, ``cross_entropy`` or ``sampled``, of the wrapped model's logits. None takes the
            criterion's own, else a ``PruningModule``'s objective or the loss of the ``training_step`` of a module of
            your own. Criteria that read weights or activations alone take none.
        distillation: Two stages of calibration, with the dense model as the teacher (SDMPrune); None for one.
        rounds: Prune in so many rounds: units go a part at a time, and what is left is scored anew on the calibration
            data before the next part goes.
        schedule: How much of the removal is done after a share x of the rounds: ``cubic``, 1 - (1 - x)^3, or
            ``linear``.
        compensation: Fit the projections that read pruned units anew, layer by layer on the calibration data and in
            closed form, before any training: ``LeastSquares()``, for example. None leaves the kept weights.
        recovery: What is trained after pruning: ``"lora"`` or a ``LoraRecovery`` (adapters), ``"full"`` (all weights),
            ``"mlp"`` (projections of the MLPs) or ``"none"`` (nothing); see
            :class:`~hfprune.recovery.mode.RecoveryMode`.
        calibration_batches: Use at most this many batches of the calibration data; needed when these are the training
            data.
        exact: Run each sequence alone, without padding: kept units are then the same, bit for bit, whatever the batch
            size, padding, packing or number of processes. False runs batches as they come: faster on a GPU when
            sequences are short, and equal up to float rounding.
        checkpoint_every: Save progress each time that about so many sequences (batches, where these are run as they
            come) were done; None never does.
        look_every: Look at the units that would be kept each time that so many sequences (or batches) were done, for
            the report's convergence curve; None never does.
        stop_when_settled: End calibration when two looks in a row find this share of the kept units unchanged since the
            look before, for example 0.99; None runs all the data. With several processes ``look_every`` must be a
            multiple of their number, so that every run stops at the same sequence.
        model: Name of the Hugging Face model within a module of your own, needed when it holds several.
        neurons: Neurons of a module of your own that holds no Hugging Face model.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        pruning_ratio: float | None = None,
        target_params: int | None = None,
        intermediate_size: int | None = None,
        mlp_ratio: float | None = None,
        round_to: int = 1,
        units: Sequence[UnitKind] = ("mlp",),
        allocation: Allocation | None = None,
        criterion: Criterion | None = None,
        objective: str | None = None,
        distillation: SelfDistillation | None = None,
        rounds: int = 1,
        schedule: Schedule = "cubic",
        compensation: Compensation | None = None,
        recovery: RecoverySetting = "full",
        calibration_batches: int | None = None,
        exact: bool = True,
        checkpoint_every: int | None = 64,
        look_every: int | None = 16,
        stop_when_settled: float | None = None,
        model: str | None = None,
        neurons: Sequence[Neurons] = (),
    ) -> None:
        counts = {
            "calibration_batches": calibration_batches,
            "checkpoint_every": checkpoint_every,
            "look_every": look_every,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(f"--importance.{name} {value} is not positive.")
        if stop_when_settled is not None and (not 0 < stop_when_settled <= 1 or look_every is None):
            raise ConfigError(
                f"--importance.stop_when_settled {stop_when_settled} is a share in (0, 1], and needs look_every."
            )
        budget = Budget(
            pruning_ratio=pruning_ratio,
            target_params=target_params,
            intermediate_size=intermediate_size,
            mlp_ratio=mlp_ratio,
            round_to=round_to,
            allocated=allocation is not None and allocation.own_budget,
        )
        kinds = unit_kinds(units)
        check_units(kinds)
        self.options = PruningOptions(
            budget=budget,
            units=kinds,
            allocation=allocation,
            criterion=criterion or ActivationTaylor(),
            objective=objective,
            compensation=compensation,
            calibration=CalibrationOptions(
                batches=calibration_batches,
                exact=exact,
                checkpoint_every=checkpoint_every,
                check_every=look_every,
                early_stop_overlap=stop_when_settled,
                rounds=rounds,
                schedule=schedule,
                self_distillation=distillation,
            ),
        )
        self.recovery_mode = RecoveryMode(recovery)
        self.recovery, self.checkpoint_every = self.recovery_mode.lora, checkpoint_every
        self.model, self.neurons = model, tuple(neurons)
        self.importance: dict[str, torch.Tensor] = {}
        self.convergence: list[tuple[int, float]] = []
        """Calibration tokens, and the share of the finally kept units that were kept after so many."""
        self.resolved: ResolvedBudget | None = None
        self.resume_from: str | Path | None = None
        """Checkpoint that ``fit`` will restore, where that is known beforehand (``PruneTrainer`` sets it)."""
        self.stock = False
        """Whether a stock config has to describe what is left: a callback of the trainer writes it so."""
        self._target: Target | None = None
        self._tap: CheckpointTap | None = None
        self._phase: Phase = "training"
        self._planner: Planner | None = None
        self._record: Record | None = None
        self._loaded: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, module: LightningModule) -> ResolvedBudget | None:
        """Returns what the budget means for ``module``'s model, from its shapes alone.

        None where these are not known yet: a module of your own that makes its model in ``configure_model``.

        Raises:
            ConfigError: There is nothing to prune in the module, the criterion does not score what is in its layers, or
                the budget is impossible for it.
            UnsupportedArchitectureError: No table describes the model's class.
        """
        target = self._find(module)
        if target.plan is not None and self.resolved is not None:  # fitted before: it is pruned already
            return self.resolved
        self.resolved = None
        if target.known:
            settles = self.options.calibration.early_stop_overlap is not None
            check_scored(target, self.options.criterion, settles=settles)
            self.resolved = target.resolve(self.options.budget, self.options.allocation)
        return self.resolved

    def check_stock(self, module: LightningModule) -> None:
        """Raises unless a stock config can describe what the budget will leave of ``module``'s model.

        Raises:
            UnsupportedArchitectureError: It cannot; the message says what it could.
        """
        resolved, target = self.check(module), self._find(module)
        if resolved is not None and target.plan is None:
            target.check_stock(resolved)

    def planned(self, module: LightningModule) -> Any:
        """Returns a Hugging Face model on the meta device that has the shapes which pruning will leave.

        None where these are not known yet, and for a module that is pruned already.
        """
        resolved, target = self.check(module), self._find(module)
        if resolved is None or target.plan is not None or resolved.provisional:
            return None
        return pruned_shapes(target.shapes(), target.outline(resolved))

    def _find(self, module: LightningModule) -> Target:
        options = self.options
        objective = options.target_objective(described=bool(self.neurons))
        target = find_target(module, objective=objective, model=self.model, neurons=self.neurons)
        target.units, target.stock = options.units, self.stock
        return target

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the budget and what is around the callback, before any weight is loaded."""
        self.stock = needs_stock(trainer)
        self._target = self._find(pl_module)
        self._record, self._loaded, self._phase = None, {}, "training"
        if stage == "fit":
            self.recovery_mode.start(trainer, pl_module)
            check_fit(trainer, self._target, self.options, recovery=self.recovery)
            resolved = self.check(pl_module)
            if resolved is not None and self._target.plan is None:
                warn(trainer, resolved.warning)
        self._tap = CheckpointTap(
            trainer, saving=lambda c: self._save(trainer, c), loaded=lambda c: self._load(trainer, c)
        )
        if stage == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            path = self.resume_from or trainer.ckpt_path
            if path is not None:  # "last" and the like become a file
                path = trainer._checkpoint_connector._parse_ckpt_path(
                    TrainerFn.FITTING, path, model_provided=True, model_connected=True
                )
            self._record = Record.of(read_metadata(path)) if path else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps count of epochs across resumes."""
        count_epoch(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the strategy back as it was; what ``fit`` was to leave is there, so its progress is not needed."""
        self._detach()
        self.recovery_mode.end(trainer)
        path = _progress_path(trainer)
        if stage == "fit" and path is not None and trainer.is_global_zero and path.exists():
            trainer.strategy.remove_checkpoint(path)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the strategy back as it was."""
        self._detach()
        self.recovery_mode.end(trainer)

    def _detach(self) -> None:
        if self._tap is not None:
            self._tap.detach()
            self._tap = None

    # ---- the work ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrates, prunes, adds adapters and sets the strategy up again."""
        target = self._target
        assert target is not None
        if self._record is not None and self._record.plan is not None and target.plan is None:  # a sharded strategy
            self._replay(trainer, self._record)
            self._set_up_again(trainer)
        resolved = self.resolved or target.resolve(self.options.budget, self.options.allocation)
        self.resolved = resolved
        self._settings = pruning_settings(trainer, target, self.options, resolved.asked)
        if self._record is not None:
            check_settings(self._record, self._settings)
        target.check_training(adapters=self.recovery is not None)
        if target.plan is not None:
            made = target.plan.provenance["budget"]["asked"]
            if made != resolved.asked:
                raise ConfigError(f"The checkpoint was pruned with {made}; this run asks for {resolved.asked}.")
            say(trainer, f"Resumed a pruned model ({resolved.asked}){whence(trainer)}: no calibration.")
            if target.lacks_adapters(self.recovery, self._record) and self.recovery is not None:
                target.add_lora(self.recovery)
                self._set_up_again(trainer)
            return
        seed = self._record.seed if self._record else torch.initial_seed() % 2**32
        target.start(trainer.strategy.broadcast(seed))
        self._prune(trainer, pl_module, target, resolved)
        self._set_up_again(trainer)
        self._phase = "pruned"
        self._save_progress(trainer)
        self._phase, self._loaded = "training", {}

    def _prune(self, trainer: Trainer, module: LightningModule, target: Target, resolved: ResolvedBudget) -> None:
        for listener in listeners(trainer):
            listener.on_pruning_start(trainer, module)
        say(trainer, resolved.describe())
        groups = target.groups(target.model)
        record = self._record
        self._planner = planner = Planner(
            target,
            calibration_data(trainer, target.record("calibrating", None).seed),
            self.options,
            LightningCommunicator(trainer),
            saved=record.calibration if record is not None else None,
            save=lambda: self._save_progress(trainer),
            progress=trainer.progress_bar_callback is not None,
        )
        try:
            with torch.compiler.set_stance("force_eager"):  # hooks see nothing of compiled modules
                plan, resolved = planner.plan(groups, resolved)
        finally:
            self._planner = None
        self.importance, self.convergence, self.resolved = planner.importance, planner.convergence, resolved
        if self._loaded:
            cut_restored_optimizers(self._loaded, target, plan, keep=self.recovery is None)
        target.apply_plan(plan)
        found = parameter_count(target.model)
        assert found == resolved.params, f"surgery left {found} parameters, not {resolved.params}"
        for listener in listeners(trainer):
            listener.on_pruning_end(trainer, module, plan)
        if self.recovery is not None:
            target.add_lora(self.recovery)
        average_anew(trainer, module)

    def _set_up_again(self, trainer: Trainer) -> None:
        """Wraps the model as it is now, and builds optimizers and schedulers for it."""
        trainer.strategy.model = trainer.lightning_module
        trainer.strategy.setup(trainer)

    def _replay(self, trainer: Trainer, record: Record) -> None:
        assert self._target is not None
        self._target.replay(record)
        average_anew(trainer, trainer.lightning_module)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_progress(self, trainer: Trainer) -> None:
        path = _progress_path(trainer)
        if path is not None and self.checkpoint_every is not None:
            trainer.save_checkpoint(path, weights_only=True)  # optimizers have no state yet

    def _save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Adds the pruning state to a checkpoint that is about to be written."""
        assert self._target is not None
        calibration = self._planner.calibration if self._planner is not None else None
        phase: Phase = "calibrating" if calibration is not None else self._phase
        state = calibration.state() if calibration is not None else None
        checkpoint[KEY] = replace(self._target.record(phase, state), settings=self._settings).to_dict()
        keep_cut_epoch(trainer, checkpoint)
        if phase == "training":
            return
        # training has not begun: what a dense checkpoint brought along waits to be restored, else there is nothing yet
        checkpoint.pop("loops", None)
        for name in ("loops", "epoch", "global_step"):
            if name in self._loaded:
                checkpoint[name] = self._loaded[name]
        for name in ("optimizer_states", "lr_schedulers"):
            checkpoint[name] = self._loaded.get(name, [])
        states = {c.state_key: c.state_dict() for c in trainer.callbacks}  # type: ignore[attr-defined]
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        if (
            self._target.reloads_weights and self.options.compensation is None
        ):  # they follow from the dense weights, the plan and the seed
            checkpoint["state_dict"] = {}

    def _load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the shapes of a checkpoint that was just read, before anything is restored from it."""
        assert self._target is not None
        record = Record.of(checkpoint)
        self._loaded = checkpoint
        if record is None:
            return
        self._record = record
        if record.phase != "calibrating" or self._target.plan is None:
            self._replay(trainer, record)


def _progress_path(trainer: Trainer) -> Path | None:
    """Returns where progress is saved: beside the first ``ModelCheckpoint``'s files; None without one."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None or "://" in str(callback.dirpath):
        return None
    return Path(callback.dirpath) / PROGRESS_CHECKPOINT
