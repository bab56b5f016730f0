"""StructuredPruningCallback: calibrates and removes neurons, heads, experts, layers or channels before training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from hfprune.allocation import Allocation, ResolvedBudget
from hfprune.callbacks.base import PruningCallback, callbacks_of, check_fit, cut_restored_optimizers
from hfprune.callbacks.resume import check_settings, describe_options, pruning_settings, whence
from hfprune.callbacks.target import Target
from hfprune.callbacks.user_module import find_target
from hfprune.compensation import Compensation
from hfprune.criteria import ActivationTaylor, Criterion, SelfDistillation
from hfprune.io.checkpoint_record import KEY, Phase, Record, read_metadata
from hfprune.models import Neurons, check_units, parameter_count
from hfprune.modules.resume import keep_cut_epoch
from hfprune.plan import Budget, PruningPlan, UnitKind
from hfprune.pruning.planner import Planner, PruningOptions, check_scored, say, warn
from hfprune.pruning.rounds import Rounds, Schedule
from hfprune.recovery.lora import LoraRecovery
from hfprune.utils.errors import ConfigError

PROGRESS_CHECKPOINT = "last-pruning.ckpt"
"""Written beside the checkpoints of a ``ModelCheckpoint`` until the fit has ended; ``ckpt_path="last"`` finds it."""


class StructuredPruningCallback(PruningCallback):
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
            ``experts`` (of mixtures), ``blocks`` (whole layers), ``channels`` (hidden channels of the residual
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
        recovery: LoRA settings; None trains on what the module trains.
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
        recovery: LoraRecovery | None = None,
        calibration_batches: int | None = None,
        exact: bool = True,
        checkpoint_every: int | None = 64,
        look_every: int | None = 16,
        stop_when_settled: float | None = None,
        model: str | None = None,
        neurons: Sequence[Neurons] = (),
    ) -> None:
        super().__init__(recovery=recovery)
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
        check_units(units)
        self.options = PruningOptions(
            budget=budget,
            units=tuple(units),
            allocation=allocation,
            criterion=criterion or ActivationTaylor(),
            objective=objective,
            distillation=distillation,
            compensation=compensation,
            calibration_batches=calibration_batches,
            exact=exact,
            look_every=look_every,
            stop_when_settled=stop_when_settled,
            rounds=Rounds(number=rounds, schedule=schedule),
        )
        self.checkpoint_every = checkpoint_every
        self.model, self.neurons = model, tuple(neurons)
        self.convergence: list[tuple[int, float]] = []
        """Calibration tokens, and the share of the finally kept units that were kept after so many."""
        self.resolved: ResolvedBudget | None = None
        self._phase: Phase = "training"
        self._planner: Planner | None = None
        self._loaded: dict[str, Any] = {}

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
            settles = self.options.stop_when_settled is not None
            check_scored(target, self.options.criterion, settles=settles)
            self.resolved = target.resolve(self.options.budget, self.options.allocation)
        return self.resolved

    def describe(self) -> dict[str, Any]:
        """Returns the settings that decide which units are kept, as plain data."""
        return describe_options(self.options)

    def _find(self, module: LightningModule) -> Target:
        options = self.options
        objective = options.target_objective(described=bool(self.neurons))
        target = find_target(module, objective=objective, model=self.model, neurons=self.neurons)
        target.units, target.stock = options.units, self.stock
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
            if path is not None:  # "last" and the like become a file
                path = trainer._checkpoint_connector._parse_ckpt_path(
                    TrainerFn.FITTING, path, model_provided=True, model_connected=True
                )
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
            say(trainer, f"Resumed a pruned model ({asked}){whence(trainer)}: no calibration.")

    def _make_plan(self, trainer: Trainer, target: Target) -> PruningPlan:
        assert self.resolved is not None
        say(trainer, self.resolved.describe())
        self._planner = planner = Planner(
            trainer,
            target,
            self.options,
            saved=self._record.calibration if self._record is not None else None,
            save=lambda: self._save_progress(trainer),
            save_every=self.checkpoint_every,
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
        if path is not None and self.checkpoint_every is not None:
            trainer.save_checkpoint(path, weights_only=True)  # optimizers have no state yet

    def _save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
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
        states = {c.state_key: c.state_dict() for c in callbacks_of(trainer)}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        if (
            self._target.reloads_weights and self.options.compensation is None
        ):  # they follow from the dense weights, the plan and the seed
            checkpoint["state_dict"] = {}

    def _load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        assert self._target is not None
        record, self._loaded = Record.of(checkpoint), checkpoint
        if record is None:  # a dense checkpoint: what was known beforehand stays
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


class TaylorImportanceCallback(StructuredPruningCallback):
    """TODO."""
