"""Grid of a sweep: methods, ratios, seeds and evaluation texts."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune.allocation import Allocation
from hfprune.allocation.round_to import RoundTo, rounding
from hfprune.compensation import Compensation
from hfprune.criteria import (
    ActivationTaylor,
    CalibratedCriterion,
    Criterion,
    GradientCriterion,
    LayerwiseCriterion,
    Magnitude,
    Random,
    SelfDistillation,
    resolve_objective,
)
from hfprune.models import check_units
from hfprune.models.skip_layers import SkipLayers
from hfprune.objectives import OBJECTIVES
from hfprune.plan import Budget, UnitKind, unit_kinds
from hfprune.pruning.options import CalibrationOptions
from hfprune.pruning.rounds import Rounds, Schedule
from hfprune.utils.errors import ConfigError

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Pruning method of a sweep.

    Attributes:
        name: Name in tables and file names.
        criterion: The criterion; ``ActivationTaylor()`` if not given.
        objective: Differentiated objective; None for that of the criterion, and for criteria without one.
        distillation: Two-stage calibration with the dense model as the teacher.
        units: Unit kinds to prune, see ``StructuredPruningCallback``.
        allocation: Distribution of the budget over groups; the same share of every group if not given.
        compensation: Refit of the projections that read pruned units; None keeps their weights.
        rounds: Number of pruning rounds; each scores the units that the previous rounds kept.
        schedule: Distribution of the removal over rounds.
        skip_layers: Layers and modules that are not pruned: indices, ranges or name patterns, see
            :class:`hfprune.SkipLayers`.
        only_layers: The only layers and modules that are pruned, in the same forms.
    """

    name: str
    criterion: Criterion | None = None
    objective: str | None = None
    distillation: SelfDistillation | None = None
    units: Sequence[UnitKind] = ("mlp",)
    allocation: Allocation | None = None
    compensation: Compensation | None = None
    rounds: int = 1
    schedule: Schedule = "cubic"
    skip_layers: dict[str, list[str | int] | str | int] | list[str | int] | str | int | None = None
    only_layers: dict[str, list[str | int] | str | int] | list[str | int] | str | int | None = None

    def __post_init__(self) -> None:
        """Replaces deprecated names of unit kinds."""
        object.__setattr__(self, "units", unit_kinds(self.units))

    def check(self) -> None:
        """Raises ``ConfigError`` for an invalid name, or an incompatible criterion and objective."""
        if not _NAME.fullmatch(self.name) or self.name == "dense":
            raise ConfigError(f"The method name '{self.name}' must consist of letters, digits, '_', '-' and '.'.")
        try:
            found = resolve_objective(self.scorer, self.objective)
            self.skipped  # noqa: B018
            CalibrationOptions(rounds=self.rounds, schedule=self.schedule, self_distillation=self.distillation)
            if self.distillation is not None:
                self.distillation.check(self.scorer, self.objective)
            check_units(self.units)
            if self.allocation is not None and self.allocation.own_budget:
                raise ConfigError(f"{self.allocation} sets the widths itself, and a sweep sets pruning_ratios.")
        except ConfigError as error:
            raise ConfigError(f"Method '{self.name}': {error}") from error
        if found is not None:
            OBJECTIVES.get(found)
        elif isinstance(self.scorer, GradientCriterion) and self.distillation is None:
            raise ConfigError(f"Method '{self.name}' needs an objective: {', '.join(OBJECTIVES)}.")

    @property
    def scorer(self) -> Criterion:
        """The criterion."""
        return self.criterion or ActivationTaylor()

    @property
    def differentiated(self) -> str | None:
        """Objective of a single-stage method, or None."""
        return None if self.distillation is not None else resolve_objective(self.scorer, self.objective)

    @property
    def removal(self) -> Rounds:
        """Number of rounds and their schedule."""
        return Rounds(number=self.rounds, schedule=self.schedule)

    @property
    def skipped(self) -> SkipLayers | None:
        """Layers and modules that are not pruned."""
        return SkipLayers.of(self.skip_layers, self.only_layers)

    @property
    def staged(self) -> bool:
        """Whether scoring requires several passes over the calibration data, which other methods cannot share."""
        return self.distillation is not None or self.rounds > 1

    @property
    def measures(self) -> bool:
        """Whether the allocation requires measurements on calibration data, such as sensitivity curves."""
        return self.allocation is not None and bool(self.allocation.measures)

    @property
    def calibrated(self) -> bool:
        """Whether the scores depend on calibration data."""
        return isinstance(self.scorer, CalibratedCriterion)

    @property
    def seeded(self) -> bool:
        """Whether the pruned model depends on the seed, through data or random numbers."""
        layerwise = self.compensation is not None or isinstance(self.scorer, LayerwiseCriterion)
        return self.seeded_scores or layerwise or self.measures

    @property
    def seeded_scores(self) -> bool:
        """Whether the scores depend on the seed."""
        return self.calibrated or isinstance(self.scorer, Random)

    def scoring(self) -> tuple[str, ...]:
        """Returns the settings that determine the scores; methods with equal settings share their scores."""
        parts = (self.differentiated, sorted(self.scorer.describe().items()), self.distillation, sorted(self.units))
        steps: tuple[Any, ...] = () if self.rounds == 1 else (self.removal, self.allocation)
        if self.staged and self.skipped is not None:
            steps = (*steps, self.skipped)
        return tuple(map(str, (*parts, *steps)))

    def with_seed(self, seed: int) -> Criterion:
        """Returns the criterion for one seed."""
        return Random(seed=seed) if isinstance(self.scorer, Random) else self.scorer


