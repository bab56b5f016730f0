"""Targets in user-defined LightningModules."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from hfprune.callbacks.described_neurons import restate_widths
from hfprune.callbacks.target import ModuleTarget, Target
from hfprune.io.checkpoint_record import Phase, Record
from hfprune.io.layouts import apply_plan
from hfprune.models import ARCHITECTURES, Neurons, class_name, custom_groups, find_groups, is_supported
from hfprune.models.fingerprint import structure_fingerprint
from hfprune.models.forward import objective_sum, run_backbone
from hfprune.modules.causal_lm import PruningModule
from hfprune.objectives import OBJECTIVES, Objective
from hfprune.plan import Group, PruningPlan
from hfprune.pruning.accumulator import ObjectiveSum
from hfprune.recovery.adapters import PrunedPeftModel
from hfprune.recovery.lora import LoraRecovery, add_lora, merge_lora
from hfprune.recovery.masked import mask_adapters
from hfprune.utils.errors import CalibrationError, ConfigError, HFPruneError

_STATE = "_hfprune"  # attribute of the module with its pruning state


class ForeignTarget(Target):
    """Target of a user-defined LightningModule: a supported Hugging Face model in it, or described neurons.

    Args:
        module: The LightningModule.
        objective: Objective of the Hugging Face model's logits; None for the ``training_step`` loss.
        model: Name of the Hugging Face model in a module with several models.
        neurons: Descriptions of neurons, with names relative to the module.

    Raises:
        ConfigError: ``training_step`` cannot provide the loss.
    """

    def __init__(
        self,
        module: LightningModule,
        objective: Objective | None,
        *,
        model: str | None = None,
        neurons: Sequence[Neurons] = (),
    ) -> None:
        self.module, self.objective, self._name, self._neurons = module, objective, model, tuple(neurons)
        self._described = bool(self._neurons)
        self._check_objective()

    @classmethod
    def of_record(cls, module: LightningModule, record: Record) -> "ForeignTarget":
        """Returns the target of a new module, with the settings of the run that wrote a checkpoint."""
        found = record.plan.provenance.get("model", {}) if record.plan is not None else {}
        several = len({id(m) for m in module.modules() if is_supported(m)}) > 1
        target = cls(module, OBJECTIVES.get("entropy"), model=found.get("name") if several else None)
        target._described = record.plan is not None and record.plan.model_class == class_name(module)
        return target

    def _check_objective(self) -> None:
        kind = type(self.module).__name__
        if self.objective is not None:
            if self._neurons:
                raise ConfigError(
                    f"objective='{self.objective.name}' reads a Hugging Face model's logits; with neurons=... the "
                    "objective is the loss of training_step (objective=None)."
                )
            return
        if not is_overridden("training_step", self.module, LightningModule):
            raise ConfigError(f"{kind} has no training_step whose loss could be the objective.")
        if not self.module.automatic_optimization:
            raise ConfigError(
                f"{kind} uses manual optimization: its training_step cannot run without optimizer steps. Set "
                "objective='entropy' or 'cross_entropy', which use the model's logits."
            )
        if is_param_in_hook_signature(self.module.training_step, "dataloader_iter", explicit=True):
            raise ConfigError(f"{kind}.training_step takes the data iterator; calibration passes it single batches.")

    @property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.module.__dict__.setdefault(_STATE, {})
        return state

    @property
    def model(self) -> Any:
        """The Hugging Face model, or the module itself if its neurons are described.

        Raises:
            ConfigError: The module has no supported model, or several.
        """
        if self._described:
            return self.module
        if self._name is not None:
            return self._named(self._name)
        found = {name: m for name, m in self.module.named_modules() if is_supported(m)}
        if len({id(m) for m in found.values()}) == 1:
            return next(iter(found.values()))
        kind = type(self.module).__name__
        if found:
            raise ConfigError(
                f"{kind} holds several models: {', '.join(found)}. Choose one, such as model='{next(iter(found))}'."
            )
        raise ConfigError(
            f"{kind} holds no supported Hugging Face model (known: {', '.join(ARCHITECTURES)}). Describe its neurons: "
            "neurons=[Neurons('net.0', 'net.2')]."
        )

    @property
    def known(self) -> bool:
        """Whether the model exists; a module may create it in ``configure_model``."""
        if not is_overridden("configure_model", self.module, LightningModule):
            return True
        try:
            return len(self.groups(self.model)) > 0
        except HFPruneError:
            return False

    def _named(self, name: str) -> nn.Module:
        """Returns the model called ``name``, without a PEFT wrapper."""
        try:
            found: nn.Module = self.module.get_submodule(name)
        except AttributeError as error:
            raise ConfigError(f"{type(self.module).__name__} has no module called '{name}'.") from error
        inner = next((m for m in found.modules() if is_supported(m)), None)
        if inner is None:
            raise ConfigError(f"'{name}' is a {type(found).__name__}, no supported Hugging Face model.")
        return inner

    @property
    def plan(self) -> PruningPlan | None:
        """The applied plan, or None."""
        plan: PruningPlan | None = self._state.get("plan")
        return plan

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns the described groups, or the groups of the Hugging Face model's unit kinds."""
        return custom_groups(model, self._neurons) if self._described else find_groups(model, self.units)

    def shapes(self) -> Any:
        """Returns the model."""
        return self.model

    def start(self, seed: int) -> None:
        """Stores the seed and the structure of the dense model."""
        self._state.setdefault("seed", seed)
        self._state.setdefault("fingerprint", structure_fingerprint(self.model))

    def objective_sum(self, item: Any, index: int) -> ObjectiveSum:
        """Runs the model, or the module's ``training_step`` without logging."""
        if self.objective is not None:
            total, valid = objective_sum(self.model, self.objective, item)
            mask = item.get("attention_mask")
            return ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=None if mask is None else mask == 0)
        loss = self._training_step(item, index)
        loss = loss.get("loss") if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor):
            raise CalibrationError(f"training_step returned {type(loss).__name__}, not a loss.")
        # the loss is one number and counts once: the number of averaged terms is unknown
        return ObjectiveSum(total=loss, num_tokens=torch.ones(1, dtype=torch.int64, device=loss.device), padding=None)

    def _training_step(self, item: Any, index: int) -> Any:
        step = self.module.training_step
        with _without_logging(self.module):
            return step(item, index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(item)

    def forward(self, item: Any, index: int) -> None:
        """Runs the Hugging Face model without its head, or, for described neurons, the module's ``training_step``."""
        if self.objective is not None:
            run_backbone(self.model, item)
        else:
            self._training_step(item, index)

    def token_counts(self, item: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the numbers of counted tokens; a batch of a ``training_step`` counts once, as its loss."""
        if self.objective is not None:
            return super().token_counts(item)
        return torch.ones(1, dtype=torch.int64, device=self.module.device), None

    def seen_tokens(self, item: Any, counted: int) -> int | None:
        """Returns the real tokens of a batch of token ids; None for other batches of a ``training_step``."""
        if self.objective is not None:
            return counted
        if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), Tensor):
            return None
        mask = item.get("attention_mask")
        return int(mask.sum()) if isinstance(mask, Tensor) else item["input_ids"].numel()

    @property
    def lora(self) -> LoraRecovery | None:
        """Settings of the adapters added by hfprune, or None."""
        return LoraRecovery(**self._state["lora"]) if "lora" in self._state else None

    def check_training(self, *, adapters: bool) -> None:
        """Accepts every module: training is defined by the user."""

    def apply_plan(self, plan: PruningPlan) -> None:
        """Cuts the model."""
        apply_plan(self.model, plan)
        if self._described:
            restate_widths(self.module, plan)
        self._state["plan"] = plan

    def add_lora(self, lora: LoraRecovery) -> None:
        """Replaces the model by a model with adapters.

        Raises:
            ConfigError: The target is not a Hugging Face model within the module.
        """
        model, name = self.model, self.name
        if not name:
            raise ConfigError(
                "recovery='lora' requires a Hugging Face model: set recovery='full' to train the pruned module."
            )
        self.module.requires_grad_(False)
        wrapped = add_lora(model, lora, seed=self._state.get("seed", 0))
        wrapped.plan = self.plan
        if self.plan is not None and self.plan.provenance.get("keep_zeros"):
            mask_adapters(wrapped)
        self._put(name, wrapped)
        self._state["lora"] = lora.to_dict()

    def merge_lora(self) -> None:
        """Replaces the PEFT model with the model, with merged adapters. The PEFT model cannot be used afterwards."""
        wrapped = self.adapted
        if wrapped is not None:
            name = next(name for name, module in self.module.named_modules() if module is wrapped)
            self._put(name, merge_lora(wrapped))
            del self._state["lora"]

    @property
    def name(self) -> str:
        """Name of the Hugging Face model in the module; empty for described neurons."""
        model = self.model
        return next((name for name, module in self.module.named_modules() if module is model), "")

    def _put(self, name: str, model: nn.Module) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self.module.get_submodule(owner), attribute, model)

    # ---- for reports ------------------------------------------------------------------------------------------------

    def check_measurable(self) -> None:
        """Raises ``ConfigError`` for described neurons: there is no Hugging Face model."""
        if self._described:
            raise ConfigError(
                f"ReportCallback measures and exports a Hugging Face model, and the neurons of "
                f"{type(self.module).__name__} are described by neurons=...: remove the callback, and save the "
                "module's state_dict."
            )

    @property
    def source(self) -> str | None:
        """Folder or Hub id in the model's config, or None."""
        return getattr(self.model.config, "_name_or_path", None) or None

    @property
    def tokenizer(self) -> Any:
        """Attribute ``tokenizer`` of the module, or None."""
        return getattr(self.module, "tokenizer", None)

    @property
    def adapted(self) -> Any:
        """The PEFT model that replaces the model, or None."""
        return next((m for m in self.module.modules() if isinstance(m, PrunedPeftModel)), None)

    def merged(self, *, merge: bool) -> Any:
        """Returns the model, or a merged copy if it has adapters. The module keeps its adapters."""
        return self.unwrapped(merge=True)

    def unwrapped(self, *, merge: bool) -> Any:
        """Returns the model, or a copy without adapters. The module keeps its adapters."""
        wrapped = self.adapted
        if wrapped is None:
            return self.model
        alone = copy.deepcopy(wrapped)
        return merge_lora(alone) if merge else alone.unload()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def record(self, phase: Phase, calibration: dict[str, Any] | None) -> Record:
        """Returns the pruning state of the module."""
        return Record(
            phase=phase,
            fingerprint=self._state.get("fingerprint", ""),
            model=class_name(self.model),
            seed=self._state.get("seed", 0),
            plan=self.plan,
            lora=self._state.get("lora"),
            calibration=calibration,
        )

    def replay(self, record: Record) -> None:
        """Applies plan and adapters of a checkpoint to a new module."""
        if self.plan is None:
            self._state["fingerprint"] = structure_fingerprint(self.model)
        record.check_model(self._state["fingerprint"], class_name(self.model))
        self._state["seed"] = record.seed
        if record.plan is not None and self.plan is None:
            self.apply_plan(record.plan)
        if record.lora is not None and "lora" not in self._state:
            self.add_lora(LoraRecovery(**record.lora))

    def describe(self) -> dict[str, Any]:
        """Returns the classes, the name of the model in the module, and the fingerprint of the structure."""
        return {
            "module": type(self.module).__name__,
            "name": self.name,
            "class": class_name(self.model),
            "fingerprint": self._state.get("fingerprint"),
        }


@contextmanager
def _without_logging(module: LightningModule) -> Iterator[None]:
    """Disables logging of ``training_step`` during calibration."""
    names = ("log", "log_dict")
    for name in names:
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            module.__dict__.pop(name, None)


def find_target(
    module: LightningModule, *, objective: str | None, model: str | None, neurons: Sequence[Neurons]
) -> Target:
    """Returns the target of ``module``; arguments as in :class:`ForeignTarget`.

    Raises:
        ConfigError: The objective is unknown, or an argument does not apply.
    """
    chosen = None if objective is None else OBJECTIVES.get(objective)
    if isinstance(module, PruningModule):
        if model is not None or neurons:
            raise ConfigError("model=... and neurons=... are for user-defined modules: remove them here.")
        return ModuleTarget(module, chosen)
    return ForeignTarget(module, chosen, model=model, neurons=neurons)
