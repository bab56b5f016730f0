"""``hfprune fit`` and ``hfprune prune``: one parser for structured, sparse and LoRA pruning."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from hfprune.callbacks import PruningCallback, ReportCallback
from hfprune.callbacks.checkpointing import OneRun, StepCheckpoint
from hfprune.callbacks.recovery_progress import RecoveryLines, RecoveryProgress
from hfprune.callbacks.snapshots import ONE_PROCESS, STAGE, DenseControl
from hfprune.cli.base import BaseCLI
from hfprune.cli.closing import closing
from hfprune.cli.commands import COMMANDS
from hfprune.cli.export import add_layout_argument
from hfprune.cli.kinds import KINDS, SPARSE, Kind, add_kinds, selected
from hfprune.cli.recipes import recipe_line
from hfprune.cli.resume import KeptCSVLogger, check_unfinished, how_to_resume, newest, planned_steps, resume_from
from hfprune.io.checkpoint_record import read_metadata
from hfprune.io.output_folder import CHECKPOINT_FOLDER, DENSE_CHECKPOINTS, MODEL_FOLDER, STATE_FOLDER
from hfprune.publishing.engine_rules import engine_line
from hfprune.publishing.engines import SERVING, serving_advice
from hfprune.publishing.inspection import inspect_folder
from hfprune.trainer import PruneTrainer
from hfprune.utils.compat import instantiate
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import tidy

_log = logging.getLogger("hfprune")

_SERVED = ", ".join(f"{name} ({step})" for name, step in SERVING.items())


class _Notes(Callback):
    """Logs what a run assumes, once it has passed its checks: a refused run prints one line."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the lines."""
        for line in self.lines if trainer.is_global_zero else ():
            _log.info(line)


