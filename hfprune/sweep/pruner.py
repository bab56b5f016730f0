"""The pruned models of a sweep: budgets, kept units, surgery and fitted weights."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hfprune.allocation import Inventory, ResolvedBudget, allocate, kept_units
from hfprune.criteria import LayerwiseCriterion
from hfprune.io.layouts import apply_plan
from hfprune.io.load import load_causal_lm
from hfprune.models import class_name, config_values, find_groups
from hfprune.models.forward import as_batch, sequences
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import Budget, PruningPlan
from hfprune.pruning.accumulator import check_criterion
from hfprune.pruning.layerwise import LayerwisePass, LayerwiseResult, check_together
from hfprune.sweep.grid import Cell, Method, SweepGrid
from hfprune.utils.errors import ConfigError

_log = logging.getLogger(__name__)

ByGroup = Mapping[str, Tensor]
"""Group -> scores [U]."""

Kept = dict[str, tuple[int, ...]]
"""Group -> kept units."""


class Pruner:
    """Makes the models of a grid.

    Args:
        module: The dense model.
        grid: What is compared.
        device: Where layers run and models go.

    Raises:
        ConfigError: A ratio is impossible for a method's units, or a method's parts do not go together.
    """

    def __init__(self, module: PruningModule, grid: SweepGrid, device: torch.device) -> None:
        self._module, self._grid, self._device = module, grid, device
        self._inventories: dict[tuple[str, ...], Inventory] = {}
        for method in grid.methods:
            for ratio in grid.pruning_ratios:
                self._check(method, self.budget(method, ratio))

    def inventory(self, method: Method) -> Inventory:
        """Returns the groups that a method may take units from."""
        units = tuple(method.units)
        if units not in self._inventories:
            model = self._module.meta_model()
            self._inventories[units] = Inventory.of(model, find_groups(model, units))
        return self._inventories[units]

    def budget(self, method: Method, ratio: float, scores: ByGroup | None = None) -> ResolvedBudget:
        """Returns what removing ``ratio`` of all parameters means for a method; provisional where it needs scores."""
        asked = Budget(pruning_ratio=ratio, round_to=self._grid.round_to)
        return allocate(self.inventory(method), asked, method.allocation, scores=scores)

    def _check(self, method: Method, budget: ResolvedBudget) -> None:
        inventory = self.inventory(method)
        try:
            model = self._module.meta_model()
            check_together(method.scorer, method.compensation, method.units, method.allocation, inventory, model=model)
            check_criterion(model, inventory.groups, method.scorer)
            if method.distillation is not None:
                if budget.provisional or inventory.layers is not None:
                    raise ConfigError("distillation needs every width before its first stage, and keeps all layers.")
                method.distillation.first_widths(inventory.groups, budget.widths)
        except ConfigError as error:
            raise ConfigError(f"Method '{method.name}': {error}") from error

    def keep(self, cell: Cell, scores: ByGroup, batches: Iterable[Any]) -> Kept:
        """Returns the units of a cell's model.

        Args:
            cell: The cell.
            scores: Importance of the units; empty where they are chosen layer by layer.
            batches: Calibration batches, read where units are chosen layer by layer.
        """
        method = cell.method
        if isinstance(method.scorer, LayerwiseCriterion):
            return self._layerwise(self._load(), cell, None, batches).keep
        return kept_units(scores, self.inventory(method).groups, self.budget(method, cell.pruning_ratio, scores))

    def build(self, cell: Cell, keep: Kept, batches: Iterable[Any]) -> Any:
        """Returns a cell's model.

        Args:
            cell: The cell.
            keep: Its units.
            batches: Calibration batches, read where weights are fitted.
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
        model = load_causal_lm(module.path, dtype=module.dtype_name, revision=module.revision)
        return model.to(self._device).eval()

    def _layerwise(self, model: Any, cell: Cell, keep: Kept | None, batches: Iterable[Any]) -> LayerwiseResult:
        method = cell.method
        groups = find_groups(model, method.units)
        widths = self.budget(method, cell.pruning_ratio).widths
        with torch.no_grad():
            found = LayerwisePass(model, groups, compensation=method.compensation).run(
                [sequence for batch in batches for sequence in sequences(as_batch(batch))],
                dict(zip((group.name for group in groups), widths, strict=True)),
                keep=keep,
                criterion=method.scorer if isinstance(method.scorer, LayerwiseCriterion) else None,
            )
        if found.warning:
            _log.warning("WARNING: %s: %s", cell.name, found.warning)
        return found
