"""Base classes of criteria: signals in, one score per unit out, with plain sums over sequences in between.

Scores therefore do not depend on the batch size, and the sums of several ranks are added. Operations that are not
additive (an absolute value, a division) run once, in ``score``.

Shape legend: B sequences, T tokens, C channels, U units, S sums of a criterion for one group.
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
"""``token``: every token counts the same. ``sequence``: every sequence counts the same (mean over its tokens)."""

Shape = tuple[int, int]
"""[out, in] of a projection's weight."""

UNITS = "units"
"""Name of the rows of criteria that keep one number per unit."""

Rows = dict[str, Tensor]
"""Contribution of one batch to the sums of a group: name -> [B, S] float64, one row per sequence."""

LargeSums = dict[str, Tensor]
"""Large float64 sums of one group, by name."""


def check_weighting(weighting: str) -> None:
    """Raises ``ConfigError`` unless ``weighting`` is a :data:`Weighting`."""
    check_choice("weighting", weighting, get_args(Weighting))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInfo:
    """Properties of the batch that a signal belongs to.

    Attributes:
        num_sequences: B.
        num_tokens: [B], tokens that count in each sequence.
        padding: [B, T] boolean, True at padding; None when there is none.
    """

    num_sequences: int
    num_tokens: Tensor
    padding: Tensor | None

    def by_sequence(self, signal: Tensor) -> Tensor:
        """Returns ``signal`` as [B, T, C]; some models (OPT) flatten their batch to [B * T, C]."""
        return signal.reshape(self.num_sequences, -1, signal.shape[-1])

    def wide(self, signal: Tensor, *, zero_padding: bool = False) -> Tensor:
        """Returns ``signal`` as [B, T, C] in float32 or wider; ``zero_padding`` sets padding to 0."""
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
    """Activations and gradient of one projection, recorded during the backward pass of a summed objective.

    Attributes:
        input: Input of the projection, [B, T, in] or [B * T, in]; for experts their router weights, [B * T, U], or 1
            for the tokens of an expert where its input carries the router weight (Llama 4).
        output: Output, [B, T, out] or [B * T, out], for slices on the output side; else None.
        grad: Gradient at the input or output, as selected by the criterion's ``reads``.
        weight: Weight as [out, in].
        bias: Bias [out], or None.
    """

    input: Tensor
    output: Tensor | None = None
    grad: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Activations of one projection, recorded during a forward pass.

    Attributes:
        input: Input of the projection, [B, T, in] or [B * T, in]; for experts the norms of contributions, [B * T, U].
        output: Output, [B, T, out] or [B * T, out].
        routed: Whether each token is routed to each expert, [B * T, U]; None for other units.
    """

    input: Tensor
    output: Tensor
    routed: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Numbers of accumulated tokens and sequences, over all ranks."""

    num_tokens: int
    num_sequences: int

    def divisor(self, weighting: Weighting) -> int:
        """Returns the number of tokens or sequences by which a sum is divided."""
        return self.num_tokens if weighting == "token" else self.num_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums of one group over all batches and ranks.

    Attributes:
        rows: Name -> sum of the rows [S], float64.
        moments: Name -> large sum, float64.
        totals: Numbers of accumulated tokens and sequences.
        weights: Function that returns the weight [out, in] of each slice. Collective when the model is sharded.
    """

    rows: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    totals: Totals
    weights: Callable[[], Sequence[Tensor]]


class Criterion(Configured, ABC):
    """Base class of all criteria. An instance holds settings only, no sums, and serves all groups.

    Attributes:
        outside_layers: Whether hidden channels are also scored in the embedding and the output head.
        norms: Whether hidden channels are also scored in the weights of norms.
        experts: Whether the criterion scores experts of mixture-of-experts layers.
        name: Name in plans and reports; defaults to the class name in snake case.
    """

    outside_layers: ClassVar[bool] = False
    norms: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Sets the default name."""
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    def describe(self) -> dict[str, str]:
        """Returns the criterion's name and settings for the plan's provenance."""
        return {"name": self.name} | {name: str(value) for name, value in self.settings().items()}


class WeightCriterion(Criterion):
    """Criterion that reads weights alone and needs no calibration data."""

    @abstractmethod
    def score(self, group: Group, weights: Sequence[Tensor]) -> Tensor:
        """Returns the importance [U] float64, >= 0.

        Args:
            group: The group.
            weights: Weight [out, in] of the projection of each slice.
        """


