"""``Sweep``: scores, prunes and measures every cell of the grid, and can be interrupted anywhere."""

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hfprune.allocation import ResolvedBudget, resolve, uniform_keep
from hfprune.arch import class_name, find_groups, find_spec, parameter_count, unit_cost
from hfprune.calibration import weight_scores
from hfprune.criteria import WeightCriterion
from hfprune.data.text import TextDataModule
from hfprune.errors import ConfigError
from hfprune.evaluation.fidelity import DenseReference
from hfprune.evaluation.latency import compare_latency
from hfprune.evaluation.overlap import SUSPICIOUS, Sketch
from hfprune.evaluation.size import measure_size
from hfprune.evaluation.stage import Measurement, measure
from hfprune.evaluation.windows import Windows
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.export import check_output_dir, command_line, write_json
from hfprune.fingerprint import prediction_fingerprint
from hfprune.layouts import apply_plan
from hfprune.loading import load_causal_lm
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import PruningPlan
from hfprune.sweep.grid import Cell, SweepGrid
from hfprune.sweep.results import write_results
from hfprune.sweep.scoring import distilled_scores, seed_scores
from hfprune.types import Budget

_log = logging.getLogger(__name__)

ByGroup = dict[str, torch.Tensor]
"""Group -> scores."""

Kept = dict[str, tuple[int, ...]]
"""Group -> kept units."""

MakeData = Callable[[int, str | None], TextDataModule]
"""Returns the data for a seed, with an evaluation text (None: none)."""


