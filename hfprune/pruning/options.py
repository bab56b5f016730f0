"""Options of structured pruning: how calibration runs, and what decides which units are kept."""

from dataclasses import dataclass, field
from typing import Any

from hfprune.allocation import Allocation
from hfprune.compensation import Compensation
from hfprune.criteria import (
    ActivationCriterion,
    ActivationTaylor,
    Criterion,
    SelfDistillation,
    WeightCriterion,
    check_experts,
    resolve_objective,
)
from hfprune.plan import Budget
from hfprune.pruning.rounds import Rounds, Schedule
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How units are scored on calibration data.

    Attributes:
        batches: Number of calibration batches; all if not given. Needed when the training data serve for calibration.
        exact: Run each sequence alone, so that scores are the same bits for every batch size, padding and number of
            processes. False runs batches as they come: faster on a GPU when sequences are short, and equal up to
            rounding.
        checkpoint_every: Save progress each time that about so many sequences (batches, unless ``exact``) were scored;
            never if None.
        check_every: Compare the kept units with those of the comparison before each time that so many sequences (or
            batches) were scored; never if None. A multiple of the number of processes with ``early_stop_overlap``.
        early_stop_overlap: End calibration when two comparisons in a row find this share of the kept units unchanged,
            for example 0.99; None runs all batches.
        rounds: Number of rounds in which units are removed, each scored without those of the rounds before.
        schedule: How the removal is spread over the rounds: after a share x of them ``linear`` has removed x, and
            ``cubic`` 1 - (1 - x)^3.
        self_distillation: Scores in two stages, with the dense model as the teacher (SDMPrune).

    Raises:
        ConfigError: A value is out of range, or rounds and self-distillation are given together.

    >>> CalibrationOptions(batches=8, rounds=2, schedule="linear").removal.shares()
    [0.5, 1.0]
    """

    batches: int | None = None
    exact: bool = True
    checkpoint_every: int | None = 64
    check_every: int | None = 16
    early_stop_overlap: float | None = None
    rounds: int = 1
    schedule: Schedule = "cubic"
    self_distillation: SelfDistillation | None = None

    def __post_init__(self) -> None:
        """Checks every value on its own, and those that exclude each other."""
        for name in ("batches", "checkpoint_every", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be positive.")
        overlap = self.early_stop_overlap
        if overlap is not None and (not 0 < overlap <= 1 or self.check_every is None):
            raise ConfigError(f"early_stop_overlap={overlap} must be a share in (0, 1], and needs check_every.")
        if self.removal.number > 1 and self.self_distillation is not None:
            raise ConfigError(
                f"rounds={self.rounds} and self_distillation both calibrate more than once: give one of the two."
            )

    @property
    def removal(self) -> Rounds:
        """Number of rounds and their schedule."""
        return Rounds(number=self.rounds, schedule=self.schedule)

    def settings(self) -> dict[str, Any]:
        """Returns what a resumed calibration must share, as plain data; names are those of earlier checkpoints."""
        distillation = self.self_distillation
        return {
            "distillation": None if distillation is None else str(distillation),
            "rounds": str(self.removal) if self.rounds > 1 else None,
            "exact": self.exact,
            "batches": self.batches,
            "stop_at": self.early_stop_overlap,
        }


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """What decides which units are kept.

    Attributes:
        budget: How far to go.
        units: Unit kinds.
        allocation: How the budget is spread over groups; the same share everywhere if not given.
        criterion: How signals become scores.
        objective: Name of what calibration differentiates; None for the criterion's own.
        compensation: How the weights that read pruned units are fitted; None leaves them.
        calibration: How calibration runs.

    Raises:
        ConfigError: Criterion, units, objective and self-distillation do not go together.
    """

    budget: Budget
    units: tuple[str, ...] = ("mlp",)
    allocation: Allocation | None = None
    criterion: Criterion = field(default_factory=ActivationTaylor)
    objective: str | None = None
    compensation: Compensation | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        """Checks what does not depend on the model."""
        resolve_objective(self.criterion, self.objective)
        check_experts(self.criterion, self.units)
        if self.calibration.self_distillation is not None:
            self.calibration.self_distillation.check(self.criterion, self.objective)

    @property
    def calibrates(self) -> bool:
        """Whether calibration data are read."""
        return self.compensation is not None or not isinstance(self.criterion, WeightCriterion)

    def target_objective(self, *, described: bool) -> str | None:
        """Returns the objective whose tokens count; None for the module's own, or its loss.

        Args:
            described: Whether the module's neurons were described by its owner.
        """
        if self.calibration.self_distillation is not None:
            return "cross_entropy"
        if isinstance(self.criterion, ActivationCriterion):  # nothing is differentiated: every real token counts
            return None if described else "entropy"
        return resolve_objective(self.criterion, self.objective)
