"""Pruned models of a sweep: budgets, kept units, surgery and refitted weights."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hfprune.allocation import Allocation, Inventory, ResolvedBudget, allocate, kept_units
from hfprune.criteria import LayerwiseCriterion
from hfprune.io.layouts import apply_plan
from hfprune.io.load import load_causal_lm
from hfprune.models import class_name, config_values, find_groups
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import PruningPlan
from hfprune.pruning.accumulator import check_criterion
from hfprune.pruning.calibration import CalibrationData
from hfprune.pruning.communicator import LocalCommunicator
from hfprune.pruning.layerwise import LayerwiseResult, check_together, run_layerwise
from hfprune.pruning.prunable import PrunableModel
from hfprune.pruning.sensitivity_curves import measured
from hfprune.sweep.grid import Cell, Method, SweepGrid
from hfprune.utils.errors import ConfigError

_log = logging.getLogger(__name__)

ByGroup = Mapping[str, Tensor]
"""Group -> scores [U]."""

Kept = dict[str, tuple[int, ...]]
"""Group -> kept units."""


class Pruner:
    """Builds the pruned models of a grid.

    Args:
        module: The module of the dense model.
        grid: The grid.
        device: Device of the models.

    Raises:
        ConfigError: A ratio is impossible for a method's units, or the settings of a method are incompatible.
    """

    def __init__(self, module: PruningModule, grid: SweepGrid, device: torch.device) -> None:
        self._module, self._grid, self._device = module, grid, device
        self._inventories: dict[str, Inventory] = {}
        for method in grid.methods:
            for ratio in grid.pruning_ratios:
                self._check(method, ratio)

    def inventory(self, method: Method) -> Inventory:
        """Returns the groups that a method prunes."""
        key = f"{'+'.join(method.units)} {method.skipped}"
        if key not in self._inventories:
            model = self._module.meta_model()
            self._inventories[key] = Inventory.of(model, find_groups(model, method.units), skip=method.skipped)
        return self._inventories[key]

    def budget(
        self,
        method: Method,
        ratio: float,
        scores: ByGroup | None = None,
        allocation: Allocation | None = None,
    ) -> ResolvedBudget:
        """Returns the budget of a method for a ratio, which is provisional if it depends on scores.

        Args:
            method: The method.
            ratio: Share of all parameters to remove.
            scores: Importance of the units, None before calibration.
            allocation: The method's allocation with its measurements; that of the method if not given.
        """
        asked = self._grid.budget(ratio)
        return allocate(self.inventory(method), asked, allocation or method.allocation, scores=scores)

    def _check(self, method: Method, ratio: float) -> None:
        inventory, budget = self.inventory(method), self.budget(method, ratio)
        try:
            model = self._module.meta_model()
            check_together(method.scorer, method.compensation, method.units, method.allocation, inventory, model=model)
            check_criterion(model, inventory.groups, method.scorer)
            asked = self._grid.budget(ratio)
            method.removal.check(_prunable(model, method), asked, method.allocation, method.scorer)
            if method.distillation is not None:
                if budget.provisional or inventory.depth_kinds:
                    raise ConfigError("distillation requires widths that are known before scoring, and all layers.")
                method.distillation.first_widths(inventory.groups, budget.widths)
        except ConfigError as error:
            raise ConfigError(f"Method '{method.name}': {error}") from error

    def keep(self, cell: Cell, scores: ByGroup, batches: Iterable[Any]) -> Kept:
        """Returns the kept units of a cell's model.

        Args:
            cell: The cell.
            scores: Importance of the units; empty for methods that select units layer by layer.
            batches: Calibration batches, used for layer-by-layer methods and measured allocations.
        """
        method, inventory = cell.method, self.inventory(cell.method)
        groups = inventory.groups
        if isinstance(method.scorer, LayerwiseCriterion):
            whole = {group.name: tuple(range(group.num_units)) for group in inventory.skipped}
            return self._layerwise(self._load(), cell, None, batches).keep | whole
        allocation = method.allocation
        if method.measures:
            subject, data = _prunable(self._load(), method), CalibrationData(batches=lambda: batches)
            open_to = tuple(groups[i] for i in inventory.open_groups())
            allocation = measured(subject, open_to, scores, allocation, data, LocalCommunicator())
        return kept_units(scores, groups, self.budget(method, cell.pruning_ratio, scores, allocation))

    def build(self, cell: Cell, keep: Kept, batches: Iterable[Any]) -> Any:
        """Returns a cell's model.

        Args:
            cell: The cell.
            keep: Its kept units.
            batches: Calibration batches, used if weights are refitted.
        """
        model = self._load()
        groups = find_groups(model, cell.method.units)
        if cell.method.compensation is not None:
            self._layerwise(model, cell, keep, batches)
        config = config_values(model, groups, keep)
        apply_plan(model, PruningPlan(model_class=class_name(model), groups=groups, keep=keep, config=config))
        return model

    def _load(self) -> Any:
        module = self._module
        model = load_causal_lm(module.path, loading=module.loading)
        return model.to(self._device).eval()

    def _layerwise(self, model: Any, cell: Cell, keep: Kept | None, batches: Iterable[Any]) -> LayerwiseResult:
        method = cell.method
        groups, resolved = find_groups(model, method.units), self.budget(method, cell.pruning_ratio)
        result = run_layerwise(
            _prunable(model, method),
            tuple(group for group in groups if group.name not in resolved.skipped),
            dict(zip((group.name for group in groups), resolved.widths, strict=True)),
            CalibrationData(batches=lambda: batches),
            LocalCommunicator(),
            keep=keep,
            criterion=method.scorer if isinstance(method.scorer, LayerwiseCriterion) else None,
            compensation=method.compensation,
        )
        if result.warning:
            _log.warning("WARNING: %s: %s", cell.name, result.warning)
        return result


def _prunable(model: Any, method: Method) -> PrunableModel:
    return PrunableModel(model, method.units, skip_layers=method.skipped)
