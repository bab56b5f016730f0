"""Scores units, allocates the budget and makes the pruning plan."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning
import torch
import transformers
from lightning import Trainer
from torch import Tensor

from hfprune.allocation import Allocation, ResolvedBudget, kept_units
from hfprune.allocation.convergence import Select
from hfprune.compensation import Compensation
from hfprune.criteria import (
    ActivationCriterion,
    CalibratedCriterion,
    Criterion,
    GradientCriterion,
    LayerwiseCriterion,
    SelfDistillation,
    WeightCriterion,
    check_experts,
    resolve_objective,
    scored_groups,
    with_layers,
)
from hfprune.models import class_name
from hfprune.plan import Budget, Group, PruningPlan
from hfprune.pruning.accumulator import check_criterion, weight_scores
from hfprune.pruning.calibration import Calibration, Kept, data_summary, two_stages
from hfprune.pruning.layerwise import LayerwiseResult, run_layerwise
from hfprune.pruning.rounds import Rounds, in_rounds
from hfprune.pruning.sensitivity_curves import measured
from hfprune.utils.errors import ConfigError
from hfprune.version import __version__

if TYPE_CHECKING:
    from hfprune.callbacks.target import Target


def check_scored(target: "Target", criterion: Criterion, *, settles: bool) -> None:
    """Raises ``ConfigError`` where ``criterion`` does not score units, or what units hold; reads shapes alone."""
    model = target.shapes()
    check_criterion(model, target.groups(model), criterion, settles=settles)


def final_units(target: "Target", budget: Budget, allocation: Allocation | None, criterion: Criterion) -> Select:
    """Returns what tells which of the scored units would be in the model, pruned by given scores.

    Args:
        target: The model.
        budget: What was asked.
        allocation: How it is spent.
        criterion: How units are scored.
    """
    groups = target.groups(target.model)
    scored = scored_groups(target.model, groups, criterion)

    def select(scores: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        known = with_layers(scores, groups, scored)
        resolved = target.resolve(budget, allocation, known)
        keep = kept_units(known, groups, resolved)
        gone = resolved.removed_layers
        return {g.name: () if g.layer in gone else keep.get(g.name, range(g.num_units)) for g in scored}

    return select


_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """What ``TaylorImportanceCallback`` was asked for, as far as it decides what is kept; see there."""

    budget: Budget
    units: tuple[str, ...]
    allocation: Allocation | None
    criterion: Criterion
    objective: str | None
    distillation: SelfDistillation | None
    compensation: Compensation | None
    calibration_batches: int | None
    exact: bool
    look_every: int | None
    stop_when_settled: float | None
    rounds: Rounds

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` where criterion, units, objective and distillation do not go together."""
        resolve_objective(self.criterion, self.objective)
        check_experts(self.criterion, self.units)
        if self.distillation is not None:
            self.distillation.check(self.criterion, self.objective)
            if self.rounds.number > 1:
                raise ConfigError("--importance.rounds and .distillation are both more than one pass: give one.")

    @property
    def calibrates(self) -> bool:
        """Whether calibration data are read."""
        return self.compensation is not None or not isinstance(self.criterion, WeightCriterion)

    def target_objective(self, *, described: bool) -> str | None:
        """Returns the objective whose tokens count; None for the module's own, or its loss.

        Args:
            described: Whether the module's neurons were described by its owner.
        """
        if self.distillation is not None:
            return "cross_entropy"
        if isinstance(self.criterion, ActivationCriterion):  # nothing is differentiated: every real token counts
            return None if described else "entropy"
        return resolve_objective(self.criterion, self.objective)


