"""LoraPruningCallback: gradual pruning during the training of adapters (LoRAPrune)."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from hfprune import _moved
from hfprune.allocation import Allocation, ResolvedBudget, keep_top
from hfprune.allocation.round_to import RoundTo, rounding
from hfprune.callbacks.base import PruningCallback, listeners
from hfprune.callbacks.communicator import say, warn
from hfprune.callbacks.target import Target
from hfprune.callbacks.user_module import find_target
from hfprune.criteria.lora_gradient import DECAY, adapted, unit_importance
from hfprune.models import class_name
from hfprune.models.expert_neurons import within_expert
from hfprune.models.skip_layers import SkipLayers, SkipPatterns
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import Budget, Group, PruningPlan, UnitKind, unit_kinds
from hfprune.pruning.hooks import UnitMask
from hfprune.recovery.lora import LoraRecovery
from hfprune.utils.errors import ConfigError
from hfprune.utils.versions import versions


class LoraPruningCallback(PruningCallback):
    """Prunes a model while its adapters are trained (LoRAPrune, Zhang et al., 2023, arXiv:2305.18403).

    Every optimizer step updates a running mean of importance, S <- 0.9 S + 0.1 s, which is computed from the gradients
    of the adapters only. Between warm-up and cool-down, the units with the lowest S are masked, and more of them every
    ``every`` steps: the share of kept units is r_f + (r_0 - r_f)(1 - progress)^3. At the end, adapters are merged and
    the masked units are removed.

    The callback works on a ``PruningModule`` and on any LightningModule that creates one supported Hugging Face model
    in its constructor and uses automatic optimization. The trainer's ``max_epochs`` or ``max_steps`` gives the length
    of the schedule. Checkpoints hold the model with adapters, before units are removed.

    Args:
        pruning_ratio: Share of ALL parameters to remove, in (0, 1).
        target_params: Number of parameters to keep.
        round_to: Kept MLP widths are multiples of this number; ``auto`` takes the largest of 256, 128 and 64 that
            misses the budget by at most 3 %.
        units: ``mlp``, ``heads`` or both.
        allocation: Distribution of the budget over layers. By default, every layer loses the same share, with a number
            of heads that a stock config can describe if the layout requires one. The published setting is
            ``Protected(first=int(0.1 * layers), last=1)``, which requires another layout.
        lora: Settings of the adapters; the published ones (rank 8, alpha 16, dropout 0.05) if not given.
        every: Number of optimizer steps between selections of units.
        warmup: Share of the steps before the first selection.
        cooldown: Share of the steps after the last selection, trained at the final widths.
        skip_layers: Layers and modules that are not pruned: indices, ranges, name patterns, or a
            :class:`~hfprune.SkipLayers`; None prunes all.
        model: Name of the Hugging Face model in a user-defined module with several models.

    Raises:
        ConfigError: A value is out of range, or the units cannot be masked individually.

    Example:
        >>> callback = LoraPruningCallback(pruning_ratio=0.2, units=("mlp",), every=20)
        >>> callback.describe()["every"], callback.recovery.rank
        (20, 8)
    """

    before_training: ClassVar[bool] = False

    def __init__(  # noqa: PLR0913
        self,
        *,
        pruning_ratio: float | None = None,
        target_params: int | None = None,
        round_to: RoundTo = 1,
        units: Sequence[UnitKind] = ("mlp", "heads"),
        allocation: Allocation | None = None,
        lora: LoraRecovery | None = None,
        every: int = 10,
        warmup: float = 0.1,
        cooldown: float = 0.1,
        skip_layers: SkipLayers | SkipPatterns | None = None,
        model: str | None = None,
    ) -> None:
        if not set(units) <= {"mlp", "heads"} or not units:
            raise ConfigError(f"units={list(units)} cannot be masked while adapters train: use mlp, heads or both.")
        if every < 1 or not 0 <= warmup < 1 or not 0 <= cooldown < 1 or warmup + cooldown >= 1:
            raise ConfigError(
                f"every={every} must be >= 1, and warmup={warmup} and cooldown={cooldown} not negative, with a sum "
                "below 1."
            )
        if allocation is not None and allocation.own_budget:
            raise ConfigError(f"allocation={allocation} sets the number of units itself; a budget is needed.")
        super().__init__(recovery=lora or LoraRecovery(rank=8, alpha=16.0, dropout=0.05))
        if self.lora.init == "pissa" or self.lora.dora:
            raise ConfigError("lora must not set dora or init: importance is computed from plain adapters.")
        self.budget = Budget(pruning_ratio=pruning_ratio, target_params=target_params, **rounding(round_to))
        self.units, self.allocation, self.skip_layers = unit_kinds(units), allocation, SkipLayers.of(skip_layers)
        self.every, self.warmup, self.cooldown, self.model = every, warmup, cooldown, model
        self._kept: dict[str, tuple[int, ...]] | None = None
        self._groups: tuple[Group, ...] = ()
        self._resolved: ResolvedBudget | None = None
        self._masks = ExitStack()
        self._step = 0

    @property
    def lora(self) -> LoraRecovery:
        """Settings of the adapters."""
        assert self.recovery is not None
        return self.recovery

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the kept units, as plain data."""
        widths = None if self._resolved is None else list(self._resolved.widths)
        schedule = {"every": self.every, "warmup": self.warmup, "cooldown": self.cooldown}
        skipped = None if self.skip_layers is None else self.skip_layers.describe()
        return {"units": list(self.units), "widths": widths, "skip_layers": skipped, **schedule}

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, module: LightningModule) -> ResolvedBudget:
        """Returns the budget resolved for ``module``'s model, from its shapes only.

        Raises:
            ConfigError: The module does not meet the requirements of this class, the budget is impossible, or its
                widths depend on scores.
            UnsupportedArchitectureError: The class is unknown, or no stock config can describe the pruned model.
        """
        target = self._find(module)
        shapes = target.shapes()
        self._groups = self._groups or target.groups(shapes)
        if any(within_expert(group) for group in self._groups):
            raise ConfigError(
                "LoraPruningCallback scores neurons by adapters, which neurons within experts do not have: use "
                "units=['heads'], or StructuredPruningCallback."
            )
        resolved = target.resolve(self.budget, self.allocation)
        if resolved.provisional:
            raise ConfigError(
                f"allocation={self.allocation} sets widths from scores, but LoraPruningCallback requires them before "
                "training."
            )
        self._resolved = resolved
        return resolved

    def _find(self, module: LightningModule) -> Target:
        if not module.automatic_optimization:
            raise ConfigError(
                f"LoraPruningCallback counts the steps of one optimizer, and {type(module).__name__} uses manual "
                "optimization (automatic_optimization=False): use StructuredPruningCallback with recovery='lora'."
            )
        target = find_target(module, objective="entropy", model=self.model, neurons=())
        if not target.known:
            raise ConfigError(
                f"LoraPruningCallback sets widths before training starts, and {type(module).__name__} creates its "
                "model in configure_model: create it in the constructor, or use StructuredPruningCallback with "
                "recovery='lora'."
            )
        target.units, target.stock, target.skip_layers = self.units, self.stock, self.skip_layers
        return target

    def _check_run(self, trainer: Trainer, target: Target) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(f"LoRAPrune runs on a single device or under DDP, not {type(trainer.strategy).__name__}.")
        events = listeners(trainer)
        for listener in events[: events.index(self)]:
            if not isinstance(listener, PruningCallback):
                raise ConfigError(
                    f"{type(listener).__name__} must come after LoraPruningCallback in the trainer's callbacks: both "
                    "run at the end of fit, and the model must be pruned first."
                )

    def _announce(self, trainer: Trainer, resolved: ResolvedBudget | None) -> None:
        assert resolved is not None
        say(trainer, resolved.describe())
        warn(trainer, resolved.warning)

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the dense model, adds adapters and sets the strategy up for them."""
        target = self._target
        assert target is not None
        if not isinstance(pl_module, PruningModule):
            _position(trainer, pl_module)  # before anything is measured
        target.check_training(adapters=True)
        if target.lacks_adapters(self.lora, self._record):
            for listener in listeners(trainer):
                listener.on_pruning_start(trainer, pl_module)
            self._start(trainer, target)
            self._add_adapters(target)
            self._set_up_again(trainer)
        missing = adapted(target.model, self._groups)
        if missing:
            raise ConfigError(
                f"LoRAPrune computes importance from adapters, but {', '.join(missing[:3])} would have none: add them "
                "to target_modules."
            )
        self._mask(target)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Reads the gradients of a user-defined module; a ``PruningModule`` calls ``on_gradients_ready`` itself."""
        if not isinstance(pl_module, PruningModule):
            self.on_gradients_ready(trainer, pl_module)

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Updates the running mean of importance; skips steps with gradients that are not finite."""
        assert self._target is not None
        scores = {group.name: unit_importance(self._target.model, group) for group in self._groups}
        if not all(bool(now.isfinite().all()) for now in scores.values()):
            return
        for name, now in scores.items():
            before = self.importance.get(name)
            self.importance[name] = (1 - DECAY) * now if before is None else DECAY * before + (1 - DECAY) * now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Masks more units every ``every`` steps of the schedule."""
        assert self._target is not None
        step, total = _position(trainer, pl_module)
        if step == self._step:  # gradients are still accumulated
            return
        self._step = step
        first, last = round(self.warmup * total), round((1 - self.cooldown) * total)
        if self.importance and first <= step <= last and ((step - first) % self.every == 0 or step == last):
            self._choose((step - first) / max(last - first, 1))
            self._mask(self._target)

    def _choose(self, progress: float) -> None:
        """Selects the kept units at a share of the schedule; masked units can be selected again."""
        assert self._resolved is not None
        kept = {}
        for group, final in zip(self._groups, self._resolved.widths, strict=True):
            number = final + round((group.num_units - final) * (1 - progress) ** 3)
            kept[group.name] = keep_top(self.importance[group.name], number)
        self._kept = kept

    def _mask(self, target: Target) -> None:
        self._masks.close()
        if self._kept is not None:
            self._masks.enter_context(UnitMask(target.model, self._groups, self._kept).active())

    # ---- the end -----------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merges the adapters and removes the masked units, before callbacks that export."""
        target = self._target
        assert target is not None
        if not self.importance:
            raise ConfigError("LoRAPrune took no optimizer step: there are no recovery data.")
        step, total = _position(trainer, pl_module)
        if step < round((1 - self.cooldown) * total):
            warnings.warn(
                f"LoRAPrune stopped after {step} of {total} steps, before the end of its schedule: the adapters were "
                "not trained at the final widths.",
                stacklevel=2,
            )
        self._choose(1.0)
        self._masks.close()
        target.merge_lora()
        self._cut(trainer, pl_module, self._make_plan(trainer, target), seconds=None)

    def _provenance(self, target: Target, trainer: Trainer) -> dict[str, Any]:
        assert self._resolved is not None
        return {
            "budget": self._resolved.to_dict(),
            "units": list(self.units),
            "allocation": self.allocation.describe() if self.allocation else None,
            "skip_layers": target.describe_skipped(),
            "criterion": {"name": "lora_prune", "every": self.every, "warmup": self.warmup, "cooldown": self.cooldown},
            "objective": None,
            "model": target.describe(),
            "calibration": None,
            "recovery": {"while_training": True, "lora": self.lora.to_dict(), "steps": trainer.global_step},
            "versions": versions(),
            "warnings": [self._resolved.warning] if self._resolved.warning else [],
        }

    def _detach(self) -> None:
        self._masks.close()
        super()._detach()

    def _make_plan(self, trainer: Trainer, target: Target) -> PruningPlan:
        kept = dict(self._kept or {})
        return PruningPlan(
            model_class=class_name(target.model),
            groups=self._groups,
            keep=kept,
            config=target.config_keys(kept),
            provenance=self._provenance(target, trainer),
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the running mean, the kept units and the settings."""
        kept = None if self._kept is None else dict(self._kept)
        return {"importance": self.importance, "kept": kept, "settings": self.describe()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the mean and the kept units.

        Raises:
            ConfigError: The checkpoint was written with other settings.
        """
        before, now = state_dict["settings"], self.describe()
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            text = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)
            raise ConfigError(f"The checkpoint's LoRAPrune run had other settings: {text}. Resume with those.")
        self.importance = dict(state_dict["importance"])
        kept = state_dict["kept"]
        self._kept = None if kept is None else {name: tuple(units) for name, units in kept.items()}


def _position(trainer: Trainer, module: LightningModule) -> tuple[int, int]:
    """Returns the current and the last step of the schedule; steps before a resume are converted by epochs.

    Raises:
        ConfigError: The trainer of a user-defined module sets neither ``max_epochs`` nor ``max_steps``.
    """
    if isinstance(module, PruningModule):
        schedule = module.schedule
        assert schedule is not None, "recovery trains"
        return trainer.global_step + schedule.offset, schedule.total
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ConfigError("LoraPruningCallback needs the number of steps: set max_epochs or max_steps of the trainer.")
    return trainer.global_step, int(total)


def __getattr__(name: str) -> Any:
    return _moved.renamed(__name__, name)
