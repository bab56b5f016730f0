"""Targets: the model in a LightningModule that a callback prunes, with its groups and objective."""

import copy
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from hfprune.io.checkpoint_record import Phase, Record
from hfprune.io.load import commit_of, load_causal_lm
from hfprune.models import find_groups, is_supported
from hfprune.models.forward import run_backbone
from hfprune.modules.causal_lm import PruningModule
from hfprune.objectives import Objective
from hfprune.plan import Group, PruningPlan
from hfprune.pruning.accumulator import ObjectiveSum
from hfprune.pruning.prunable import Prunable
from hfprune.recovery.lora import LoraRecovery, check_lora, merge_lora
from hfprune.utils.errors import ConfigError


class Target(Prunable):
    """Base class of pruning targets: the model in a LightningModule.

    Attributes:
        reloads_weights: Whether the module reloads the dense weights, so that checkpoints need not contain them.
    """

    reloads_weights: bool = False

    @property
    @abstractmethod
    def plan(self) -> PruningPlan | None:
        """The applied plan, or None."""

    @abstractmethod
    def apply_plan(self, plan: PruningPlan) -> None:
        """Cuts the model."""

    @abstractmethod
    def add_lora(self, lora: LoraRecovery) -> None:
        """Adds adapters."""

    @abstractmethod
    def merge_lora(self) -> None:
        """Merges the adapters permanently into the weights of the module, if it has adapters."""

    @abstractmethod
    def record(self, phase: Phase, calibration: dict[str, Any] | None) -> Record:
        """Returns the pruning state for checkpoints."""

    @abstractmethod
    def replay(self, record: Record) -> None:
        """Applies the plan and adds the adapters of a checkpoint."""

    @abstractmethod
    def start(self, seed: int) -> None:
        """Sets the seed of the run, before the dense model is pruned."""

    @property
    @abstractmethod
    def lora(self) -> LoraRecovery | None:
        """Settings of the model's adapters, or None."""

    @abstractmethod
    def check_training(self, *, adapters: bool) -> None:
        """Raises ``ConfigError`` if the module cannot train its weights or adapters, before calibration."""

    # ---- for reports ------------------------------------------------------------------------------------------------

    def check_measurable(self) -> None:
        """Raises ``ConfigError`` if there is no Hugging Face model to measure and export."""

    @property
    @abstractmethod
    def source(self) -> str | None:
        """Folder or Hub id of the dense model, or None."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Tokenizer of the model, or None."""

    @abstractmethod
    def merged(self, *, merge: bool) -> Any:
        """Returns the trained model with merged adapters, for measurements.

        Args:
            merge: Whether the adapters may be merged permanently; otherwise a copy is merged.
        """

    @abstractmethod
    def unwrapped(self, *, merge: bool) -> Any:
        """Returns the model without adapters, for the export.

        Args:
            merge: Whether to merge the adapters; otherwise they are dropped.
        """

    @property
    @abstractmethod
    def adapted(self) -> Any:
        """The PEFT model that wraps the model, or None."""

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns ``function(*args)``; head and embeddings of a sharded model are gathered for the call."""
        return function(*args)

    def load_dense(self) -> Any:
        """Returns a newly loaded dense model, or None if it cannot be loaded."""
        return None

    def training_figures(self) -> dict[str, Any]:
        """Returns tokens, FLOPs and seconds of recovery, if the module counts them."""
        return {}

    def run_facts(self) -> dict[str, Any]:
        """Returns the report's entries on resumes and distillation."""
        return {"resumed": [], "distillation": None}

    # ---- a run of a trainer ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the trainer's strategy."""
        device: torch.device = self.module.trainer.strategy.root_device
        return device

    def to_device(self, item: Any) -> Any:
        """Moves an item to the device with the trainer's strategy."""
        return self.module.trainer.strategy.batch_to_device(item)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Returns the context of the trainer's precision."""
        context: AbstractContextManager[Any] = self.module.trainer.strategy.precision_plugin.forward_context()
        return context

    def check_recovery(self, recovery: LoraRecovery | None) -> None:
        """Raises ``ConfigError`` for adapters that do not fit the model, from its shapes only."""
        if recovery is not None and self.lora is None and self.known and is_supported(self.shapes()):
            check_lora(self.shapes(), recovery)

    def lacks_adapters(self, recovery: LoraRecovery | None, record: Record | None) -> bool:
        """Returns whether the adapters of ``recovery`` are still to be added to an already pruned model.

        Args:
            recovery: Adapters of this run, or None.
            record: Record of the resumed checkpoint; None if the model was pruned by an earlier call.

        Raises:
            ConfigError: Training was started with other adapters.
        """
        if self.lora == recovery:
            return False
        if self.lora is None and (record is None or record.phase != "training"):
            return True
        raise ConfigError(
            f"The model was recovered with {self.lora or 'no adapters'}, but this run has {recovery or 'none'}. Set "
            "the same recovery to continue."
        )