class RunCLI(BaseCLI):
    """``fit`` and ``prune``."""

    resumed_from: str | None = None
    kind: Kind
    """The kind of pruning, known after parsing."""
    pruning: PruningCallback | None
    """The callback that prunes."""

    def defaults(self) -> dict[str, Any]:
        """Returns defaults of the Trainer's arguments."""
        return super().defaults() | {"logger": None, "max_epochs": 1, "log_every_n_steps": 1}

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return super().classes() | {kind.group: kind.callback for kind in KINDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the output folder and the flags of every kind of pruning; ``fit`` has those of recovery as well."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives model/, report.json, checkpoints/")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results of an earlier run")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last': the newest"
        )
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        add_layout_argument(parser)
        parser.add_argument(
            "--serve",
            type=str | None,
            default=None,
            help=f"how the model will be served, which sets --round_to: {_SERVED}",
        )
        add_kinds(parser, self.command)
        if self.command == "fit":
            parser.add_argument(
                "--recover_dense",
                type=bool,
                default=False,
                help="afterwards tune the dense model on the same data as well, and add it to the report",
            )
            parser.add_argument("--merge_adapters", type=bool, default=True, help="merge the LoRA adapters at export")
            parser.add_argument(
                "--checkpoint_steps", type=PositiveInt, default=100, help="steps of recovery between checkpoints"
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` and selects the kind of pruning that they ask for."""
        super().parse_arguments(parser, args)
        self.kind = selected(self.given, self.command)
        self.notes = [*self.notes, *filter(None, [recipe_line(args)])]

    def unused_groups(self) -> set[str]:
        """Returns the groups of options that this run does not use."""
        chosen = getattr(self, "kind", None)
        return {kind.group for kind in KINDS if chosen not in (kind, None)}

    def instantiate_trainer(self, **kwargs: Any) -> PruneTrainer:
        """Builds the trainer with the pruning callback, the report and checkpoints in the output folder."""
        config: Namespace = self.config
        out = Path(config.output_dir)
        if config.trainer.barebones:
            raise ConfigError(
                "--trainer.barebones true measures the training loop alone: callbacks that prune, save and report do "
                "not run in it. Leave it out."
            )
        if config.trainer.max_epochs is None and config.trainer.max_steps == -1:
            raise ConfigError(
                "--trainer.max_epochs null without --trainer.max_steps would train for Lightning's 1000 epochs: give "
                "one of the two a number."
            )
        folder = out / CHECKPOINT_FOLDER  # of the progress of calibration, too
        self.pruning = self.kind.build(self.config_init)
        callbacks: list[Any] = [_Notes(self.notes), self.pruning, self.report(out)]
        self.resumed_from = resume_from(config.ckpt_path, folder)
        if config.trainer.enable_checkpointing is not False:
            callbacks.append(StepCheckpoint(dirpath=folder, save_last="link", enable_version_counter=False))
            if self.command == "fit":
                callbacks.append(step_checkpoint(folder, config.checkpoint_steps))
        callbacks += self._shown()
        self.trainer_defaults["callbacks"] = callbacks
        if config.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = str(out)
        if self.command == "prune":
            kwargs |= {"logger": False}
        elif config.trainer.logger is None:
            step = None if self.resumed_from is None else read_metadata(self.resumed_from).get("global_step", 0)
            kwargs["logger"] = KeptCSVLogger(out, from_step=step)
        trainer: PruneTrainer = super().instantiate_trainer(**kwargs)
        if trainer.checkpoint_callbacks:
            of_run = [OneRun(folder), OneRun(folder / DENSE_CHECKPOINTS)]  # before the first is written
            trainer.callbacks[:0] = of_run  # type: ignore[attr-defined]
        return trainer

    def _shown(self) -> list[Any]:
        """Returns the callback that shows recovery, in the place of Lightning's bar or of none."""
        given = self.config_init.trainer
        if any(isinstance(callback, ProgressBar) for callback in _listed(given.callbacks)):
            return []
        return [RecoveryLines() if given.enable_progress_bar is False else RecoveryProgress()]

    def report(self, out: Path) -> ReportCallback:
        """Returns the callback that measures, exports and reports into ``out``.

        Raises:
            ConfigError: The folder holds results, or checkpoints of a run that could go on.
        """
        config: Namespace = self.config
        overwrite = config.overwrite
        if self.kind is SPARSE:
            self._check_zeros()
            overwrite = overwrite or _holds_layers_only(out)
        if not overwrite and config.ckpt_path is None:
            check_unfinished(out, self.typed)
        return ReportCallback(
            str(out),
            overwrite=overwrite or config.ckpt_path is not None,
            latency=config.latency,
            merge_adapters=config.get("merge_adapters", True),
            layout=config.layout,
            config=self.plain_config(),
        )

    def _check_zeros(self) -> None:
        """Raises ``ConfigError`` for adapters that are not merged into weights whose zeros stay."""
        if not self.config.get("merge_adapters", True) and self.config.sparse.keep_zeros:
            raise ConfigError(
                "--merge_adapters false keeps adapters that would fill the zeros: give --sparse.keep_zeros false, or "
                "merge them."
            )

    def plain_config(self) -> dict[str, Any]:
        """Returns the configuration as plain data, without the options of the other kinds of pruning."""
        dumped = self.dumped()
        return {name: value for name, value in dumped.items() if name not in self.unused_groups()}

    def run(self) -> None:
        """Runs the command."""
        report = next(c for c in cast(Any, self.trainer).callbacks if isinstance(c, ReportCallback))
        if self.command == "prune":
            trainer = cast(PruneTrainer, self.trainer)
            trainer.prune(self.model, datamodule=self.datamodule, ckpt_path=self.resumed_from)
        else:
            self._check_control()
            out = Path(self.config.output_dir)
            with _without_traces([out / "logs", out]):
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.resumed_from)
            if self.config.recover_dense:
                self._recover_dense()
            self._log_next()
        self._close(report)

    def _close(self, report: ReportCallback) -> None:
        """Prints what the run has done and what can be run next; every other process has no report."""
        if not report.report:
            return
        self.result = report.report
        block = closing(report.report, report.output_dir, typed=self.typed, commands=COMMANDS)
        lines = [f"\n{block}", *self._served(report)]
        Console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

    def _served(self, report: ReportCallback) -> list[str]:
        """Returns which engines load the model, and what its widths prevent where ``--serve`` names one."""
        if not (report.output_dir / MODEL_FOLDER / "config.json").is_file():
            return []
        found = inspect_folder(str(report.output_dir / MODEL_FOLDER))
        lines, model = [f"It {engine_line(found['engines'])}."], found["model"]
        if self.config.serve is not None:
            advice = serving_advice(model.get("mlp_widths", []), model["hidden_size"], self.config.serve)
            lines += [f"warning: {advice}".replace("round_to=", "--round_to ")] if advice else []
        return lines

    def advice(self) -> str | None:
        """Returns the command that continues an interrupted run, None without a checkpoint."""
        return how_to_resume(Path(self.config.output_dir) / CHECKPOINT_FOLDER, self.typed)

    def _log_next(self) -> None:
        """Logs how to continue the recovery: a run that ended within its schedule has steps left."""
        schedule = getattr(self.model, "schedule", None)
        advice = self.advice()
        trainer = self.trainer
        if advice is None or schedule is None or not trainer.global_step or not trainer.is_global_zero:
            return
        done, total = trainer.global_step + schedule.offset, planned_steps(trainer)
        if total is not None and done < total:
            _log.info("Recovery ended at step %d, of %d in max_epochs. %s", done, total, advice)
        else:
            _log.info("To train on, give more --trainer.max_epochs. %s", advice)

    def _check_control(self) -> None:
        """Raises ``ConfigError`` where ``--recover_dense`` cannot be served, before anything is run."""
        if not self.config.recover_dense:
            return
        if self.trainer.world_size > 1:
            raise ConfigError(ONE_PROCESS)
        assert self.pruning is not None
        if self.trainer.limit_train_batches == 0 or self.pruning.recovery_mode.word == "none":
            raise ConfigError("--recover_dense tunes the dense model on the recovery data; there is no recovery here.")
        distillation = self.model.distillation
        if distillation is not None and distillation.alpha == 1:
            raise ConfigError(
                "--recover_dense with --model.distillation trains the dense model on its own predictions, which "
                "changes nothing. Remove it, or give --model.distillation.alpha < 1."
            )

    def _recover_dense(self) -> None:
        """Tunes the dense model with the same settings, in a trainer of its own, and adds it to the report."""
        config: Namespace = self.config
        callbacks = cast(Any, self.trainer).callbacks
        report = next(c for c in callbacks if isinstance(c, ReportCallback))
        assert self.pruning is not None
        adapters, trainable = self.pruning.recovery, self.model.trainable
        self.pruning = None
        del callbacks  # they hold the pruned model
        seed_everything(self.model.run_seed, workers=True, verbose=False)
        folder = Path(config.output_dir) / CHECKPOINT_FOLDER / DENSE_CHECKPOINTS
        if config.ckpt_path is None:
            for path in folder.glob("*.ckpt"):
                path.unlink()
        # new objects: the first run has changed the state of module and data
        self.config_init = again = instantiate(self.parser, config)
        self.model, self.datamodule = again.model, again.data
        self.model.trainable = trainable
        control = DenseControl(adapters, latency=config.latency, samples=report.measured.samples)
        saving = step_checkpoint(folder, config.checkpoint_steps, save_last="link")
        self.trainer_defaults["callbacks"] = [control, saving, *self._shown()]
        self.trainer = super().instantiate_trainer(logger=False)
        gc.collect()  # the pruned model and its optimizer go before the dense model comes
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=newest(folder))
        _warn_if_unequal(report, control.figures)
        report.add_stage(STAGE, control.measured)


def step_checkpoint(folder: Path, steps: int, **kwargs: Any) -> StepCheckpoint:
    """Returns the callback that saves every so many steps of recovery."""
    within: dict[str, Any] = {"every_n_train_steps": steps, "filename": "step-{step}"}
    return StepCheckpoint(dirpath=folder, auto_insert_metric_name=False, **within, **kwargs)


def _warn_if_unequal(report: ReportCallback, control: dict[str, Any]) -> None:
    """Adds a warning to the report when the dense and the recovered model took different numbers of steps or tokens."""
    recovered = report.stages.get("recovered", {})
    for name in ("optimizer_steps", "supervised_tokens"):
        of_recovered, of_dense = recovered.get(name, 0), control[name]
        if of_recovered != of_dense:
            text = (
                f"{STAGE} is not comparable with recovered: {of_dense:,} {name.replace('_', ' ')}, the recovered model "
                f"{of_recovered:,}. One of the runs was stopped early (--trainer.max_time or early stopping)."
            )
            report.measured.warnings.append(text)
            _log.warning(text)
            return


def _listed(callbacks: Any) -> list[Any]:
    """Returns callbacks as the Trainer takes them, one or several or none, as a list."""
    return list(callbacks) if isinstance(callbacks, list | tuple) else [] if callbacks is None else [callbacks]


def _holds_layers_only(out: Path) -> bool:
    """Returns whether a folder holds nothing but the finished layers of a sparse run, which a new run continues."""
    tidy(out)
    return out.is_dir() and {path.name for path in out.iterdir()} <= {STATE_FOLDER, CHECKPOINT_FOLDER}


@contextmanager
def _without_traces(folders: Sequence[Path]) -> Iterator[None]:
    """Removes the empty folders that a refused or interrupted command has created: loggers create theirs first.

    Folders that existed before, and folders with files, are kept.

    Args:
        folders: The folders, inner ones first.
    """
    missing = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:  # callbacks of Lightning refuse with errors of their own, Ctrl-C ends with SystemExit
        for folder in missing:
            with suppress(OSError):  # it is not there, or something is in it
                folder.rmdir()
        raise
