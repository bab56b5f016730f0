"""Scoring of a sweep's calibrated methods for one seed, with shared passes over the data."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.criteria import CalibratedCriterion, scored_groups
from hfprune.models import find_groups
from hfprune.objectives import OBJECTIVES, Objective
from hfprune.plan import Budget
from hfprune.pruning.calibration import Calibration, CalibrationData, Scorer
from hfprune.pruning.communicator import LocalCommunicator
from hfprune.pruning.options import CalibrationOptions
from hfprune.pruning.prunable import PrunableModel
from hfprune.pruning.rounds import Kept, State, in_rounds
from hfprune.pruning.two_stages import two_stages
from hfprune.sweep.grid import Method
from hfprune.utils.files import load_tensors, write_tensors

SAVE_EVERY = 64
"""Number of sequences between saved states."""

Scores = dict[str, dict[str, Tensor]]
"""Method -> group -> importance [U]."""


def shared_pass(
    model: Any, methods: Sequence[Method], batches: Iterable[Any], *, objective: Objective | None = None
) -> Calibration:
    """Returns a calibration that accumulates the scores of several methods from the same forward passes.

    Args:
        model: The dense model.
        methods: Methods that calibrate.
        batches: The calibration batches.
        objective: The objective of all of them; each method's own if not given.
    """
    scorers = []
    for method in methods:
        assert isinstance(method.scorer, CalibratedCriterion)
        groups = scored_groups(model, find_groups(model, method.units), method.scorer)
        name = method.differentiated
        scorers.append(Scorer(method.scorer, groups, objective or (None if name is None else OBJECTIVES.get(name))))
    data = CalibrationData(batches=lambda: batches)
    options = CalibrationOptions(checkpoint_every=SAVE_EVERY, check_every=None)  # no budget, so no convergence checks
    return Calibration(PrunableModel(model), scorers, data, options, LocalCommunicator())


def seed_scores(
    model: Any,
    methods: Sequence[Method],
    batches: Iterable[Any],
    path: Path,
    *,
    key: str,
    objective: Objective | None = None,
) -> Scores:
    """Returns the scores of one seed, from ``path`` if possible; resumes an interrupted pass.

    Args:
        model: The dense model.
        methods: Methods that calibrate.
        batches: The calibration batches.
        path: File of the scores; the state of an unfinished pass is saved next to it.
        key: Hash of the inputs of the scores; a file with another hash is not used.
        objective: The objective of all methods; each method's own if not given.
    """
    stored = load_tensors(path, key=key)
    if stored is not None:
        scores: Scores = {}
        for name, tensor in stored.items():
            method, _, group = name.partition("/")
            scores.setdefault(method, {})[group] = tensor
        return scores
    calibration = shared_pass(model, methods, batches, objective=objective)
    unfinished = path.with_suffix(".unfinished")
    state = load_tensors(unfinished, key=key)
    if state is not None:
        position = int(state.pop("position"))
        calibration.resume(position, [state[str(number)] for number in range(len(state))])

    def save() -> None:
        sums = {str(number): tensor for number, tensor in enumerate(calibration.tensors())}
        write_tensors(unfinished, sums | {"position": torch.tensor(calibration.position)}, {"key": key})

    calibration.run(save)
    scores = {method.name: found for method, found in zip(methods, calibration.scores(), strict=True)}
    flat = {f"{name}/{group}": tensor for name, by_group in scores.items() for group, tensor in by_group.items()}
    write_tensors(path, flat, {"key": key})
    unfinished.unlink(missing_ok=True)
    return scores


def staged_scores(
    model: Any, method: Method, batches: Callable[[], Iterable[Any]], path: Path, *, key: str, budget: Budget
) -> Scores:
    """Returns the scores of a method with several passes (rounds or self-distillation), each with a separate file.

    Args:
        model: The dense model.
        method: A method with ``rounds`` or ``distillation``.
        batches: Returns the calibration batches.
        path: File of the last pass; those of earlier passes are next to it.
        key: Hash of the inputs of the scores.
        budget: The budget of the last round.
    """
    subject = PrunableModel(model, method.units, skip_layers=method.skipped)
    groups = subject.groups(model)
    skipped = set() if method.skipped is None else {group.name for group in subject.inventory().skipped}
    number, last = 0, 2 if method.distillation is not None else method.rounds

    def run(masked: Kept | None, saved: State | None) -> dict[str, Tensor]:
        nonlocal number
        number += 1
        name = "first" if method.distillation is not None else f"round{number}"
        file = path if number == last else path.with_suffix(f".{name}.safetensors")
        return seed_scores(model, [method], batches(), file, key=key, objective=subject.objective)[method.name]

    if method.distillation is not None:
        least = [group.num_units if group.name in skipped else 0 for group in groups]
        scores = two_stages(subject, groups, method.distillation, least, None, run)
    else:
        final = subject.resolve(budget, method.allocation).widths
        widths = method.removal.widths(subject, budget, method.allocation, final)
        scores = in_rounds(subject, groups, widths, None, run)
    return {method.name: scores}
