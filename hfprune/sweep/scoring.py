"""The scores of every calibrated criterion for one seed, from one forward pass over its calibration data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.allocation import uniform_keep
from hfprune.criteria import CalibratedCriterion, scored_groups
from hfprune.models import find_groups
from hfprune.models.forward import objective_sums, run_backbone, sequences, token_counts
from hfprune.objectives import OBJECTIVES, Objective
from hfprune.objectives.self_distillation import SelfDistillationObjective
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum, backward
from hfprune.pruning.hooks import UnitMask
from hfprune.sweep.grid import Method
from hfprune.utils.errors import CalibrationError
from hfprune.utils.files import load_tensors, save_tensors

SAVE_EVERY = 64
"""Sequences between saved states."""

Scores = dict[str, dict[str, Tensor]]
"""Method -> group -> importance [U]."""


class SharedPass:
    """Accumulates the scores of several methods; the forward pass and the logits are theirs together.

    Args:
        model: The dense model.
        methods: Methods that calibrate.
        device: Where sequences go.
        objective: The objective of all of them; each method's own if not given.
    """

    def __init__(
        self, model: Any, methods: Sequence[Method], *, device: torch.device, objective: Objective | None = None
    ) -> None:
        self._model, self._methods, self._device = model, tuple(methods), device
        self._accumulators = []
        self._by_objective: dict[Objective | None, list[ImportanceAccumulator]] = {}
        for method in methods:
            assert isinstance(method.scorer, CalibratedCriterion)
            groups = scored_groups(model, find_groups(model, method.units), method.scorer)
            accumulator = ImportanceAccumulator(model, groups, method.scorer, device=device)
            self._accumulators.append(accumulator)
            name = method.differentiated
            chosen = objective or (None if name is None else OBJECTIVES.get(name))
            self._by_objective.setdefault(chosen, []).append(accumulator)

    def run(self, batches: Iterator[Any], *, skip: int = 0, done: Callable[[int], None] = lambda _: None) -> None:
        """Adds every sequence of ``batches`` but the first ``skip``; ``done`` is told how many were seen."""
        position = 0
        with ExitStack() as stack:
            for accumulator in self._accumulators:
                stack.enter_context(accumulator.recording())
            for batch in batches:
                for sequence in sequences(batch):
                    position += 1
                    if position > skip:
                        self._step(sequence, position)
                        done(position)

    def _step(self, sequence: dict[str, Tensor], position: int) -> None:
        batch = {name: tensor.to(self._device) for name, tensor in sequence.items()}
        objectives = [objective for objective in self._by_objective if objective is not None]
        forward_only = self._by_objective.get(None, [])
        for accumulator in forward_only:
            accumulator.arm(*token_counts(batch))
        try:
            if objectives:
                self._differentiate(batch, objectives)
            else:
                run_backbone(self._model, batch)
            for accumulator in forward_only:
                accumulator.commit(torch.zeros((), device=self._device))
        except CalibrationError as error:
            raise CalibrationError(f"Calibration sequence {position - 1}: {error}") from error

    def _differentiate(self, batch: dict[str, Tensor], objectives: list[Objective]) -> None:
        with torch.enable_grad():
            found = objective_sums(self._model, objectives, batch)
            for index, (objective, (total, valid)) in enumerate(zip(objectives, found, strict=True)):
                out = ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=None)
                try:
                    backward(out, self._by_objective[objective], retain_graph=index < len(found) - 1)
                except CalibrationError as error:
                    raise CalibrationError(f"{objective.name}: {error}") from error

    def scores(self) -> Scores:
        """Returns the scores of every method."""
        return {m.name: a.scores() for m, a in zip(self._methods, self._accumulators, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """Returns every sum."""
        return {f"{i}/{j}": t for i, a in enumerate(self._accumulators) for j, t in enumerate(a.tensors())}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over sums that ``tensors`` returned."""
        for i, accumulator in enumerate(self._accumulators):
            mine = sorted((int(key.split("/")[1]), t) for key, t in tensors.items() if key.startswith(f"{i}/"))
            accumulator.load([t.to(self._device) for _, t in mine])

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self._accumulators[0].totals().num_tokens


def seed_scores(
    model: Any,
    methods: Sequence[Method],
    batches: Iterable[Any],
    path: Path,
    *,
    key: str,
    device: torch.device,
    objective: Objective | None = None,
) -> Scores:
    """Returns the scores of one seed, from ``path`` if they were computed before; resumes an interrupted pass.

    Args:
        model: The dense model.
        methods: Methods that calibrate.
        batches: The calibration batches.
        path: File of the scores; the state of an unfinished pass lies beside it.
        key: What the scores depend on; a file with another one is not used.
        device: Where to run.
        objective: The objective of all methods; each method's own if not given.
    """
    found = load_tensors(path, key=key)
    if found is not None:
        scores: Scores = {}
        for name, tensor in found.items():
            method, _, group = name.partition("/")
            scores.setdefault(method, {})[group] = tensor
        return scores
    shared = SharedPass(model, methods, device=device, objective=objective)
    unfinished = path.with_suffix(".unfinished")
    state, skip = load_tensors(unfinished, key=key), 0
    if state is not None:
        skip = int(state.pop("position"))
        shared.load(state)

    def done(position: int) -> None:
        if position % SAVE_EVERY == 0:
            save_tensors(unfinished, shared.tensors() | {"position": torch.tensor(position)}, key=key)

    shared.run(iter(batches), skip=skip, done=done)
    scores = shared.scores()
    found = {f"{name}/{group}": t for name, by_group in scores.items() for group, t in by_group.items()}
    save_tensors(path, found, key=key)
    unfinished.unlink(missing_ok=True)
    return scores


def distilled_scores(
    model: Any, method: Method, batches: Callable[[], Iterable[Any]], path: Path, *, key: str, device: torch.device
) -> Scores:
    """Returns the scores of a method of two stages; each stage is a pass of its own, with a file of its own.

    Args:
        model: The dense model.
        method: A method with ``distillation``.
        batches: Returns the calibration batches.
        path: File of the scores; those of the first stage lie beside it.
        key: What the scores depend on.
        device: Where to run.
    """
    setting = method.distillation
    assert setting is not None
    groups = find_groups(model, method.units)
    early, ce = path.with_suffix(".first.safetensors"), OBJECTIVES.get("cross_entropy")
    first = seed_scores(model, [method], batches(), early, key=key, device=device, objective=ce)
    kept = uniform_keep(first[method.name], groups, setting.first_widths(groups, [0] * len(groups)))
    mask = UnitMask(model, groups, kept)
    student = SelfDistillationObjective(alpha=setting.alpha, temperature=setting.temperature, unmasked=mask.lifted)
    with mask.active():
        return seed_scores(model, [method], batches(), path, key=key, device=device, objective=student)
