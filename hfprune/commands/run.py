"""``fit`` and ``prune``."""

import logging
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from hfprune.callbacks import ReportCallback, TaylorImportanceCallback
from hfprune.commands.base import BaseCLI
from hfprune.commands.export import add_layout_argument
from hfprune.errors import ConfigError
from hfprune.export import CHECKPOINT_FOLDER
from hfprune.recovery import LoraRecovery
from hfprune.trainer import PruneTrainer

_BUDGET = {
    "pruning_ratio": (float, "share of ALL parameters to remove, in (0, 1)"),
    "target_params": (int, "number of parameters to keep"),
    "intermediate_size": (int, "MLP width to keep"),
    "mlp_ratio": (float, "MLP width to keep / hidden size (the HFPrune script's flag)"),
    "round_to": (int, "kept widths are multiples of this; 64 or 128 for fast kernels"),
}


class RunCLI(BaseCLI):
    """``fit`` and ``prune``."""

    def defaults(self) -> dict[str, Any]:
        """Returns defaults of the Trainer's arguments."""
        return super().defaults() | {"logger": None, "max_epochs": 1, "log_every_n_steps": 1}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the budget, the output folder and the importance callback."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives model/, report.json, checkpoints/")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results of an earlier run")
        for name, (kind, text) in _BUDGET.items():
            parser.add_argument(f"--{name}", type=kind | None, default=1 if name == "round_to" else None, help=text)
        parser.add_lightning_class_args(TaylorImportanceCallback, "importance")
        for name in _BUDGET:
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
        parser.add_argument("--merge_adapters", type=bool, default=True, help="merge the LoRA adapters at export")
        parser.add_argument(
            "--checkpoint_steps", type=PositiveInt, default=100, help="steps of recovery between checkpoints"
        )

    def instantiate_trainer(self, **kwargs: Any) -> PruneTrainer:
        """Builds the trainer with the report and, for ``fit``, checkpoints in the output folder."""
        config: Namespace = self.config
        out = Path(config.output_dir)
        callbacks: list[Any] = [self.report(out)]
        folder = out / CHECKPOINT_FOLDER  # of the progress of calibration, too
        callbacks.append(ModelCheckpoint(dirpath=folder, save_last="link", enable_version_counter=False))
        if self.command == "fit":
            within = {"every_n_train_steps": config.checkpoint_steps, "filename": "step-{step}"}
            callbacks.append(ModelCheckpoint(dirpath=folder, auto_insert_metric_name=False, **within))
        self.trainer_defaults["callbacks"] = callbacks
        if config.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = str(out)
        if self.command == "prune":
            kwargs |= {"logger": False}
        elif config.trainer.logger is None:
            kwargs["logger"] = CSVLogger(out, name="", version="logs")
        try:
            return cast(PruneTrainer, super().instantiate_trainer(**kwargs))
        except (ValueError, TypeError, MisconfigurationException) as error:  # Lightning refuses a flag's value
            raise ConfigError(f"The trainer cannot be built: {error}") from error

    def report(self, out: Path, *, overwrite: bool = False) -> ReportCallback:
        """Returns the callback that measures, exports and reports into ``out``."""
        config: Namespace = self.config
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
        path = self._resume_from()
        trainer = cast(PruneTrainer, self.trainer)
        if self.command == "prune":
            trainer.prune(self.model, datamodule=self.datamodule, ckpt_path=path)
        else:
            trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path)

    def _resume_from(self) -> str | None:
        """Returns the checkpoint to resume from; for ``last`` the newest of the output folder, if there is any yet.

        Raises:
            ConfigError: It does not exist.
        """
        asked: str | None = self.config.ckpt_path
        if asked is None or Path(asked).exists():
            return asked
        if asked != "last":
            raise ConfigError(f"--ckpt_path '{asked}' does not exist.")
        folder = Path(self.config.output_dir) / CHECKPOINT_FOLDER
        found = [path for path in folder.glob("[!.]*.ckpt") if path.exists() and not path.is_symlink()]
        if not found:
            logging.getLogger("hfprune").info("There is no checkpoint in %s yet: starting anew.", folder)
            return None
        return str(max(found, key=lambda path: path.stat().st_mtime))
