"""``PruneTrainer``: Lightning's Trainer with ``prune`` and ``evaluate`` beside ``fit``."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer

from hfprune.callbacks.importance import TaylorImportanceCallback
from hfprune.callbacks.lora_prune import LoraPruneCallback
from hfprune.callbacks.sparse import SparsityCallback
from hfprune.data.text import TextDataModule
from hfprune.errors import ConfigError
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.evaluator import Evaluation
from hfprune.modules.causal_lm import PruningModule
from hfprune.paths import user_path


class PruneTrainer(Trainer):
    """A ``Trainer`` that checks budgets before it loads anything, prunes without training, and evaluates."""

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Calibrates, prunes and recovers; arguments as in Lightning."""
        ckpt_path = None if ckpt_path is None else user_path(ckpt_path, "ckpt_path")
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TaylorImportanceCallback):
                callback.check(_plain(model))
                callback.resume_from = ckpt_path
            if isinstance(callback, SparsityCallback | LoraPruneCallback):
                callback.check(_plain(model))
        if isinstance(model, PruningModule):
            model.check_loadable()
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def prune(
        self, model: LightningModule, datamodule: LightningDataModule, *, ckpt_path: str | Path | None = None
    ) -> None:
        """Calibrates and prunes, without recovery: the same phase as in ``fit``, and no loop after it.

        Trainer and callbacks have their own settings again afterwards, so that ``fit`` trains.

        Args:
            model: The dense model's module.
            datamodule: Provides ``calibration_dataloader()``.
            ckpt_path: Checkpoint of an interrupted run to go on from.

        Raises:
            ConfigError: The trainer has no callback that prunes.
        """
        callbacks = self.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks if isinstance(c, TaylorImportanceCallback | SparsityCallback)]
        if not found:
            raise ConfigError(
                "prune needs a TaylorImportanceCallback or a SparsityCallback among the trainer's callbacks."
            )
        with ExitStack() as restored, warnings.catch_warnings():
            for callback in found:
                restored.enter_context(_changed(callback, recovery=None))
            restored.enter_context(_changed(self, limit_train_batches=0, limit_val_batches=0, num_sanity_val_steps=0))
            warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")  # nothing will be validated
            self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)

    def evaluate(
        self,
        model: PruningModule,
        datamodule: TextDataModule,
        *,
        dense: str | None = None,
        ckpt_path: str | Path | None = None,
        latency: bool = True,
        zero_shot: ZeroShotTasks | None = None,
        dense_cache: str | None = None,
        output: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Measures size, perplexity, speed and zero-shot tasks of a model, beside a dense one when that is given.

        Args:
            model: The model to measure; one that is configured is measured as it is.
            datamodule: Its ``text`` is the evaluation text.
            dense: Folder or hub id of the dense model to compare with.
            ckpt_path: Lightning checkpoint to measure, written while pruning or recovering ``model``; adapters are
                merged.
            latency: Measure prefill and decode speed, of both models in alternation.
            zero_shot: Tasks to run.
            dense_cache: Folder that keeps the top logits of the dense model for later comparisons.
            output: JSON file for the figures.

        Returns:
            Stage name (``dense``, ``model``) -> figures.

        Raises:
            ConfigError: A model, text, task or checkpoint cannot be used; most of it is said before weights are loaded.
        """
        return Evaluation(model, datamodule, device=self.strategy.root_device, dense=dense, ckpt_path=ckpt_path).run(
            latency=latency, zero_shot=zero_shot, dense_cache=dense_cache, output=output
        )


@contextmanager
def _changed(owner: Any, **values: Any) -> Iterator[None]:
    """Gives attributes of ``owner`` other values within the context."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _plain(module: Any) -> LightningModule:
    """Returns the LightningModule itself, also when ``torch.compile`` was given it."""
    plain: LightningModule = getattr(module, "_orig_mod", module)
    return plain
