"""Accumulating importance during forward and backward passes, without Lightning.

``ImportanceAccumulator`` hooks the projections of the groups, lets a gradient flow from the first of them on (all
weights frozen), and adds each backward pass to exact sums. Nothing of the graph outlives its backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfprune.arch.groups import group_modules
from hfprune.arch.projection import weight_of
from hfprune.criteria.base import BatchInfo, GradientCriterion, Signal, Totals, WeightCriterion
from hfprune.errors import CalibrationError
from hfprune.sums import LIMIT, ExactSum
from hfprune.types import Group, Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSum:
    """The objective of one batch, summed over tokens and not divided.

    Attributes:
        total: Scalar, differentiable, nats.
        num_tokens: [B], int64, tokens counted in each sequence.
        padding: [B, T] boolean, True at padding; None when there is none.
    """

    total: Tensor
    num_tokens: Tensor
    padding: Tensor | None


def weight_scores(model: nn.Module, groups: Sequence[Group], criterion: WeightCriterion) -> dict[str, Tensor]:
    """Returns group name -> importance [U], float64, on the CPU; every rank of a sharded model must ask for it."""
    modules = group_modules(model, groups)
    with torch.no_grad():
        return {g.name: criterion.score(g, [_whole(modules[s.module]) for s in g.slices]).cpu() for g in groups}


def _whole(module: nn.Module) -> Tensor:
    """Returns a projection's weight [out, in], gathered where it is sharded."""
    weight = weight_of(module).detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class NotFiniteError(CalibrationError):
    """The objective of a batch is NaN or infinite."""


def backward(
    out: ObjectiveSum,
    accumulators: Sequence["ImportanceAccumulator"],
    *,
    count: bool = True,
    retain_graph: bool = False,
) -> tuple[float, int]:
    """Runs the backward pass of one batch's objective; every accumulator adds what its criterion makes of it.

    Args:
        out: The objective.
        accumulators: Those that hooked the model.
        count: False adds nothing.
        retain_graph: Whether another objective of the same forward pass follows.

    Returns:
        The summed objective (nats) and its number of tokens.

    Raises:
        NotFiniteError: The objective is not finite.
        CalibrationError: A score is not finite, or the objective depends on nothing that is scored.
    """
    total, num_tokens = float(out.total.detach()), int(out.num_tokens.sum())
    if total != total or abs(total) == float("inf"):
        raise NotFiniteError(f"The objective is {total} in this batch.")
    if not out.total.requires_grad:
        raise CalibrationError(
            "The objective does not depend on any scored activation: no scored module ran, or the objective was "
            "computed without gradients."
        )
    for accumulator in accumulators:
        accumulator.arm(out)
    out.total.backward(retain_graph=retain_graph)
    for accumulator in accumulators:
        accumulator.commit(out, count=count)
    return total, num_tokens


