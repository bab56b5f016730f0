"""Accumulating importance during forward and backward passes, without Lightning.

``ImportanceAccumulator`` hooks the projections of the groups, lets a gradient flow from the first of them on (all
weights frozen), and adds each backward pass to float64 sums. Nothing of the graph outlives its backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.arch.groups import group_modules
from hfprune.arch.projection import weight_of
from hfprune.criteria.base import BatchInfo, Criterion, Signal, Totals
from hfprune.errors import CalibrationError
from hfprune.types import Group, Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSum:
    """The objective of one batch, summed over tokens and not divided.

    Attributes:
        total: Scalar, differentiable, nats.
        num_tokens: [B], tokens counted in each sequence.
        padding: [B, T] boolean, True at padding; None when there is none.
    """

    total: Tensor
    num_tokens: Tensor
    padding: Tensor | None


class ImportanceAccumulator:
    """Sums of a criterion over calibration batches.

    Args:
        model: The Hugging Face model, dense.
        groups: What is scored.
        criterion: How.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], criterion: Criterion) -> None:
        self._model, self._groups, self._criterion = model, tuple(groups), criterion
        device = next(model.parameters()).device
        self.states = {g.name: criterion.init_state(g, device) for g in groups}
        # tokens, sequences, objective: float64 holds counts exactly up to 2^53
        self.counts = torch.zeros(3, dtype=torch.float64, device=device)
        self._batch: BatchInfo | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Freezes the model, puts it into eval mode and hooks it; undoes all three at the end."""
        requires_grad = [(p, p.requires_grad) for p in self._model.parameters()]
        training = [(m, m.training) for m in self._model.modules()]
        for p, _ in requires_grad:
            p.requires_grad_(False)
        self._model.eval()
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

    def step(self, objective: Callable[[], ObjectiveSum]) -> tuple[float, int]:
        """Runs one forward and backward pass of ``objective`` and adds it.

        Returns:
            The batch's summed objective (nats) and its number of tokens.

        Raises:
            CalibrationError: The objective or a score is not finite; the message names the first layer where.
        """
        with torch.enable_grad():
            out = objective()
            self._batch = BatchInfo(num_sequences=len(out.num_tokens), num_tokens=out.num_tokens, padding=out.padding)
            total, num_tokens = float(out.total.detach()), int(out.num_tokens.sum())
            if total != total or abs(total) == float("inf"):
                raise CalibrationError(f"The objective is {total} in this batch. {self._blame(objective)}")
            if num_tokens:
                out.total.backward()
        self.counts += self.counts.new_tensor([num_tokens, len(out.num_tokens), total])
        self._check_states()
        return total, num_tokens

    def tensors(self) -> list[Tensor]:
        """Returns every sum, in a fixed order: adding them over ranks gives the sums of the whole set."""
        return [*self.states.values(), self.counts]

    def totals(self) -> Totals:
        """Returns how much was accumulated."""
        return Totals(num_tokens=int(self.counts[0]), num_sequences=int(self.counts[1]))

    def scores(self) -> dict[str, Tensor]:
        """Returns group name -> importance [U], float64, on the CPU.

        Raises:
            CalibrationError: No token was seen, or all scores of a group are zero.
        """
        totals = self.totals()
        if not totals.num_tokens:
            raise CalibrationError("Calibration saw no token: the calibration data is empty.")
        scores = {name: self._criterion.score(state, totals).cpu() for name, state in self.states.items()}
        for name, score in scores.items():
            if not score.any():
                raise CalibrationError(
                    f"All scores of {name} are zero: the objective does not depend on its units (a model that predicts "
                    "one token with certainty, or zero weights, does that)."
                )
        return scores

    def mean_objective(self) -> float:
        """Returns the objective per token so far, in nats."""
        return float(self.counts[2] / self.counts[0]) if self.counts[0] else float("nan")

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
        assert self._batch is not None
        signal = Signal(input=value, grad=grad, weight=weight_of(module))
        self._criterion.update(self.states[group.name], group, part, signal, self._batch)

    def _check_states(self) -> None:
        sums = torch.stack([state.sum(dtype=torch.float64) for state in self.states.values()])
        if not bool(sums.isfinite().all()):
            names = [
                name for name, s in zip(self.states, sums.tolist(), strict=True) if s != s or abs(s) == float("inf")
            ]
            raise CalibrationError(
                f"The scores of {names[-1]} are not finite ({len(names)} of {len(sums)} layers): a gradient "
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
