"""Options of structured pruning and of its calibration."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

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
from hfprune.models.skip_layers import SkipLayers
from hfprune.plan import DEPTH_KINDS, Budget
from hfprune.pruning.rounds import Rounds, Schedule
from hfprune.utils.errors import ConfigError

DepthMeasure = Literal["cosine", "cross_entropy", "perplexity", "kl"]
"""What the dense model loses without a layer or sub-layer, see ``hfprune.pruning.removal_scores``."""


@dataclass(frozen=True, kw_only=True)
class DepthScores:
    """Scores of whole layers and sub-layers, measured on the dense model without each one.

    Attributes:
        measure: ``kl`` (KL to the dense model), ``cross_entropy`` or ``perplexity`` (their increase), or ``cosine``
            (1 - cosine of the residual stream before and after it).
        sequences: Number of calibration sequences; None for all.
        greedy: Remove one unit at a time, the one that costs least without those removed before, as 2SSP does. The cost
            grows with the number of removed units. Not for ``cosine``.

    Raises:
        ConfigError: A value is out of range.

    >>> DepthScores.of("cosine")
    DepthScores(measure='cosine', sequences=16, greedy=False)
    """

    measure: DepthMeasure = "kl"
    sequences: int | None = 16
    greedy: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.measure not in get_args(DepthMeasure):
            known = ", ".join(get_args(DepthMeasure))
            raise ConfigError(f"depth_scores='{self.measure}' is not one of {known}, nor a DepthScores.")
        if self.sequences is not None and self.sequences < 1:
            raise ConfigError(f"depth_scores: sequences={self.sequences} must be positive.")
        if self.greedy and self.measure == "cosine":
            raise ConfigError("depth_scores: greedy=True measures outputs: use kl, cross_entropy or perplexity.")

    @classmethod
    def of(cls, setting: "DepthSetting") -> "DepthScores | None":
        """Returns the settings that a word stands for."""
        return cls(measure=setting) if isinstance(setting, str) else setting


DepthSetting = DepthScores | DepthMeasure | None
"""Values of ``depth_scores=...``. None: the sum of the scores of the units within."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Calibration options.

    Attributes:
        batches: Number of calibration batches; defaults to all. Required if the training data are used for calibration.
        exact: Run each sequence alone, so that scores have the same bits for every batch size, padding and number of
            processes. False runs whole batches: faster on GPUs for short sequences, and equal up to rounding.
        checkpoint_every: Number of sequences (batches, unless ``exact``) between saves of the progress; None saves
            none.
        check_every: Number of sequences (batches, unless ``exact``) between comparisons of the kept units; None
            compares none. Must be a multiple of the number of processes with ``early_stop_overlap``.
        early_stop_overlap: Stop when two successive comparisons find this share of the kept units unchanged, for
            example 0.99; None runs all batches.
        rounds: Number of rounds in which units are removed; each round scores the model without the removed units.
        schedule: Share of the removal after a share x of the rounds: x for ``linear``, 1 - (1 - x)^3 for ``cubic``.
        self_distillation: Two-stage scoring with the dense model as the teacher (SDMPrune).
        depth_scores: How whole layers and sub-layers are scored: a measure, :class:`DepthScores`, or None for the sum
            of the criterion's scores of their units.

    Raises:
        ConfigError: A value is out of range, or rounds and self-distillation are combined.

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
    depth_scores: DepthSetting = None

    def __post_init__(self) -> None:
        """Checks the values and their combinations."""
        for name in ("batches", "checkpoint_every", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be positive.")
        object.__setattr__(self, "depth_scores", DepthScores.of(self.depth_scores))
        overlap = self.early_stop_overlap
        if overlap is not None and (not 0 < overlap <= 1 or self.check_every is None):
            raise ConfigError(f"early_stop_overlap={overlap} must be a share in (0, 1] and requires `check_every`.")
        if self.removal.number > 1 and self.self_distillation is not None:
            raise ConfigError(
                f"rounds={self.rounds} and `self_distillation` cannot be combined: both calibrate more than once."
            )

    @property
    def depth(self) -> DepthScores | None:
        """How whole layers and sub-layers are scored; None for sums of scores."""
        return DepthScores.of(self.depth_scores)

    @property
    def removal(self) -> Rounds:
        """Number of rounds and their schedule."""
        return Rounds(number=self.rounds, schedule=self.schedule)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that a resumed calibration must share, under the names of earlier checkpoints."""
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
    """Options of structured pruning.

    Attributes:
        budget: Number of parameters or units to remove.
        units: Unit kinds to remove.
        allocation: Distribution of the budget over groups; defaults to the same share for all.
        criterion: Criterion that scores units.
        objective: Name of the objective to differentiate; None for the criterion's default.
        compensation: Fit of the weights that read pruned units; None keeps the weights.
        calibration: Calibration options.
        skip_layers: Layers and modules that are not pruned; None prunes all.

    Raises:
        ConfigError: Criterion, units, objective and self-distillation cannot be combined.
    """

    budget: Budget
    units: tuple[str, ...] = ("mlp",)
    allocation: Allocation | None = None
    criterion: Criterion = field(default_factory=ActivationTaylor)
    objective: str | None = None
    compensation: Compensation | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    skip_layers: SkipLayers | None = None

    def __post_init__(self) -> None:
        """Checks the combinations that do not depend on the model."""
        resolve_objective(self.criterion, self.objective)
        check_experts(self.criterion, self.units)
        if self.calibration.self_distillation is not None:
            self.calibration.self_distillation.check(self.criterion, self.objective)
        if self.calibration.depth is not None and set(DEPTH_KINDS).isdisjoint(self.units):
            raise ConfigError(
                f"depth_scores scores whole layers and sub-layers; the units are {', '.join(self.units)}. Add one of "
                f"{', '.join(DEPTH_KINDS)} to them, or leave depth_scores out."
            )

    @property
    def calibrates(self) -> bool:
        """Whether calibration data are needed."""
        measures = self.compensation is not None or self.calibration.depth is not None
        return measures or not isinstance(self.criterion, WeightCriterion)

    def target_objective(self, *, described: bool) -> str | None:
        """Returns the name of the objective that defines which tokens count; None for the loss of the user's module.

        Args:
            described: Whether the groups are custom neurons of the user's module.
        """
        if self.calibration.self_distillation is not None:
            return "cross_entropy"
        if isinstance(self.criterion, ActivationCriterion):  # no backward pass: every real token counts
            return None if described else "entropy"
        return resolve_objective(self.criterion, self.objective)