class CalibratedCriterion(Criterion):
    """Criterion that accumulates sums over calibration data.

    Rows are summed exactly: the result has the same bits for every order of the sequences and every number of
    processes. Moments (second moments, sums with the shape of a weight) are too large for exact sums; they are added
    in float64 and agree up to rounding.
    """

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` if the criterion cannot score the group's units.

        Args:
            group: The group.
            shapes: [out, in] of the projection of each slice.
        """

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns name -> length S of the group's rows; by default one number per unit."""
        return {UNITS: group.num_units}

    def moments(self, group: Group, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of the group's moments; by default none."""
        return {}

    def new_sum(self, length: int, device: torch.device) -> UnitSum:
        """Returns an empty sum for rows of this length; by default an exact one."""
        return ExactSum(length, device=device)

    @abstractmethod
    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns the importance [U] float64, >= 0."""


class GradientCriterion(CalibratedCriterion):
    """Criterion that reads activations or weights and the gradients of an objective.

    Attributes:
        objectives: Supported objectives, the default first; None supports all.
        joint: Whether ``rows`` receives the signals of all slices of a group together.
    """

    objectives: ClassVar[tuple[str, ...] | None] = None
    joint: bool = False

    @abstractmethod
    def reads(self, part: Slice) -> Literal["input", "output"] | None:
        """Returns the side of the slice's projection at which the gradient is read, or None to skip the slice."""

    @abstractmethod
    def rows(self, group: Group, signals: Mapping[Slice, Signal], batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the contribution of one batch.

        Args:
            group: The group.
            signals: Signal of one slice, or of every slice that is read for ``joint`` criteria.
            batch: The batch.
            moments: Moments of the group, updated in place.
        """


class LayerwiseCriterion(Criterion):
    """Criterion that selects units layer by layer, on activations of a model whose earlier layers are pruned."""

    @abstractmethod
    def select(self, group: Group, weight: Tensor, moments: Moments, width: int) -> tuple[Tensor, Tensor]:
        """Returns the kept units [width], int64 and ascending, and the importance [U] float64, >= 0.

        Args:
            group: The group.
            weight: Weight [O, C] of the projection that reads the group.
            moments: Second moments of the projection's inputs; unit j owns inputs j * w to (j + 1) * w - 1.
            width: Number of kept units.
        """


class ActivationCriterion(CalibratedCriterion):
    """Criterion that reads activations of forward passes without output head; every real token counts."""

    @abstractmethod
    def reads(self, part: Slice) -> bool:
        """Returns whether the criterion reads the activations of a slice's projection."""

    @abstractmethod
    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the contribution of one slice in one batch.

        Args:
            group: The group.
            part: The slice.
            seen: Activations of its projection.
            batch: The batch.
            moments: Moments of the group, updated in place.
        """


def check_experts(criterion: Criterion, kinds: Collection[str]) -> None:
    """Raises ``ConfigError`` if ``kinds`` contains experts and ``criterion`` does not score them."""
    if "experts" in kinds and not criterion.experts:
        able = ", ".join(name for name, known in discover("hfprune.criteria", Criterion).items() if known.experts)
        raise ConfigError(
            f"{type(criterion).__name__} does not score experts. Choose one of {able}, or leave 'experts' and 'layers' "
            "(which contain experts) out of the units."
        )


def resolve_objective(criterion: Criterion, asked: str | None) -> str | None:
    """Returns the name of the objective to differentiate, or None if the criterion supports all and none was given.

    Args:
        criterion: The criterion.
        asked: Name of the objective given by the user, or None.

    Raises:
        ConfigError: The criterion takes no objective, or does not support this one.
    """
    name = type(criterion).__name__
    if isinstance(criterion, GradientCriterion):
        known = criterion.objectives
        if known is None or asked in known:
            return asked
        if asked is None:
            return known[0]
        raise ConfigError(f"{name} supports the objective {' or '.join(known)}, not '{asked}'.")
    if asked is None:
        return None
    why = "reads weights alone" if isinstance(criterion, WeightCriterion) else "reads activations of a forward pass"
    raise ConfigError(f"{name} {why}: it takes no objective, but '{asked}' was given.")


def checked_scores(criterion: Criterion, group: Group, scores: Tensor, *, why_zero: str = "") -> Tensor:
    """Checks that the scores of a group rank its units.

    Args:
        criterion: Criterion that computed the scores.
        group: The group.
        scores: Scores [U].
        why_zero: Explanation used in the message when all scores are zero.

    Returns:
        The scores [U], float64, on the CPU.

    Raises:
        CalibrationError: The shape is not [U], a score is NaN or infinite, or all scores are zero or equal.
    """
    name = type(criterion).__name__
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (group.num_units,):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise CalibrationError(f"{name} must return a tensor [{group.num_units}] for {group.name}; it returned {got}.")
    found = scores.detach().to("cpu", torch.float64)
    bad = int((~found.isfinite()).sum())
    if bad:
        raise CalibrationError(
            f"The scores of {group.name} by {name} are not finite: {bad} of {group.num_units} are NaN or infinite."
        )
    if any("." in part.parameter for part in group.slices) and not bool(found.any()):
        return found  # an expert that no calibration token is routed to
    if not bool(found.any()):
        raise CalibrationError(f"All scores of {group.name} are zero ({name}): {why_zero or 'its weights are zero.'}")
    if group.num_units > 1 and bool((found == found[0]).all()):
        raise CalibrationError(
            f"All scores of {group.name} are equal ({name}, {float(found[0]):.4g}) and rank no units. Use another "
            "criterion, or Random() for a random choice."
        )
    return found
