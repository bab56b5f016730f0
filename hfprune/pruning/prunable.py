"""Prunable models: the groups of a model, and how calibration runs it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.allocation import Allocation, Inventory, ResolvedBudget, allocate, resolve_shares
from hfprune.allocation.round_to import auto_rounded
from hfprune.models import (
    check_stock,
    class_name,
    config_values,
    find_groups,
    is_supported,
    parameter_count,
    pruned_count,
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
from hfprune.objectives import Objective
from hfprune.plan import LAYERS, Budget, Group, PruningPlan, unit_kinds
from hfprune.pruning.accumulator import ObjectiveSum
from hfprune.utils.errors import ConfigError


class Prunable(ABC):
    """A model that can be scored and pruned, wherever it lives.

    Attributes:
        module: The module that is frozen and put into eval mode during calibration; holds the model.
        objective: What calibration differentiates; None: a loss of the module's own.
        units: Unit kinds of a Hugging Face model.
        stock: Whether a stock config has to describe what is left, so that allocations choose what it can state.
    """

    module: Any
    objective: Objective | None
    units: Sequence[str] = ("mlp",)
    stock: bool = False

    @property
    @abstractmethod
    def model(self) -> Any:
        """The module that the groups' names refer to."""

    @abstractmethod
    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the groups of ``model``."""

    @abstractmethod
    def shapes(self) -> Any:
        """Returns the dense model, or one with its shapes before it is loaded."""

    @abstractmethod
    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Returns the objective of one calibration item.

        Args:
            item: One item.
            index: Its position in the calibration data.
        """

    @abstractmethod
    def forward(self, item: Any, index: int) -> None:
        """Runs the model on one calibration item for what hooks see: no gradients, and no output head if possible."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what the plan's provenance says about the model."""

    # ---- how it is run -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where items and sums go."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def to_device(self, item: Any) -> Any:
        """Returns a calibration item on :attr:`device`."""
        return {name: value.to(self.device) for name, value in item.items()}

    def forward_context(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass: autocast, for example."""
        return nullcontext()

    def objective_sums(self, item: Any, objectives: Sequence[Objective]) -> list[ObjectiveSum]:
        """Returns several objectives of one calibration item, from one forward pass."""
        padding = token_counts(item)[1]
        return [
            ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=padding)
            for total, valid in objective_sums(self.model, objectives, item)
        ]

    def token_counts(self, item: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens [B] that count in each sequence of an item without objective, and its padding [B, T]."""
        return token_counts(item)

    def seen_tokens(self, item: Any, counted: int) -> int | None:
        """Returns how many tokens of a calibration item the model read, None where that is not known.

        Args:
            item: One item.
            counted: Tokens that its objective counts.
        """
        return counted

    def items(self, batch: Any, *, exact: bool) -> list[Any]:
        """Returns what of ``batch`` is run at once: each sequence alone when ``exact``, and where rows are packed."""
        if not self.reads_tokens:
            return [batch]
        tensors = as_batch(batch)
        return sequences(tensors) if exact or is_packed(tensors) else [tensors]

    @property
    def reads_tokens(self) -> bool:
        """Whether batches hold token ids, so that they can be split into sequences."""
        return self.objective is not None

    @property
    def objective_name(self) -> str:
        """Name of the objective, for the plan and the progress bar."""
        return self.objective.name if self.objective else "training_step loss"

    @property
    def sharded(self) -> bool:
        """Whether the ranks must run the model in step."""
        return False

    @property
    def known(self) -> bool:
        """Whether the model's shapes are known already."""
        return True

    # ---- shapes and budgets ------------------------------------------------------------------------------------------

    def resolve(
        self, budget: Budget, allocation: Allocation | None = None, scores: Mapping[str, Tensor] | None = None
    ) -> ResolvedBudget:
        """Returns what ``budget`` means here, from shapes, and scores where the allocation needs them.

        Args:
            budget: What was asked.
            allocation: How it is spent; None: the same share of every group of a kind.
            scores: Importance of the units, None before calibration.

        Raises:
            ConfigError: It is impossible, or units or allocation do not apply to modules that no table describes.
        """
        model = self.shapes()
        groups, dense_params = self.groups(model), parameter_count(model)
        if is_supported(model):
            return allocate(self.inventory(), budget, allocation, scores=scores)
        if allocation is not None or tuple(self.units) != ("mlp",):
            raise ConfigError(
                "units and allocation apply to Hugging Face models that hfprune knows; described neurons all lose the "
                "same share. Leave both out."
            )
        count = partial(pruned_count, model, groups)
        shares = partial(resolve_shares, groups=groups, count=count, dense_params=dense_params)
        return auto_rounded(budget, shares, shapes=shares) if budget.auto_round else shares(budget)

    def inventory(self) -> Inventory:
        """Returns the groups of a Hugging Face model and what their units cost."""
        model = self.shapes()
        return Inventory.of(model, self.groups(model), stock=self.stock)

    def config_keys(self, keep: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Returns the config keys that change when ``keep`` stays."""
        model = self.model
        return config_values(model, self.groups(model), keep) if is_supported(model) else {}

    def outline(self, resolved: ResolvedBudget) -> PruningPlan:
        """Returns a plan with the numbers of units that ``resolved`` leaves; which units these are is not known yet."""
        model = self.shapes()
        groups = self.groups(model)
        keep = {g.name: tuple(range(width)) for g, width in zip(groups, resolved.widths, strict=True)}
        removed = resolved.removed_layers
        keep |= {g.name: tuple(u for u in range(g.num_units) if u not in removed) for g in groups if g.kind == LAYERS}
        config = config_values(model, groups, keep) if is_supported(model) else {}
        return PruningPlan(model_class=class_name(model), groups=groups, keep=keep, config=config)

    def check_stock(self, resolved: ResolvedBudget) -> None:
        """Raises ``UnsupportedArchitectureError`` unless a stock config can describe what ``resolved`` leaves."""
        plan = self.outline(resolved)
        check_stock(self.shapes(), plan.groups, plan.keep)


class PrunableModel(Prunable):
    """A Hugging Face model without a LightningModule around it.

    Args:
        model: A supported Hugging Face causal LM.
        units: Unit kinds.
        objective: What calibration differentiates.
    """

    def __init__(self, model: Any, units: Sequence[str] = ("mlp",), *, objective: Objective | None = None) -> None:
        self.module, self.units, self.objective = model, unit_kinds(units), objective

    @property
    def model(self) -> Any:
        """The model."""
        return self.module

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the groups of the unit kinds."""
        return find_groups(model, self.units)

    def shapes(self) -> Any:
        """Returns the model."""
        return self.module

    @property
    def reads_tokens(self) -> bool:
        """Always."""
        return True

    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Returns the sum of the objective over the tokens that count."""
        assert self.objective is not None
        total, valid = objective_sum(self.module, self.objective, item)
        return ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=token_counts(item)[1])

    def forward(self, item: Any, index: int) -> None:
        """Runs the model without its head."""
        run_backbone(self.module, item)

    def describe(self) -> dict[str, Any]:
        """Returns class, path and type of the weights."""
        model = self.module
        return {"class": class_name(model), "path": model.name_or_path, "dtype": str(model.dtype)}
