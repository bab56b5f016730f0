"""Evaluation of the dense, pruned and recovered model during a run, and the dense control run."""

import copy
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from hfprune.evaluation.evaluate import Measurement, continuations, measure
from hfprune.evaluation.fidelity import DenseReference
from hfprune.evaluation.perplexity import Windows
from hfprune.io.load import load_causal_lm
from hfprune.modules.causal_lm import PruningModule
from hfprune.recovery.lora import LoraRecovery, merge_lora
from hfprune.utils.errors import ConfigError
from hfprune.utils.progress import phase

EXPLODED = 10.0
"""Ratio to the dense model's perplexity above which a warning is reported."""


class Stages:
    """Evaluation of the model at every stage in comparison with the dense model.

    Args:
        latency: Whether to measure prefill and decode speed (batch size 1).
        samples: Number of prompts from the evaluation text that the models of all stages continue.

    Attributes:
        stages: Stage -> results.
        warnings: Warnings for the report.
        generations: Prompts with the continuations of all stages.

    Raises:
        ConfigError: The number of prompts is negative.
    """

    def __init__(self, *, latency: bool, samples: int) -> None:
        if samples < 0:
            raise ConfigError(f"samples={samples} must not be negative.")
        self._latency, self.samples = latency, samples
        self.stages: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []
        self.generations: list[dict[str, Any]] = []
        self._reference: DenseReference | None = None
        self._is_dense = False  # the measured model is the dense model itself

    def state_dict(self) -> dict[str, Any]:
        """Returns the results so far, for checkpoints."""
        return {"stages": self.stages, "warnings": self.warnings, "generations": self.generations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the results before an interruption."""
        self.stages, self.warnings = state["stages"], state["warnings"]
        self.generations = state.get("generations", [])

    def dense(self, module: PruningModule, trainer: Trainer) -> None:
        """Measures the dense model and stores its final hidden states."""
        windows = windows_of(trainer)
        with phase("measuring the dense model"):
            if windows is not None:
                # recovery that trains the head must not move the reference along with it
                self._reference = module.run(DenseReference.collect, module.causal_lm, windows)
            self._is_dense = True
            self._measure("dense", module, trainer)
            self._is_dense = False

    def add(self, name: str, module: PruningModule, trainer: Trainer) -> None:
        """Measures the module's model, without adapters, as stage ``name``."""
        with phase(f"measuring the {name} model"):
            self._measure(name, module, trainer)

    def _measure(self, name: str, module: PruningModule, trainer: Trainer) -> None:
        latency = self._latency and not module.sharded  # the time of gathering weights says nothing of the model
        self._record(name, module.run(self._figures, module.causal_lm, trainer, latency))
        if not module.sharded:
            self._sample(name, module.causal_lm, module, trainer)

    def recovered(self, module: PruningModule, trainer: Trainer, *, merge: bool, name: str = "recovered") -> None:
        """Measures the trained model on the trainer's device, from which Lightning has moved it.

        Args:
            module: The module of the model.
            trainer: The trainer.
            merge: Whether to merge the adapters permanently; otherwise a merged copy is measured.
            name: Name of the stage.
        """
        with phase(f"measuring the {name} model"):
            if module.sharded:
                self._recovered_sharded(module, trainer, merge=merge)
            else:
                self._recovered(module, trainer, merge=merge, name=name)

    def _recovered(self, module: PruningModule, trainer: Trainer, *, merge: bool, name: str) -> None:
        device, windows = trainer.strategy.root_device, windows_of(trainer)
        if self._reference is None and windows is not None:  # a resumed run
            dense = load_causal_lm(module.path, dtype=module.dtype_name, revision=module.revision)
            self._reference = DenseReference.collect(dense.to(device), windows)
        if merge or not module.lora:
            module.unwrap()
            merged = module.model
        else:
            merged = merge_lora(copy.deepcopy(module.model))
        self._record(name, self._figures(merged.to(device), trainer, self._latency) | _training(module, trainer))
        self._sample(name, merged, module, trainer)
        merged.cpu()

    def _recovered_sharded(self, module: PruningModule, trainer: Trainer, *, merge: bool) -> None:
        """Measures the model with unmerged adapters: merging would require a second model."""
        windows = windows_of(trainer)
        if self._reference is None and windows is not None:
            dense = PruningModule(module.path, dtype=module.dtype_name, revision=module.revision)
            dense._device_mesh = module.device_mesh
            dense.configure_model()
            self._reference = dense.run(DenseReference.collect, dense.causal_lm, windows)
            del dense
        if merge:
            module.unwrap()
        figures = module.run(self._figures, module.causal_lm, trainer, False)
        figures["parameters"] -= sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
        self._record("recovered", figures | _training(module, trainer))

    def _sample(self, name: str, model: Any, module: PruningModule, trainer: Trainer) -> None:
        windows = windows_of(trainer)
        if windows is None or not self.samples:
            return
        found = continuations(model, module.tokenizer, windows.ids[: self.samples])
        if not self.generations:
            self.generations = [{"prompt": prompt, "texts": {}} for prompt, _ in found]
        for item, (_, text) in zip(self.generations, found, strict=True):
            item["texts"][name] = text

    def _figures(self, model: Any, trainer: Trainer, latency: bool) -> dict[str, Any]:
        reference, windows = self._reference, windows_of(trainer)
        known = reference.hidden if reference is not None and self._is_dense else None
        result: Measurement = measure(model, windows, reference=reference, latency=latency, hidden=known)
        return result.to_dict()

    def _record(self, name: str, figures: dict[str, Any]) -> None:
        self.stages[name] = figures
        dense, found = self.stages.get("dense", {}).get("perplexity"), figures.get("perplexity")
        if name == "pruned" and dense and found and not found["value"] < EXPLODED * dense["value"]:
            text = (
                f"PERPLEXITY EXPLODED: {dense['value']:,.1f} dense, {found['value']:,.1f} pruned. Reduce the budget, "
                "or check the calibration data."
            )
            self.warnings.append(text)
            rank_zero_warn(text)


def _training(module: PruningModule, trainer: Trainer) -> dict[str, Any]:
    """Returns steps, tokens, FLOPs and seconds of the training."""
    return {
        "optimizer_steps": trainer.global_step,
        "supervised_tokens": module.trained_tokens,
        "training": {
            "tokens": module.seen_tokens,
            "flops": module.training_flops,
            "seconds": module.training_seconds,
        },
    }


def windows_of(trainer: Trainer) -> Windows | None:
    """Returns the evaluation windows of a trainer's data, or None."""
    windows = getattr(trainer.datamodule, "evaluation_windows", None)  # type: ignore[attr-defined]
    return windows() if callable(windows) else None


STAGE = "dense_tuned"
"""Stage name of the trained dense model in reports."""


ONE_PROCESS = "The dense control is tuned by one process: use devices=1, or recover_dense=False."


class DenseControl(Callback):
    """Trains a dense ``PruningModule`` with the recovery settings of a pruned run, and evaluates it.

    A fair comparison with a recovered model requires a dense model that was trained on the same data. Use the callback
    in a separate trainer with the settings, data and seed of the pruned run.

    Args:
        recovery: Adapters of the pruned run; None trains all weights.
        latency: Whether to measure speed.
        samples: Number of prompts from the evaluation text that the model continues.

    Attributes:
        measured: The results, under ``dense_tuned``.

    Raises:
        ConfigError: The number of prompts is negative.
    """

    def __init__(self, recovery: LoraRecovery | None, *, latency: bool = False, samples: int = 2) -> None:
        self._recovery = recovery
        self.measured = Stages(latency=latency, samples=samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the model and adds adapters, before optimizers are built and checkpoints are read."""
        if not isinstance(pl_module, PruningModule):
            raise ConfigError(f"DenseControl tunes a PruningModule, not a {type(pl_module).__name__}.")
        if trainer.world_size > 1:
            raise ConfigError(ONE_PROCESS)
        if stage != "fit":
            return
        pl_module.configure_model()
        pl_module.run_seed = torch.initial_seed() % 2**32
        if self._recovery is not None and pl_module.lora is None:
            pl_module.add_lora(self._recovery)
        elif self._recovery is None:
            pl_module.choose_trained()
        pl_module.trainer = trainer
        pl_module.check_training(adapters=self._recovery is not None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the trained model with merged adapters."""
        assert isinstance(pl_module, PruningModule)
        self.measured.recovered(pl_module, trainer, merge=True, name=STAGE)

    @property
    def figures(self) -> dict[str, Any]:
        """Results of the trained dense model."""
        return self.measured.stages[STAGE]
