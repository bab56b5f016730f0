"""PruningModule: a Hugging Face causal LM in Lightning, with the calibration objective and recovery training."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from hfprune.io.checkpoint_record import KEY, Phase, Record
from hfprune.io.layouts import apply_plan
from hfprune.io.load import (
    check_model,
    check_model_path,
    check_weight_files,
    load_causal_lm,
    load_config,
    load_tokenizer,
    max_positions,
    meta_model,
    previous_plan,
)
from hfprune.io.load_sharded import load_sharded, rebuild
from hfprune.io.loading import LoadingOptions
from hfprune.models import find_groups, find_spec
from hfprune.models.fingerprint import fingerprint
from hfprune.models.forward import objective_sum, token_counts
from hfprune.modules.optimization import OptimizationOptions
from hfprune.modules.resume import reopen_epoch
from hfprune.modules.training_step import RecoverySteps, check_optimizer
from hfprune.objectives import OBJECTIVES, Objective
from hfprune.plan import PruningPlan
from hfprune.pruning.accumulator import ObjectiveSum
from hfprune.recovery.distillation import DistillationRecovery
from hfprune.recovery.lora import LoraRecovery, add_lora, merge_lora
from hfprune.recovery.masked import mask_adapters
from hfprune.utils.compat import has_trainer, saved_hyperparameters
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import user_path
from hfprune.utils.flat_options import flat_options
from hfprune.utils.progress import phase


class PruningModule(RecoverySteps):
    """LightningModule of a causal LM that is calibrated, pruned and then trained to recover.

    Arguments are checked first, and the model is loaded in ``configure_model``. A checkpoint contains the plan and the
    LoRA settings, from which the pruned shapes are rebuilt before weights are restored.

    The options of ``loading`` and ``optimization`` can be given as single keywords as well, which are the flags of the
    command line: ``PruningModule(path, dtype="bfloat16", learning_rate=2e-4)``.

    Args:
        path: Folder of a saved model, hub id, or ``smollm2-135m`` for the embedded model.
        objective: Objective differentiated during calibration: ``entropy`` (HFPrune) or ``cross_entropy``.
        allow_pruned: Whether to accept a model pruned by hfprune; the budget then refers to this smaller model.
        loading: Dtype, revision, subfolder, token and other options with which the model is read.
        optimization: Learning rate, optimizer and memory options of recovery.
        distillation: Recovery towards the dense model's predictions; None trains on the text only.
        trainable: Weights trained by recovery without adapters: ``all``, or ``mlp`` for the projections of the MLPs.
            Set by ``recovery="mlp"`` of the callbacks.

    Raises:
        ConfigError: A value is out of range, there is no model at ``path``, or the model was already pruned.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig
        >>> folder = tempfile.mkdtemp()  # stands for the folder of a saved model
        >>> LlamaConfig(hidden_size=16, num_attention_heads=2, vocab_size=64).save_pretrained(folder)
        >>> PruningModule(folder, learning_rate=2e-4).vocab_size
        64
    """

    @flat_options(loading=LoadingOptions, optimization=OptimizationOptions)
    def __init__(
        self,
        path: str = "smollm2-135m",
        *,
        objective: str = "entropy",
        allow_pruned: bool = False,
        loading: LoadingOptions | None = None,
        optimization: OptimizationOptions | None = None,
        distillation: DistillationRecovery | None = None,
        trainable: Literal["all", "mlp"] = "all",
    ) -> None:
        super().__init__()
        path = user_path(path, "path")
        loading, optimization = loading or LoadingOptions(), optimization or OptimizationOptions()
        check_model_path(path, loading=loading)
        self.objective: Objective = OBJECTIVES.get(objective)
        if not allow_pruned and (plan := previous_plan(path, loading=loading)):
            done = PruningPlan.load(plan).provenance.get("budget", {}).get("asked", "an earlier plan")
            raise ConfigError(
                f"path='{path}' was already pruned ({done}). Use the dense model, or allow_pruned=True to prune it "
                "further (the budget then refers to this smaller model)."
            )
        if trainable not in ("all", "mlp"):
            raise ConfigError(f"trainable='{trainable}' is not one of all, mlp.")
        check_optimizer(optimization.optimizer)
        check_model(path, loading=loading)
        own = {"path": path, "objective": objective, "allow_pruned": allow_pruned, "trainable": trainable}
        with saved_hyperparameters(own | asdict(loading) | asdict(optimization), without=("distillation", "token")):
            self.save_hyperparameters()
        self.path, self.loading, self.dtype_name, self.revision = path, loading, loading.dtype, loading.revision
        self.learning_rate, self.weight_decay = optimization.learning_rate, optimization.weight_decay
        self.warmup_ratio, self.optimizer_name = optimization.warmup_ratio, optimization.optimizer
        self.distillation, self.trainable = distillation, trainable
        self.gradient_checkpointing = optimization.gradient_checkpointing
        self.model: Any = None
        self.plan: PruningPlan | None = None
        self.lora: LoraRecovery | None = None
        self.fingerprint = ""
        self.run_seed: int | None = None
        self._tokenizer: Any = None
        self.__dict__["_root"] = None  # root unit of a sharded model; as a submodule it would change parameter names

    # ---- the model -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the model if it is not loaded yet, sharded over the ranks under ``ModelParallelStrategy``."""
        if self.model is not None:
            return
        if self._mesh is not None:
            if self.distillation is not None:
                raise ConfigError(
                    "`distillation` requires the full dense model on every rank, which FSDP2 shards: remove it."
                )
            if self.optimizer_name == "adamw_8bit":
                raise ConfigError(
                    "optimizer='adamw_8bit' requires unsharded weights and cannot be used under FSDP2: set 'adamw'."
                )
            half = torch.get_default_dtype()  # Lightning's "bf16-true" sets it here
            name: Any = self.dtype_name if half == torch.float32 else str(half).removeprefix("torch.")
            with phase("loading the model"):
                loaded = load_sharded(self.path, self._mesh, dtype=name, loading=self.loading)
            self.model, self.__dict__["_root"], self.fingerprint = loaded
        else:
            with phase("loading the model"):
                self.model = load_causal_lm(self.path, loading=self.loading)
                self.fingerprint = fingerprint(self.model)

    def check_loadable(self) -> None:
        """Raises ``ConfigError`` if a model that is not loaded yet has no weight files or no tokenizer."""
        if self.model is None:
            check_weight_files(self.path, loading=self.loading)
            self.tokenizer  # noqa: B018

    @property
    def _mesh(self) -> Any:
        """Device mesh over which weights are sharded, or None."""
        return None if self.device_mesh is None else self.device_mesh["data_parallel"]

    @property
    def sharded(self) -> bool:
        """Whether the model's weights are sharded over the ranks."""
        return self.__dict__["_root"] is not None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns ``function(*args)``, with gathered head and embeddings if the model is sharded.

        Tensors that need a gradient must be returned. Under a sharded strategy, every rank must call this method.

        Args:
            function: Function of the model.
            args: Its arguments.
        """
        root = self.__dict__["_root"]
        return function(*args) if root is None else root(function, *args)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model, without the wrapper of adapters."""
        return self.model if self.lora is None else self.model.get_base_model()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path, loading=self.loading)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token embeddings."""
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length, or None if the config has none."""
        return max_positions(self.config)

    @property
    def config(self) -> Any:
        """The model's config; read from its folder before the model is loaded."""
        return self.causal_lm.config if self.model is not None else load_config(self.path, loading=self.loading)

    def meta_model(self) -> Any:
        """Returns the loaded model, or a model on the meta device before it is loaded."""
        return self.causal_lm if self.model is not None else meta_model(self.path, loading=self.loading)

    def apply_plan(self, plan: PruningPlan) -> None:
        """Prunes the model, see :func:`hfprune.io.layouts.apply_plan`; a sharded model is rebuilt layer by layer."""
        if self.sharded:
            self._rebuild(plan=plan)
        else:
            apply_plan(self.causal_lm, plan)
        self.plan = plan
        self.choose_trained()

    def choose_trained(self) -> None:
        """Freezes the weights that recovery without adapters does not train."""
        if self.trainable == "mlp":
            units = ("mlp",) if find_spec(self.causal_lm).mlp else ("experts",)
            names = {f"{part.module}." for group in find_groups(self.causal_lm, units) for part in group.slices}
            for name, parameter in self.causal_lm.named_parameters():
                parameter.requires_grad_(name.rpartition(".")[0] + "." in names)

    def add_lora(self, lora: LoraRecovery) -> None:
        """Adds adapters, which become the only trainable weights."""
        if self.sharded:
            self._rebuild(lora=lora, seed=self.run_seed or 0)
        else:
            self.model = add_lora(self.model, lora, seed=self.run_seed or 0)
        if self.plan is not None and self.plan.provenance.get("keep_zeros"):
            mask_adapters(self.model)
        self.lora = lora

    def unwrap(self, *, merge: bool = True) -> Any:
        """Merges the adapters into the weights, or drops them, and returns the model without adapters."""
        if self.lora is not None:
            if self.sharded:
                self._rebuild(merge=merge)
            else:
                self.model = merge_lora(self.model) if merge else self.model.unload()
            self.lora = None
        return self.model

    def _rebuild(self, **kwargs: Any) -> None:
        self.model, self.__dict__["_root"] = rebuild(self.model, self._mesh, **kwargs)

    # ---- the objective and the steps ---------------------------------------------------------------------------------

    def calibration_step(
        self, batch: dict[str, Tensor], batch_idx: int, objective: Objective | None = None
    ) -> ObjectiveSum:
        """Returns the calibration objective of a batch, summed over its tokens.

        Args:
            batch: ``input_ids`` [B, T]; ``attention_mask`` and ``labels`` [B, T] are optional.
            batch_idx: Index of the batch in the calibration data.
            objective: The objective; that of the module if not given.
        """
        total, valid = self.run(objective_sum, self.causal_lm, objective or self.objective, batch)
        return ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=token_counts(batch)[1])

    def on_fit_start(self) -> None:
        """Switches to training mode: ``from_pretrained`` leaves a model in eval mode."""
        self.train()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def record(self, phase: Phase, calibration: dict[str, Any] | None = None) -> Record:
        """Returns the pruning state for checkpoints."""
        return Record(
            phase=phase,
            fingerprint=self.fingerprint,
            model=f"'{self.path}'",
            seed=self.run_seed or 0,
            plan=self.plan,
            lora=self.lora.to_dict() if self.lora else None,
            calibration=calibration,
        )

    def replay(self, record: Record) -> None:
        """Applies the plan of ``record`` and then its adapters, unless this has been done.

        Args:
            record: Pruning state of a checkpoint.

        Raises:
            ConfigError: The record belongs to another dense model, or its plan differs from the applied one.
        """
        self.configure_model()
        record.check_model(self.fingerprint, f"'{self.path}'")
        self.run_seed = record.seed
        if record.plan is not None and self.plan is None:
            self.apply_plan(record.plan)
        if record.plan is not None and self.plan is not None and self.plan.keep != record.plan.keep:
            raise ConfigError("The plan of the checkpoint keeps other units than the plan of this model.")
        if record.lora is not None and self.lora is None:
            self.add_lora(LoraRecovery(**record.lora))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the pruning state, as plain data."""
        checkpoint[KEY] = self.record("training").to_dict()
        checkpoint["trained_tokens"], checkpoint["seen_tokens"] = self.trained_tokens, self.seen_tokens
        checkpoint["training_seconds"], checkpoint["training_flops"] = self.training_seconds, self.operations()
        checkpoint["recovery"] = self.recovery_state()
        reopen_epoch(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replays plan and adapters before the weights are restored."""
        record = Record.of(checkpoint)
        if record is None:
            raise ConfigError("This checkpoint was not written by a PruningModule: it has no pruning state.")
        if has_trainer(self) and self.trainer.state.fn == TrainerFn.FITTING:
            self.check_resumed(checkpoint, begun=record.phase == "training")
        self.replay(record)
        self.trained_tokens, self.seen_tokens = checkpoint.get("trained_tokens", 0), checkpoint.get("seen_tokens", 0)
        self._seconds = checkpoint.get("training_seconds", 0.0)
        self.training_flops = checkpoint.get("training_flops", 0)
        if record.phase != "training" and not checkpoint.get("state_dict"):  # the checkpoint has no weights
            checkpoint["state_dict"] = self.state_dict()
