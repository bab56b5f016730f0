"""``PruneTrainer``: Lightning's Trainer with ``prune`` and ``evaluate`` beside ``fit``."""

import warnings
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from rich.console import Console

from hfprune.callbacks.importance import TaylorImportanceCallback
from hfprune.data.text import TextDataModule
from hfprune.errors import ConfigError
from hfprune.evaluation.fidelity import DenseReference
from hfprune.evaluation.stage import measure
from hfprune.evaluation.table import stage_table
from hfprune.export import write_json
from hfprune.loading import check_model_path, load_causal_lm, load_config
from hfprune.modules.causal_lm import PruningModule


class PruneTrainer(Trainer):
    """A ``Trainer`` that checks budgets before it loads anything, prunes without training, and evaluates."""

    def fit(self, model: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Calibrates, prunes and recovers; arguments as in Lightning."""
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TaylorImportanceCallback):
                callback.check(model)
                callback.resume_from = kwargs.get("ckpt_path")
        super().fit(model, *args, **kwargs)

    def prune(
        self, model: LightningModule, datamodule: LightningDataModule, *, ckpt_path: str | Path | None = None
    ) -> None:
        """Calibrates and prunes, without recovery: the same phase as in ``fit``, and no loop after it.

        Args:
            model: The dense model's module.
            datamodule: Provides ``calibration_dataloader()``.
            ckpt_path: Checkpoint of an interrupted run to go on from.

        Raises:
            ConfigError: The trainer has no ``TaylorImportanceCallback``.
        """
        found = [c for c in self.callbacks if isinstance(c, TaylorImportanceCallback)]  # type: ignore[attr-defined]
        if not found:
            raise ConfigError("prune needs a TaylorImportanceCallback among the trainer's callbacks.")
        for callback in found:
            callback.recovery = None
        self.limit_train_batches = self.limit_val_batches = self.num_sanity_val_steps = 0
        with warnings.catch_warnings():  # nothing will be validated
            warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")
            self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)

    def evaluate(
        self,
        model: PruningModule,
        datamodule: TextDataModule,
        *,
        dense: str | None = None,
        latency: bool = True,
        output: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Measures size, perplexity and speed of a model, and its fidelity to a dense one.

        Args:
            model: The model to measure.
            datamodule: Its ``text`` is the evaluation text.
            dense: Folder or hub id of the dense model to compare with.
            latency: Measure prefill and decode speed.
            output: JSON file for the figures.

        Returns:
            Stage name (``dense``, ``model``) -> figures.
        """
        if dense is not None:
            check_model_path(dense)
            other_vocab = load_config(dense).vocab_size
            if other_vocab != model.vocab_size:
                raise ConfigError(
                    f"--dense '{dense}' has {other_vocab} tokens, the model {model.vocab_size}: their predictions "
                    "cannot be compared."
                )
        datamodule.bind(model.tokenizer, vocab_size=model.vocab_size, max_positions=model.max_positions)
        windows = datamodule.evaluation_windows()
        model.configure_model()
        device = self.strategy.root_device
        stages, reference = {}, None
        if dense is not None:
            other = load_causal_lm(dense, dtype=model.dtype_name).to(device)
            if windows is not None:
                reference = DenseReference.collect(other, windows)
            stages["dense"] = measure(other, windows, reference=reference, latency=latency).to_dict()
            del other
        found = measure(model.causal_lm.to(device), windows, reference=reference, latency=latency)
        stages["model"] = found.to_dict()
        Console().print(stage_table(stages))
        if output is not None:
            write_json(Path(output), {"model": model.path, "dense": dense, "stages": stages})
        return stages
