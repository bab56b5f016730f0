"""Recovery training: steps and losses, distillation from the dense model, and the optimizer."""

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.io.load import load_causal_lm, load_config
from hfprune.io.loading import LoadingOptions
from hfprune.models.fingerprint import with_config
from hfprune.models.forward import objective_sum, objective_sums
from hfprune.modules.resume import (
    FIXED,
    Schedule,
    differences,
    moved_offset,
    recovery_settings,
    refuse,
    steps_per_epoch,
)
from hfprune.modules.token_weights import TokenWeighted
from hfprune.objectives import OBJECTIVES, Objective
from hfprune.objectives.distillation import DistillationObjective
from hfprune.objectives.teacher import CachedTopK, DenseModel, Teacher
from hfprune.plan import PruningPlan
from hfprune.recovery.cost import training_flops
from hfprune.recovery.distillation import DistillationRecovery, RecoveryLoss
from hfprune.recovery.teacher_cache import TeacherCache, check_cache, supervised, training_rows
from hfprune.utils.errors import ConfigError

_log = logging.getLogger(__name__)


class RecoverySteps(TokenWeighted):
    """Training of a ``PruningModule``, which describes the settings.

    Attributes:
        plan: The pruning plan, None before pruning.
        fingerprint: Fingerprint of the dense model.
        run_seed: Seed of the run.
    """

    path: str
    plan: PruningPlan | None
    fingerprint: str
    loading: LoadingOptions
    distillation: DistillationRecovery | None
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    trainable: str
    optimizer_name: str
    gradient_checkpointing: bool
    run_seed: int | None
    model: Any
    causal_lm: Any
    run: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self._teacher: Teacher | None = None  # not a submodule: neither saved in checkpoints nor trained
        self._losses: list[RecoveryLoss] = []
        self._seconds = 0.0
        self._since: float | None = None
        self._saved: dict[str, Any] | None = None
        self.schedule: Schedule | None = None
        self.resumed: list[dict[str, Any]] = []
        """Resumes of the run: checkpoint, step, epoch, and setting -> [old, new] of changed settings."""
        self.training_flops = 0
        """Floating-point operations of recovery, see :mod:`hfprune.recovery.cost`; set at its end."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds the dropout of the step by run, epoch, batch and rank, so that a resumed run has the same masks."""
        if self.run_seed is not None:
            text = f"{self.run_seed} {self.trainer.current_epoch} {batch_idx} {self.global_rank}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss in nats per supervised token: cross-entropy, or the loss of ``distillation``.

        Logs ``train_loss``, and with ``distillation`` its terms ``train_kl``, ``train_ce`` and ``train_<name>`` of its
        other losses (``train_hidden``).

        Args:
            batch: ``input_ids`` [B, T] and optionally ``attention_mask``, ``labels`` and ``position_ids`` [B, T].
            batch_idx: Index of the batch.
        """
        loss, num_tokens, terms = self._recovery_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=num_tokens)
        for name, value in terms.items():
            self.log(f"train_{name}", value, batch_size=num_tokens)
        self.weigh(num_tokens, seen=int(_mask(batch).sum()))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss``: cross-entropy in nats per supervised token, independent of the training loss.

        With ``distillation``, also logs the same value as ``val_ce``, and ``val_kl`` if the teacher is in memory, for
        comparison with ``train_ce`` and ``train_kl``.
        """
        total, valid, kl = self._validated(batch)
        num_tokens = int(valid.sum())
        loss = (total / max(num_tokens, 1)).float()
        logged = {"val_loss": loss} | ({} if self.distillation is None else {"val_ce": loss})
        logged |= {} if kl is None else {"val_kl": (kl / max(num_tokens, 1)).float()}
        for name, value in logged.items():
            self.log(name, value, prog_bar=name == "val_loss", sync_dist=True, batch_size=num_tokens)

    def logged_figures(self) -> tuple[str, ...]:
        """Returns the names of the logged values."""
        settings = self.distillation
        if settings is None:
            return ("train_loss", "val_loss")
        added = (f"train_{loss.name}" for loss in settings.losses())
        names = ("train_loss", "val_loss", "train_kl", "train_ce", "val_ce", *added)
        return names if settings.cache is not None else (*names, "val_kl")

    def _validated(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the summed cross-entropy, the supervised positions [B, T], and the summed KL to a loaded teacher."""
        hard = OBJECTIVES.get("cross_entropy")
        if self._teacher is None or self._teacher.model is None:
            total, valid = self.run(objective_sum, self.causal_lm, hard, batch)
            return total, valid, None
        soft = self._recovery_objective()
        (total, valid), _ = self.run(objective_sums, self.causal_lm, [hard, soft], batch)
        return total, valid, (soft.parts or {}).get("kl")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``test_loss``, nats per supervised token."""
        loss, num_tokens = self._loss(batch, OBJECTIVES.get("cross_entropy"))
        self.log("test_loss", loss, prog_bar=True, sync_dist=True, batch_size=num_tokens)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the logits [B, T, V]."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        logits: Tensor = self.run(lambda: self.causal_lm(**inputs, use_cache=False).logits)
        return logits

    def setup(self, stage: str) -> None:
        """Raises ``ConfigError`` if the settings of ``distillation`` are not possible, before any computation."""
        settings = self.distillation
        if stage != "fit" or settings is None:
            return
        if settings.cache is not None:
            check_cache(settings.cache, self.trainer.datamodule)  # type: ignore[attr-defined]
        for loss in settings.losses():
            loss.check(load_config(self.path, loading=self.loading))

    @property
    def training_seconds(self) -> float:
        """Duration of recovery so far in seconds, including the time before a resume."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def on_train_start(self) -> None:
        """Starts the clock and loads the teacher from the path of the dense model."""
        if self.distillation is not None:
            self._start_distillation(self.distillation)
        if self.gradient_checkpointing:
            with _ignore_deprecation():
                self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._apply_changed_settings()
        self._since = time.perf_counter()

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def recovery_state(self) -> dict[str, Any]:
        """Returns the recovery state for checkpoints: settings, steps per epoch, and previous resumes."""
        return {
            "settings": recovery_settings(self),
            "steps_per_epoch": steps_per_epoch(self.trainer),
            "offset": self.schedule.offset if self.schedule else 0,
            "total": self.schedule.total if self.schedule else None,
            "resumed": self.resumed,
        }

    def check_resumed(self, checkpoint: Mapping[str, Any], *, begun: bool) -> None:
        """Compares the settings of a resumed checkpoint with those of this run.

        Args:
            checkpoint: The checkpoint.
            begun: Whether recovery had started.

        Raises:
            ConfigError: A setting was changed that must not change after recovery has started.
        """
        saved = checkpoint.get("recovery")
        path = None if self.trainer.ckpt_path is None else Path(self.trainer.ckpt_path).name
        where = {"checkpoint": path, "step": checkpoint.get("global_step", 0), "epoch": checkpoint.get("epoch", 0)}
        self.resumed = [*(saved["resumed"] if saved else []), where | {"changes": {}}]
        if saved is None or not begun:
            return
        changes = differences(saved["settings"], recovery_settings(self))
        refuse({name: changes[name] for name in FIXED if name in changes}, "recovered")
        self._saved = saved

    def _apply_changed_settings(self) -> None:
        """Applies changed settings of a resumed run to the restored optimizer, and logs them.

        Raises:
            ConfigError: The learning rate has decayed to zero before the last step.
        """
        saved, self._saved = self._saved, None
        step = self.trainer.global_step
        if self.schedule is None:
            return
        if saved is not None:
            offset = moved_offset(saved, step=step, per_epoch=steps_per_epoch(self.trainer))
            self.schedule = Schedule.of(self.trainer, self.warmup_ratio, offset)
            changes = differences(saved["settings"], recovery_settings(self))
            changes |= differences({"schedule_steps": saved["total"]}, {"schedule_steps": self.schedule.total})
            if changes:
                rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
                self.schedule.apply(self.trainer, **rates)
                summary = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
                rate = self.learning_rate * self.schedule.factor(step)
                _log.info("Changed for the rest of recovery: %s. The learning rate is now %.3g.", summary, rate)
            self.resumed[-1]["changes"] = changes
        if step and not self.schedule.factor(step) and not self.trainer.fit_loop.done:
            raise ConfigError(
                f"Recovery is at step {step}, but the learning rate decays to zero over {self.schedule.total} steps: "
                "further steps have no effect. Increase max_epochs or max_steps, or start a new run."
            )

    def operations(self) -> int:
        """Returns the floating-point operations of recovery so far."""
        if self._since is None:  # not training: the value of the checkpoint
            return self.training_flops
        return training_flops(
            self.model, self.seen_tokens, teacher=None if self._teacher is None else self._teacher.model
        )

    def on_train_end(self) -> None:
        """Stops the clock, counts operations and frees the teacher."""
        self.training_flops = self.operations()
        self._seconds, self._since = self.training_seconds, None
        if self.gradient_checkpointing:
            with _ignore_deprecation():
                self.causal_lm.gradient_checkpointing_disable()
        self._teacher, self._losses = None, []

    def _start_distillation(self, settings: DistillationRecovery) -> None:
        """Prepares the teacher and the losses of ``settings``."""
        if settings.cache is not None:
            self._teacher = CachedTopK(self._fill_cache(settings).lookup)
        else:
            self._teacher = DenseModel(self._load_teacher())
        self._losses = settings.losses()
        removed = () if self.plan is None else self.plan.removed_layers()
        for loss in self._losses:
            loss.start(self.causal_lm, self._teacher.model, removed)

    def _load_teacher(self) -> Any:
        dtype: Any = str(self.causal_lm.dtype).removeprefix("torch.")
        teacher = load_causal_lm(self.path, dtype=dtype, loading=self.loading).to(self.device).eval()
        return teacher.requires_grad_(requires_grad=False)

    def _fill_cache(self, settings: DistillationRecovery) -> TeacherCache:
        """Returns the dense model's predictions for all recovery data; each rank computes its share."""
        assert settings.cache is not None
        strategy = self.trainer.strategy
        predicted = with_config(self.fingerprint, load_config(self.path, loading=self.loading))
        cache = TeacherCache(
            settings.cache,
            fingerprint=f"{predicted} {self.trainer.precision}",
            top_k=settings.top_k,
            temperature=settings.temperature,
        )
        strategy.barrier("the cache was read")  # before other ranks add to it
        rows = training_rows(self.trainer.train_dataloader, rank=self.global_rank, world_size=self.trainer.world_size)
        moved = ({name: tensor.to(self.device) for name, tensor in row.items()} for row in rows)
        with strategy.precision_plugin.forward_context():
            count = cache.fill(self._load_teacher, moved)
        if count:
            _log.info("The dense model's predictions for %d rows are in %s.", count, cache.folder)
        strategy.barrier("the cache was filled")
        cache.refresh()
        return cache

    def _recovery_objective(self) -> Objective:
        settings = self.distillation
        if settings is None:
            return OBJECTIVES.get("cross_entropy")
        assert self._teacher is not None
        return DistillationObjective(alpha=settings.alpha, temperature=settings.temperature, teacher=self._teacher)

    def _recovery_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Returns the loss per supervised token, the number of these tokens, and the terms of the loss by name."""
        objective = self._recovery_objective()
        with ExitStack() as stack:
            for term in self._losses:
                stack.enter_context(term.observing())
            loss, num_tokens = self._loss(batch, objective)
        terms = _terms(objective, num_tokens)
        for term in self._losses:
            added = term(batch, supervised(batch))
            terms[term.name] = added.detach() / max(num_tokens, 1)
            loss = loss + term.weight * added / max(num_tokens, 1)
        return loss, num_tokens, terms

    def _loss(self, batch: dict[str, Tensor], objective: Objective) -> tuple[Tensor, int]:
        total, valid = self.run(objective_sum, self.causal_lm, objective, batch)
        num_tokens = int(valid.sum())
        return (total / max(num_tokens, 1)).float(), num_tokens

    def check_training(self, *, adapters: bool = False) -> None:
        """Raises ``ConfigError`` for training of half-precision weights, and for adapters with ``trainable="mlp"``.

        In bfloat16, a second moment with beta2 = 0.999 rounds to itself and cannot decay, and small steps are lost.

        Args:
            adapters: Whether adapters are trained instead of the weights.
        """
        if self.trainer.limit_train_batches == 0:
            return
        if adapters and self.trainable != "all":
            raise ConfigError(
                f"trainable='{self.trainable}' selects weights for recovery without adapters, but adapters are "
                f"requested: set recovery='{self.trainable}', or select projections with recovery.target_modules."
            )
        precision = str(self.trainer.precision)
        if precision in ("bf16-true", "16-true"):
            raise ConfigError(
                f"precision='{precision}' converts all trained weights to {precision.removesuffix('-true')}, adapters "
                "included, where optimizer states cannot decay. Set precision='bf16-mixed', and dtype='bfloat16' if "
                "the model is too large for float32: adapters stay float32."
            )
        if adapters:
            return
        trained = (p.dtype for p in self.parameters() if p.requires_grad)
        half = next((dtype for dtype in trained if dtype in (torch.bfloat16, torch.float16)), None)
        if half is not None:
            raise ConfigError(
                f"The weights to train are {str(half).removeprefix('torch.')}, whose optimizer states cannot decay. "
                "Load the model with dtype='float32' and train with precision='bf16-mixed', or set recovery='lora': "
                "adapters are float32."
            )

    def configure_optimizers(self) -> Any:
        """Returns AdamW, with 8-bit states if requested, and the schedule per step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        make = _optimizer_class(self.optimizer_name)
        optimizer = make(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.trainer.limit_train_batches == 0:  # no training
            return {"optimizer": optimizer}
        self.schedule = Schedule.of(self.trainer, self.warmup_ratio)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _factor(self) -> Callable[[int], float]:
        """Returns the current schedule as a function: callable objects would be saved in the scheduler's checkpoint."""

        def factor(step: int) -> float:
            assert self.schedule is not None
            return self.schedule.factor(step)

        return factor


def _terms(objective: Objective, num_tokens: int) -> dict[str, Tensor]:
    """Returns the terms of a mixed objective per supervised token; empty for an objective with one term."""
    return {name: (total / max(num_tokens, 1)).float() for name, total in (objective.parts or {}).items()}


def _mask(batch: dict[str, Tensor]) -> Tensor:
    """Returns the mask [B, T] of the tokens that are not padding."""
    found = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if found is None else found


@contextmanager
def _ignore_deprecation() -> Iterator[None]:
    """Suppresses a deprecation warning of transformers 5.23; the new name does not exist in 5.20."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def check_optimizer(name: str) -> None:
    """Raises ``ConfigError`` if an optimizer is unknown or its library is not installed."""
    _optimizer_class(name)


def _optimizer_class(name: str) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    if name != "adamw_8bit":
        raise ConfigError(f"optimizer='{name}' is not one of adamw, adamw_8bit.")
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"optimizer='adamw_8bit' requires bitsandbytes (pip install bitsandbytes): {error}. Or set "
            "optimizer='adamw'."
        ) from error
    return bitsandbytes.optim.AdamW8bit
