"""Score cache of a sweep, shared by all cells."""

import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune.criteria import LayerwiseCriterion, WeightCriterion, scored_groups, with_layers
from hfprune.data.text import TextDataModule
from hfprune.models import find_groups
from hfprune.pruning.accumulator import weight_scores
from hfprune.sweep.grid import Cell, Method, SweepGrid, digest
from hfprune.sweep.scoring import seed_scores, staged_scores

_log = logging.getLogger(__name__)

ByGroup = Mapping[str, Tensor]
"""Group -> scores [U]."""


class ScoreBook:
    """Scores of a grid's methods, cached in files.

    Args:
        dense: The dense model.
        grid: The grid.
        data: Seed -> datamodule with the calibration data.
        folder: Folder of the files.
        model_key: Identifies the dense model.
    """

    def __init__(
        self,
        dense: Any,
        grid: SweepGrid,
        data: Mapping[int, TextDataModule],
        folder: Path,
        *,
        model_key: str,
    ) -> None:
        self._dense, self._grid, self._data, self._folder = dense, grid, data, folder
        self._model_key = model_key
        self._known: dict[tuple[Any, ...], ByGroup] = {}

    def batches(self, cell: Cell) -> Iterable[Any]:
        """Returns the calibration batches of a cell's seed; empty for a cell without calibration."""
        return () if cell.seed is None else self._data[cell.seed].calibration_dataloader()

    def data_key(self, cell: Cell) -> str | None:
        """Returns the identity of a cell's calibration data."""
        return None if cell.seed is None else str(self._data[cell.seed].summary()["calibration"]["sha256"])

    def scores(self, cell: Cell) -> ByGroup:
        """Returns group -> scores of a cell; empty for methods that select units layer by layer."""
        method = cell.method
        if isinstance(method.scorer, LayerwiseCriterion):
            return {}
        groups = find_groups(self._dense, method.units)
        scored = scored_groups(self._dense, groups, method.scorer)
        criterion = method.with_seed(cell.seed or 0)
        key = self._key(cell, method)
        if key not in self._known and isinstance(criterion, WeightCriterion):
            self._known[key] = weight_scores(self._dense, scored, criterion)
        elif key not in self._known:
            self._calibrate(cell)
        return with_layers(self._known[key], groups, scored)

    def first(self) -> dict[str, ByGroup]:
        """Returns method -> group -> scores of its first cell."""
        found: dict[str, ByGroup] = {}
        for cell in self._grid.cells():
            if cell.method.name not in found and (scores := self.scores(cell)):
                found[cell.method.name] = scores
        return found

    def _key(self, cell: Cell, method: Method) -> tuple[Any, ...]:
        """Returns the inputs of a method's scores in a cell other than the model."""
        ratio = cell.pruning_ratio if method.rounds > 1 else None  # later rounds depend on the removed units
        return method.scoring(), cell.seed if method.seeded_scores else None, ratio

    def _calibrate(self, cell: Cell) -> None:
        """Adds the scores of a cell's seed; all single-stage criteria share one pass."""
        assert cell.seed is not None
        staged = cell.method.staged
        one_stage = [m for m in self._grid.methods if m.calibrated and not m.staged]
        methods = [cell.method] if staged else list({m.scoring(): m for m in reversed(one_stage)}.values())[::-1]
        depends: list[Any] = [self._model_key, self.data_key(cell), {m.name: m.scoring() for m in methods}]
        name = f"seed{cell.seed}-{cell.method.name}" if staged else f"seed{cell.seed}"
        if cell.method.rounds > 1:
            depends += [cell.pruning_ratio, self._grid.round_to]
            name = f"{name}-{cell.pruning_ratio:g}"
        path, start = self._folder / f"{name}.safetensors", time.perf_counter()
        found = self._pass(cell, methods, path, digest(depends))
        _log.info("Scores of seed %d: %.1f s.", cell.seed, time.perf_counter() - start)
        for method in methods:
            self._known[self._key(cell, method)] = found[method.name]

    def _pass(self, cell: Cell, methods: list[Method], path: Path, key: str) -> Mapping[str, ByGroup]:
        if not cell.method.staged:
            return seed_scores(self._dense, methods, self.batches(cell), path, key=key)
        budget = self._grid.budget(cell.pruning_ratio)
        return staged_scores(self._dense, cell.method, partial(self.batches, cell), path, key=key, budget=budget)
