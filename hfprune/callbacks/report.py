"""ReportCallback: evaluation of the model at every stage of a run, export and report."""

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from hfprune.callbacks.base import PruningCallback, pruning_callbacks
from hfprune.callbacks.evaluation_text import EvaluationText, TextSource
from hfprune.callbacks.run_time import RunTime
from hfprune.callbacks.snapshots import Stages
from hfprune.callbacks.target import Target
from hfprune.callbacks.training_curve import TrainingCurve
from hfprune.evaluation.evaluate import flat
from hfprune.io.layouts import LAYOUTS
from hfprune.io.load_sharded import whole
from hfprune.io.output_folder import (
    ADAPTER_FOLDER,
    FIGURES_FOLDER,
    MODEL_FOLDER,
    REPORT_FILE,
    REPORT_PAGE,
    RESULTS,
    check_apart,
)
from hfprune.io.save import (
    check_output_dir,
    check_shards,
    command_line,
    export_model,
    export_sharded,
    save_importance,
    saved_line,
)
from hfprune.models import parameter_count
from hfprune.modules.events import PruningEvents
from hfprune.plan import PLAN_FILE, PruningPlan
from hfprune.report import read_run, save_figures, write_report
from hfprune.report.table import show, stage_table
from hfprune.sparse.state import count_saved, load_orders, save_orders
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import replaced_folder, user_path, write_json
from hfprune.utils.versions import versions

_log = logging.getLogger(__name__)


