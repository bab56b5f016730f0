"""What a sweep compares."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune.allocation import Allocation
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
from hfprune.objectives import OBJECTIVES
from hfprune.plan import UnitKind, unit_kinds
from hfprune.pruning.options import CalibrationOptions
from hfprune.pruning.rounds import Rounds, Schedule
from hfprune.utils.errors import ConfigError

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to score units.

    Attributes:
        name: What tables call it; also part of file names.
        criterion: How signals become scores; HFPrune's per-token activation Taylor if not given.
        objective: What calibration differentiates; None for the criterion's own, and for criteria that need none.
        distillation: Two stages of calibration, with the dense model as the teacher.
        units: What may be removed, see ``TaylorImportanceCallback``.
        allocation: How the budget is spread over groups; the same share everywhere if not given.
        compensation: How the projections that read pruned units are refitted; None leaves the kept weights.
        rounds: Number of rounds in which units are removed, each scored without those of the rounds before.
        schedule: How the removal is spread over the rounds.
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

    def __post_init__(self) -> None:
        """Replaces deprecated names of unit kinds."""
        object.__setattr__(self, "units", unit_kinds(self.units))

    def check(self) -> None:
        """Raises ``ConfigError`` unless the name can be one and criterion and objective belong together."""
        if not _NAME.fullmatch(self.name) or self.name == "dense":
            raise ConfigError(f"The method name '{self.name}' is not made of letters, digits, '_', '-' and '.'.")
        try:
            found = resolve_objective(self.scorer, self.objective)
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
        """The objective of its only stage, None without one."""
        return None if self.distillation is not None else resolve_objective(self.scorer, self.objective)

    @property
    def removal(self) -> Rounds:
        """Number of rounds and their schedule."""
        return Rounds(number=self.rounds, schedule=self.schedule)

    @property
    def staged(self) -> bool:
        """Whether its scores need several passes over the calibration data, and share none with other methods."""
        return self.distillation is not None or self.rounds > 1

    @property
    def measures(self) -> bool:
        """Whether its allocation measures on the calibration data: sensitivity curves, for example."""
        return self.allocation is not None and bool(self.allocation.measures)

    @property
    def calibrated(self) -> bool:
        """Whether its scores come from calibration data."""
        return isinstance(self.scorer, CalibratedCriterion)

    @property
    def seeded(self) -> bool:
        """Whether its model depends on the seed: through the data, or through random numbers."""
        layerwise = self.compensation is not None or isinstance(self.scorer, LayerwiseCriterion)
        return self.seeded_scores or layerwise or self.measures

    @property
    def seeded_scores(self) -> bool:
        """Whether its scores do."""
        return self.calibrated or isinstance(self.scorer, Random)

    def scoring(self) -> tuple[str, ...]:
        """Returns what its scores follow from, beside model and data: methods that share it share their scores."""
        parts = (self.differentiated, sorted(self.scorer.describe().items()), self.distillation, sorted(self.units))
        steps = () if self.rounds == 1 else (self.removal, self.allocation)
        return tuple(map(str, (*parts, *steps)))

    def with_seed(self, seed: int) -> Criterion:
        """Returns the criterion for one seed."""
        return Random(seed=seed) if isinstance(self.scorer, Random) else self.scorer


def digest(value: Any) -> str:
    """Returns a short hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def default_methods() -> list[Method]:
    """Returns entropy and cross-entropy Taylor scores, and the two baselines that need no data."""
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
        method: How its units were scored.
        pruning_ratio: Share of all parameters removed.
        seed: Seed of calibration data or random numbers; None where neither plays a part.
    """

    method: Method
    pruning_ratio: float
    seed: int | None

    @property
    def name(self) -> str:
        """Its name, for files."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.method.name}-{self.pruning_ratio:g}{seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepGrid:
    """The grid.

    Attributes:
        methods: What is compared.
        pruning_ratios: Shares of all parameters to remove.
        seeds: Seeds of the calibration data (and of random scores).
        texts: Name -> evaluation text, as ``TextDataModule(text=...)`` takes it.
        round_to: Kept widths are multiples of this.
        task_seeds: Run the zero-shot tasks for the first so many seeds.
    """

    methods: Sequence[Method]
    pruning_ratios: Sequence[float]
    seeds: Sequence[int]
    texts: Mapping[str, str]
    round_to: int = 1
    task_seeds: int = 1

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` where something is missing or stands there twice."""
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
            raise ConfigError(f"texts: names are made of letters, digits, '_', '-' and '.'; got {list(self.texts)}.")
        if self.task_seeds < 1:
            raise ConfigError(f"task_seeds={self.task_seeds} must be positive.")

    def cells(self) -> Iterator[Cell]:
        """Yields the models to make; those of the first seed first, so that a whole table exists early."""
        for number, seed in enumerate(self.seeds):
            for method in self.methods:
                if method.seeded or number == 0:
                    for ratio in self.pruning_ratios:
                        yield Cell(method=method, pruning_ratio=ratio, seed=seed if method.seeded else None)

    def runs_tasks(self, cell: Cell) -> bool:
        """Returns whether the zero-shot tasks are run on a cell's model."""
        return cell.seed is None or cell.seed in list(self.seeds)[: self.task_seeds]
