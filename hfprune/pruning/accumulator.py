"""Importance accumulator: sums of a criterion over forward and backward passes, without Lightning.

``ImportanceAccumulator`` hooks the projections of the groups and freezes all weights; the autograd graph begins at the
first hooked projection. Each backward pass (each forward pass for activation criteria) is added to exact sums.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune.criteria.accumulated import AccumulatedSums
from hfprune.criteria.base import (
    Activation,
    ActivationCriterion,
    BatchInfo,
    CalibratedCriterion,
    Criterion,
    GradientCriterion,
    LayerwiseCriterion,
    Rows,
    Signal,
    Totals,
    WeightCriterion,
    checked_scores,
)
from hfprune.criteria.layers import scored_groups
from hfprune.models.expert_neurons import expert_of
from hfprune.models.groups import group_modules
from hfprune.plan import Group, Slice
from hfprune.pruning.hooks import (
    first_not_finite,
    frozen,
    full_precision,
    hook_activations,
    hook_gradients,
    hooked,
    read_slices,
    slice_shapes,
    whole_weight,
)
from hfprune.utils.errors import CalibrationError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSum:
    """The objective of one batch, summed over tokens.

    Attributes:
        total: Differentiable scalar, in nats.
        num_tokens: [B], int64, tokens that count in each sequence.
        padding: [B, T] boolean, True at padding; None without padding.
    """

    total: Tensor
    num_tokens: Tensor
    padding: Tensor | None


def weight_scores(model: nn.Module, groups: Sequence[Group], criterion: WeightCriterion) -> dict[str, Tensor]:
    """Scores units by their weights. Collective when the model is sharded.

    Args:
        model: The dense model.
        groups: Groups to score.
        criterion: Criterion that reads weights alone.

    Returns:
        Group name -> importance [U], float64, on the CPU.

    Raises:
        CalibrationError: A group's scores do not rank its units.
    """
    modules, found = group_modules(model, groups), dict[str, Tensor]()
    with torch.no_grad():
        for g in groups:
            weights = [whole_weight(modules[s.module], s.parameter) for s in g.slices]
            found[g.name] = checked_scores(criterion, g, criterion.score(g, weights))
    return found


class NotFiniteError(CalibrationError):
    """The objective of a batch is NaN or infinite."""


def backward(
    out: ObjectiveSum,
    accumulators: Sequence["ImportanceAccumulator"],
    *,
    count: bool = True,
    retain_graph: bool = False,
) -> tuple[float, int]:
    """Runs the backward pass of one batch's objective and adds it to every accumulator.

    Args:
        out: The objective.
        accumulators: Accumulators whose hooks are active.
        count: False runs the pass without adding it.
        retain_graph: Whether another objective of the same forward pass follows.

    Returns:
        The summed objective (nats) and its number of tokens.

    Raises:
        NotFiniteError: The objective is not finite.
        CalibrationError: A score is not finite, or the objective does not depend on any scored activation.
    """
    if not out.total.requires_grad:
        raise CalibrationError(
            "The objective does not depend on any scored activation: no scored module ran, or the objective was "
            "computed without gradients."
        )
    num_tokens = int(out.num_tokens.sum())  # waits for the forward pass: hooks record nothing without tokens
    for accumulator in accumulators:
        accumulator.arm(out.num_tokens, out.padding, count=count and num_tokens > 0)
    out.total.backward(retain_graph=retain_graph)
    total = float(out.total.detach())  # waits for the backward pass
    if total != total or abs(total) == float("inf"):
        raise NotFiniteError(f"The objective is {total} in this batch.")
    for accumulator in accumulators:
        accumulator.commit(out.total.detach())
    return total, num_tokens


def check_criterion(
    model: nn.Module, groups: tuple[Group, ...], criterion: Criterion, *, settles: bool = False
) -> None:
    """Raises ``ConfigError`` if ``criterion`` cannot score the groups; reads shapes alone.

    Args:
        model: The dense model, possibly on the meta device.
        groups: Groups to prune.
        criterion: The criterion.
        settles: Whether scores are recomputed during calibration to detect convergence.
    """
    if isinstance(criterion, LayerwiseCriterion):
        return
    scored = scored_groups(model, groups, criterion)
    if not isinstance(criterion, CalibratedCriterion):
        return
    modules = group_modules(model, scored)
    for group in scored:
        shapes = slice_shapes(modules, group)
        if any(expert_of(part) is not None and part.side == "out" for part in read_slices(criterion, group)):
            raise ConfigError(
                f"{type(criterion).__name__} reads gate and up projections, which are part of one tensor in experts. "
                "Score neurons within experts by ActivationTaylor, ActivationNorm, Fisher or Magnitude."
            )
        criterion.check(group, shapes)
        if settles and criterion.moments(group, shapes):
            raise ConfigError(
                f"early_stop_overlap cannot be used with {type(criterion).__name__} and these settings: its sums are "
                "too large to be reduced and scored several times."
            )


class ImportanceAccumulator:
    """Accumulates the sums of a criterion over calibration sequences.

    Args:
        model: Dense model that contains the modules of the groups.
        groups: Groups to score.
        criterion: Criterion that scores them.
        root: Module to freeze and put into eval mode while recording; defaults to ``model``.
        device: Device of the sums; defaults to the device of the first parameter.

    Raises:
        ConfigError: The criterion cannot score one of the groups.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        criterion: CalibratedCriterion,
        *,
        root: nn.Module | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._groups, self._criterion = model, tuple(groups), criterion
        self._root = model if root is None else root
        self._device = device or next(model.parameters()).device
        self._modules = group_modules(model, groups)
        shapes = {g.name: slice_shapes(self._modules, g) for g in groups}
        self._sums = AccumulatedSums(groups, criterion, shapes, device=self._device)
        self._batch: BatchInfo | None = None
        self._counting = False
        self._pending: dict[tuple[str, str], list[Tensor]] = {}
        self._waiting: dict[str, list[dict[Slice, Signal]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which the root is frozen and in eval mode and the model is hooked."""
        criterion = self._criterion
        if isinstance(criterion, GradientCriterion):
            handles = hook_gradients(self._model, self._groups, criterion, self._receive_signal)
        else:
            assert isinstance(criterion, ActivationCriterion)
            handles = hook_activations(self._model, self._groups, criterion, self._receive_activation)
        with frozen(self._root), hooked(handles):
            yield

    # ---- passes ------------------------------------------------------------------------------------------------------

    def step(self, objective: Callable[[], ObjectiveSum], *, count: bool = True) -> tuple[float, int]:
        """Runs one forward and backward pass and adds it.

        Args:
            objective: Function that runs the forward pass.
            count: False runs the passes without adding them, for ranks of a sharded model that have no batch left.

        Returns:
            The summed objective (nats) and the number of tokens of the batch.

        Raises:
            CalibrationError: The objective or a score is not finite; the message names the first affected layer.
        """
        with torch.enable_grad():
            out = objective()
            try:
                return backward(out, [self], count=count)
            except NotFiniteError as error:
                raise CalibrationError(f"{error} {self._blame(objective)}") from None

    def observe(
        self, forward: Callable[[], None], num_tokens: Tensor, padding: Tensor | None, *, count: bool = True
    ) -> int:
        """Runs one forward pass for an activation criterion and adds it.

        Args:
            forward: Function that runs the model.
            num_tokens: [B], tokens that count in each sequence.
            padding: [B, T] boolean, True at padding; None without padding.
            count: False runs the pass without adding it.

        Returns:
            The number of tokens.

        Raises:
            CalibrationError: An activation is not finite; the message names the last affected layer.
        """
        number = int(num_tokens.sum())
        self.arm(num_tokens, padding, count=count and number > 0)
        with torch.no_grad():
            forward()
        self.commit(torch.zeros((), dtype=torch.float64, device=self._device))
        return number

    def arm(self, num_tokens: Tensor, padding: Tensor | None, *, count: bool = True) -> None:
        """Starts recording of the next backward pass (forward pass for activation criteria).

        Args:
            num_tokens: [B], tokens that count in each sequence.
            padding: [B, T] boolean, True at padding; None without padding.
            count: False records nothing, as for a batch without counted tokens.
        """
        self._batch = BatchInfo(num_sequences=len(num_tokens), num_tokens=num_tokens, padding=padding)
        self._counting = count
        self._pending, self._waiting = {}, {}

    def commit(self, total: Tensor) -> None:
        """Stops recording and adds the recorded pass.

        Args:
            total: Summed objective of the batch, scalar.

        Raises:
            CalibrationError: A score is not finite, or a joint criterion did not receive all projections of a group.
        """
        batch, self._batch = self._batch, None
        assert batch is not None
        if self._counting:
            self._check_complete()
            self._sums.add(self._pending, batch.num_tokens, total)
        self._pending, self._waiting = {}, {}

    def _receive_signal(self, group: Group, part: Slice, signal: Signal) -> None:
        criterion, batch = self._criterion, self._batch
        if batch is None or not self._counting:  # backward pass of another objective
            return
        assert isinstance(criterion, GradientCriterion)
        signals = {part: signal}
        if criterion.joint:
            waiting = self._waiting.setdefault(group.name, [])
            home = next((found for found in waiting if part not in found), None)
            if home is None:  # projections may run several times: signals are collected per run
                waiting.append(home := {})
            home[part] = signal
            parts = read_slices(criterion, group)
            if len(home) < len(parts):
                return
            waiting.remove(home)
            signals = {p: home[p] for p in parts}
        with full_precision(signal.grad):
            self._receive_rows(group, criterion.rows(group, signals, batch, self._sums.moments[group.name]))

    def _receive_activation(self, group: Group, part: Slice, seen: Activation) -> None:
        criterion, batch = self._criterion, self._batch
        if batch is None or not self._counting:
            return
        assert isinstance(criterion, ActivationCriterion)
        with full_precision(seen.output):
            self._receive_rows(group, criterion.rows(group, part, seen, batch, self._sums.moments[group.name]))

    def _receive_rows(self, group: Group, rows: Rows) -> None:
        for name, found in rows.items():
            self._pending.setdefault((group.name, name), []).append(found.to(self._device))

    def _check_complete(self) -> None:
        for name, waiting in self._waiting.items():
            if waiting:
                found = ", ".join(sorted({part.module for parts in waiting for part in parts}))
                raise CalibrationError(
                    f"{type(self._criterion).__name__} reads all projections of {name} together, but only {found} "
                    "took part in the objective."
                )

    # ---- state -------------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Returns every sum in a fixed order. Sums of several ranks add up to those of the whole data set."""
        return self._sums.tensors()

    @property
    def has_moments(self) -> bool:
        """Whether the criterion keeps moments: large sums that are not exact."""
        return any(self._sums.moments.values())

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Replaces the sums by the result of :meth:`tensors`, of this rank or added up over all ranks."""
        self._sums.load(tensors)

    def totals(self) -> Totals:
        """Returns the numbers of accumulated tokens and sequences."""
        return self._sums.totals()

    def scores(self) -> dict[str, Tensor]:
        """Returns group name -> importance [U], float64, on the CPU. Collective when the model is sharded."""

        def weights(group: Group) -> list[Tensor]:
            return [whole_weight(self._modules[p.module], p.parameter).to(self._device) for p in group.slices]

        with torch.no_grad():
            return self._sums.scores(weights)

    def mean_objective(self) -> float | None:
        """Returns the mean objective per token in nats; None without an objective, NaN before the first token."""
        if not isinstance(self._criterion, GradientCriterion):
            return None
        tokens = self.totals().num_tokens
        return self._sums.objective_total() / tokens if tokens else float("nan")

    def _blame(self, objective: Callable[[], ObjectiveSum]) -> str:
        """Repeats the forward pass without gradients and names the first group with non-finite activations."""
        bad = first_not_finite(self._modules, self._groups, objective)
        if bad is not None:
            return f"The first activations that are not finite are those of {bad}."
        return "All activations of the scored groups are finite. Check the final norm and the output head."