class ModuleTarget(Target):
    """Target of a ``PruningModule``."""

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
        """Whether weights are sharded over ranks."""
        return bool(self.module.sharded)

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the groups of the unit kinds."""
        return find_groups(model, self.units)

    def shapes(self) -> Any:
        """Returns the model, on the meta device before it is loaded."""
        return self.module.meta_model()

    def start(self, seed: int) -> None:
        """Sets the seed of the run."""
        self.module.run_seed = seed

    @property
    def lora(self) -> LoraRecovery | None:
        """The module's adapters."""
        lora: LoraRecovery | None = self.module.lora
        return lora

    def check_recovery(self, recovery: LoraRecovery | None) -> None:
        """Also raises ``ConfigError`` for distillation of hidden states after channels are removed."""
        super().check_recovery(recovery)
        distillation = self.module.distillation
        losses = () if distillation is None else distillation.losses()
        name = next((loss.name for loss in losses if loss.compares_states), None)
        if name is not None and "channels" in self.units:
            raise ConfigError(
                f"`distillation.{name}` compares hidden states of the pruned and the dense model, whose sizes differ "
                "when channels are removed: set it to 0, or remove 'channels' from the units."
            )

    def check_training(self, *, adapters: bool) -> None:
        """Raises ``ConfigError`` for weights of half precision."""
        self.module.check_training(adapters=adapters)

    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Runs the module's ``calibration_step``."""
        found: ObjectiveSum = self.module.calibration_step(item, index, self.objective)
        return found

    def forward(self, item: Any, index: int) -> None:
        """Runs the model without its head."""
        self.run(run_backbone, self.module.causal_lm, item)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function with the gathered model."""
        return self.module.run(function, *args)

    @property
    def source(self) -> str | None:
        """The module's path."""
        path: str = self.module.path
        return path

    @property
    def tokenizer(self) -> Any:
        """The module's tokenizer."""
        return self.module.tokenizer

    def merged(self, *, merge: bool) -> Any:
        """Returns the module's model, or a merged copy if the adapters must be kept."""
        if merge or not self.module.lora:
            return self.module.unwrap()
        return merge_lora(copy.deepcopy(self.module.model))

    def unwrapped(self, *, merge: bool) -> Any:
        """Merges or drops the module's adapters."""
        return self.module.unwrap(merge=merge)

    @property
    def adapted(self) -> Any:
        """The module's model."""
        return self.module.model if self.module.lora else None

    def load_dense(self) -> Any:
        """Loads the model from the module's path."""
        return load_causal_lm(self.module.path, loading=self.module.loading)

    def training_figures(self) -> dict[str, Any]:
        """Returns tokens, FLOPs and seconds of recovery."""
        module = self.module
        cost = {"tokens": module.seen_tokens, "flops": module.training_flops, "seconds": module.training_seconds}
        return {"supervised_tokens": module.trained_tokens, "training": cost}

    def run_facts(self) -> dict[str, Any]:
        """Returns the module's resumes and its distillation."""
        distillation = self.module.distillation
        return {"resumed": self.module.resumed, "distillation": distillation.to_dict() if distillation else None}

    def apply_plan(self, plan: PruningPlan) -> None:
        """Cuts the model."""
        self.module.apply_plan(plan)

    def add_lora(self, lora: LoraRecovery) -> None:
        """Adds adapters."""
        self.module.add_lora(lora)

    def merge_lora(self) -> None:
        """Merges the module's adapters."""
        self.module.unwrap(merge=True)

    def record(self, phase: Phase, calibration: dict[str, Any] | None) -> Record:
        """Returns the module's record."""
        record: Record = self.module.record(phase, calibration)
        return record

    def replay(self, record: Record) -> None:
        """Rebuilds plan and adapters."""
        self.module.replay(record)

    def describe(self) -> dict[str, Any]:
        """Returns path, revision, commit, dtype and fingerprint of the model, and how else it was read."""
        module = self.module
        found = {"path": module.path, "revision": module.revision}
        if (commit := commit_of(module.path, module.loading)) is not None:
            found["commit"] = commit
        known = {name: module.loading.describe().get(name) for name in ("subfolder", "attn_implementation")}
        found |= {name: value for name, value in known.items() if value is not None}
        return found | {"dtype": str(module.causal_lm.dtype), "fingerprint": module.fingerprint}
