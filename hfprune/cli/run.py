"""``hfprune fit`` and ``hfprune prune``: structured, sparse and LoRA pruning."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning import seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from hfprune.callbacks import LoraPruneCallback, ReportCallback, SparsityCallback, TaylorImportanceCallback
from hfprune.callbacks.checkpointing import OneRun, StepCheckpoint
from hfprune.callbacks.snapshots import ONE_PROCESS, STAGE, DenseControl
from hfprune.cli.base import BaseCLI
from hfprune.cli.csv_logger import KeptCSVLogger
from hfprune.cli.export import add_layout_argument
from hfprune.cli.precedence import config_files, read_config
from hfprune.cli.resume import check_unfinished, how_to_resume, newest, planned_steps, resume_from
from hfprune.io.checkpoint_record import read_metadata
from hfprune.io.output_folder import CHECKPOINT_FOLDER, DENSE_CHECKPOINTS, STATE_FOLDER
from hfprune.recovery import LoraRecovery
from hfprune.sparse import METHODS, SparseGPT, SparseMethod
from hfprune.trainer import PruneTrainer
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import tidy


@contextmanager
def without_traces(folders: Sequence[Path]) -> Iterator[None]:
    """Removes folders that were made within and are empty still, where the command fails.

    Loggers make theirs before anything is checked. Only empty folders go, and none that was there before.

    Args:
        folders: The folders, inner ones first.
    """
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except Exception:  # a callback of Lightning's refuses with errors of its own
        for folder in made:
            with suppress(OSError):  # it is not there, or something is in it
                folder.rmdir()
        raise


BUDGET: dict[str, tuple[type, str]] = {
    "pruning_ratio": (float, "share of ALL parameters to remove, in (0, 1)"),
    "target_params": (int, "number of parameters to keep"),
    "intermediate_size": (int, "MLP width to keep"),
    "mlp_ratio": (float, "MLP width to keep / hidden size (the HFPrune script's flag)"),
    "round_to": (int, "kept widths are multiples of this; 64 or 128 for fast kernels"),
}

_log = logging.getLogger("hfprune")


class RunCLI(BaseCLI):
    """``fit`` and ``prune``."""

    resumed_from: str | None = None

    def defaults(self) -> dict[str, Any]:
        """Returns defaults of the Trainer's arguments."""
        return super().defaults() | {"logger": None, "max_epochs": 1, "log_every_n_steps": 1}

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return super().classes() | {"importance": TaylorImportanceCallback}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the budget, the output folder and the importance callback."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives model/, report.json, checkpoints/")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results of an earlier run")
        for name, (kind, text) in BUDGET.items():
            parser.add_argument(f"--{name}", type=kind | None, default=1 if name == "round_to" else None, help=text)
        parser.add_lightning_class_args(TaylorImportanceCallback, "importance")
        for name in BUDGET:
            parser.link_arguments(name, f"importance.{name}")
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        add_layout_argument(parser)
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last': the newest"
        )
        if self.command == "fit":
            parser.set_defaults({"importance.recovery": LoraRecovery()})
            self.add_fit_arguments(parser)

    def add_fit_arguments(self, parser: LightningArgumentParser) -> None:
        """Adds what only ``fit`` has, whatever prunes."""
        parser.add_argument(
            "--recover_dense",
            type=bool,
            default=False,
            help="afterwards tune the dense model on the same data, too, and report it beside",
        )
        parser.add_argument("--merge_adapters", type=bool, default=True, help="merge the LoRA adapters at export")
        parser.add_argument(
            "--checkpoint_steps", type=PositiveInt, default=100, help="steps of recovery between checkpoints"
        )

    def instantiate_trainer(self, **kwargs: Any) -> PruneTrainer:
        """Builds the trainer with the report and, for ``fit``, checkpoints in the output folder."""
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
        callbacks: list[Any] = [self.report(out)]
        self.resumed_from = resume_from(config.ckpt_path, folder)
        if config.trainer.enable_checkpointing is not False:
            callbacks.append(StepCheckpoint(dirpath=folder, save_last="link", enable_version_counter=False))
            if self.command == "fit":
                callbacks.append(step_checkpoint(folder, config.checkpoint_steps))
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

    def report(self, out: Path, *, overwrite: bool = False) -> ReportCallback:
        """Returns the callback that measures, exports and reports into ``out``.

        Raises:
            ConfigError: The folder holds results, or checkpoints of a run that could go on.
        """
        config: Namespace = self.config
        if not overwrite and not config.overwrite and config.ckpt_path is None:
            check_unfinished(out)
        return ReportCallback(
            str(out),
            overwrite=overwrite or config.overwrite or config.ckpt_path is not None,
            latency=config.latency,
            merge_adapters=config.get("merge_adapters", True),
            layout=config.get("layout", "uniform"),
            config=self.plain_config(),
        )

    def plain_config(self) -> dict[str, Any]:
        """Returns the configuration as plain data."""
        import yaml

        dumped: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, format="yaml", skip_link_targets=False))
        return dumped

    def run(self) -> None:
        """Runs the command."""
        if self.command == "prune":
            trainer = cast(PruneTrainer, self.trainer)
            trainer.prune(self.model, datamodule=self.datamodule, ckpt_path=self.resumed_from)
        else:
            self._check_control()
            out = Path(self.config.output_dir)
            with without_traces([out / "logs", out]):
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.resumed_from)
            if self.config.recover_dense:
                self._recover_dense()
            self._tell_next()

    def advice(self) -> str | None:
        """Returns which command goes on with a run that was interrupted; None where there is nothing to go on from."""
        return how_to_resume(Path(self.config.output_dir) / CHECKPOINT_FOLDER)

    def _tell_next(self) -> None:
        """Says how to train on: a run that ended within its schedule has more to do."""
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
        """Raises ``ConfigError`` where the dense model cannot be tuned beside, before anything is run."""
        if not self.config.recover_dense:
            return
        if self.trainer.world_size > 1:
            raise ConfigError(ONE_PROCESS)
        callbacks = cast(Any, self.trainer).callbacks
        modes = [callback.recovery_mode.word for callback in callbacks if hasattr(callback, "recovery_mode")]
        if self.trainer.limit_train_batches == 0 or "none" in modes:
            raise ConfigError("--recover_dense tunes the dense model on the recovery data; there is no recovery here.")
        distillation = self.model.distillation
        if distillation is not None and distillation.alpha == 1:
            raise ConfigError(
                "--recover_dense with --model.distillation would let the dense model follow its own predictions, which "
                "changes nothing. Leave it out, or give --model.distillation.alpha < 1."
            )

    def _recover_dense(self) -> None:
        """Tunes the dense model with the same settings, in a trainer of its own, and adds it to the report."""
        config: Namespace = self.config
        callbacks = cast(Any, self.trainer).callbacks
        report = next(c for c in callbacks if isinstance(c, ReportCallback))
        pruning = next(
            c for c in callbacks if isinstance(c, TaylorImportanceCallback | SparsityCallback | LoraPruneCallback)
        )
        adapters = pruning.lora if isinstance(pruning, LoraPruneCallback) else pruning.recovery
        trainable = self.model.trainable
        del callbacks, pruning  # they hold the pruned model
        seed_everything(self.model.run_seed, workers=True, verbose=False)
        folder = Path(config.output_dir) / CHECKPOINT_FOLDER / DENSE_CHECKPOINTS
        if config.ckpt_path is None:
            for path in folder.glob("*.ckpt"):
                path.unlink()
        # settings, data and seed are read anew
        self.config_init = again = self.parser.instantiate_classes(config)
        self.model, self.datamodule = again.model, again.data
        self.model.trainable = trainable
        control = DenseControl(adapters, latency=config.latency, samples=report.measured.samples)
        saving = step_checkpoint(folder, config.checkpoint_steps, save_last="link")
        self.trainer_defaults["callbacks"] = [control, saving]
        settings = dict(again.trainer) | {"logger": False}
        self.trainer = self._instantiate_trainer(settings, [])
        gc.collect()  # the pruned model and its optimizer go before the dense model comes
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=newest(folder))
        _warn_if_unequal(report, control.figures)
        report.add_stage(STAGE, control.measured)


