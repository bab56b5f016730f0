"""Accumulated sums of one criterion over all groups: reduced over ranks, saved in checkpoints, turned into scores."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hfprune.criteria.base import (
    Activation,
    ActivationCriterion,
    BatchInfo,
    CalibratedCriterion,
    GradientCriterion,
    Shape,
    Signal,
    Sums,
    Totals,
    checked_scores,
)
from hfprune.plan import Group
from hfprune.utils.errors import CalibrationError
from hfprune.utils.exact_sums import LIMIT, ExactSum

Pending = Mapping[tuple[str, str], Sequence[Tensor]]
"""(group's name, name of the rows) -> rows [R, S] of one batch."""


class AccumulatedSums:
    """Sums of a criterion: the rows of all groups in one vector, the moments, the objective and the token counts.

    Args:
        groups: Groups to score.
        criterion: Criterion that scores them.
        shapes: Group name -> [out, in] of the projection of each of its slices.
        device: Device of the sums.

    Raises:
        ConfigError: The criterion cannot score one of the groups.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        criterion: CalibratedCriterion,
        shapes: Mapping[str, Sequence[Shape]],
        *,
        device: torch.device,
    ) -> None:
        for g in groups:
            criterion.check(g, shapes[g.name])
        self._groups, self._criterion, self._device = tuple(groups), criterion, device
        self._slots = [(g, *size) for g in groups for size in criterion.sizes(g, shapes[g.name]).items()]
        self._lengths = [length for _, _, length in self._slots]
        self._rows = criterion.new_sum(sum(self._lengths), device) if self._slots else None
        self.moments = {
            g.name: {
                name: torch.zeros(shape, dtype=torch.float64, device=device)
                for name, shape in criterion.moments(g, shapes[g.name]).items()
            }
            for g in groups
        }
        self._objective = ExactSum(1, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # tokens, sequences

    def add(self, pending: Pending, num_tokens: Tensor, objective: Tensor) -> None:
        """Adds one batch.

        Args:
            pending: (group's name, name of the rows) -> rows [R, S]. Modules that did not run have no entry.
            num_tokens: [B], tokens that count in each sequence.
            objective: Scalar, the summed objective in nats.

        Raises:
            CalibrationError: A row is not finite.
        """
        height = max((sum(map(len, rows)) for rows in pending.values()), default=0)
        if self._rows is not None and height:
            found = torch.cat([self._slot(g, name, n, pending, height) for g, name, n in self._slots], dim=1)
            if not bool((found.abs() < LIMIT).all()):  # NaN compares false
                self._raise_not_finite(found)
            self._rows.add(found)
        self._objective.add(objective.to(self._device, torch.float64).reshape(1, 1))
        self._counts += torch.stack([num_tokens.sum(), (num_tokens > 0).sum()]).to(self._device)

    def _slot(self, group: Group, name: str, length: int, pending: Pending, height: int) -> Tensor:
        rows = list(pending.get((group.name, name), ()))
        missing = height - sum(map(len, rows))
        if missing:
            rows.append(torch.zeros(missing, length, dtype=torch.float64, device=self._device))
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _raise_not_finite(self, rows: Tensor) -> None:
        parts = zip(self._slots, rows.split(self._lengths, dim=1), strict=True)
        bad = list(dict.fromkeys(slot[0].name for slot, part in parts if not bool((part.abs() < LIMIT).all())))
        what = "a gradient" if isinstance(self._criterion, GradientCriterion) else "an activation"
        raise CalibrationError(
            f"The scores of {bad[-1]} are not finite ({len(bad)} of {len(self._groups)} groups): {what} "
            "overflowed. Calibrate in float32 or bfloat16."
        )

    def tensors(self) -> list[Tensor]:
        """Returns every sum in a fixed order. Sums of several ranks add up to those of the whole data set."""
        rows = self._rows.tensors() if self._rows is not None else ()
        return [*rows, *self._moment_tensors(), *self._objective.tensors(), self._counts]

    def _moment_tensors(self) -> list[Tensor]:
        return [tensor for by_name in self.moments.values() for tensor in by_name.values()]

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Replaces the sums.

        Args:
            tensors: Result of :meth:`tensors`, of this rank or added up over all ranks.

        Raises:
            CalibrationError: The sums belong to other groups or another criterion.
        """
        if [(t.shape, t.dtype) for t in self.tensors()] != [(t.shape, t.dtype) for t in tensors]:
            raise CalibrationError("The saved calibration sums belong to another model or criterion.")
        moments = self._moment_tensors()
        *rest, objective, counts = tensors
        split = len(rest) - len(moments)
        if self._rows is not None:
            self._rows.load(tuple(rest[:split]))
        for own, other in zip(moments, rest[split:], strict=True):
            own.copy_(other)
        self._objective.load((objective,))
        self._counts.copy_(counts)

    def totals(self) -> Totals:
        """Returns the numbers of accumulated tokens and sequences."""
        tokens, sequences = self._counts.tolist()
        return Totals(num_tokens=tokens, num_sequences=sequences)

    def objective_total(self) -> float:
        """Returns the accumulated objective, in nats."""
        return float(self._objective.total())

    def scores(self, weights: Callable[[Group], Sequence[Tensor]]) -> dict[str, Tensor]:
        """Returns group name -> importance [U], float64, on the CPU.

        Args:
            weights: Function that returns the weight [out, in] of each slice of a group.

        Raises:
            CalibrationError: No token was accumulated, a moment is not finite, or scores do not rank a group's units.
        """
        totals = self.totals()
        if not totals.num_tokens:
            raise CalibrationError("Calibration saw no token: the calibration data is empty.")
        found: dict[str, dict[str, Tensor]] = {group.name: {} for group in self._groups}
        if self._rows is not None:
            parts = self._rows.total().split(self._lengths)
            for (group, name, _), part in zip(self._slots, parts, strict=True):
                found[group.name][name] = part
        scores = {}
        for group in self._groups:
            rows = found[group.name]
            moments = self.moments[group.name]
            if not all(bool(moment.isfinite().all()) for moment in moments.values()):
                raise CalibrationError(f"The sums of {group.name} are not finite. Calibrate in float32 or bfloat16.")
            sums = Sums(rows=rows, moments=moments, totals=totals, weights=partial(weights, group))
            found_scores = self._criterion.score(group, sums)
            scores[group.name] = checked_scores(self._criterion, group, found_scores, why_zero=self._why_zero())
        if not any(bool(found_scores.any()) for found_scores in scores.values()):  # single experts may have no tokens
            raise CalibrationError(f"All scores are zero ({type(self._criterion).__name__}): {self._why_zero()}")
        return scores

    def _why_zero(self) -> str:
        if not isinstance(self._criterion, GradientCriterion):
            return "its activations or its weights are zero."
        return (
            "the objective does not depend on its units. The weights may be zero, or the model predicts one token with "
            "certainty."
        )


def score_batch(
    criterion: CalibratedCriterion,
    group: Group,
    signals: Sequence[Signal | Activation],
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Scores a group on one batch of sequences of equal length, to try out a criterion.

    Args:
        criterion: The criterion.
        group: The group.
        signals: One signal [B, T, channels] for each slice that the criterion reads, in the order of the slices.
        weights: Weight [out, in] of the projection of every slice; defaults to the weights of the signals.

    Returns:
        Scores [U], float64.

    Raises:
        CalibrationError: The scores do not rank the units.
    """
    if weights is None:
        weights = [s.weight if isinstance(s, Signal) else torch.zeros(1, s.input.shape[-1]) for s in signals]
    num_sequences, length = signals[0].input.shape[:2]
    tokens = torch.full((num_sequences,), length)
    batch = BatchInfo(num_sequences=num_sequences, num_tokens=tokens, padding=None)
    shapes = {group.name: [(w.shape[0], w.shape[1]) for w in weights]}
    sums = AccumulatedSums([group], criterion, shapes, device=torch.device("cpu"))
    moments = sums.moments[group.name]
    found: dict[str, Tensor] = {}
    if isinstance(criterion, GradientCriterion):
        known = {part: s for part, s in zip(group.slices, signals, strict=False) if isinstance(s, Signal)}
        for several in [known] if criterion.joint else [{part: s} for part, s in known.items()]:
            found |= criterion.rows(group, several, batch, moments)
    elif isinstance(criterion, ActivationCriterion):
        read = [part for part in group.slices if criterion.reads(part)]
        for part, seen in zip(read, signals, strict=True):
            assert isinstance(seen, Activation)
            found |= criterion.rows(group, part, seen, batch, moments)
    pending = {(group.name, name): [rows] for name, rows in found.items()}
    sums.add(pending, tokens, torch.zeros(()))
    return sums.scores(lambda _: weights)[group.name]
