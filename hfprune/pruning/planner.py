"""Planner: scores units, allocates the budget and creates the pruning plan."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from hfprune.allocation import Allocation, ResolvedBudget, kept_units
from hfprune.allocation.convergence import Select
from hfprune.criteria import (
    CalibratedCriterion,
    GradientCriterion,
    LayerwiseCriterion,
    WeightCriterion,
    scored_groups,
    with_layers,
)
from hfprune.models import class_name
from hfprune.plan import DEPTH_KINDS, LAYERS, SUBLAYERS, Budget, Group, PruningPlan, lost_parts
from hfprune.pruning.accumulator import check_criterion, weight_scores
from hfprune.pruning.calibration import Calibration, CalibrationData, Scorer
from hfprune.pruning.communicator import Communicator, LocalCommunicator, say, warn
from hfprune.pruning.layerwise import LayerwiseResult, run_layerwise
from hfprune.pruning.options import PruningOptions
from hfprune.pruning.prunable import Prunable
from hfprune.pruning.removal_scores import measured_depth
from hfprune.pruning.rounds import Kept, State, in_rounds
from hfprune.pruning.sensitivity_curves import measured
from hfprune.pruning.two_stages import two_stages
from hfprune.utils.progress import phase
from hfprune.utils.versions import versions


def check_scored(model: Prunable, options: PruningOptions, *, settles: bool) -> None:
    """Raises ``ConfigError`` if the criterion cannot score the model's units; see :func:`check_criterion`."""
    shapes = model.shapes()
    check_criterion(shapes, _by_criterion(model.groups(shapes), options), options.criterion, settles=settles)


def _by_criterion(groups: tuple[Group, ...], options: PruningOptions) -> tuple[Group, ...]:
    """Returns the groups that the criterion scores; ``depth_scores`` measures layers and sub-layers."""
    measured_apart = () if options.calibration.depth is None else DEPTH_KINDS
    return tuple(group for group in groups if group.kind not in measured_apart)


def _removals(groups: Sequence[Group], resolved: ResolvedBudget) -> dict[str, int]:
    """Returns unit kind -> number of layers or sub-layers that a budget, resolved from shapes alone, removes."""
    found = {LAYERS: len(resolved.removed_layers)}
    for group, width in zip(groups, resolved.widths, strict=True):
        if group.kind in SUBLAYERS:
            found[group.kind] = found.get(group.kind, 0) + (not width)
    return found


