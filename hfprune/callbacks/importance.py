"""``TaylorImportanceCallback``: calibrates and prunes inside ``fit``, before the first training step."""

import logging
import time
from typing import Any

import lightning
import torch
import transformers
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from hfprune.allocation import ResolvedBudget, resolve, uniform_keep
from hfprune.arch import find_groups, find_spec, parameter_count, unit_cost
from hfprune.calibration import ImportanceAccumulator
from hfprune.callbacks.events import listeners
from hfprune.callbacks.progress import calibration_progress
from hfprune.criteria import ActivationTaylor, Criterion
from hfprune.errors import CalibrationError, ConfigError
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import PruningPlan
from hfprune.recovery.lora import LoraRecovery
from hfprune.types import Budget, Group
from hfprune.version import __version__

_log = logging.getLogger(__name__)


class TaylorImportanceCallback(Callback):
    """Accumulates importance over the calibration batches in ``on_fit_start``, prunes, and hands over to recovery.

    After it, the strategy is set up a second time: it wraps the small model and rebuilds optimizers and schedulers, so
    ``global_step``, schedules and checkpoints count recovery only. A run resumed from a pruned checkpoint skips this.

    Args:
        pruning_ratio: Share of ALL parameters to remove, in (0, 1).
        target_params: Number of parameters to keep.
        intermediate_size: MLP width to keep.
        mlp_ratio: MLP width to keep as a multiple of the hidden size (the HFPrune script's flag).
        round_to: Kept widths are multiples of this; 1 gives exact numbers, 64 or 128 fast kernels.
        criterion: How activations and gradients become scores; HFPrune's per-token activation Taylor by default.
        recovery: LoRA settings; None trains all weights of the pruned model.
        calibration_batches: Use at most this many batches of the calibration data.
    """

    def __init__(
        self,
        *,
        pruning_ratio: float | None = None,
        target_params: int | None = None,
        intermediate_size: int | None = None,
        mlp_ratio: float | None = None,
        round_to: int = 1,
        criterion: Criterion | None = None,
        recovery: LoraRecovery | None = None,
        calibration_batches: int | None = None,
    ) -> None:
        if calibration_batches is not None and calibration_batches < 1:
            raise ConfigError(f"--importance.calibration_batches {calibration_batches} is not positive.")
        self.budget = Budget(
            pruning_ratio=pruning_ratio,
            target_params=target_params,
            intermediate_size=intermediate_size,
            mlp_ratio=mlp_ratio,
            round_to=round_to,
        )
        self.criterion = criterion or ActivationTaylor()
        self.recovery = recovery
        self.calibration_batches = calibration_batches
        self.importance: dict[str, torch.Tensor] = {}
        self.resolved: ResolvedBudget | None = None

    def check(self, module: LightningModule) -> ResolvedBudget:
        """Returns what the budget means for ``module``'s model, from its shapes alone.

        Raises:
            ConfigError: The module is no ``PruningModule``, or the budget is impossible for its model.
            UnsupportedArchitectureError: No table describes the model's class.
        """
        if not isinstance(module, PruningModule):
            raise ConfigError(
                f"TaylorImportanceCallback prunes a PruningModule; this trainer fits a {type(module).__name__}."
            )
        if module.plan is not None and self.resolved is not None:  # fitted before: it is pruned already
            return self.resolved
        model = module.meta_model()
        groups = find_groups(model, find_spec(model))
        self.resolved = resolve(
            self.budget,
            groups,
            [unit_cost(model, group) for group in groups],
            dense_params=parameter_count(model),
            hidden_size=model.config.hidden_size,
        )
        return self.resolved

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the budget and what is around the callback, before any weight is loaded."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                f"TaylorImportanceCallback runs on a single device or under DDP; {type(strategy).__name__} is not "
                "supported."
            )
        if not hasattr(trainer.datamodule, "calibration_dataloader"):  # type: ignore[attr-defined]
            raise ConfigError(
                "TaylorImportanceCallback needs calibration data: pass a TextDataModule (or a datamodule with a "
                "calibration_dataloader() method) to fit."
            )
        self.check(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrates, prunes, adds adapters and sets the strategy up again."""
        assert isinstance(pl_module, PruningModule)
        assert self.resolved is not None
        if pl_module.plan is not None:
            self._check_resumed(pl_module.plan, self.resolved)
            _say(trainer, f"Resumed a pruned model ({self.resolved.asked}): no calibration.")
            pl_module.train()
            return
        for listener in listeners(trainer):
            listener.on_pruning_start(trainer, pl_module)
        _say(trainer, self.resolved.describe())
        plan = self._plan(trainer, pl_module, self.resolved)
        pl_module.apply_plan(plan)
        found = parameter_count(pl_module.causal_lm)
        assert found == self.resolved.params, f"surgery left {found} parameters, not {self.resolved.params}"
        for listener in listeners(trainer):
            listener.on_pruning_end(trainer, pl_module, plan)
        if self.recovery is not None:
            pl_module.add_lora(self.recovery)
        trainer.strategy.model = pl_module
        trainer.strategy.setup(trainer)
        pl_module.train()

    def _check_resumed(self, plan: PruningPlan, resolved: ResolvedBudget) -> None:
        """Raises ``ConfigError`` when the checkpoint's model was pruned to another budget than is asked for now."""
        made = plan.provenance["budget"]["asked"]
        if made != resolved.asked:
            raise ConfigError(f"The checkpoint was pruned with {made}; this run asks for {resolved.asked}.")

    def _plan(self, trainer: Trainer, module: PruningModule, resolved: ResolvedBudget) -> PruningPlan:
        groups = find_groups(module.causal_lm)
        start = time.perf_counter()
        accumulator = self._calibrate(trainer, module, groups)
        self.importance = accumulator.scores()
        totals = accumulator.totals()
        plan = PruningPlan(
            model_class=type(module.causal_lm).__name__,
            groups=groups,
            keep=uniform_keep(self.importance, groups, resolved.width),
            config={find_spec(module.causal_lm).width_key: resolved.width},
            provenance={
                "budget": resolved.to_dict(),
                "criterion": self.criterion.describe(),
                "objective": module.objective.name,
                "model": {"path": module.path, "revision": module.revision, "dtype": str(module.causal_lm.dtype)},
                "calibration": {
                    "sequences": totals.num_sequences,
                    "tokens": totals.num_tokens,
                    "mean_objective_nats": accumulator.mean_objective(),
                    "data": _summary(trainer.datamodule),  # type: ignore[attr-defined]
                },
                "versions": versions(),
            },
        )
        seconds = time.perf_counter() - start
        _say(trainer, f"Calibrated on {totals.num_tokens:,} tokens in {seconds:.1f} s.")
        shared: PruningPlan = trainer.strategy.broadcast(plan)
        return shared

    def _calibrate(self, trainer: Trainer, module: PruningModule, groups: tuple[Group, ...]) -> ImportanceAccumulator:
        """Runs the calibration batches; every rank takes its share and the sums are added over ranks."""
        loader = trainer.datamodule.calibration_dataloader()  # type: ignore[attr-defined]
        limit = min(len(loader), self.calibration_batches or len(loader))
        accumulator = ImportanceAccumulator(module.causal_lm, groups, self.criterion)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        mine = range(trainer.global_rank, limit, trainer.world_size)
        with (
            accumulator.recording(),
            calibration_progress(len(mine), objective=module.objective.name, enabled=shown) as advance,
        ):
            for index, batch in enumerate(loader):
                if index >= limit:
                    break
                if index % trainer.world_size != trainer.global_rank:
                    continue
                num_tokens = self._step(trainer, module, accumulator, batch, index)
                advance(num_tokens, accumulator.mean_objective())
        if trainer.world_size > 1:
            for tensor in accumulator.tensors():
                tensor.copy_(trainer.strategy.reduce(tensor, reduce_op="sum"))
        return accumulator

    def _step(
        self, trainer: Trainer, module: PruningModule, accumulator: ImportanceAccumulator, batch: Any, index: int
    ) -> int:
        batch = trainer.strategy.batch_to_device(batch)
        try:
            with trainer.precision_plugin.forward_context():
                return accumulator.step(lambda: module.calibration_step(batch, index))[1]
        except CalibrationError as error:
            raise CalibrationError(f"Calibration batch {index}: {error}") from error


def _say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        _log.info(text)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {
        "hfprune": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def _summary(datamodule: Any) -> Any:
    """Returns what the datamodule tells about its calibration data, None when it tells nothing."""
    summary = getattr(datamodule, "summary", None)
    return summary().get("calibration") if callable(summary) else None
