"""Sweep: scores, prunes and evaluates every cell of a grid, and continues after interruptions."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hfprune.criteria import LayerwiseCriterion
from hfprune.data.self_generated import author_of
from hfprune.data.text import TextDataModule
from hfprune.evaluation.evaluate import Measurement, measure
from hfprune.evaluation.fidelity import DenseReference
from hfprune.evaluation.overlap import Sketch, warn_of_share
from hfprune.evaluation.perplexity import Windows
from hfprune.evaluation.size_and_speed import compare_latency, measure_size
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.io.load import predicts_badly_without_bos
from hfprune.io.output_folder import RESULTS, check_apart, is_sweep
from hfprune.io.save import check_output_dir, command_line
from hfprune.models import parameter_count
from hfprune.models.fingerprint import prediction_fingerprint
from hfprune.modules.causal_lm import PruningModule
from hfprune.sweep.grid import Cell, SweepGrid, digest
from hfprune.sweep.pruner import Kept, Pruner
from hfprune.sweep.recommendation import RECIPE_FILE, Recipe
from hfprune.sweep.results import write_results
from hfprune.sweep.score_cache import ScoreBook
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import user_path, write_json, write_text
from hfprune.utils.progress import phase
from hfprune.utils.versions import versions

_log = logging.getLogger(__name__)

MakeData = Callable[[int, str | None], TextDataModule]
"""Returns the datamodule for a seed and an evaluation text (or None)."""


class Sweep:
    """Runs a grid. Finished cells are read from the output folder.

    Args:
        module: The module of the dense model.
        grid: The grid.
        make_data: Returns the datamodule for a seed and an evaluation text.
        output_dir: Folder for ``scores/``, ``cells/``, ``table.csv``, ``table.json``, ``table.md`` and ``report.html``.
        zero_shot: Tasks for the cells of the first seeds and the dense model.
        latency: Whether to measure speed, of the dense model and one model per ratio in alternation.
        device: Device of the sweep.
        recipe: How the caller runs the recommended method; None writes no ``recommended.yaml``.

    Raises:
        ConfigError: A ratio is impossible for the model, or the folder is not writable.
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
        recipe: Recipe | None = None,
    ) -> None:
        self.recipe = recipe
        self.module, self.grid, self.make_data = module, grid, make_data
        module.check_loadable()
        folder = Path(user_path(output_dir, "output_dir"))
        self.out = check_output_dir(folder, overwrite=is_sweep(folder))
        check_apart(
            self.out, {"model.path": module.path, **{f"texts.{n}": t for n, t in grid.texts.items()}}, names=RESULTS
        )
        self.zero_shot, self.latency = zero_shot, latency
        self.device = device or torch.device("cpu")
        self.pruner = Pruner(module, grid, self.device)
        self.warnings: list[str] = []
        self._references: dict[str, DenseReference] = {}
        self._model_key = ""

    def run(self) -> dict[str, Any]:
        """Runs the unfinished cells and returns the content of ``table.json``."""
        self._warn_of_budgets()
        windows = {name: self._windows(name) for name in self.grid.texts}
        by_seed = {seed: self._bound(self.make_data(seed, None)) for seed in self.grid.seeds}
        for data in by_seed.values():
            check_apart(self.out, data.local_sources(), names=RESULTS)
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
        folder = self.out / "scores"
        book = ScoreBook(dense, self.grid, by_seed, folder, model_key=self._model_key)
        kept: dict[str, Kept] = {}
        wanted = list(self.grid.cells())
        with phase("sweep", total=len(wanted), unit="model") as current:
            for number, cell in enumerate(wanted, start=1):
                kept[cell.name] = keep = self._keep(cell, book)
                make = partial(self._measure_pruned, cell, keep, book, windows)
                cells[cell.name] = self._cell(cell.name, [texts, *self._depends(cell, keep, book)], make)
                current.update(number)
        if self.latency:
            self._add_speeds(dense, kept, cells, book)
        if self.zero_shot is not None:
            self._add_tasks(self.zero_shot, dense, kept, cells, book)
        facts = {
            "command": command_line(),
            "model": self.module.path,
            "model_hash": self._model_key,
            "versions": versions(),
            "recommended_command": None if self.recipe is None else self.recipe.command,
            "warnings": self.warnings,
            "budgets": self._budgets(),
            "calibration": {
                str(seed): data.summary()["calibration"] | {"ngrams": None} for seed, data in by_seed.items()
            },
        }
        groups = (group for method in self.grid.methods for group in self.pruner.inventory(method).groups)
        units = {group.name: group.num_units for group in groups}
        result = write_results(self.out, self.grid, cells, kept, book.first(), facts, units)
        if self.recipe is not None and result["recommended"]:
            first = result["recommended"][0]
            method = next(method for method in self.grid.methods if method.name == first["method"])
            write_text(self.out / RECIPE_FILE, self.recipe.config(method, first["pruning_ratio"]))
        return result

    def _warn_of_budgets(self) -> None:
        """Warns of budgets that remove more than half of the parameters, before anything is loaded."""
        every = (self.pruner.budget(m, ratio) for ratio in self.grid.pruning_ratios for m in self.grid.methods)
        for text in dict.fromkeys(budget.warning for budget in every if budget.warning):
            self.warnings.append(text)
            _log.warning("WARNING: %s", text)

    def _budgets(self) -> dict[str, dict[str, Any]]:
        """Returns ratio -> method -> budget before scoring."""
        return {
            f"{ratio:g}": {method.name: self.pruner.budget(method, ratio).to_dict() for method in self.grid.methods}
            for ratio in self.grid.pruning_ratios
        }

    # ---- data --------------------------------------------------------------------------------------------------------

    def _bound(self, data: TextDataModule) -> TextDataModule:
        module = self.module
        author = author_of(module, device=self.device)
        limits: dict[str, Any] = {"vocab_size": module.vocab_size, "max_positions": module.max_positions}
        data.bind(module.tokenizer, **limits, author=author, needs_bos=predicts_badly_without_bos(module.config))
        data.serve(training=False)
        return data

    def _windows(self, name: str) -> Windows:
        windows = self._bound(self.make_data(self.grid.seeds[0], self.grid.texts[name])).evaluation_windows()
        if windows is None:
            raise ConfigError(f"texts: '{name}' has no evaluation windows; see eval_windows.")
        return windows

    def _warn_of_overlap(self, name: str, windows: Windows, by_seed: dict[int, TextDataModule]) -> None:
        ids = windows.ids.tolist()
        sketches = [Sketch.from_text(data.summary()["calibration"]["ngrams"]) for data in by_seed.values()]
        share = max(sketch.share_of(ids) for sketch in sketches)
        if text := warn_of_share(share, "the calibration text", evaluated=f"the evaluation text '{name}'"):
            self.warnings.append(text)

    # ---- cells -------------------------------------------------------------------------------------------------------

    def _cell(self, name: str, depends: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the results of a cell from its file, or computes and saves them.

        Args:
            name: Name of the file.
            depends: Inputs of the results other than the dense model, as plain data: texts, tasks, kept units.
            make: Computes the results.
        """
        path, key = self.out / "cells" / f"{name}.json", digest([self._model_key, depends])
        found = _read_cell(path, key)
        if found is not None:
            return found
        with phase(f"measuring {name}"):
            figures = make()
        write_json(path, {"key": key, **figures})
        again = _read_cell(path, key)  # as a resumed sweep would have it
        assert again is not None
        return again

    def _keep(self, cell: Cell, book: ScoreBook) -> Kept:
        """Returns the kept units of a cell, cached in a file if their selection is slow."""
        if not isinstance(cell.method.scorer, LayerwiseCriterion) and not cell.method.measures:
            return self.pruner.keep(cell, book.scores(cell), ())
        budget = self.pruner.budget(cell.method, cell.pruning_ratio).to_dict()
        depends = [cell.method.scoring(), self._fitted(cell, book), book.data_key(cell), budget]
        make = partial(self.pruner.keep, cell, book.scores(cell), book.batches(cell))
        found = self._cell(f"kept-{cell.name}", depends, make)
        return {name: tuple(units) for name, units in found.items()}

    def _fitted(self, cell: Cell, book: ScoreBook) -> list[Any]:
        """Returns the inputs of a cell's refitted weights other than its units; empty without a refit."""
        compensation = cell.method.compensation
        return [] if compensation is None else [compensation.describe(), book.data_key(cell)]

    def _depends(self, cell: Cell, keep: Kept, book: ScoreBook) -> list[Any]:
        """Returns the inputs of a cell's model other than the dense model."""
        return [keep, *self._fitted(cell, book)]

    def _measure_pruned(self, cell: Cell, keep: Kept, book: ScoreBook, windows: dict[str, Windows]) -> dict[str, Any]:
        return self._measure(self.pruner.build(cell, keep, book.batches(cell)), windows)

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
        self,
        tasks: ZeroShotTasks,
        dense: Any,
        kept: dict[str, Kept],
        cells: dict[str, dict[str, Any]],
        book: ScoreBook,
    ) -> None:
        """Adds the zero-shot results, which take longest."""

        def run(make: Callable[[], Any]) -> dict[str, Any]:
            return tasks.run(make(), self.module.tokenizer).to_dict()

        asked = tasks.settings()
        cells["dense"]["zero_shot"] = self._cell("tasks-dense", asked, partial(run, lambda: dense))
        for cell in self.grid.cells():
            if self.grid.runs_tasks(cell):
                keep = kept[cell.name]
                make = partial(run, partial(self.pruner.build, cell, keep, book.batches(cell)))
                depends = [asked, *self._depends(cell, keep, book)]
                cells[cell.name]["zero_shot"] = self._cell(f"tasks-{cell.name}", depends, make)

    def _add_speeds(self, dense: Any, kept: dict[str, Kept], cells: dict[str, dict[str, Any]], book: ScoreBook) -> None:
        """Adds speeds, which depend on widths only: one model per set of widths is timed."""
        alike: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in self.grid.cells():
            widths = tuple((name, len(units)) for name, units in kept[cell.name].items())
            alike.setdefault((cell.pruning_ratio, widths), []).append(cell)
        of_ratio = Counter(ratio for ratio, _ in alike)
        labels = {
            key: f"{key[0]:.0%}" if of_ratio[key[0]] == 1 else f"{key[0]:.0%}, {some[0].name}"
            for key, some in alike.items()
        }

        def make() -> dict[str, Any]:
            models = [self.pruner.build(some[0], kept[some[0].name], book.batches(some[0])) for some in alike.values()]
            found = compare_latency([dense, *models])
            names = ["dense", *labels.values()]
            return {name: speed.to_dict() for name, speed in zip(names, found, strict=True)}

        depends = [sorted((labels[key], key[1]) for key in alike), str(self.device), torch.get_num_threads()]
        speeds = self._cell("speed", depends, make)
        cells["dense"]["latency"] = speeds["dense"] | {"label": "-"}
        for key, some in alike.items():
            for cell in some:
                cells[cell.name]["latency"] = speeds[labels[key]] | {"label": labels[key]}


def _read_cell(path: Path, key: str) -> dict[str, Any] | None:
    """Returns the results in a file written for ``key``, or None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # missing or damaged
    if not isinstance(found, dict) or found.pop("key", None) != key:
        return None
    return found
