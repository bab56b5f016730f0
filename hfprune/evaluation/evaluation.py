"""Evaluation: a model measured on the evaluation text and tasks, optionally in comparison with the dense model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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
from hfprune.io.loading import LoadingOptions
from hfprune.io.output_folder import check_apart
from hfprune.io.save import check_output_file, check_writable, command_line
from hfprune.plan import PruningPlan
from hfprune.utils.errors import ConfigError, PlanError
from hfprune.utils.files import user_path, write_json

if TYPE_CHECKING:
    from hfprune.data.text import TextDataModule
    from hfprune.modules.causal_lm import PruningModule


class Evaluation:
    """Evaluation of a model, optionally in comparison with the dense model.

    The constructor checks the arguments before weights are loaded; ``run`` measures.

    Args:
        module: The model to evaluate.
        data: Datamodule whose ``text`` is the evaluation text.
        device: Device of the evaluation.
        dense: Folder or hub id of the dense model.
        dense_loading: How the dense model is read; with the dtype and the access of ``module`` if not given.
        ckpt_path: Lightning checkpoint to restore into ``module``.

    Raises:
        ConfigError: The dense model has another vocabulary, or the checkpoint cannot be evaluated.
    """

    def __init__(
        self,
        module: "PruningModule",
        data: "TextDataModule",
        *,
        device: torch.device,
        dense: str | None = None,
        dense_loading: LoadingOptions | None = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        self.module, self.data, self.device = module, data, device
        self.dense = None if dense is None else user_path(dense, "dense")
        self.ckpt_path = None if ckpt_path is None else user_path(ckpt_path, "ckpt_path")
        self.dense_loading = module.loading.elsewhere() if dense_loading is None else dense_loading
        self.warnings: list[str] = []
        module.check_loadable()
        if self.dense is not None:
            where: dict[str, Any] = {"argument": "dense", "loading": self.dense_loading}
            check_model(self.dense, **where)
            check_weight_files(self.dense, **where)
            other_vocab = load_config(self.dense, **where).vocab_size
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
        """Evaluates; arguments and result as in :meth:`hfprune.PruneTrainer.evaluate`."""
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
            folder = self._folder(dense=name == "dense")
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
            facts: dict[str, Any] = {"command": command_line(), "model": module.path, "dense": self.dense}
            loaded = {"model_loading": module.loading.describe(), "dense_loading": self.dense_loading.describe()}
            facts |= {name: value for name, value in loaded.items() if value and (self.dense or "dense" not in name)}
            facts |= {"ckpt_path": None if self.ckpt_path is None else str(self.ckpt_path)}
            write_json(Path(output), {**facts, "warnings": self.warnings, "stages": stages})
        return stages

    def _folder(self, *, dense: bool) -> str | None:
        """Returns the folder of a model's files, whose bytes are measured; None for a model from a checkpoint."""
        if dense:
            assert self.dense is not None
            return self.dense_loading.within(self.dense)
        return None if self.ckpt_path else self.module.loading.within(self.module.path)

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
            dense = load_causal_lm(self.dense, argument="dense", loading=self.dense_loading).to(self.device)
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
        path = previous_plan(self.module.path, loading=self.module.loading)
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