def digest(value: Any) -> str:
    """Returns a short hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def default_methods() -> list[Method]:
    """Returns entropy and cross-entropy Taylor scores, and two baselines without data."""
    return [
        Method(name="entropy", objective="entropy"),
        Method(name="cross_entropy", objective="cross_entropy"),
        Method(name="magnitude", criterion=Magnitude()),
        Method(name="random", criterion=Random()),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One pruned model of a sweep.

    Attributes:
        method: The pruning method.
        pruning_ratio: Share of all parameters removed.
        seed: Seed of calibration data or random numbers; None if the method uses neither.
    """

    method: Method
    pruning_ratio: float
    seed: int | None

    @property
    def name(self) -> str:
        """Name of the cell, for files."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.method.name}-{self.pruning_ratio:g}{seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepGrid:
    """Grid of a sweep.

    Attributes:
        methods: The compared methods.
        pruning_ratios: Shares of all parameters to remove.
        seeds: Seeds of the calibration data and of random scores.
        texts: Name -> evaluation text, as for ``TextDataModule(text=...)``.
        round_to: Kept widths are multiples of this number; ``auto`` takes the largest of 256, 128 and 64 that misses
            the budget by at most 3 %.
        task_seeds: Number of seeds for which the zero-shot tasks run.
    """

    methods: Sequence[Method]
    pruning_ratios: Sequence[float]
    seeds: Sequence[int]
    texts: Mapping[str, str]
    round_to: RoundTo = 1
    task_seeds: int = 1

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for missing or duplicate entries."""
        for method in self.methods:
            method.check()
        listed: dict[str, Sequence[object]] = {
            "methods": [method.name for method in self.methods],
            "pruning_ratios": self.pruning_ratios,
            "seeds": self.seeds,
        }
        for name, values in listed.items():
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name}={list(values)} must name at least one, and each once.")
        if not self.texts:
            raise ConfigError("texts={} must name at least one evaluation text.")
        if any(not _NAME.fullmatch(name) for name in self.texts):
            raise ConfigError(f"texts: names consist of letters, digits, '_', '-' and '.'; got {list(self.texts)}.")
        if self.task_seeds < 1:
            raise ConfigError(f"task_seeds={self.task_seeds} must be positive.")

    def cells(self) -> Iterator[Cell]:
        """Yields the cells, beginning with those of the first seed, so that a complete table exists early."""
        for number, seed in enumerate(self.seeds):
            for method in self.methods:
                if method.seeded or number == 0:
                    for ratio in self.pruning_ratios:
                        yield Cell(method=method, pruning_ratio=ratio, seed=seed if method.seeded else None)

    def budget(self, ratio: float) -> Budget:
        """Returns the budget of a pruning ratio."""
        return Budget(pruning_ratio=ratio, **rounding(self.round_to))

    def runs_tasks(self, cell: Cell) -> bool:
        """Returns whether the zero-shot tasks run on a cell's model."""
        return cell.seed is None or cell.seed in list(self.seeds)[: self.task_seeds]
