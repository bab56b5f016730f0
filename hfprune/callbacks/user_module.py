"""Targets in user-defined LightningModules."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.callbacks.target import ModuleTarget, Target
from hfprune.io.checkpoint_record import Phase, Record
from hfprune.io.layouts import apply_plan
from hfprune.io.layouts.apply import restate_width
from hfprune.models import ARCHITECTURES, Neurons, class_name, custom_groups, find_groups, is_supported
from hfprune.models.fingerprint import structure_fingerprint
from hfprune.models.forward import objective_sum, run_backbone
from hfprune.modules.causal_lm import PruningModule
from hfprune.objectives import OBJECTIVES, Objective
from hfprune.plan import Group, PruningPlan
from hfprune.pruning.accumulator import ObjectiveSum
from hfprune.recovery.lora import LoraRecovery, add_lora
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
        self._check_objective()

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
        if self._neurons:
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
        return custom_groups(model, self._neurons) if self._neurons else find_groups(model, self.units)

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
        if self._neurons:
            _restate(self.module, plan)
        self._state["plan"] = plan

    def add_lora(self, lora: LoraRecovery) -> None:
        """Replaces the model by a model with adapters.

        Raises:
            ConfigError: The target is not a Hugging Face model within the module.
        """
        model = self.model
        name = next((n for n, m in self.module.named_modules() if m is model), "")
        if self._neurons or not name:
            raise ConfigError(
                "recovery='lora' requires a Hugging Face model: set recovery='full' to train the pruned module."
            )
        owner, _, attribute = name.rpartition(".")
        self.module.requires_grad_(False)
        wrapped = add_lora(model, lora, seed=self._state.get("seed", 0))
        wrapped.plan = self.plan
        setattr(self.module.get_submodule(owner), attribute, wrapped)
        self._state["lora"] = lora.to_dict()

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
        """Returns the classes and the fingerprint of the structure."""
        return {
            "module": type(self.module).__name__,
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


def _restate(module: nn.Module, plan: PruningPlan) -> None:
    """Updates the configs of Hugging Face models in ``module`` to the new widths; warns if this is impossible."""
    models = {name: m for name, m in module.named_modules() if isinstance(m, PreTrainedModel)}
    for name, model in models.items():
        prefix = f"{name}." if name else ""
        inside = [group for group in plan.groups if all(s.module.startswith(prefix) for s in group.slices)]
        if not inside or any(name.startswith(f"{other}.") for other in models):  # submodules share the config
            continue
        widths = {(group.num_units, len(plan.keep[group.name])) for group in inside}
        reason = "layers differ" if len(widths) > 1 else restate_width(model, *next(iter(widths)))
        if reason is not None:
            warnings.warn(
                f"No config of {type(model).__name__} describes the pruned '{name}' ({reason}): from_pretrained cannot "
                "load the files of save_pretrained. Save the state_dict, or describe neurons with the same width in "
                "every layer.",
                stacklevel=2,
            )