def step_checkpoint(folder: Path, steps: int, **kwargs: Any) -> StepCheckpoint:
    """Returns the callback that saves every so many steps of recovery."""
    within: dict[str, Any] = {"every_n_train_steps": steps, "filename": "step-{step}"}
    return StepCheckpoint(dirpath=folder, auto_insert_metric_name=False, **within, **kwargs)


def _warn_if_unequal(report: ReportCallback, control: dict[str, Any]) -> None:
    """Says in the report where dense and pruned model were not tuned alike: one of them was stopped by something."""
    recovered = report.stages.get("recovered", {})
    for name in ("optimizer_steps", "supervised_tokens"):
        ours, theirs = recovered.get(name, 0), control[name]
        if ours != theirs:
            text = (
                f"{STAGE} is no control of recovered: {theirs:,} {name.replace('_', ' ')} against {ours:,}. Something "
                "other than the data has ended one of them, --trainer.max_time or early stopping."
            )
            report.measured.warnings.append(text)
            logging.getLogger("hfprune").warning(text)
            return


SPARSE_FLAGS = ("method", "sparsity")


def asks_for(args: Sequence[str], flags: Sequence[str]) -> bool:
    """Returns whether flags of a kind are among ``args``, or in a YAML file that these name."""
    names = [arg.removeprefix("--").split("=")[0].split(".")[0] for arg in args if arg.startswith("--")]
    return any(name in flags for name in (*names, *(key for path in config_files(args) for key in read_config(path))))


