"""StructuredPruningCallback: removal of neurons, heads, experts, sub-layers, layers or channels before training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from hfprune.allocation import Allocation, ResolvedBudget
from hfprune.allocation.round_to import RoundTo, rounding
from hfprune.callbacks.base import PruningCallback, cut_restored_optimizers
from hfprune.callbacks.calibration_data import calibration_data
from hfprune.callbacks.checks import callbacks_of, check_fit, check_positive
from hfprune.callbacks.communicator import LightningCommunicator, say, warn
from hfprune.callbacks.resume import check_settings, describe_options, pruning_settings, resumed_from
from hfprune.callbacks.target import Target
from hfprune.callbacks.user_module import find_target
from hfprune.compensation import Compensation
from hfprune.criteria import ActivationTaylor, Criterion, SelfDistillation
from hfprune.io.checkpoint_record import KEY, Phase, Record, read_metadata
from hfprune.models import Neurons, check_units, parameter_count
from hfprune.models.skip_layers import SkipLayers, SkipPatterns
from hfprune.modules.resume import reopen_epoch
from hfprune.plan import Budget, PruningPlan, UnitKind, unit_kinds
from hfprune.pruning.options import CalibrationOptions, DepthSetting, PruningOptions
from hfprune.pruning.planner import Planner, check_scored
from hfprune.pruning.rounds import Schedule
from hfprune.recovery.mode import RecoverySetting
from hfprune.utils.compat import resolved_checkpoint
from hfprune.utils.deprecation import renamed_keywords
from hfprune.utils.errors import ConfigError

PROGRESS_CHECKPOINT = "last-pruning.ckpt"
"""Progress file in the folder of a ``ModelCheckpoint``, until the end of ``fit``; ``ckpt_path="last"`` finds it."""


class StructuredPruningCallback(PruningCallback):
    """Scores units with a criterion and removes the units with the lowest scores, before training.

    Scoring and surgery run in ``on_fit_start``. The strategy is then set up again, which wraps the pruned model and
    builds its optimizers and schedulers: ``global_step``, schedules and checkpoints count recovery only.

    The module is a ``PruningModule``, any LightningModule with one supported Hugging Face model, or a module whose
    neurons are described by ``neurons``. Single devices and DDP are supported, and FSDP2 (``ModelParallelStrategy``)
    with a ``PruningModule``.

    If the trainer has a ``ModelCheckpoint``, progress is saved in its folder. ``fit(ckpt_path="last")`` then continues
    during calibration, after pruning or during recovery, possibly with another number of processes.

    Args:
        budget: Share of ALL parameters to remove, in (0, 1), or a :class:`hfprune.Budget`. None if the allocation sets
            the number of units itself (``Explicit(...)``, ``share=...``).
        criterion: Criterion that scores units from activations, gradients or weights, see :mod:`hfprune.criteria`.
        units: Unit kinds to prune: ``mlp`` (neurons), ``heads`` (a key-value head with its query heads), ``experts``,
            ``attention_sublayers`` and ``mlp_sublayers`` (whole attentions and MLPs), ``layers`` (whole layers),
            ``channels`` (hidden channels of the residual stream).
        allocation: Distribution of the budget over layers, see :mod:`hfprune.allocation`; the same share of every layer
            if not given.
        objective: Differentiated objective: ``entropy``, ``cross_entropy`` or ``sampled``. If not given, that of the
            criterion or of the ``PruningModule`` (``entropy`` by default), or the ``training_step`` loss of a
            user-defined module. Criteria of weights or activations have no objective.
        compensation: Closed-form refit of the projections that read pruned units, for example ``LeastSquares()``; None
            keeps their weights.
        recovery: ``"lora"`` or a ``LoraRecovery`` (adapters), ``"full"`` (all weights), ``"mlp"`` (projections of the
            MLPs) or ``"none"``; see :class:`~hfprune.recovery.mode.RecoveryMode`.
        calibration: Options of the calibration.
        skip_layers: Layers and modules that are not pruned: indices, ranges, name patterns, or a
            :class:`~hfprune.SkipLayers`; None prunes all.
        model: Name of the Hugging Face model in a user-defined module with several models.
        neurons: Neurons of a user-defined module without a Hugging Face model.

    Raises:
        ConfigError: A value is out of range, or arguments are mutually exclusive.

    Example:
        >>> from hfprune.criteria import ActivationNorm
        >>> callback = StructuredPruningCallback(
        ...     0.2, criterion=ActivationNorm(), units=("mlp", "heads"), calibration=CalibrationOptions(batches=32)
        ... )
        >>> callback.describe()["budget"]
        'pruning_ratio=0.2'
    """

    def __init__(  # noqa: PLR0913
        self,
        budget: Budget | float | None = None,
        *,
        criterion: Criterion,
        units: Sequence[UnitKind] = ("mlp",),
        allocation: Allocation | None = None,
        objective: str | None = None,
        compensation: Compensation | None = None,
        recovery: RecoverySetting = "full",
        calibration: CalibrationOptions | None = None,
        skip_layers: SkipLayers | SkipPatterns | None = None,
        model: str | None = None,
        neurons: Sequence[Neurons] = (),
    ) -> None:
        super().__init__(recovery=recovery)
        self.calibration = calibration or CalibrationOptions()
        kinds = unit_kinds(units)
        check_units(kinds)
        self.options = PruningOptions(
            budget=_budget(budget, allocation),
            units=kinds,
            allocation=allocation,
            criterion=criterion,
            objective=objective,
            compensation=compensation,
            calibration=self.calibration,
            skip_layers=SkipLayers.of(skip_layers),
        )
        self.model, self.neurons = model, tuple(neurons)
        self.convergence: list[tuple[int, float]] = []
        """Number of calibration tokens -> share of the finally kept units that were selected at that point."""
        self.resolved: ResolvedBudget | None = None
        self._phase: Phase = "training"
        self._planner: Planner | None = None
        self._loaded: dict[str, Any] = {}

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, module: LightningModule) -> ResolvedBudget | None:
        """Returns the budget resolved for ``module``'s model, from its shapes only.

        None for a user-defined module that creates its model in ``configure_model``.

        Raises:
            ConfigError: The module has no units to prune, the criterion does not support them, or the budget is
                impossible.
            UnsupportedArchitectureError: The model's class is unknown.
        """
        target = self._find(module)
        if target.plan is not None and self.resolved is not None:  # pruned by an earlier fit
            return self.resolved
        self.resolved = None
        if target.known:
            settles = self.calibration.early_stop_overlap is not None
            check_scored(target, self.options, settles=settles)
            self.resolved = target.resolve(self.options.budget, self.options.allocation)
        return self.resolved

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the kept units, as plain data."""
        return describe_options(self.options)

    def _find(self, module: LightningModule) -> Target:
        options = self.options
        objective = options.target_objective(described=bool(self.neurons))
        target = find_target(module, objective=objective, model=self.model, neurons=self.neurons)
        target.units, target.stock, target.skip_layers = options.units, self.stock, options.skip_layers
        return target

    def _check_run(self, trainer: Trainer, target: Target) -> None:
        check_fit(trainer, target, self.options)

    def _announce(self, trainer: Trainer, resolved: ResolvedBudget | None) -> None:
        assert self._target is not None
        if resolved is not None and self._target.plan is None:
            warn(trainer, resolved.warning)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the budget, the trainer and the model, before any weight is loaded."""
        self._loaded, self._phase = {}, "training"
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            path = self.resume_from or trainer.ckpt_path
            if path is not None:  # resolves "last" and other keywords
                path = resolved_checkpoint(trainer, path, TrainerFn.FITTING)
            self._record = Record.of(read_metadata(path)) if path else None

    # ---- the work ----------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, target: Target) -> None:
        if self._record is not None and self._record.plan is not None and target.plan is None:  # a sharded strategy
            self._replay(trainer, self._record)
            self._set_up_again(trainer)
        self.resolved = self.resolved or target.resolve(self.options.budget, self.options.allocation)
        asked = self.resolved.asked
        self._settings = pruning_settings(trainer, target, self.options, asked)
        if self._record is not None:
            check_settings(self._record, self._settings)
        if target.plan is not None:
            before = target.plan.provenance["budget"]["asked"]
            if before != asked:
                raise ConfigError(f"The checkpoint was pruned with {before}; this run asks for {asked}.")
            say(trainer, f"Resumed a pruned model ({asked}){resumed_from(trainer)}: no calibration.")

    def _make_plan(self, trainer: Trainer, target: Target) -> PruningPlan:
        assert self.resolved is not None
        say(trainer, self.resolved.describe())
        self._planner = planner = Planner(
            target,
            calibration_data(trainer, target.record("calibrating", None).seed),
            self.options,
            LightningCommunicator(trainer),
            saved=self._record.calibration if self._record is not None else None,
            save=lambda: self._save_progress(trainer),
            progress=trainer.progress_bar_callback is not None,
        )
        try:
            plan, self.resolved = planner.plan(target.groups(target.model), self.resolved)
        finally:
            self._planner = None
        self.importance, self.convergence = planner.importance, planner.convergence
        return plan

    def _apply(self, target: Target, plan: PruningPlan) -> None:
        assert self.resolved is not None
        if self._loaded:
            cut_restored_optimizers(self._loaded, target, plan, keep=self.recovery is None)
        target.apply_plan(plan)
        left = parameter_count(target.model)
        assert left == self.resolved.params, f"surgery left {left} parameters, not {self.resolved.params}"

    def _ready(self, trainer: Trainer, target: Target, *, pruned: bool) -> None:
        if pruned:
            self._phase = "pruned"
            self._save_progress(trainer)
            self._phase, self._loaded = "training", {}

    def _finish(self, trainer: Trainer) -> None:
        path = _progress_path(trainer)
        if path is not None and trainer.is_global_zero and path.exists():
            trainer.strategy.remove_checkpoint(path)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_progress(self, trainer: Trainer) -> None:
        path = _progress_path(trainer)
        if path is not None and self.calibration.checkpoint_every is not None:
            trainer.save_checkpoint(path, weights_only=True)  # optimizers have no state yet

    def _save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        assert self._target is not None
        calibration = self._planner.calibration if self._planner is not None else None
        phase: Phase = "calibrating" if calibration is not None else self._phase
        state = calibration.state() if calibration is not None else None
        checkpoint[KEY] = replace(self._target.record(phase, state), settings=self._settings).to_dict()
        reopen_epoch(trainer, checkpoint)
        if phase == "training":
            return
        # no step was taken yet: states of a resumed dense checkpoint are written again, else none
        checkpoint.pop("loops", None)
        for name in ("loops", "epoch", "global_step"):
            if name in self._loaded:
                checkpoint[name] = self._loaded[name]
        for name in ("optimizer_states", "lr_schedulers"):
            checkpoint[name] = self._loaded.get(name, [])
        states = {c.state_key: c.state_dict() for c in callbacks_of(trainer)}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        if (
            self._target.reloads_weights and self.options.compensation is None
        ):  # weights follow from the dense model, the plan and the seed
            checkpoint["state_dict"] = {}

    def _load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        assert self._target is not None
        record, self._loaded = Record.of(checkpoint), checkpoint
        if record is None:  # a dense checkpoint
            return
        self._record = record
        if record.phase != "calibrating" or self._target.plan is None:
            self._replay(trainer, record)


def _progress_path(trainer: Trainer) -> Path | None:
    """Returns the progress file in the folder of the first ``ModelCheckpoint``, or None without one."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None or "://" in str(callback.dirpath):
        return None
    return Path(callback.dirpath) / PROGRESS_CHECKPOINT


