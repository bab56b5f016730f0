"""What ``TaylorImportanceCallback`` works on: the model inside a LightningModule, its groups, its objective."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from hfprune.allocation import Allocation, Inventory, ResolvedBudget, allocate, resolve_shares
from hfprune.io.checkpoint_record import Phase, Record
from hfprune.models import (
    check_stock,
    class_name,
    config_values,
    find_groups,
    is_supported,
    parameter_count,
    pruned_count,
)
from hfprune.models.forward import as_batch, is_packed, run_backbone, sequences, token_counts
from hfprune.modules.causal_lm import PruningModule
from hfprune.objectives import Objective
from hfprune.plan import LAYERS, Budget, Group, PruningPlan
from hfprune.pruning.accumulator import ObjectiveSum
from hfprune.recovery.lora import LoraRecovery, check_lora
from hfprune.utils.errors import ConfigError


class Target(ABC):
    """The part of a LightningModule that is pruned.

    Attributes:
        module: The LightningModule.
        objective: What calibration differentiates; None: the loss of the module's own ``training_step``.
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

    @property
    @abstractmethod
    def plan(self) -> PruningPlan | None:
        """What was pruned."""

    @abstractmethod
    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the groups of ``model``."""

    @abstractmethod
    def shapes(self) -> Any:
        """Returns the dense model, or one with its shapes before it is loaded."""

    @abstractmethod
    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Returns the objective of one calibration item."""

    @abstractmethod
    def forward(self, item: Any, index: int) -> None:
        """Runs the model on one calibration item for what hooks see: no gradients, and no output head if possible."""

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

    @abstractmethod
    def apply_plan(self, plan: PruningPlan) -> None:
        """Cuts the model."""

    @abstractmethod
    def add_lora(self, lora: LoraRecovery) -> None:
        """Adds adapters."""

    @abstractmethod
    def record(self, phase: Phase, calibration: dict[str, Any] | None) -> Record:
        """Returns the pruning state that checkpoints carry."""

    @abstractmethod
    def replay(self, record: Record) -> None:
        """Rebuilds the shapes that a checkpoint describes."""

    @abstractmethod
    def start(self, seed: int) -> None:
        """Takes over the run's seed, with the dense model in place."""

    @property
    @abstractmethod
    def lora(self) -> LoraRecovery | None:
        """The adapters that are there."""

    @abstractmethod
    def check_training(self, *, adapters: bool) -> None:
        """Raises ``ConfigError`` where the module cannot train its weights or adapters, before it is calibrated."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what the plan's provenance says about the model."""

    def check_recovery(self, recovery: LoraRecovery | None) -> None:
        """Raises ``ConfigError`` for adapters that the model has no place for, from its shapes alone."""
        if recovery is not None and self.lora is None and self.known and is_supported(self.shapes()):
            check_lora(self.shapes(), recovery)

    def lacks_adapters(self, recovery: LoraRecovery | None, record: Record | None) -> bool:
        """Returns whether a model that is pruned already has yet to get the adapters of ``recovery``.

        Args:
            recovery: What this run asks for.
            record: Of the checkpoint that the run goes on from; None where the model was pruned by an earlier call.

        Raises:
            ConfigError: Training has begun with other ones.
        """
        if self.lora == recovery:
            return False
        if self.lora is None and (record is None or record.phase != "training"):
            return True
        raise ConfigError(
            f"The model was recovered with {self.lora or 'no adapters'}; this run asks for {recovery or 'none'}. Give "
            "the same recovery to go on."
        )

    reloads_weights: bool = False
    """Whether the dense weights come back without a checkpoint."""

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
        return resolve_shares(budget, groups, partial(pruned_count, model, groups), dense_params=dense_params)

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
        gone = resolved.removed_layers
        keep |= {g.name: tuple(u for u in range(g.num_units) if u not in gone) for g in groups if g.kind == LAYERS}
        config = config_values(model, groups, keep) if is_supported(model) else {}
        return PruningPlan(model_class=class_name(model), groups=groups, keep=keep, config=config)

    def check_stock(self, resolved: ResolvedBudget) -> None:
        """Raises ``UnsupportedArchitectureError`` unless a stock config can describe what ``resolved`` leaves."""
        plan = self.outline(resolved)
        check_stock(self.shapes(), plan.groups, plan.keep)

    def items(self, batch: Any, *, exact: bool) -> list[Any]:
        """Returns what of ``batch`` is run at once: each sequence alone when ``exact``, and where rows are packed."""
        if self.objective is None:
            return [batch]
        tensors = as_batch(batch)
        return sequences(tensors) if exact or is_packed(tensors) else [tensors]


class ModuleTarget(Target):
    """A ``PruningModule``."""

    reloads_weights = True

    def __init__(self, module: PruningModule, objective: Objective | None) -> None:
        self.module, self.objective = module, objective or module.objective

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self.module.causal_lm

    @property
    def plan(self) -> PruningPlan | None:
        """What was pruned."""
        plan: PruningPlan | None = self.module.plan
        return plan

    @property
    def sharded(self) -> bool:
        """Whether weights are spread over ranks."""
        return bool(self.module.sharded)

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the groups of the unit kinds."""
        return find_groups(model, self.units)

    def shapes(self) -> Any:
        """Returns the model, on the meta device before it is loaded."""
        return self.module.meta_model()

    def start(self, seed: int) -> None:
        """Takes over the run's seed."""
        self.module.run_seed = seed

    @property
    def lora(self) -> LoraRecovery | None:
        """The module's adapters."""
        lora: LoraRecovery | None = self.module.lora
        return lora

    def check_recovery(self, recovery: LoraRecovery | None) -> None:
        """Refuses hidden states that would be compared with wider ones, too."""
        super().check_recovery(recovery)
        distillation = self.module.distillation
        if distillation is not None and distillation.hidden and "channels" in self.units:
            raise ConfigError(
                "--model.distillation.hidden compares hidden states with the dense model's, which removing channels "
                "makes wider: leave it out, or leave 'channels' out of the units."
            )

    def check_training(self, *, adapters: bool) -> None:
        """Refuses to train what is of half precision."""
        self.module.check_training(adapters=adapters)

    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Runs the module's ``calibration_step``."""
        found: ObjectiveSum = self.module.calibration_step(item, index, self.objective)
        return found

    def forward(self, item: Any, index: int) -> None:
        """Runs the model without its head."""
        self.module.run(run_backbone, self.module.causal_lm, item)

    def apply_plan(self, plan: PruningPlan) -> None:
        """Cuts the model."""
        self.module.apply_plan(plan)

    def add_lora(self, lora: LoraRecovery) -> None:
        """Adds adapters."""
        self.module.add_lora(lora)

    def record(self, phase: Phase, calibration: dict[str, Any] | None) -> Record:
        """Returns the module's record."""
        record: Record = self.module.record(phase, calibration)
        return record

    def replay(self, record: Record) -> None:
        """Rebuilds plan and adapters."""
        self.module.replay(record)

    def describe(self) -> dict[str, Any]:
        """Returns path, revision, type and fingerprint."""
        module = self.module
        return {
            "path": module.path,
            "revision": module.revision,
            "dtype": str(module.causal_lm.dtype),
            "fingerprint": module.fingerprint,
        }