def final_units(model: Prunable, budget: Budget, allocation: Allocation | None, scored: tuple[Group, ...]) -> Select:
    """Returns a function from scores to the units of the scored groups that would be kept.

    Args:
        model: Model to prune.
        budget: The budget.
        allocation: Allocation of the budget.
        scored: The scored groups.
    """
    groups = model.groups(model.model)

    def select(scores: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        every = with_layers(scores, groups, scored)
        resolved = model.resolve(budget, allocation, every)
        keep = kept_units(every, groups, resolved)
        lost = lost_parts(groups, keep)
        return {g.name: () if (g.kind, g.layer) in lost else keep.get(g.name, range(g.num_units)) for g in scored}

    return select


class Planner:
    """Creates the pruning plan of a model: scores units, allocates the budget and optionally fits weights.

    Args:
        model: Model to prune.
        data: The calibration data.
        options: Options of structured pruning.
        communicator: The processes; defaults to this process.
        saved: State of an interrupted calibration.
        save: Function that saves the state of :attr:`calibration`, called during calibration.
        progress: Show progress bars.

    Attributes:
        importance: Group name -> importance [U].
        convergence: Pairs of calibration tokens and the share of the finally kept units selected at that point.
        calibration: Current pass over the calibration data; None outside of passes.
        allocation: The allocation, with its measurements.
    """

    def __init__(
        self,
        model: Prunable,
        data: CalibrationData,
        options: PruningOptions,
        communicator: Communicator | None = None,
        *,
        saved: State | None = None,
        save: Callable[[], None] = lambda: None,
        progress: bool = False,
    ) -> None:
        self._model, self._data, self._options = model, data, options
        self._communicator = communicator or LocalCommunicator()
        self._saved, self._save, self._progress = saved, save, progress
        self.importance: dict[str, Tensor] = {}
        self.convergence: list[tuple[int, float]] = []
        self.calibration: Calibration | None = None
        self.allocation = options.allocation
        self._warnings: list[str] = []

    def plan(self, groups: tuple[Group, ...], resolved: ResolvedBudget) -> tuple[PruningPlan, ResolvedBudget]:
        """Returns the plan, the same on every rank, and the resolved budget.

        Args:
            groups: Groups of the model.
            resolved: Budget resolved from shapes alone.
        """
        options, model = self._options, self._model
        calibration = self.score(groups, resolved)
        if resolved.provisional:
            self.allocation = measured(
                model,
                tuple(group for group in groups if group.name not in resolved.skipped),
                self.importance,
                options.allocation,
                self._data,
                self._communicator,
                progress=self._progress,
            )
            resolved = model.resolve(options.budget, self.allocation, self.importance)
            say(self._communicator, resolved.describe())
        keep = kept_units(self.importance, groups, resolved) if self.importance else None
        if keep is None or options.compensation is not None:
            keep = self._layerwise(groups, resolved, keep).keep
        plan = PruningPlan(
            model_class=class_name(model.model),
            groups=groups,
            keep=keep,
            config=model.config_keys(keep),
            provenance=self._provenance(resolved, calibration),
        )
        shared: PruningPlan = self._communicator.broadcast(plan)
        return shared, resolved

    def _provenance(self, resolved: ResolvedBudget, calibration: dict[str, Any] | None) -> dict[str, Any]:
        options, model = self._options, self._model
        distillation = options.calibration.self_distillation
        differentiates = isinstance(options.criterion, GradientCriterion)
        return {
            "budget": resolved.to_dict(),
            "units": list(options.units),
            "allocation": self.allocation.describe() if self.allocation else None,
            "skip_layers": model.describe_skipped(),
            "criterion": options.criterion.describe(),
            "objective": model.objective_name if differentiates else None,
            "distillation": None if distillation is None else asdict(distillation),
            "rounds": asdict(options.calibration.removal),
            "depth_scores": None if options.calibration.depth is None else asdict(options.calibration.depth),
            "model": model.describe(),
            "calibration": calibration,
            "compensation": options.compensation.describe() if options.compensation else None,
            "recovery": {"data": self._data.summary("recovery")},
            "versions": versions(),
            "warnings": [text for text in (resolved.warning, *self._warnings) if text],
        }

    # ---- scores ------------------------------------------------------------------------------------------------------

    def score(self, groups: tuple[Group, ...], resolved: ResolvedBudget) -> dict[str, Any] | None:
        """Computes :attr:`importance`, which stays empty for layer-by-layer criteria.

        Args:
            groups: Groups of the model.
            resolved: Budget resolved from shapes alone.

        Returns:
            Provenance of the calibration; None without calibration.
        """
        depth = self._options.calibration.depth
        if depth is None:
            return self._score_units(groups, resolved)
        within = _by_criterion(groups, self._options)
        found = self._score_units(within, resolved) if within else None
        self.importance |= measured_depth(
            self._model,
            groups,
            depth,
            self._data,
            self._communicator,
            removals=_removals(groups, resolved),
            progress=self._progress,
        )
        self.importance = {group.name: self.importance[group.name] for group in groups}
        return found

    def _score_units(self, groups: tuple[Group, ...], resolved: ResolvedBudget) -> dict[str, Any] | None:
        """Computes the importance of some groups by the criterion; returns the provenance of the calibration."""
        criterion, model = self._options.criterion, self._model.model
        if isinstance(criterion, LayerwiseCriterion):
            return None
        scored = scored_groups(model, groups, criterion)
        if isinstance(criterion, WeightCriterion):
            with phase("scoring the weights"):
                self.importance = with_layers(weight_scores(model, scored, criterion), groups, scored)
            return None
        start = time.perf_counter()
        calibration, by_unit = self._calibrate(scored, resolved)
        self.importance = with_layers(by_unit, groups, scored)
        self.convergence = calibration.history.convergence(by_unit)
        seconds = time.perf_counter() - start
        return self._summary(calibration, seconds)

    def _summary(self, calibration: Calibration, seconds: float) -> dict[str, Any]:
        """Logs the size of the calibration and returns its provenance."""
        sequences, tokens = calibration.accumulator.totals().num_sequences, calibration.seen.total
        early = "; stopped early: the kept units had converged" if calibration.stopped else ""
        size = f"{sequences:,} batches" if tokens is None else f"{tokens:,} tokens"
        say(self._communicator, f"Calibrated on {size} in {seconds:.1f} s{early}.")
        return {
            "sequences": sequences,
            "tokens": tokens,
            "mean_objective_nats": calibration.accumulator.mean_objective(),
            "exact": self._options.calibration.exact,
            "settled": calibration.stopped,
            "convergence": self.convergence,
            "data": self._data.summary("calibration"),
        }

    def _calibrate(self, scored: tuple[Group, ...], resolved: ResolvedBudget) -> tuple[Calibration, dict[str, Tensor]]:
        """Returns the last pass over the calibration data and the scores of the units."""
        options, model = self._options, self._model
        passes: list[Calibration] = []

        def run(masked: Kept | None, saved: State | None) -> dict[str, Tensor]:
            passes[:] = [self._pass(scored, resolved, masked, saved)]
            return passes[0].accumulator.scores()

        distillation = options.calibration.self_distillation
        if options.calibration.rounds > 1:
            widths = options.calibration.removal.widths(model, options.budget, options.allocation, resolved.widths)
            scores = in_rounds(model, scored, widths, self._saved, run)
        elif distillation is not None:
            scores = two_stages(model, scored, distillation, resolved.widths, self._saved, run)
        else:
            scores = run(None, self._saved)
        return passes[0], scores

    def _pass(
        self, scored: tuple[Group, ...], resolved: ResolvedBudget, masked: Kept | None, saved: State | None
    ) -> Calibration:
        """Runs one pass over the calibration data."""
        options, model = self._options, self._model
        assert isinstance(options.criterion, CalibratedCriterion)
        widths: Sequence[int] | Select = resolved.widths
        if resolved.provisional or resolved.removed_layers or len(scored) < len(resolved.widths):
            widths = final_units(model, options.budget, options.allocation, scored)
        calibration = Calibration(
            model,
            [Scorer(options.criterion, scored)],
            self._data,
            options.calibration,
            self._communicator,
            widths=widths,
            masked=masked,
            progress=self._progress,
        )
        if saved is not None:
            calibration.load(saved)
            say(self._communicator, f"Resumed calibration at {calibration.item} {saved['position']}.")
        self.calibration = calibration
        try:
            calibration.run(self._save)
        finally:
            self.calibration = None
        return calibration

    def _layerwise(
        self, groups: tuple[Group, ...], resolved: ResolvedBudget, keep: dict[str, tuple[int, ...]] | None
    ) -> LayerwiseResult:
        """Selects units unless ``keep`` gives them, and fits the weights that read them; skipped groups stay."""
        options, start = self._options, time.perf_counter()
        result = run_layerwise(
            self._model,
            tuple(group for group in groups if group.name not in resolved.skipped),
            dict(zip((group.name for group in groups), resolved.widths, strict=True)),
            self._data,
            self._communicator,
            keep=keep,
            criterion=options.criterion if isinstance(options.criterion, LayerwiseCriterion) else None,
            compensation=options.compensation,
            limit=options.calibration.batches,
            progress=self._progress,
        )
        result.keep |= {group.name: tuple(range(group.num_units)) for group in groups if group.name in resolved.skipped}
        self.importance = self.importance or result.scores
        error = sum(result.errors.values()) / max(len(result.errors), 1)
        seconds = time.perf_counter() - start
        say(self._communicator, f"Fitted the layers in {seconds:.1f} s; mean output error {error:.1%}.")
        self._warnings.append(result.warning)
        warn(self._communicator, result.warning)
        return result