def _budget(budget: Budget | float | None, allocation: Allocation | None) -> Budget:
    """Returns the budget; ``Budget(allocated=True)`` if the allocation sets the number of units."""
    allocated = allocation is not None and allocation.own_budget
    if isinstance(budget, Budget):
        return replace(budget, allocated=allocated)
    return Budget(pruning_ratio=budget, allocated=allocated)


class TaylorImportanceCallback(StructuredPruningCallback):
    """Structured pruning with first-order Taylor scores of the output entropy (HFPrune), with flat keyword arguments.

    Equal to :class:`StructuredPruningCallback` with ``criterion=ActivationTaylor()``, and the entropy objective in a
    ``PruningModule``. The fields of ``budget`` and ``calibration`` are separate arguments.

    Args:
        pruning_ratio: Share of ALL parameters to remove, in (0, 1).
        target_params: Number of parameters to keep.
        intermediate_size: MLP width to keep.
        mlp_ratio: MLP width to keep as a multiple of the hidden size, as in the HFPrune script.
        round_to: Kept MLP widths and hidden sizes are multiples of this number; 1 gives exact numbers, 64 or 128 fast
            kernels. ``auto`` takes the largest of 256, 128 and 64 that misses the budget by at most 3 %.
        units: Unit kinds to prune, see :class:`StructuredPruningCallback`.
        allocation: Distribution of the budget over groups: ``Uniform()`` by default, ``Protected``, ``GlobalRank``,
            ``CosineSoftmax``, ``Sensitivity``. ``Explicit(...)`` and ``share=...`` set the number of units themselves
            and replace the budget.
        criterion: The criterion; ``ActivationTaylor()`` if not given.
        objective: Differentiated objective, see :class:`StructuredPruningCallback`.
        self_distillation: Two-stage scoring with the dense model as the teacher (SDMPrune); None for one stage.
        rounds: Number of pruning rounds; each scores the units that the previous rounds kept.
        schedule: Distribution of the removal over rounds: after a share x of the rounds, ``cubic`` has removed the
            share 1 - (1 - x)^3 and ``linear`` the share x.
        depth_scores: How whole layers and sub-layers are scored: ``kl``, ``cross_entropy``, ``perplexity`` or
            ``cosine`` of the dense model without each one, on 16 calibration sequences (``DepthScores``). None: the sum
            of the criterion's scores of their units.
        compensation: Closed-form refit of the projections that read pruned units, for example ``LeastSquares()``; None
            keeps their weights.
        recovery: ``"lora"`` or a ``LoraRecovery`` (adapters), ``"full"`` (all weights), ``"mlp"`` (projections of the
            MLPs) or ``"none"``; see :class:`~hfprune.recovery.mode.RecoveryMode`.
        calibration_batches: Number of calibration batches; all if not given. Required if the training data are used.
        exact: Whether sequences run one at a time without padding, so that the kept units are bitwise the same for
            every batch size, padding, packing and number of processes. False runs whole batches: faster on a GPU for
            short sequences, and equal up to rounding.
        checkpoint_every: Number of sequences (batches, unless ``exact``) between saves of the progress; None for none.
        check_every: Number of sequences (or batches) between comparisons of the kept units, for the convergence curve
            of the report; None for none.
        early_stop_overlap: Share of unchanged kept units, for example 0.99, at which calibration stops after two
            comparisons in a row; None runs all batches. ``check_every`` must then be a multiple of the number of
            processes.
        skip_layers: Layers and modules that are not pruned: indices, ranges, name patterns, or a
            :class:`~hfprune.SkipLayers`; None prunes all.
        model: Name of the Hugging Face model in a user-defined module with several models.
        neurons: Neurons of a user-defined module without a Hugging Face model.

    Raises:
        ConfigError: A value is out of range, or arguments are mutually exclusive.

    Example:
        >>> TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=32).describe()["criterion"]["name"]
        'activation_taylor'
    """

    @renamed_keywords(
        look_every="check_every", stop_when_settled="early_stop_overlap", distillation="self_distillation"
    )
    def __init__(  # noqa: PLR0913
        self,
        *,
        pruning_ratio: float | None = None,
        target_params: int | None = None,
        intermediate_size: int | None = None,
        mlp_ratio: float | None = None,
        round_to: RoundTo = 1,
        units: Sequence[UnitKind] = ("mlp",),
        allocation: Allocation | None = None,
        criterion: Criterion | None = None,
        objective: str | None = None,
        self_distillation: SelfDistillation | None = None,
        rounds: int = 1,
        schedule: Schedule = "cubic",
        depth_scores: DepthSetting = None,
        compensation: Compensation | None = None,
        recovery: RecoverySetting = "full",
        calibration_batches: int | None = None,
        exact: bool = True,
        checkpoint_every: int | None = 64,
        check_every: int | None = 16,
        early_stop_overlap: float | None = None,
        skip_layers: SkipLayers | SkipPatterns | None = None,
        model: str | None = None,
        neurons: Sequence[Neurons] = (),
    ) -> None:
        check_positive(calibration_batches=calibration_batches)
        budget = Budget(
            pruning_ratio=pruning_ratio,
            target_params=target_params,
            intermediate_size=intermediate_size,
            mlp_ratio=mlp_ratio,
            **rounding(round_to),
            allocated=allocation is not None and allocation.own_budget,
        )
        calibration = CalibrationOptions(
            batches=calibration_batches,
            exact=exact,
            checkpoint_every=checkpoint_every,
            check_every=check_every,
            early_stop_overlap=early_stop_overlap,
            rounds=rounds,
            schedule=schedule,
            self_distillation=self_distillation,
            depth_scores=depth_scores,
        )
        super().__init__(
            budget,
            criterion=criterion or ActivationTaylor(),
            units=units,
            allocation=allocation,
            objective=objective,
            compensation=compensation,
            recovery=recovery,
            calibration=calibration,
            skip_layers=skip_layers,
            model=model,
            neurons=neurons,
        )
