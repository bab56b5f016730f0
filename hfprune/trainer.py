"""Lightning trainer with ``fit``, ``prune`` and ``evaluate``."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn

from hfprune.callbacks.base import pruning_callbacks
from hfprune.callbacks.checks import check_nodes
from hfprune.data.text import TextDataModule
from hfprune.evaluation.cache import cached_reference
from hfprune.evaluation.evaluate import add_speeds, measure
from hfprune.evaluation.fidelity import DenseReference, Reference, TopKReference
from hfprune.evaluation.overlap import Sketch, warn_of_share
from hfprune.evaluation.perplexity import Windows
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.io.checkpoint_record import Record, read_metadata
from hfprune.io.load import (
    check_model,
    check_weight_files,
    load_causal_lm,
    load_config,
    predicts_badly_without_bos,
    previous_plan,
)
from hfprune.io.output_folder import check_apart
from hfprune.io.save import check_output_file, check_writable, command_line
from hfprune.modules.causal_lm import PruningModule
from hfprune.plan import PruningPlan
from hfprune.report.table import show, stage_table
from hfprune.utils.compat import uncompiled
from hfprune.utils.errors import ConfigError, PlanError
from hfprune.utils.files import user_path, write_json


class Evaluation:
    """Evaluation of a model, optionally in comparison with the dense model.

    The constructor checks the arguments before weights are loaded; ``run`` measures.

    Args:
        module: The model to evaluate.
        data: Datamodule whose ``text`` is the evaluation text.
        device: Device of the evaluation.
        dense: Folder or hub id of the dense model.
        ckpt_path: Lightning checkpoint to restore into ``module``.

    Raises:
        ConfigError: The dense model has another vocabulary, or the checkpoint cannot be evaluated.
    """

    def __init__(
        self,
        module: PruningModule,
        data: TextDataModule,
        *,
        device: torch.device,
        dense: str | None = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        self.module, self.data, self.device = module, data, device
        self.dense = None if dense is None else user_path(dense, "dense")
        self.ckpt_path = None if ckpt_path is None else user_path(ckpt_path, "ckpt_path")
        self.warnings: list[str] = []
        module.check_loadable()
        if self.dense is not None:
            check_model(self.dense, argument="dense")
            check_weight_files(self.dense, argument="dense")
            other_vocab = load_config(self.dense, argument="dense").vocab_size
            if other_vocab != module.vocab_size:
                raise ConfigError(
                    f"dense='{dense}' has {other_vocab} tokens, but the model has {module.vocab_size}: their "
                    "predictions cannot be compared."
                )
        if self.ckpt_path is not None:
            _check_checkpoint(Path(self.ckpt_path))

    def run(
        self,
        *,
        latency: bool = True,
        zero_shot: ZeroShotTasks | None = None,
        dense_cache: str | None = None,
        output: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Evaluates; arguments and result as in :meth:`PruneTrainer.evaluate`."""
        module, data = self.module, self.data
        dense_cache = None if dense_cache is None else user_path(dense_cache, "dense_cache")
        output = None if output is None else user_path(output, "output")
        self._check_outputs(dense_cache, output)
        limits: dict[str, Any] = {"vocab_size": module.vocab_size, "max_positions": module.max_positions}
        data.bind(module.tokenizer, **limits, needs_bos=predicts_badly_without_bos(module.config))
        windows = data.evaluation_windows()
        if zero_shot is not None:
            zero_shot.load()
        models, reference = self._load(windows, dense_cache)
        self._warn_of_overlap(windows)
        stages = {}
        for name, model in models.items():
            folder = self.dense if name == "dense" else (None if self.ckpt_path else module.path)
            settings: dict[str, Any] = {"reference": reference, "latency": False, "folder": folder}
            if name == "dense" and isinstance(reference, DenseReference):
                settings["hidden"] = reference.hidden
            elif name == "dense" and isinstance(reference, TopKReference):
                settings["known"] = reference.of_dense()
            stages[name] = measure(model, windows, **settings).to_dict()
            if zero_shot is not None:
                stages[name]["zero_shot"] = zero_shot.run(model, module.tokenizer).to_dict()
        if latency:
            add_speeds(stages, models)
        if output is not None:
            facts = {"command": command_line(), "model": module.path, "dense": self.dense}
            facts |= {"ckpt_path": None if self.ckpt_path is None else str(self.ckpt_path)}
            write_json(Path(output), {**facts, "warnings": self.warnings, "stages": stages})
        show(stage_table(stages))
        return stages

    def _check_outputs(self, dense_cache: str | None, output: str | None) -> None:
        """Raises ``ConfigError`` if results cannot be written, before anything is read."""
        if output is not None:
            check_output_file(output, "output")
            check_apart(Path(output), self._sources(), argument="output", names=None)
        if dense_cache is None:
            return
        if self.dense is None:
            raise ConfigError("dense_cache stores the dense model's predictions and requires `dense`.")
        if Path(dense_cache).exists() and not Path(dense_cache).is_dir():
            raise ConfigError(f"dense_cache='{dense_cache}' is a file, not a folder.")
        check_writable(Path(dense_cache), "dense_cache")
        check_apart(Path(dense_cache), self._sources(), argument="dense_cache", names=())

    def _sources(self) -> dict[str, str | Path | None]:
        """Returns the input models and data, by argument."""
        return {"model.path": self.module.path, "dense": self.dense, **self.data.local_sources()}

    def _load(self, windows: Windows | None, dense_cache: str | None) -> tuple[dict[str, Any], Reference | None]:
        """Returns the models by stage, the dense model first, and the dense model's predictions."""
        models: dict[str, Any] = {}
        reference: Reference | None = None
        if self.dense is not None:
            dense = load_causal_lm(self.dense, dtype=self.module.dtype_name, argument="dense").to(self.device)
            models["dense"] = dense
            if windows is not None and dense_cache is not None:
                reference = cached_reference(dense_cache, dense, windows)
            elif windows is not None:
                reference = DenseReference.collect(dense, windows, copy_head=False)
        models["model"] = self._model().to(self.device)
        return models, reference

    def _model(self) -> nn.Module:
        self.module.configure_model()
        if self.ckpt_path is not None:
            checkpoint = torch.load(self.ckpt_path, map_location="cpu", weights_only=True)
            self.module.on_load_checkpoint(checkpoint)
            self.module.load_state_dict(checkpoint["state_dict"])
            self.module.unwrap()
        model: nn.Module = self.module.causal_lm
        return model

    def _warn_of_overlap(self, windows: Windows | None) -> None:
        """Warns if the evaluation text overlaps with the calibration or recovery data listed in the model's plan."""
        plan = self._plan()
        if plan is None or windows is None:
            return
        for role in ("calibration", "recovery"):
            seen = (plan.provenance.get(role) or {}).get("data") or {}
            if "ngrams" not in seen:
                continue
            share = Sketch.from_text(seen["ngrams"]).share_of(windows.ids.tolist())
            if text := warn_of_share(share, f"the model's {role} data ('{seen['source']}')"):
                self.warnings.append(text)

    def _plan(self) -> PruningPlan | None:
        if self.module.plan is not None:
            return self.module.plan
        path = previous_plan(self.module.path)
        try:
            return None if path is None else PruningPlan.load(path)
        except PlanError as error:
            raise ConfigError(f"path='{self.module.path}': {error}") from error


def _check_checkpoint(path: Path) -> None:
    """Raises ``ConfigError`` unless ``path`` is a single-file checkpoint of a ``PruningModule``."""
    if path.is_dir():
        raise ConfigError(
            f"ckpt_path='{path}' is a sharded checkpoint: resume it with its strategy and evaluate the exported model."
        )
    if Record.of(read_metadata(path)) is None:
        raise ConfigError(f"ckpt_path='{path}' was not written by a PruningModule: it has no pruning state.")


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
        return Evaluation(model, datamodule, device=self.strategy.root_device, dense=dense, ckpt_path=ckpt_path).run(
            latency=latency, zero_shot=zero_shot, dense_cache=dense_cache, output=output
        )


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