class ReportCallback(Callback, PruningEvents):
    """Evaluates the dense, pruned and recovered model, exports the last one, writes a report and prints a table.

    It works with a ``PruningModule`` and with any LightningModule that contains one supported Hugging Face model. A
    user-defined module keeps its adapters: a merged copy is measured and exported.

    Perplexity and fidelity are measured on ``text``, or on the datamodule's ``evaluation_windows()``. Without an
    evaluation text, only size and speed are measured. The model at the end of ``fit`` is measured, not the best
    checkpoint.

    Args:
        output_dir: Output folder for ``model/``, ``plan.json``, ``importance.safetensors``, ``report.json``,
            ``report.html`` and ``figures/``.
        overwrite: Whether the folder may hold files, as for a resumed run; results are kept until replaced.
        latency: Whether to measure prefill and decode speed (batch size 1).
        merge_adapters: Whether to merge the LoRA adapters into ``model/``; otherwise they are saved in ``adapter/``.
        config: Configuration of the run, copied to the report.
        samples: Number of prompts from the evaluation text that the models of all stages continue.
        layout: Layout of ``model/``, see :func:`hfprune.io.save.export_model`.
        text: Evaluation text, see :class:`~hfprune.callbacks.evaluation_text.EvaluationText`: a file or data set, a
            ``TextDataModule`` with an evaluation text, or token ids [N, W].
        tokenizer: Tokenizer of the model; the module's attribute ``tokenizer`` if not given.

    Raises:
        ConfigError: The folder is not empty or not writable, or the layout is unknown.

    Example:
        >>> import tempfile
        >>> ReportCallback(tempfile.mkdtemp(), layout="per_layer").needs_stock
        False
    """

    def __init__(
        self,
        output_dir: str,
        *,
        overwrite: bool = False,
        latency: bool = True,
        merge_adapters: bool = True,
        config: dict[str, Any] | None = None,
        samples: int = 2,
        layout: str = "uniform",
        text: TextSource = None,
        tokenizer: Any = None,
    ) -> None:
        self.layout = LAYOUTS.get(layout)
        if not self.layout.by_runs:
            raise ConfigError(
                f"layout='{layout}' is written from a saved model: choose another layout for this run, and then export "
                f"'{output_dir}/{MODEL_FOLDER}' with it (hfprune export)."
            )
        self.output_dir = Path(user_path(output_dir, "output_dir"))
        self._unchecked: bool | None = overwrite
        if getattr(rank_zero_only, "rank", 0) == 0:  # rank 0 may already be writing when others start
            self._check_folder()
        self.merge_adapters, self.config = merge_adapters, config
        self.measured = Stages(latency=latency, samples=samples, text=EvaluationText(text, tokenizer))
        self._curve, self._time = TrainingCurve(), RunTime()
        self._report: dict[str, Any] = {}

    @property
    def needs_stock(self) -> bool:
        """Whether the layout requires a stock config."""
        return self.layout.stock

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Results of the dense, pruned and recovered model, as in ``report.json``."""
        return self.measured.stages

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ``ConfigError`` without a pruning callback, or if the layout cannot express the pruned model."""
        pruning = pruning_callbacks(trainer)
        if not pruning:
            raise ConfigError(
                "ReportCallback needs a callback that prunes among the trainer's callbacks: StructuredPruningCallback, "
                "SparsePruningCallback or LoraPruningCallback."
            )
        target = pruning[0].find_target(pl_module)
        target.check_measurable()
        if target.known:
            check_apart(self.output_dir, {"model.path": target.source, **_sources(trainer)}, names=RESULTS)
            self.measured.text.check(target)
        if trainer.is_global_zero:  # an environment variable may have reported another rank before
            self._check_folder()
        if stage == "fit" and target.known:
            self._check_layout(trainer, pl_module, pruning[0])

    def _check_folder(self) -> None:
        """Raises ``ConfigError`` if the output folder cannot be used; once, on the writing process."""
        if self._unchecked is not None:
            check_output_dir(self.output_dir, overwrite=self._unchecked)
            self._unchecked = None

    def _check_layout(self, trainer: Trainer, module: LightningModule, pruning: PruningCallback) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            check_shards(self.layout.name)
        pruning.stock = self.layout.stock  # its ``setup`` may run before or after this one
        if self.layout.stock:
            pruning.check_stock(module)
        expected = pruning.expected_model(module)
        if expected is not None:
            self.layout.check(expected)

    def state_dict(self) -> dict[str, Any]:
        """Returns the stages measured so far, the training curve and the time, so that a resumed run reports them."""
        return self.measured.state_dict() | {"curve": self._curve.to_dict(), "time": self._time.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the stages measured before the interruption."""
        self.measured.load_state_dict(state_dict)
        self._curve.load(state_dict.get("curve", {}))
        self._time.load_state_dict(state_dict.get("time", {}))  # checkpoints of earlier versions have none

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the training loss."""
        self._curve.batch(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the validation loss."""
        self._curve.validation(trainer, pl_module)

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the dense model and stores its final hidden states."""
        target = self._target(trainer)
        copies = 1 + bool(trainer.checkpoint_callbacks)  # the exported model, and a checkpoint of the same size
        check_output_dir(self.output_dir, overwrite=True, need_bytes=copies * _size(target.model))
        self.measured.dense(target, trainer)

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, plan: PruningPlan) -> None:
        """Checks the layout, writes ``plan.json`` and measures the pruned model."""
        target = self._target(trainer)
        self.layout.check(target.model)
        self.measured.warnings += plan.provenance.get("warnings") or []
        if trainer.is_global_zero:
            plan.save(self.output_dir / PLAN_FILE)
            pruning = pruning_callbacks(trainer)[0]
            if pruning.importance:
                save_importance(pruning.importance, self.output_dir)
            save_orders(pruning.orders, self.output_dir)
        if not (plan.provenance.get("recovery") or {}).get("while_training"):  # else only the recovered model exists
            self.measured.add("pruned", target, trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merges adapters, exports the model, checks the files, writes the report and prints the table."""
        target = self._target(trainer)
        if not trainer.is_global_zero and not target.sharded:  # all ranks gather a sharded model
            return
        recovery = target.lora.to_dict() if target.lora else None
        if recovery and not self.merge_adapters:
            self._save_adapter(trainer, target)
        if trainer.global_step:
            self.measured.recovered(target, trainer, merge=self.merge_adapters)
        saved = self._export(trainer, target)
        if not trainer.is_global_zero:
            return
        self._write_report(trainer, target, saved, recovery)
        show(stage_table(self.stages))
        for warning in self.measured.warnings:
            _log.warning("WARNING: %s", warning)
        Console().print(saved_line(self.output_dir / MODEL_FOLDER, saved), soft_wrap=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes ``log`` and ``log_dict``, through which Lightning's callback refers to the module."""
        for name in ("log", "log_dict"):
            self.__dict__.pop(name, None)

    def _target(self, trainer: Trainer) -> Target:
        """Returns the model that the run's pruning callback has found."""
        target = pruning_callbacks(trainer)[0].target
        assert target is not None, "setup has found it"
        return target

    def _export(self, trainer: Trainer, target: Target) -> dict[str, Any]:
        assert target.plan is not None
        model, folder = target.unwrapped(merge=self.merge_adapters), self.output_dir / MODEL_FOLDER
        tokenizer = self.measured.text.tokenizer(target)
        if target.sharded:
            writer, layout = trainer.is_global_zero, self.layout.name
            return export_sharded(model, tokenizer, target.plan, folder, writer=writer, layout=layout, overwrite=True)
        saved = export_model(model, tokenizer, target.plan, folder, layout=self.layout.name, overwrite=True)
        kept = target.plan.provenance.get("keep_zeros")
        if kept or (kept is not None and not trainer.global_step):
            saved["sparsity"] = count_saved(folder, model, target.plan, load_orders(self.output_dir))
        return saved

    def _save_adapter(self, trainer: Trainer, target: Target) -> None:
        adapted = target.adapted
        state = {name: whole(p.detach()) for name, p in adapted.named_parameters() if "lora_" in name}
        if trainer.is_global_zero:
            with replaced_folder(self.output_dir / ADAPTER_FOLDER) as stage:
                base, adapted.base_folder = adapted.base_folder, self.output_dir / MODEL_FOLDER
                adapted.plan = target.plan
                try:
                    adapted.save_pretrained(stage, state_dict=state)
                finally:
                    adapted.base_folder = base

    def _write_report(
        self, trainer: Trainer, target: Target, saved: dict[str, Any], recovery: dict[str, Any] | None
    ) -> None:
        plan = target.plan
        assert plan is not None
        summary = getattr(trainer.datamodule, "summary", None)  # type: ignore[attr-defined]
        report = {
            "command": command_line(),
            "seconds": self._time.seconds,
            "timing": self._time.timing,
            "training": self._curve.to_dict(),
            "stages": self.stages,
            "convergence": (plan.provenance.get("calibration") or {}).get("convergence", []),
            "generations": self.measured.generations,
            "saved": saved,
            "warnings": self.measured.warnings,
            "plan": dict(plan.provenance),
            "recovery": recovery,
            **target.run_facts(),
            "data": _used(summary(), plan) if callable(summary) else None,
            "versions": versions(),
            "config": self.config,
        }
        self._report = report
        self._show()
        self._log_figures(trainer)

    def _show(self) -> None:
        """Writes ``report.json``, the figures and the page."""
        write_json(self.output_dir / REPORT_FILE, self._report)
        shown = read_run(self.output_dir)
        save_figures(shown, self.output_dir / FIGURES_FOLDER)
        write_report(shown, self.output_dir / REPORT_PAGE)

    def add_stage(self, name: str, measured: Stages) -> None:
        """Adds the results of another model to the written report, and prints the table again.

        Args:
            name: Name of the stage.
            measured: Its results and continuations.
        """
        self.stages[name] = measured.stages[name]
        for item, other in zip(self.measured.generations, measured.generations, strict=True):
            item["texts"][name] = other["texts"][name]
        self._show()
        show(stage_table(self.stages))

    @property
    def report(self) -> dict[str, Any]:
        """The content of ``report.json``; empty before it was written."""
        return self._report

    def _log_figures(self, trainer: Trainer) -> None:
        """Logs the results of every stage as ``stage/name``."""
        for logger in trainer.loggers:
            for step, (name, figures) in enumerate(self.stages.items()):
                logger.log_metrics({f"{name}/{key}": value for key, value in flat(figures).items()}, step=step)


def _used(summary: dict[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """Returns the provenance of the data, without calibration data that the criterion did not use."""
    return {role: found for role, found in summary.items() if role != "calibration" or plan.provenance["calibration"]}


def _sources(trainer: Trainer) -> dict[str, Path]:
    """Returns the files and folders of the data, by argument."""
    found = getattr(trainer.datamodule, "local_sources", None)  # type: ignore[attr-defined]
    return found() if callable(found) else {}


def _size(model: Any) -> int:
    """Returns the size of a saved copy of ``model`` in bytes, an upper bound for the pruned model."""
    return parameter_count(model) * int(next(model.parameters()).element_size())
