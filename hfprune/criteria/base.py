"""The contract of a criterion: signals in, one score per unit out, everything in between a plain sum over sequences.

So scores do not depend on how sequences are batched, and ranks are combined by adding their sums; whatever is not
additive (an absolute value, a division) happens in ``score``, once.

Shape legend: B sequences, T tokens, C channels, U units, S sums that a criterion keeps of one group.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from hfprune.plan import Group, Slice
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.exact_sums import ExactSum, UnitSum
from hfprune.utils.second_moments import Moments
from hfprune.utils.settings import Configured, check_choice, discover, snake_case

Weighting = Literal["token", "sequence"]
"""``token``: every token counts the same. ``sequence``: every sequence does (the paper's mean over its tokens)."""

Shape = tuple[int, int]
"""[out, in] of a projection's weight."""

UNITS = "units"
"""Name of the rows of criteria that add one number per unit."""

Rows = dict[str, Tensor]
"""What one batch adds to a group's sums: name -> [B, S] float64, one row per sequence."""

LargeSums = dict[str, Tensor]
"""Large float64 sums of one group, by name."""


def check_weighting(weighting: str) -> None:
    """Raises ``ConfigError`` unless ``weighting`` is one."""
    check_choice("weighting", weighting, get_args(Weighting))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInfo:
    """What a criterion must know about the batch that a signal belongs to.

    Attributes:
        num_sequences: B.
        num_tokens: [B], tokens that count in each sequence.
        padding: [B, T] boolean, True at padding; None when there is none.
    """

    num_sequences: int
    num_tokens: Tensor
    padding: Tensor | None

    def by_sequence(self, signal: Tensor) -> Tensor:
        """Returns ``signal`` as [B, T, C], also where a model flattens its batch to [B * T, C] (OPT)."""
        return signal.reshape(self.num_sequences, -1, signal.shape[-1])

    def wide(self, signal: Tensor, *, zero_padding: bool = False) -> Tensor:
        """Returns ``signal`` as [B, T, C] in float32 or wider, with zeros at padding where asked."""
        found = self.by_sequence(signal)
        found = found if found.dtype == torch.float64 else found.float()
        return (
            found.masked_fill(self.padding.unsqueeze(-1), 0.0) if zero_padding and self.padding is not None else found
        )

    def weights(self, weighting: Weighting) -> Tensor:
        """Returns the weight [B] of each sequence's token sum, float64."""
        counts = self.num_tokens.to(torch.float64)
        return torch.ones_like(counts) if weighting == "token" else 1 / counts.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What was recorded at one projection during one backward pass of a summed objective.

    Attributes:
        input: Input of the projection, [B, T, in] or [B * T, in]; of experts their routers' weights, [B * T, U].
        output: Its output, [B, T, out] or [B * T, out], of a slice on the output side that is read there.
        grad: Gradient at the projection's input or output, as the criterion ``reads`` it.
        weight: The projection's weight as [out, in].
        bias: Its bias [out], or None.
    """

    input: Tensor
    output: Tensor | None = None
    grad: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What was recorded at one projection during one forward pass.

    Attributes:
        input: Input of the projection, [B, T, in] or [B * T, in]; of experts the norm of what each adds, [B * T, U].
        output: Its output, [B, T, out] or [B * T, out].
    """

    input: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """How much was accumulated, over all ranks."""

    num_tokens: int
    num_sequences: int

    def divisor(self, weighting: Weighting) -> int:
        """Returns what a sum is divided by, once, at the end."""
        return self.num_tokens if weighting == "token" else self.num_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What was accumulated of one group over all batches and ranks.

    Attributes:
        rows: The sums [S] of all rows by name, float64.
        moments: Large sums, float64.
        totals: How much was accumulated.
        weights: Returns the weight [out, in] of each of the group's slices; every rank of a sharded model must ask.
    """

    rows: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    totals: Totals
    weights: Callable[[], Sequence[Tensor]]


class Criterion(Configured, ABC):
    """Turns what is known about units into scores. One instance serves all groups; it holds settings, never sums.

    Attributes:
        outside_layers: Whether it scores hidden channels in the embedding and the output head, too.
        norms: Whether it scores them in the weights of norms, too.
        experts: Whether it scores experts of mixtures.
        name: Its name in plans and reports; that of the class with underscores unless a criterion says otherwise.
    """

    outside_layers: ClassVar[bool] = False
    norms: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Names the criterion after its class."""
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    def describe(self) -> dict[str, str]:
        """Returns the criterion's name and settings for the plan's provenance."""
        return {"name": self.name} | {name: str(value) for name, value in self.settings().items()}


class WeightCriterion(Criterion):
    """Scores that follow from the weights alone: no calibration data is run."""

    @abstractmethod
    def score(self, group: Group, weights: Sequence[Tensor]) -> Tensor:
        """Returns the importance [U] float64, >= 0.

        Args:
            group: The group.
            weights: The weight [out, in] of each of its slices' projections.
        """


class CalibratedCriterion(Criterion):
    """Scores from what the calibration data bring, summed.

    Rows are added exactly, whatever the order and the number of processes. Moments (second moments, sums with the shape
    of a weight) would be too large for that: they are added in float64, and agree to rounding.
    """

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` where the criterion cannot score the group's units.

        Args:
            group: The group.
            shapes: [out, in] of each of its slices' projections.
        """

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the lengths S of the group's rows by name: one number per unit unless a criterion says otherwise."""
        return {UNITS: group.num_units}

    def moments(self, group: Group, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the moments by name: none unless a criterion says otherwise."""
        return {}

    def new_sum(self, length: int, device: torch.device) -> UnitSum:
        """Returns the empty sum that rows are added to: exact unless a criterion says otherwise."""
        return ExactSum(length, device=device)

    @abstractmethod
    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns the importance [U] float64, >= 0."""


class GradientCriterion(CalibratedCriterion):
    """Scores from activations or weights and an objective's gradients.

    Attributes:
        objectives: The objectives that the scores make sense with, the default first; None: with any.
        joint: Whether ``rows`` needs the signals of all of a group's slices together.
    """

    objectives: ClassVar[tuple[str, ...] | None] = None
    joint: bool = False

    @abstractmethod
    def reads(self, part: Slice) -> Literal["input", "output"] | None:
        """Returns at which end of a slice's projection the gradient is read; None where the slice is not read."""

    @abstractmethod
    def rows(self, group: Group, signals: Mapping[Slice, Signal], batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns what one batch's signals add.

        Args:
            group: The group.
            signals: The signal of one slice, or, for ``joint`` criteria, of every slice that is read.
            batch: The batch.
            moments: To be added to, in place.
        """


class LayerwiseCriterion(Criterion):
    """Chooses the units of one layer after another, from activations that the pruned layers before it give."""

    @abstractmethod
    def select(self, group: Group, weight: Tensor, moments: Moments, width: int) -> tuple[Tensor, Tensor]:
        """Returns the kept units [width], int64 and ascending, and the importance [U] float64, >= 0.

        Args:
            group: The group.
            weight: [O, C], of the projection that reads it.
            moments: Of that projection's inputs, unit j owning inputs j * w up to (j + 1) * w.
            width: Units that stay.
        """


class ActivationCriterion(CalibratedCriterion):
    """Scores from activations alone: a forward pass without output head, objective or backward pass.

    Every real token counts.
    """

    @abstractmethod
    def reads(self, part: Slice) -> bool:
        """Returns whether the criterion reads the activations of a slice's projection."""

    @abstractmethod
    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns what the activations of one slice of one batch add.

        Args:
            group: The group.
            part: The slice.
            seen: The activations of its projection.
            batch: The batch.
            moments: To be added to, in place.
        """


def check_experts(criterion: Criterion, kinds: Collection[str]) -> None:
    """Raises ``ConfigError`` where experts are among the units and ``criterion`` does not score them."""
    if "experts" in kinds and not criterion.experts:
        able = ", ".join(name for name, known in discover("hfprune.criteria", Criterion).items() if known.experts)
        raise ConfigError(
            f"{type(criterion).__name__} does not score experts. Choose one of {able}; or leave 'experts' out of the "
            "units, and 'layers', which hold them."
        )


def resolve_objective(criterion: Criterion, asked: str | None) -> str | None:
    """Returns the name of the objective to differentiate: the one asked for, or the criterion's own; None: any will do.

    Raises:
        ConfigError: The criterion takes no objective, or not this one.
    """
    name = type(criterion).__name__
    if isinstance(criterion, GradientCriterion):
        known = criterion.objectives
        if known is None or asked in known:
            return asked
        if asked is None:
            return known[0]
        raise ConfigError(f"{name} goes with the objective {' or '.join(known)}, not with '{asked}'.")
    if asked is None:
        return None
    why = "reads weights alone" if isinstance(criterion, WeightCriterion) else "reads activations of a forward pass"
    raise ConfigError(f"{name} {why}: it takes no objective, but '{asked}' was given.")


def checked_scores(criterion: Criterion, group: Group, scores: Tensor, *, why_zero: str = "") -> Tensor:
    """Returns the scores [U] of a group in float64 on the CPU, after checking that they rank its units.

    Args:
        criterion: What made them.
        group: The group.
        scores: What it made.
        why_zero: What explains scores that are all zero; by default that the weights are.

    Raises:
        CalibrationError: They are not [U] numbers, or one is NaN or infinite, or all of several units' are equal.
    """
    name = type(criterion).__name__
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (group.num_units,):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise CalibrationError(f"{name} must give a tensor [{group.num_units}] for {group.name}, and gave {got}.")
    found = scores.detach().to("cpu", torch.float64)
    bad = int((~found.isfinite()).sum())
    if bad:
        raise CalibrationError(
            f"The scores of {group.name} by {name} are not finite: {bad} of {group.num_units} are NaN or infinite."
        )
    if not bool(found.any()):
        raise CalibrationError(f"All scores of {group.name} are zero ({name}): {why_zero or 'its weights are zero.'}")
    if group.num_units > 1 and bool((found == found[0]).all()):
        raise CalibrationError(
            f"All scores of {group.name} are equal ({name}, {float(found[0]):.4g}): they rank nothing. Give another "
            "criterion, or Random() if that is meant."
        )
    return found
