"""Measures the dense, the pruned and the recovered model of a run, and the dense control run."""

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
"""A perplexity this many times the dense model's is reported as a warning."""


class Stages:
    """Measures the model at every stage, against the dense one, and lets it continue some prompts.

    Args:
        latency: Measure prefill and decode speed (batch 1).
        samples: Prompts from the evaluation text that every stage's model continues.

    Attributes:
        stages: Stage -> figures.
        warnings: Warnings for the report.
        generations: Prompts, with the continuation by the model of each stage.

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
        self._is_dense = False  # what is being measured is what the reference is made of

    def state_dict(self) -> dict[str, Any]:
        """Returns what was measured so far, for checkpoints."""
        return {"stages": self.stages, "warnings": self.warnings, "generations": self.generations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what was measured before an interruption."""
        self.stages, self.warnings = state["stages"], state["warnings"]
        self.generations = state.get("generations", [])

    def dense(self, module: PruningModule, trainer: Trainer) -> None:
        """Measures the dense model and remembers its final hidden states."""
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
        """Measures the trained model on the device that Lightning has just moved it from.

        Args:
            module: Holds it.
            trainer: The trainer.
            merge: Merge the adapters for good; else a merged copy is measured.
            name: What the stage is called.
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
        """Measures with the adapters in place: merging them would need a second model."""
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
                f"PERPLEXITY EXPLODED: {dense['value']:,.1f} dense, {found['value']:,.1f} pruned. Remove less, or "
                "check the calibration data."
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
    """Returns the evaluation windows of a trainer's data, None where they have none."""
    windows = getattr(trainer.datamodule, "evaluation_windows", None)  # type: ignore[attr-defined]
    return windows() if callable(windows) else None


STAGE = "dense_tuned"
"""Name of the stage of the tuned dense model in reports."""


ONE_PROCESS = "The dense control is tuned by one process: use devices=1, or recover_dense=False."


class DenseControl(Callback):
    """Tunes a dense ``PruningModule`` as recovery tunes a pruned one, and measures it.

    A fair comparison with a recovered model needs a dense model that was trained on the same data. Use the callback in
    a trainer of its own, with the settings, data and seed of the pruned run.

    Args:
        recovery: The adapters of the pruned run; None trains the weights themselves.
        latency: Measure speed, too.
        samples: Prompts from the evaluation text that the model continues.

    Attributes:
        measured: The figures, under ``dense_tuned``.

    Raises:
        ConfigError: The number of prompts is negative.
    """

    def __init__(self, recovery: LoraRecovery | None, *, latency: bool = False, samples: int = 2) -> None:
        self._recovery = recovery
        self.measured = Stages(latency=latency, samples=samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the model and adds adapters, before optimizers are built and checkpoints read."""
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
        """Measures the tuned model, adapters merged."""
        assert isinstance(pl_module, PruningModule)
        self.measured.recovered(pl_module, trainer, merge=True, name=STAGE)

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured."""
        return self.measured.stages[STAGE]
