"""Lightning trainer with ``fit``, ``prune`` and ``evaluate``."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer

from hfprune.callbacks.base import pruning_callbacks
from hfprune.callbacks.checks import check_nodes
from hfprune.data.text import TextDataModule
from hfprune.evaluation.evaluation import Evaluation as _Evaluation
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.io.loading import LoadingOptions
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import PruningPlan
from hfprune.report.table import show, stage_table
from hfprune.utils.compat import uncompiled
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import user_path


class PruneTrainer(Trainer):
    """Lightning ``Trainer`` that checks settings before loading weights, prunes without training, and evaluates.

    Example:
        >>> trainer = PruneTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        >>> trainer.world_size
        1
    """

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Calibrates, prunes and recovers; arguments as in ``lightning.Trainer.fit``.

        Raises:
            ConfigError: Model, callbacks and trainer are incompatible.
        """
        ckpt_path = None if ckpt_path is None else user_path(ckpt_path, "ckpt_path")
        check_nodes(self)  # before the strategy waits for the other nodes
        for callback in pruning_callbacks(self):
            callback.check(_plain(model))
            callback.resume_from = ckpt_path
        if isinstance(model, PruningModule):
            model.check_loadable()
        with self._training_or_not():
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    @contextmanager
    def _training_or_not(self) -> Iterator[None]:
        """Disables training and validation if a callback prunes with ``recovery="none"``."""
        if any(callback.recovery_mode.word == "none" for callback in pruning_callbacks(self)):
            with self._no_training():
                yield
        else:
            yield

    @contextmanager
    def _no_training(self) -> Iterator[None]:
        """Disables training and validation inside the block."""
        off = {"limit_train_batches": 0, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        with _changed(self, **off), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")
            yield

    def prune(
        self, model: LightningModule, datamodule: LightningDataModule, *, ckpt_path: str | Path | None = None
    ) -> PruningPlan:
        """Calibrates and prunes as ``fit`` does, without training.

        The settings of trainer and callbacks are restored afterwards.

        Args:
            model: The module of the dense model.
            datamodule: Datamodule with a ``calibration_dataloader()``.
            ckpt_path: Checkpoint of an interrupted run to resume.

        Returns:
            The applied plan; with several pruning callbacks, the plan of the last one.

        Raises:
            ConfigError: The trainer has no callback that prunes before training.
        """
        found = [callback for callback in pruning_callbacks(self) if callback.before_training]
        if not found:
            raise ConfigError(
                "prune needs a callback that prunes before training, such as StructuredPruningCallback or "
                "SparsePruningCallback, among the trainer's callbacks."
            )
        with ExitStack() as restored, self._no_training():
            for callback in found:
                restored.enter_context(_changed(callback, recovery=None))
            self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        plan = found[-1].plan
        assert plan is not None, "fit has applied it"
        return plan

    def evaluate(
        self,
        model: PruningModule,
        datamodule: TextDataModule,
        *,
        dense: str | None = None,
        dense_loading: LoadingOptions | None = None,
        ckpt_path: str | Path | None = None,
        latency: bool = True,
        zero_shot: ZeroShotTasks | None = None,
        dense_cache: str | None = None,
        output: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Measures size, perplexity, speed and zero-shot accuracy of a model, and optionally of the dense model.

        Args:
            model: The module of the model; a loaded model is evaluated without reloading.
            datamodule: Datamodule whose ``text`` is the evaluation text.
            dense: Folder or hub id of the dense model.
            dense_loading: Revision, subfolder and other options of the dense model; if not given, it is read with the
                dtype, the attention implementation and the access of ``model``.
            ckpt_path: Lightning checkpoint written while pruning or recovering ``model``; its adapters are merged.
            latency: Whether to measure prefill and decode speed, of both models in alternation.
            zero_shot: Tasks to run.
            dense_cache: Folder in which the dense model's top logits are stored for later evaluations.
            output: JSON file for the results.

        Returns:
            Stage name (``dense``, ``model``) -> results.

        Raises:
            ConfigError: A model, text, task or checkpoint cannot be used. Most errors are raised before weights are
                loaded.
        """
        evaluation = _Evaluation(
            model,
            datamodule,
            device=self.strategy.root_device,
            dense=dense,
            dense_loading=dense_loading,
            ckpt_path=ckpt_path,
        )
        stages = evaluation.run(latency=latency, zero_shot=zero_shot, dense_cache=dense_cache, output=output)
        show(stage_table(stages))
        return stages


@contextmanager
def _changed(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of ``owner`` inside the block."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _plain(module: Any) -> LightningModule:
    """Returns the LightningModule, without the wrapper of ``torch.compile``."""
    plain: LightningModule = uncompiled(module)
    return plain


def __getattr__(name: str) -> Any:
    """Imports ``Evaluation`` from its new module, with a warning."""
    if name != "Evaluation":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    new = f"{_Evaluation.__module__}.{name}"
    text = f"{__name__}.{name} is now {new}; the old path will be removed in the next release."
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return _Evaluation
