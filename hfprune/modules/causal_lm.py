"""``PruningModule``: a Hugging Face causal LM in Lightning that computes the calibration objective and recovers."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from hfprune.arch.groups import backbone, output_head
from hfprune.calibration import ObjectiveSum
from hfprune.errors import ConfigError
from hfprune.loading import (
    DTypeName,
    check_model_path,
    load_causal_lm,
    load_config,
    load_tokenizer,
    max_positions,
    meta_model,
    previous_plan,
    resolve_model_path,
)
from hfprune.objectives import OBJECTIVES, Objective, chunked_objective
from hfprune.plan import PruningPlan
from hfprune.recovery.lora import LoraRecovery, add_lora, merge_lora
from hfprune.surgery import apply_plan

_STATE_KEY = "hfprune"


class PruningModule(LightningModule):
    """Loads a causal LM, computes the calibration objective, and trains what pruning left.

    The model is loaded in ``configure_model``, after every argument was checked. A checkpoint carries the plan and the
    LoRA settings, so that the pruned shapes are rebuilt before weights are restored.

    Args:
        path: Folder of a saved model, hub id, or ``smollm2-135m`` for the embedded default.
        dtype: Type of the weights; ``auto`` takes what was saved.
        objective: What calibration differentiates: ``entropy`` (HFPrune) or ``cross_entropy``.
        revision: Branch, tag or commit of a hub id.
        allow_pruned: Prune a model that hfprune pruned before; the budget then refers to that model, not to the dense
            one it came from.
        learning_rate: Peak learning rate of recovery (AdamW).
        weight_decay: Weight decay of recovery.
        warmup_ratio: Share of the steps with a linearly rising learning rate, before the cosine decay to zero.
    """

    def __init__(
        self,
        path: str = "smollm2-135m",
        *,
        dtype: DTypeName = "auto",
        objective: str = "entropy",
        revision: str | None = None,
        allow_pruned: bool = False,
        learning_rate: float = 4e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        check_model_path(path)
        self.objective: Objective = OBJECTIVES.get(objective)
        if learning_rate <= 0 or weight_decay < 0 or not 0 <= warmup_ratio < 1:
            raise ConfigError(
                "Recovery needs --model.learning_rate > 0, --model.weight_decay >= 0 and --model.warmup_ratio in "
                f"[0, 1); got {learning_rate}, {weight_decay}, {warmup_ratio}."
            )
        if not allow_pruned and (plan := previous_plan(path)):
            done = PruningPlan.load(plan).provenance.get("budget", {}).get("asked", "an earlier plan")
            raise ConfigError(
                f"--model.path '{path}' was already pruned ({done}). Give the dense model, or --model.allow_pruned "
                "true to prune it further (the budget then refers to this smaller model)."
            )
        self.save_hyperparameters()
        self.path, self.dtype_name, self.revision = path, dtype, revision
        self.learning_rate, self.weight_decay, self.warmup_ratio = learning_rate, weight_decay, warmup_ratio
        self.model: Any = None
        self.plan: PruningPlan | None = None
        self.lora: LoraRecovery | None = None
        self._tokenizer: Any = None

    # ---- the model -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the model; does nothing when it is there."""
        if self.model is None:
            self.model = load_causal_lm(self.path, dtype=self.dtype_name, revision=self.revision)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model itself, also when adapters are around it."""
        return self.model if self.lora is None else self.model.get_base_model()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path, revision=self.revision)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int | None:
        """Number of positions that the model allows."""
        return max_positions(self.config)

    @property
    def config(self) -> Any:
        """The model's config, read without its weights when these are not loaded yet."""
        return self.causal_lm.config if self.model is not None else load_config(self.path, revision=self.revision)

    def meta_model(self) -> Any:
        """Returns the loaded model, or, before loading, one with the same shapes and no weights."""
        return self.causal_lm if self.model is not None else meta_model(self.path, revision=self.revision)

    def model_name(self) -> str:
        """Returns what transformers was given to load."""
        return resolve_model_path(self.path)

    def apply_plan(self, plan: PruningPlan) -> None:
        """Cuts the model; see :func:`hfprune.surgery.apply_plan`."""
        apply_plan(self.causal_lm, plan)
        self.plan = plan

    def add_lora(self, lora: LoraRecovery) -> None:
        """Wraps the model with adapters, from then on its only trainable weights."""
        self.model = add_lora(self.model, lora)
        self.lora = lora

    def unwrap(self, *, merge: bool = True) -> Any:
        """Merges the adapters into the weights, or drops them; returns the plain model, which the module then holds."""
        if self.lora is not None:
            self.model, self.lora = merge_lora(self.model) if merge else self.model.unload(), None
        return self.model

    # ---- the objective and the steps ---------------------------------------------------------------------------------

    def calibration_step(self, batch: dict[str, Tensor], batch_idx: int) -> ObjectiveSum:
        """Returns the calibration objective of a batch, summed over its tokens.

        Args:
            batch: ``input_ids`` [B, T] and ``attention_mask`` [B, T]; ``labels`` [B, T] are optional.
            batch_idx: Position of the batch in the calibration data.
        """
        total, valid = self._objective_sum(self.objective, batch)
        padding = None if bool(batch["attention_mask"].all()) else batch["attention_mask"] == 0
        return ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=padding)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the next-token cross-entropy, nats per supervised token."""
        loss, num_tokens = self._next_token_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=num_tokens)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss``, nats per supervised token."""
        loss, num_tokens = self._next_token_loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=num_tokens)

    def _next_token_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        total, valid = self._objective_sum(OBJECTIVES.get("cross_entropy"), batch)
        num_tokens = int(valid.sum())
        return (total / max(num_tokens, 1)).float(), num_tokens

    def _objective_sum(self, objective: Objective, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the sum of ``objective`` over the positions that count, and those positions [B, T]."""
        input_ids, mask = batch["input_ids"], batch["attention_mask"]
        targets, valid = objective.targets(input_ids, mask, batch.get("labels"))
        model = self.causal_lm
        unpadded = bool(mask.all())
        hidden = backbone(model)(
            input_ids=input_ids,
            attention_mask=None if unpadded else mask,
            position_ids=None if unpadded else (mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        every = bool(valid.all())
        tokens = hidden.flatten(0, 1) if every else hidden[valid]
        targets = None if targets is None else (targets.flatten() if every else targets[valid])
        return chunked_objective(objective, tokens, output_head(model), targets), valid

    def configure_optimizers(self) -> Any:
        """AdamW with float32 states on the trainable weights, cosine decay to zero after the warm-up, per step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.trainer.limit_train_batches == 0:  # prune only: no step will be taken
            return {"optimizer": optimizer}
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = int(self.warmup_ratio * total)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the plan and the LoRA settings, as plain data."""
        checkpoint[_STATE_KEY] = {
            "plan": self.plan.to_json() if self.plan else None,
            "lora": self.lora.to_dict() if self.lora else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replays plan and adapters before the weights are restored, so that every shape fits."""
        self.configure_model()
        state = checkpoint.get(_STATE_KEY)
        if state is None:
            raise ConfigError("This checkpoint was not written by a PruningModule: it carries no pruning state.")
        if state["plan"] and self.plan is None:
            self.apply_plan(PruningPlan.from_json(state["plan"]))
        if state["lora"] and self.lora is None:
            self.add_lora(LoraRecovery(**state["lora"]))