class SparseCLI(RunCLI):
    """``fit`` and ``prune`` with a sparse method."""

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return super().classes() | {"sparse": SparsityCallback}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the method, the output folder and the sparsity callback."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives model/, report.json, checkpoints/")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results of an earlier run")
        names = f"a name ({', '.join(METHODS)}), or a class of hfprune.sparse with options of its own"
        parser.add_argument("--method", type=SparseMethod | str, required=True, help=names)
        parser.add_argument(
            "--sparsity", type=str | float, required=True, help="share of zeros (0.5), or n zeros in every m (2:4)"
        )
        parser.add_argument(
            "--update", type=SparseGPT | str | None, default=None, help="sparsegpt: what stays makes up for what goes"
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last': the newest"
        )
        parser.add_lightning_class_args(SparsityCallback, "sparse")
        for name in ("method", "sparsity", "update"):
            parser.link_arguments(name, f"sparse.{name}")
        parser.link_arguments("output_dir", "sparse.state_dir", compute_fn=_state_dir)
        parser.link_arguments(("overwrite", "ckpt_path"), "sparse.fresh", compute_fn=_fresh)
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        if self.command == "fit":
            parser.set_defaults({"sparse.recovery": LoraRecovery()})
            self.add_fit_arguments(parser)

    def report(self, out: Path, *, overwrite: bool = False) -> ReportCallback:
        """Returns the report; a folder that holds nothing but finished layers is one to go on in."""
        config = self.config
        if not config.get("merge_adapters", True) and config.sparse.keep_zeros:
            raise ConfigError(
                "--merge_adapters false keeps adapters that would fill the zeros: give --sparse.keep_zeros false, or "
                "merge them."
            )
        tidy(out)
        going_on = out.is_dir() and {path.name for path in out.iterdir()} <= {STATE_FOLDER, CHECKPOINT_FOLDER}
        return super().report(out, overwrite=overwrite or going_on)


def _state_dir(output_dir: str) -> str:
    return str(Path(output_dir) / STATE_FOLDER)


def _fresh(overwrite: bool, ckpt_path: str | None) -> bool:
    """Returns whether finished layers are dropped: a run that is resumed goes on behind them."""
    return overwrite and ckpt_path is None


LORA_PRUNE_FLAGS = ("lora_prune",)


class LoraPruneCLI(RunCLI):
    """``fit`` with gradual pruning."""

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return super().classes() | {"lora_prune": LoraPruneCallback}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the budget, the output folder and the callback."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives model/, report.json, checkpoints/")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results of an earlier run")
        parser.add_lightning_class_args(LoraPruneCallback, "lora_prune")
        for name in ("pruning_ratio", "target_params", "round_to"):
            kind, text = BUDGET[name]
            parser.add_argument(f"--{name}", type=kind | None, default=1 if name == "round_to" else None, help=text)
            parser.link_arguments(name, f"lora_prune.{name}")
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        add_layout_argument(parser)
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last': the newest"
        )
        self.add_fit_arguments(parser)
