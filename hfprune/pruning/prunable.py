"""Prunable models: the interface through which calibration and planning access a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.allocation import Allocation, Inventory, ResolvedBudget, allocate
from hfprune.models import (
    check_stock,
    class_name,
    config_values,
    find_groups,
    is_supported,
)
from hfprune.models.forward import (
    as_batch,
    is_packed,
    objective_sum,
    objective_sums,
    run_backbone,
    sequences,
    token_counts,
)
from hfprune.models.skip_layers import SkipLayers
from hfprune.objectives import Objective
from hfprune.plan import LAYERS, Budget, Group, PruningPlan, unit_kinds
from hfprune.pruning.accumulator import ObjectiveSum
from hfprune.utils.errors import ConfigError


class Prunable(ABC):
    """Base class of models that can be scored and pruned.

    Attributes:
        module: Module that contains the model; frozen and in eval mode during calibration.
        objective: Objective to differentiate; None for the loss of the user's module.
        units: Unit kinds of a Hugging Face model.
        stock: Whether a stock config must describe the pruned model; allocations then choose widths that it supports.
        skip_layers: Layers and modules that are not pruned; None prunes all.
    """

    module: Any
    objective: Objective | None
    units: Sequence[str] = ("mlp",)
    stock: bool = False
    skip_layers: SkipLayers | None = None

    @property
    @abstractmethod
    def model(self) -> Any:
        """The model that contains the modules of the groups."""

    @abstractmethod
    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the groups of ``model``."""

    @abstractmethod
    def shapes(self) -> Any:
        """Returns the dense model, or a model of the same shapes on the meta device before loading."""

    @abstractmethod
    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Returns the objective of one calibration item.

        Args:
            item: The item.
            index: Position of the item in the calibration data.
        """

    @abstractmethod
    def forward(self, item: Any, index: int) -> None:
        """Runs the model on one calibration item for its hooks, without gradients and, if possible, output head."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the description of the model for the plan's provenance."""

    # ---- forward passes ----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of items and sums."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def to_device(self, item: Any) -> Any:
        """Returns a calibration item on :attr:`device`."""
        return {name: value.to(self.device) for name, value in item.items()}

    def forward_context(self) -> AbstractContextManager[Any]:
        """Returns the context of forward passes, for example autocast."""
        return nullcontext()

    def objective_sums(self, item: Any, objectives: Sequence[Objective]) -> list[ObjectiveSum]:
        """Returns several objectives of one calibration item, from one forward pass."""
        padding = token_counts(item)[1]
        return [
            ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=padding)
            for total, valid in objective_sums(self.model, objectives, item)
        ]

    def token_counts(self, item: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the number of real tokens [B] of each sequence of an item, and its padding [B, T] or None."""
        return token_counts(item)

    def seen_tokens(self, item: Any, counted: int) -> int | None:
        """Returns the number of tokens that the model reads in a calibration item; None if unknown.

        Args:
            item: The item.
            counted: Number of tokens that the objective counts.
        """
        return counted

    def items(self, batch: Any, *, exact: bool) -> list[Any]:
        """Returns the inputs of single forward passes: sequences if ``exact`` or packed, else the whole batch."""
        if not self.reads_tokens:
            return [batch]
        tensors = as_batch(batch)
        return sequences(tensors) if exact or is_packed(tensors) else [tensors]

    @property
    def reads_tokens(self) -> bool:
        """Whether batches contain token ids and can be split into sequences."""
        return self.objective is not None

    @property
    def objective_name(self) -> str:
        """Name of the objective, for the plan and the progress bar."""
        return self.objective.name if self.objective else "training_step loss"

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded, so that all ranks must run it together."""
        return False

    @property
    def known(self) -> bool:
        """Whether the shapes of the model are known."""
        return True

    # ---- shapes and budgets ------------------------------------------------------------------------------------------

    def resolve(
        self, budget: Budget, allocation: Allocation | None = None, scores: Mapping[str, Tensor] | None = None
    ) -> ResolvedBudget:
        """Resolves a budget to numbers of kept units.

        Args:
            budget: The budget.
            allocation: Allocation of the budget; None for the same share of every group of a kind.
            scores: Group name -> importance [U]; None before calibration.

        Raises:
            ConfigError: The budget cannot be met, or custom neurons are combined with units or an allocation.
        """
        described = not is_supported(self.shapes())
        if described and (allocation is not None or tuple(self.units) != ("mlp",)):
            raise ConfigError(
                "units and allocation require a Hugging Face model of a supported architecture; all groups of custom "
                "neurons are pruned by the same share. Remove both arguments."
            )
        return allocate(self.inventory(), budget, allocation, scores=scores)

    def inventory(self) -> Inventory:
        """Returns the groups of the model and the parameters of their units."""
        model = self.shapes()
        return Inventory.of(model, self.groups(model), stock=self.stock, skip=self.skip_layers)

    def describe_skipped(self) -> dict[str, Any] | None:
        """Returns the patterns of ``skip_layers``, and the groups and layers that they keep, for the provenance."""
        if self.skip_layers is None:
            return None
        found = self.inventory()
        names, layers = [group.name for group in found.skipped], sorted(found.fixed_layers)
        return {**self.skip_layers.describe(), "groups": names, "layers": layers if found.layers is not None else []}

    def config_keys(self, keep: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Returns the config keys that change when the units ``keep`` are kept."""
        model = self.model
        return config_values(model, self.groups(model), keep) if is_supported(model) else {}

    def outline(self, resolved: ResolvedBudget) -> PruningPlan:
        """Returns a plan with the widths of ``resolved`` and arbitrary units, for checks before scoring."""
        model = self.shapes()
        groups = self.groups(model)
        keep = {g.name: tuple(range(width)) for g, width in zip(groups, resolved.widths, strict=True)}
        removed = resolved.removed_layers
        keep |= {g.name: tuple(u for u in range(g.num_units) if u not in removed) for g in groups if g.kind == LAYERS}
        config = config_values(model, groups, keep) if is_supported(model) else {}
        return PruningPlan(model_class=class_name(model), groups=groups, keep=keep, config=config)

    def check_stock(self, resolved: ResolvedBudget) -> None:
        """Raises ``UnsupportedArchitectureError`` unless a stock config can describe the widths of ``resolved``."""
        plan = self.outline(resolved)
        check_stock(self.shapes(), plan.groups, plan.keep)


class PrunableModel(Prunable):
    """A Hugging Face model without a LightningModule around it.

    Args:
        model: A supported Hugging Face causal LM.
        units: Unit kinds.
        objective: Objective to differentiate.
        skip_layers: Layers and modules that are not pruned.
    """

    def __init__(
        self,
        model: Any,
        units: Sequence[str] = ("mlp",),
        *,
        objective: Objective | None = None,
        skip_layers: SkipLayers | None = None,
    ) -> None:
        self.module, self.units, self.objective = model, unit_kinds(units), objective
        self.skip_layers = skip_layers

    @property
    def model(self) -> Any:
        """The model."""
        return self.module

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the groups of the selected unit kinds."""
        return find_groups(model, self.units)

    def shapes(self) -> Any:
        """Returns the model."""
        return self.module

    @property
    def reads_tokens(self) -> bool:
        """True."""
        return True

    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Returns the sum of the objective over the tokens that count."""
        assert self.objective is not None
        total, valid = objective_sum(self.module, self.objective, item)
        return ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=token_counts(item)[1])

    def forward(self, item: Any, index: int) -> None:
        """Runs the model without its output head."""
        run_backbone(self.module, item)

    def describe(self) -> dict[str, Any]:
        """Returns class, path and dtype of the model."""
        model = self.module
        return {"class": class_name(model), "path": model.name_or_path, "dtype": str(model.dtype)}