class ImportanceAccumulator:
    """Sums of a criterion over calibration sequences.

    All units of all groups live in one vector, in the order of the groups.

    Args:
        model: The module that the groups' names refer to, dense.
        groups: What is scored.
        criterion: How.
        root: The module that is frozen and put into eval mode while recording; ``model`` if not given.
        device: Where sums live; the first parameter's device if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        criterion: GradientCriterion,
        *,
        root: nn.Module | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._groups, self._criterion = model, tuple(groups), criterion
        self._root = model if root is None else root
        self._device = device or next(model.parameters()).device
        self._scores = criterion.new_sum(sum(g.num_units for g in groups), self._device)
        self._objective = ExactSum(1, device=self._device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=self._device)  # tokens, sequences
        self._batch: BatchInfo | None = None
        self._pending: dict[str, list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Freezes the root, puts it into eval mode and hooks the model; undoes all three at the end."""
        requires_grad = [(p, p.requires_grad) for p in self._root.parameters()]
        training = [(m, m.training) for m in self._root.modules()]
        for p, _ in requires_grad:
            p.requires_grad_(False)
        self._root.eval()
        handles = self._attach()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for p, flag in requires_grad:
                p.requires_grad_(flag)
            for m, flag in training:
                m.training = flag

    def step(self, objective: Callable[[], ObjectiveSum], *, count: bool = True) -> tuple[float, int]:
        """Runs one forward and backward pass of ``objective`` and adds it.

        Args:
            objective: Runs the forward pass.
            count: False runs the passes and adds nothing: what a rank of a sharded model does that has no batch left.

        Returns:
            The batch's summed objective (nats) and its number of tokens.

        Raises:
            CalibrationError: The objective or a score is not finite; the message names the first layer where.
        """
        with torch.enable_grad():
            out = objective()
            try:
                return backward(out, [self], count=count)
            except NotFiniteError as error:
                raise CalibrationError(f"{error} {self._blame(objective)}") from None

    def arm(self, out: ObjectiveSum) -> None:
        """Makes the hooks record what the next backward pass, that of ``out``, brings."""
        self._batch = BatchInfo(num_sequences=len(out.num_tokens), num_tokens=out.num_tokens, padding=out.padding)
        self._pending = {}

    def commit(self, out: ObjectiveSum, *, count: bool = True) -> None:
        """Adds what was recorded, unless ``count`` is false, and stops recording."""
        self._batch = None
        if count and int(out.num_tokens.sum()):
            self._add(out.num_tokens, out.total.detach())
        self._pending = {}

    def _add(self, num_tokens: Tensor, total: Tensor) -> None:
        """Adds the pending rows of every group at once."""
        height = max((sum(map(len, rows)) for rows in self._pending.values()), default=0)
        columns = []
        for group in self._groups:
            rows = self._pending.get(group.name, [])
            missing = height - sum(map(len, rows))  # a group whose modules did not run
            if missing:
                rows = [*rows, torch.zeros(missing, group.num_units, dtype=torch.float64, device=self._device)]
            columns.append(torch.cat(rows) if len(rows) > 1 else rows[0])
        found = torch.cat(columns, dim=1)
        if not bool((found.abs() < LIMIT).all()):  # NaN compares false
            self._raise_not_finite(found)
        self._scores.add(found)
        self._objective.add(total.to(self._device, torch.float64).reshape(1, 1))
        self._counts += torch.stack([num_tokens.sum(), (num_tokens > 0).sum()]).to(self._device)

    # ---- state -------------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Returns every sum, in a fixed order: adding them over ranks gives the sums of the whole set."""
        return [*self._scores.tensors(), *self._objective.tensors(), self._counts]

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Takes over sums that ``tensors`` returned, here or on all ranks together.

        Raises:
            CalibrationError: They belong to other groups or another criterion.
        """
        mine = self.tensors()
        if [(t.shape, t.dtype) for t in mine] != [(t.shape, t.dtype) for t in tensors]:
            raise CalibrationError("The saved calibration sums belong to another model or criterion.")
        *scores, objective, counts = tensors
        self._scores.load(tuple(scores))
        self._objective.load((objective,))
        self._counts.copy_(counts)

    def totals(self) -> Totals:
        """Returns how much was accumulated."""
        tokens, sequences = self._counts.tolist()
        return Totals(num_tokens=tokens, num_sequences=sequences)

    def scores(self) -> dict[str, Tensor]:
        """Returns group name -> importance [U], float64, on the CPU.

        Raises:
            CalibrationError: No token was seen, or all scores of a group are zero.
        """
        totals = self.totals()
        if not totals.num_tokens:
            raise CalibrationError("Calibration saw no token: the calibration data is empty.")
        flat = self._criterion.score(self._scores.total(), totals).cpu()
        parts = flat.split([g.num_units for g in self._groups])
        scores = {group.name: part.clone() for group, part in zip(self._groups, parts, strict=True)}
        for name, score in scores.items():
            if not score.any():
                raise CalibrationError(
                    f"All scores of {name} are zero: the objective does not depend on its units (a model that predicts "
                    "one token with certainty, or zero weights, does that)."
                )
        return scores

    def mean_objective(self) -> float:
        """Returns the objective per token so far, in nats."""
        tokens = int(self._counts[0])
        return float(self._objective.total()) / tokens if tokens else float("nan")

    def _attach(self) -> list[Any]:
        modules = group_modules(self._model, self._groups)
        handles = []
        for group in self._groups:
            parts = group.inputs() if self._criterion.signal == "activation" else group.slices
            for part in parts:
                module = modules[part.module]
                if self._criterion.signal == "activation":
                    handles.append(module.register_forward_pre_hook(self._input_hook(group, part)))
                else:
                    handles.append(module.register_forward_hook(self._output_hook(group, part)))
        return handles

    def _input_hook(self, group: Group, part: Slice) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not torch.is_grad_enabled():
                return None
            x = _differentiable(args[0])
            value = x.detach()  # a closure over x itself would be a reference cycle through its graph
            x.register_hook(lambda grad: self._record(module, group, part, value, grad))
            return (x, *args[1:])

        return hook

    def _output_hook(self, group: Group, part: Slice) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            y, value = _differentiable(output), args[0].detach()
            y.register_hook(lambda grad: self._record(module, group, part, value, grad))
            return y

        return hook

    def _record(self, module: nn.Module, group: Group, part: Slice, value: Tensor, grad: Tensor) -> None:
        if self._batch is None:  # the backward pass of another objective
            return
        signal = Signal(input=value, grad=grad, weight=weight_of(module))
        rows = self._criterion.rows(group, part, signal, self._batch)
        self._pending.setdefault(group.name, []).append(rows.to(self._device))

    def _raise_not_finite(self, rows: Tensor) -> None:
        parts = rows.split([g.num_units for g in self._groups], dim=1)
        bad = [g.name for g, part in zip(self._groups, parts, strict=True) if not bool((part.abs() < LIMIT).all())]
        raise CalibrationError(
            f"The scores of {bad[-1]} are not finite ({len(bad)} of {len(parts)} layers): a gradient "
            "overflowed. Calibrate in float32 or bfloat16."
        )

    def _blame(self, objective: Callable[[], ObjectiveSum]) -> str:
        """Runs the batch again without gradients and names the first group whose activations are not finite."""
        bad: list[str] = []
        modules = group_modules(self._model, self._groups)

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if not bool(args[0].isfinite().all()):
                    bad.append(name)

            return hook

        handles = [modules[g.inputs()[0].module].register_forward_pre_hook(watch(g.name)) for g in self._groups]
        try:
            with torch.no_grad():
                objective()
        finally:
            for handle in handles:
                handle.remove()
        if bad:
            return f"The first activations that are not finite are those of {bad[0]}."
        return "All MLP activations are finite: look at the final norm and the output head."


def _differentiable(x: Tensor) -> Tensor:
    """Returns ``x``, or, where nothing before it needs a gradient, a leaf in its place: the graph begins here."""
    return x if x.requires_grad else x.detach().requires_grad_()