class Sweep:
    """Runs a grid. What is finished lies in the output folder and is not done again.

    Args:
        module: The dense model.
        grid: What to compare.
        make_data: Makes the data for a seed and an evaluation text.
        output_dir: Receives ``scores/``, ``cells/``, ``table.csv``, ``table.json``, ``table.md`` and ``report.html``.
        zero_shot: Tasks to run on the cells of the first seeds and on the dense model.
        latency: Measure speed, of the dense model and one model per ratio, in alternation.
        device: Where to run.

    Raises:
        ConfigError: A ratio is impossible for the model, or the folder cannot be written.
    """

    def __init__(
        self,
        module: PruningModule,
        grid: SweepGrid,
        make_data: MakeData,
        output_dir: str | Path,
        *,
        zero_shot: ZeroShotTasks | None = None,
        latency: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.module, self.grid, self.make_data = module, grid, make_data
        self.out = check_output_dir(output_dir, overwrite=True)
        self.zero_shot, self.latency = zero_shot, latency
        self.device = device or torch.device("cpu")
        self.budgets = {ratio: self._resolve(ratio) for ratio in grid.pruning_ratios}
        self._check_stages()
        self.warnings: list[str] = []
        self._references: dict[str, DenseReference] = {}
        self._model_key = ""

    def _resolve(self, ratio: float) -> ResolvedBudget:
        model = self.module.meta_model()
        groups = find_groups(model)
        costs = [unit_cost(model, group) for group in groups]
        budget = Budget(pruning_ratio=ratio, round_to=self.grid.round_to)
        dense = parameter_count(model)
        return resolve(budget, groups, costs, dense_params=dense, hidden_size=model.config.hidden_size)

    def _check_stages(self) -> None:
        """Raises ``ConfigError`` where a method's first stage would keep fewer units than a budget does."""
        groups = find_groups(self.module.meta_model())
        for method in self.grid.methods:
            if method.distillation is not None:
                for budget in self.budgets.values():
                    method.distillation.first_widths(groups, budget.widths)

    def run(self) -> dict[str, Any]:
        """Runs what is not there yet; returns the results, which ``table.json`` holds too."""
        windows = {name: self._windows(name) for name in self.grid.texts}
        by_seed = {seed: self._bound(self.make_data(seed, None)) for seed in self.grid.seeds}
        for data in by_seed.values():
            data.calibration_dataloader()
        for name, cut in windows.items():
            self._warn_of_overlap(name, cut, by_seed)
        if self.zero_shot is not None:
            self.zero_shot.load()
        self.module.configure_model()
        dense = self.module.causal_lm.to(self.device)
        self._model_key = prediction_fingerprint(dense)
        texts = {name: [cut.sha256, cut.protocol] for name, cut in windows.items()}
        cells = {"dense": self._cell("dense", texts, lambda: self._measure(dense, windows, dense=True))}
        scores: dict[tuple[str, int | None], ByGroup] = {}
        kept: dict[str, Kept] = {}
        for cell in self.grid.cells():
            scored = self._scores(cell, dense, by_seed, scores)
            keep = uniform_keep(scored, find_groups(dense), self.budgets[cell.pruning_ratio].widths)
            kept[cell.name] = keep
            ratio = cell.pruning_ratio
            make = partial(self._measure_pruned, keep, ratio, windows)
            cells[cell.name] = self._cell(cell.name, [texts, keep], make)
        if self.latency:
            self._add_speeds(dense, kept, cells)
        if self.zero_shot is not None:
            self._add_tasks(self.zero_shot, dense, kept, cells)
        facts = {
            "command": command_line(),
            "model": self.module.path,
            "warnings": self.warnings,
            "budgets": {f"{ratio:g}": budget.to_dict() for ratio, budget in self.budgets.items()},
            "calibration": {
                str(seed): data.summary()["calibration"] | {"ngrams": None} for seed, data in by_seed.items()
            },
        }
        by_method: dict[str, ByGroup] = {}
        for (name, _), by_group in scores.items():
            by_method.setdefault(name, by_group)
        return write_results(self.out, self.grid, cells, kept, by_method, facts)

    # ---- data --------------------------------------------------------------------------------------------------------

    def _bound(self, data: TextDataModule) -> TextDataModule:
        module = self.module
        data.bind(module.tokenizer, vocab_size=module.vocab_size, max_positions=module.max_positions)
        return data

    def _windows(self, name: str) -> Windows:
        windows = self._bound(self.make_data(self.grid.seeds[0], self.grid.texts[name])).evaluation_windows()
        if windows is None:
            raise ConfigError(f"--texts {name}: there are no evaluation windows; see --data.eval_windows.")
        return windows

    def _warn_of_overlap(self, name: str, windows: Windows, by_seed: dict[int, TextDataModule]) -> None:
        ids = windows.ids.tolist()
        sketches = [Sketch.from_text(data.summary()["calibration"]["ngrams"]) for data in by_seed.values()]
        share = max(sketch.share_of(ids) for sketch in sketches)
        if share >= SUSPICIOUS:
            text = f"{share:.0%} of the 13-grams of the evaluation text '{name}' occur in the calibration text."
            self.warnings.append(text)
            warnings.warn(text, stacklevel=2)

    # ---- scores ------------------------------------------------------------------------------------------------------

    def _scores(
        self,
        cell: Cell,
        dense: Any,
        by_seed: dict[int, TextDataModule],
        known: dict[tuple[str, int | None], ByGroup],
    ) -> ByGroup:
        """Returns the scores of a cell; one pass serves all criteria of its seed that calibrate in one stage."""
        key = (cell.method.name, cell.seed)
        if key in known:
            return known[key]
        criterion = cell.method.with_seed(cell.seed or 0)
        if isinstance(criterion, WeightCriterion):
            known[key] = weight_scores(dense, find_groups(dense), criterion)
            return known[key]
        assert cell.seed is not None
        data, staged = by_seed[cell.seed], cell.method.distillation is not None
        methods = [m for m in self.grid.methods if m.calibrated and m.distillation is None]
        methods = [cell.method] if staged else methods
        parts = {m.name: [m.differentiated, m.scorer.describe(), str(m.distillation)] for m in methods}
        digest = _digest([self._model_key, data.summary()["calibration"]["sha256"], parts])
        name = f"seed{cell.seed}-{cell.method.name}" if staged else f"seed{cell.seed}"
        path, start = self.out / "scores" / f"{name}.safetensors", time.perf_counter()
        make = data.calibration_dataloader
        if staged:
            found = distilled_scores(dense, cell.method, make, path, key=digest, device=self.device)
        else:
            found = seed_scores(dense, methods, make(), path, key=digest, device=self.device)
        _log.info("Scores of seed %d: %.1f s.", cell.seed, time.perf_counter() - start)
        for name, by_group in found.items():
            known[name, cell.seed] = by_group
        return known[key]

    # ---- cells -------------------------------------------------------------------------------------------------------

    def _cell(self, name: str, depends: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a cell's figures: from its file, or made and written to it.

        Args:
            name: The file's name.
            depends: What the figures follow from beside the dense model, as plain data: texts, tasks, kept units.
            make: Measures.
        """
        path, key = self.out / "cells" / f"{name}.json", _digest([self._model_key, depends])
        found = _read_cell(path, key)
        if found is not None:
            return found
        _log.info("Measuring %s.", name)
        write_json(path, {"key": key, **make()})
        again = _read_cell(path, key)  # as a resumed sweep would have it
        assert again is not None
        return again

    def _measure_pruned(self, keep: Kept, ratio: float, windows: dict[str, Windows]) -> dict[str, Any]:
        return self._measure(self._pruned(keep, ratio), windows)

    def _pruned(self, keep: Kept, ratio: float) -> Any:
        module = self.module
        model = load_causal_lm(module.path, dtype=module.dtype_name, revision=module.revision)
        width = self.budgets[ratio].width
        assert width is not None
        config = {find_spec(model).width_key: width}
        plan = PruningPlan(model_class=class_name(model), groups=find_groups(model), keep=keep, config=config)
        apply_plan(model, plan)
        return model.to(self.device)

    def _measure(self, model: Any, windows: dict[str, Windows], *, dense: bool = False) -> dict[str, Any]:
        figures: dict[str, Any] = {"parameters": parameter_count(model), "size": measure_size(model).to_dict()}
        figures["texts"] = {}
        for name, cut in windows.items():
            reference = self._reference(name, cut)
            known = reference.hidden if dense else None
            found: Measurement = measure(model, cut, reference=reference, latency=False, hidden=known)
            assert found.perplexity is not None
            assert found.fidelity is not None
            figures["texts"][name] = {"perplexity": found.perplexity.to_dict(), "fidelity": found.fidelity.to_dict()}
        return figures

    def _reference(self, name: str, windows: Windows) -> DenseReference:
        if name not in self._references:
            self._references[name] = DenseReference.collect(self.module.causal_lm, windows, copy_head=False)
        return self._references[name]

    def _add_tasks(
        self, tasks: ZeroShotTasks, dense: Any, kept: dict[str, Kept], cells: dict[str, dict[str, Any]]
    ) -> None:
        """Adds the zero-shot figures, last: they take longest."""

        def run(make: Callable[[], Any]) -> dict[str, Any]:
            return tasks.run(make(), self.module.tokenizer).to_dict()

        asked = tasks.settings()
        cells["dense"]["zero_shot"] = self._cell("tasks-dense", asked, partial(run, lambda: dense))
        for cell in self.grid.cells():
            if self.grid.runs_tasks(cell):
                pruned = partial(self._pruned, kept[cell.name], cell.pruning_ratio)
                depends, make = [asked, kept[cell.name]], partial(run, pruned)
                cells[cell.name]["zero_shot"] = self._cell(f"tasks-{cell.name}", depends, make)

    def _add_speeds(self, dense: Any, kept: dict[str, Kept], cells: dict[str, dict[str, Any]]) -> None:
        """Adds speeds: those of a model depend on its widths only, so one model per ratio is timed."""
        timed: dict[float, Cell] = {}
        for cell in self.grid.cells():
            timed.setdefault(cell.pruning_ratio, cell)

        def make() -> dict[str, Any]:
            models = [dense, *(self._pruned(kept[cell.name], ratio) for ratio, cell in timed.items())]
            found = compare_latency(models)
            names = ["dense", *(f"{ratio:g}" for ratio in timed)]
            return {name: speed.to_dict() for name, speed in zip(names, found, strict=True)}

        widths = {f"{ratio:g}": self.budgets[ratio].widths for ratio in timed}
        speeds = self._cell("speed", [widths, str(self.device), torch.get_num_threads()], make)
        cells["dense"]["latency"] = speeds["dense"]
        for cell in self.grid.cells():
            cells[cell.name]["latency"] = speeds[f"{cell.pruning_ratio:g}"]


def _read_cell(path: Path, key: str) -> dict[str, Any] | None:
    """Returns the figures of a file that was written for ``key``, None when there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # not measured yet, or damaged: measured again
    if not isinstance(found, dict) or found.pop("key", None) != key:
        return None
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
