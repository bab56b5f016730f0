"""Evaluation of the dense, pruned and recovered model during a run, and the dense control run."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from hfprune.callbacks.evaluation_text import EvaluationText
from hfprune.callbacks.target import ModuleTarget, Target
from hfprune.evaluation.evaluate import Measurement, continuations, measure
from hfprune.evaluation.fidelity import DenseReference
from hfprune.modules.causal_lm import PruningModule
from hfprune.recovery.lora import LoraRecovery
from hfprune.utils.errors import ConfigError
from hfprune.utils.progress import phase

EXPLODED = 10.0
"""Ratio to the dense model's perplexity above which a warning is reported."""


class Stages:
    """Evaluation of the model at every stage in comparison with the dense model.

    Args:
        latency: Whether to measure prefill and decode speed (batch size 1).
        samples: Number of prompts from the evaluation text that the models of all stages continue.
        text: Evaluation text; the text of the trainer's datamodule if not given.

    Attributes:
        stages: Stage -> results.
        warnings: Warnings for the report.
        generations: Prompts with the continuations of all stages.

    Raises:
        ConfigError: The number of prompts is negative.
    """

    def __init__(self, *, latency: bool, samples: int, text: EvaluationText | None = None) -> None:
        if samples < 0:
            raise ConfigError(f"samples={samples} must not be negative.")
        self._latency, self.samples, self.text = latency, samples, text or EvaluationText()
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

    def dense(self, target: Target, trainer: Trainer) -> None:
        """Measures the dense model and stores its final hidden states."""
        windows = self.text.windows(trainer, target)
        with phase("measuring the dense model"):
            if windows is not None:
                # the reference must not change when recovery trains the head
                self._reference = target.run(DenseReference.collect, target.model, windows)
            self._is_dense = True
            self._measure("dense", target, trainer)
            self._is_dense = False

    def add(self, name: str, target: Target, trainer: Trainer) -> None:
        """Measures the target's model, without adapters, as stage ``name``."""
        with phase(f"measuring the {name} model"):
            self._measure(name, target, trainer)

    def _measure(self, name: str, target: Target, trainer: Trainer) -> None:
        latency = self._latency and not target.sharded  # gathering weights would dominate
        self._record(name, target.run(self._figures, target.model, target, trainer, latency))
        if not target.sharded:
            self._sample(name, target.model, target, trainer)

    def recovered(self, target: Target, trainer: Trainer, *, merge: bool, name: str = "recovered") -> None:
        """Measures the trained model on the trainer's device, from which Lightning has moved it.

        Args:
            target: The target of the model.
            trainer: The trainer.
            merge: Whether to merge the adapters permanently; otherwise a merged copy is measured.
            name: Name of the stage.
        """
        with phase(f"measuring the {name} model"):
            if target.sharded:
                self._recovered_sharded(target, trainer, merge=merge)
            else:
                self._recovered(target, trainer, merge=merge, name=name)

    def _recovered(self, target: Target, trainer: Trainer, *, merge: bool, name: str) -> None:
        device, windows = trainer.strategy.root_device, self.text.windows(trainer, target)
        if self._reference is None and windows is not None:  # a resumed run
            dense = target.load_dense()
            self._reference = None if dense is None else DenseReference.collect(dense.to(device), windows)
        model = target.merged(merge=merge)
        self._record(name, self._figures(model.to(device), target, trainer, self._latency) | _training(target, trainer))
        self._sample(name, model, target, trainer)
        model.cpu()

    def _recovered_sharded(self, target: Target, trainer: Trainer, *, merge: bool) -> None:
        """Measures the model with unmerged adapters: merging would require a second model."""
        module, windows = target.module, self.text.windows(trainer, target)
        if self._reference is None and windows is not None:
            dense = PruningModule(module.path, loading=module.loading)
            dense._device_mesh = module.device_mesh
            dense.configure_model()
            self._reference = dense.run(DenseReference.collect, dense.causal_lm, windows)
            del dense
        if merge:
            module.unwrap()
        figures = module.run(self._figures, module.causal_lm, target, trainer, False)
        figures["parameters"] -= sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
        self._record("recovered", figures | _training(target, trainer))

    def _sample(self, name: str, model: Any, target: Target, trainer: Trainer) -> None:
        windows, tokenizer = self.text.windows(trainer, target), self.text.tokenizer(target)
        if windows is None or tokenizer is None or not self.samples:
            return
        found = continuations(model, tokenizer, windows.ids[: self.samples])
        if not self.generations:
            self.generations = [{"prompt": prompt, "texts": {}} for prompt, _ in found]
        for item, (_, text) in zip(self.generations, found, strict=True):
            item["texts"][name] = text

    def _figures(self, model: Any, target: Target, trainer: Trainer, latency: bool) -> dict[str, Any]:
        reference, windows = self._reference, self.text.windows(trainer, target)
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


def _training(target: Target, trainer: Trainer) -> dict[str, Any]:
    """Returns the optimizer steps and, where the module counts them, tokens, FLOPs and seconds of the training."""
    return {"optimizer_steps": trainer.global_step, **target.training_figures()}


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
        self.measured.recovered(ModuleTarget(pl_module, None), trainer, merge=True, name=STAGE)

    @property
    def figures(self) -> dict[str, Any]:
        """Results of the trained dense model."""
        return self.measured.stages[STAGE]