class Planner:
    """Scores a model's units, spends the budget on them and fits weights where asked.

    Args:
        trainer: The trainer, in ``fit``.
        target: What is pruned.
        options: How.
        saved: State of a calibration that was left.
        save: Writes a checkpoint during calibration.
        save_every: Do so each time that about so many sequences (or batches) were done.

    Attributes:
        importance: Group -> scores [U] of the units.
        convergence: Calibration tokens, and the share of the finally kept units that were kept after so many.
        calibration: The pass over the calibration data that is under way.
        allocation: How the budget is spent, with what was measured for it.
    """

    def __init__(
        self,
        trainer: Trainer,
        target: "Target",
        options: PruningOptions,
        *,
        saved: dict[str, Any] | None,
        save: Callable[[], None],
        save_every: int | None,
    ) -> None:
        self._trainer, self._target, self._options = trainer, target, options
        self._saved, self._save, self._save_every = saved, save, save_every
        self.importance: dict[str, torch.Tensor] = {}
        self.convergence: list[tuple[int, float]] = []
        self.calibration: Calibration | None = None
        self.allocation = options.allocation
        self._warnings: list[str] = []

    def plan(self, groups: tuple[Group, ...], resolved: ResolvedBudget) -> tuple[PruningPlan, ResolvedBudget]:
        """Returns what stays, the same on every rank, and the budget as the scores decide it.

        Args:
            groups: The target's groups.
            resolved: The budget as far as shapes decide it.
        """
        options, target = self._options, self._target
        calibration = self._score(groups, resolved)
        if resolved.provisional:
            self.allocation = self._measured(groups)
            resolved = target.resolve(options.budget, self.allocation, self.importance)
            say(self._trainer, resolved.describe())
        keep = kept_units(self.importance, groups, resolved) if self.importance else None
        if keep is None or options.compensation is not None:
            keep = self._layerwise(groups, resolved, keep).keep
        plan = PruningPlan(
            model_class=class_name(target.model),
            groups=groups,
            keep=keep,
            config=target.config_keys(keep),
            provenance=self._provenance(resolved, calibration),
        )
        shared: PruningPlan = self._trainer.strategy.broadcast(plan)
        return shared, resolved

    def _provenance(self, resolved: ResolvedBudget, calibration: dict[str, Any] | None) -> dict[str, Any]:
        options, target = self._options, self._target
        differentiates = isinstance(options.criterion, GradientCriterion)
        return {
            "budget": resolved.to_dict(),
            "units": list(options.units),
            "allocation": self.allocation.describe() if self.allocation else None,
            "criterion": options.criterion.describe(),
            "objective": target.objective_name if differentiates else None,
            "distillation": None if options.distillation is None else asdict(options.distillation),
            "rounds": asdict(options.rounds),
            "model": target.describe(),
            "calibration": calibration,
            "compensation": options.compensation.describe() if options.compensation else None,
            "recovery": {"data": data_summary(self._trainer, "recovery")},
            "versions": versions(),
            "warnings": [text for text in (resolved.warning, *self._warnings) if text],
        }

    def _measured(self, groups: tuple[Group, ...]) -> Allocation | None:
        """Returns the allocation, with curves where it goes by measured ones."""
        seed = self._target.record("calibrating", None).seed
        return measured(self._trainer, self._target, groups, self.importance, self._options.allocation, seed=seed)

    # ---- scores ------------------------------------------------------------------------------------------------------

    def _score(self, groups: tuple[Group, ...], resolved: ResolvedBudget) -> dict[str, Any] | None:
        """Sets ``importance``; returns what is told about the calibration, None when there was none.

        Importance is empty where units are chosen layer by layer.
        """
        criterion, model = self._options.criterion, self._target.model
        if isinstance(criterion, LayerwiseCriterion):
            return None
        scored = scored_groups(model, groups, criterion)
        if isinstance(criterion, WeightCriterion):
            self.importance = with_layers(weight_scores(model, scored, criterion), groups, scored)
            return None
        start = time.perf_counter()
        calibration, by_unit = self._calibrate(scored, resolved)
        accumulator = calibration.accumulator
        self.importance = with_layers(by_unit, groups, scored)
        self.convergence = calibration.history.convergence(by_unit)
        totals = accumulator.totals()
        seconds = time.perf_counter() - start
        early = "; the kept units had settled" if calibration.stopped else ""
        tokens = calibration.seen.total
        size = f"{totals.num_sequences:,} batches" if tokens is None else f"{tokens:,} tokens"
        say(self._trainer, f"Calibrated on {size} in {seconds:.1f} s{early}.")
        return {
            "sequences": totals.num_sequences,
            "tokens": tokens,
            "mean_objective_nats": accumulator.mean_objective(),
            "exact": self._options.exact,
            "settled": calibration.stopped,
            "convergence": self.convergence,
            "data": data_summary(self._trainer, "calibration"),
        }

    def _calibrate(
        self, scored: tuple[Group, ...], resolved: ResolvedBudget
    ) -> tuple[Calibration, dict[str, torch.Tensor]]:
        """Returns the last pass over the calibration data, and the scores of the units."""
        options, target = self._options, self._target
        final = (
            final_units(target, options.budget, options.allocation, options.criterion)
            if resolved.kinds
            else resolved.widths
        )

        def run(first_stage: Kept | None, saved: dict[str, Any] | None) -> Calibration:
            assert isinstance(options.criterion, CalibratedCriterion)
            calibration = Calibration(
                self._trainer,
                target,
                scored,
                options.criterion,
                limit=options.calibration_batches,
                exact=options.exact,
                seed=target.record("calibrating", None).seed,
                widths=final,
                look_every=options.look_every,
                stop_at=options.stop_when_settled,
                first_stage=first_stage,
                distillation=None if options.distillation is None else str(options.distillation),
                rounds=str(options.rounds) if options.rounds.number > 1 else None,
            )
            if saved is not None:
                calibration.load(saved)
                say(self._trainer, f"Resumed calibration after {saved['position']} sequences.")
            self.calibration = calibration
            try:
                calibration.run(every=self._save_every, save=self._save)
            finally:
                self.calibration = None
            return calibration

        if options.rounds.number > 1:
            widths = options.rounds.widths(target, options.budget, options.allocation, resolved.widths)
            return in_rounds(target, scored, widths, self._saved, run)
        if options.distillation is None:
            found = run(None, self._saved)
        else:
            found = two_stages(target, scored, options.distillation, resolved.widths, self._saved, run)
        return found, found.accumulator.scores()

    def _layerwise(
        self, groups: tuple[Group, ...], resolved: ResolvedBudget, keep: dict[str, tuple[int, ...]] | None
    ) -> LayerwiseResult:
        """Chooses units that were not chosen yet, and fits the weights that read them."""
        options, start = self._options, time.perf_counter()
        found = run_layerwise(
            self._trainer,
            self._target,
            groups,
            dict(zip((group.name for group in groups), resolved.widths, strict=True)),
            keep=keep,
            criterion=options.criterion if isinstance(options.criterion, LayerwiseCriterion) else None,
            compensation=options.compensation,
            limit=options.calibration_batches,
            seed=self._target.record("calibrating", None).seed,
        )
        self.importance = self.importance or found.scores
        lost = sum(found.errors.values()) / len(found.errors)
        seconds = time.perf_counter() - start
        say(self._trainer, f"Went through the layers in {seconds:.1f} s; mean output error {lost:.1%}.")
        self._warnings.append(found.warning)
        warn(self._trainer, found.warning)
        return found


def say(trainer: Trainer, text: str) -> None:
    """Logs ``text`` once, whatever the number of processes."""
    if trainer.is_global_zero:
        _log.info(text)


def warn(trainer: Trainer, text: str) -> None:
    """Logs a warning once, whatever the number of processes; nothing where there is none."""
    if text and trainer.is_global_zero:
        _log.warning("WARNING: %s", text)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {
        "hfprune": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }
