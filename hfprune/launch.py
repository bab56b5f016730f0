"""What the commands build from their arguments: module, data, callbacks and trainer, through LightningCLI."""

import difflib
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.markdown import Markdown

from hfprune.callbacks import ReportCallback, TaylorImportanceCallback
from hfprune.criteria import Criterion
from hfprune.data import TextDataModule
from hfprune.errors import ConfigError
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.export import CHECKPOINT_FOLDER
from hfprune.modules import PruningModule
from hfprune.recovery import LoraRecovery
from hfprune.sweep import Method, Sweep, SweepGrid
from hfprune.sweep.grid import default_methods
from hfprune.sweep.results import markdown
from hfprune.trainer import PruneTrainer

_BUDGET = {
    "pruning_ratio": (float, "share of ALL parameters to remove, in (0, 1)"),
    "target_params": (int, "number of parameters to keep"),
    "intermediate_size": (int, "MLP width to keep"),
    "mlp_ratio": (float, "MLP width to keep / hidden size (the HFPrune script's flag)"),
    "round_to": (int, "kept widths are multiples of this; 64 or 128 for fast kernels"),
}


class BaseCLI(LightningCLI):
    """A LightningCLI for one command: a flat parser, classes built, nothing run."""

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        super().__init__(
            PruningModule,
            TextDataModule,
            trainer_class=PruneTrainer,
            trainer_defaults=self.defaults(),
            seed_everything_default=42,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"hfprune {command}", "description": None, "exit_on_error": False},
            args=args,
            run=False,
        )

    def defaults(self) -> dict[str, Any]:
        """Returns defaults of the Trainer's arguments."""
        return {"devices": 1, "logger": False, "enable_model_summary": False}

    def run(self) -> None:
        """Runs the command."""
        raise NotImplementedError

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` alone; raises ``ConfigError`` in one line for what the parser refuses."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ConfigError(_one_line(error, parser)) from error


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
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last': the newest"
        )
        if self.command == "fit":
            parser.set_defaults({"importance.recovery": LoraRecovery()})
            parser.add_argument("--merge_adapters", type=bool, default=True, help="merge the LoRA adapters at export")
            parser.add_argument(
                "--checkpoint_steps", type=PositiveInt, default=100, help="steps of recovery between checkpoints"
            )

    def instantiate_trainer(self, **kwargs: Any) -> PruneTrainer:
        """Builds the trainer with the report and, for ``fit``, checkpoints in the output folder."""
        config: Namespace = self.config
        out = Path(config.output_dir)
        callbacks: list[Any] = [
            ReportCallback(
                str(out),
                overwrite=config.overwrite or config.ckpt_path is not None,
                latency=config.latency,
                merge_adapters=config.get("merge_adapters", True),
                config=self.plain_config(),
            )
        ]
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


class EvaluateCLI(BaseCLI):
    """``evaluate``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what ``PruneTrainer.evaluate`` and ``ZeroShotTasks`` take; a pruned model is welcome here."""
        parser.add_argument("--dense", type=str | None, default=None, help="dense model to compare with")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Lightning checkpoint of --model.path to measure"
        )
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        parser.add_argument(
            "--dense_cache", type=str | None, default=None, help="folder that keeps the dense model's top logits"
        )
        parser.add_argument("--output", type=str | None, default=None, help="JSON file for the figures")
        add_task_arguments(parser)
        parser.set_defaults({"model.allow_pruned": True})

    def run(self) -> None:
        """Runs the command."""
        c = self.config
        cast(PruneTrainer, self.trainer).evaluate(
            self.model,
            self.datamodule,
            dense=c.dense,
            ckpt_path=c.ckpt_path,
            latency=c.latency,
            zero_shot=zero_shot_tasks(c),
            dense_cache=c.dense_cache,
            output=c.output,
        )


class SweepCLI(BaseCLI):
    """``sweep``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the grid, the output folder and the tasks."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives the tables; resumed if not empty")
        parser.add_argument(
            "--methods",
            type=list[Method] | None,
            default=None,
            help="what is compared (default: entropy, cross_entropy, magnitude, random)",
        )
        parser.add_argument("--pruning_ratios", type=list[float], default=[0.2, 0.3], help="shares of ALL parameters")
        parser.add_argument("--seeds", type=list[int], default=[42], help="seeds of the calibration data")
        parser.add_argument(
            "--texts", type=dict[str, str] | None, default=None, help="name: evaluation text (default: --data.text)"
        )
        parser.add_argument("--round_to", type=PositiveInt, default=1, help="kept widths are multiples of this")
        parser.add_argument("--task_seeds", type=PositiveInt, default=1, help="seeds whose models run the tasks")
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        add_task_arguments(parser)

    def run(self) -> None:
        """Runs the command."""
        c, trainer = self.config, self.trainer
        if trainer.world_size > 1:
            raise ConfigError("sweep runs on one device: give --trainer.devices 1.")
        init = self.config_init
        texts = c.texts or ({"text": c.data.text} if c.data.text else {})
        if not texts or c.data.calibration in texts.values():
            raise ConfigError(
                'sweep evaluates on texts that do not calibrate: give --texts \'{"NAME": "FILE"}\', or --data.text.'
            )
        grid = SweepGrid(
            methods=init.methods or default_methods(),
            pruning_ratios=c.pruning_ratios,
            seeds=c.seeds,
            texts=texts,
            round_to=c.round_to,
            task_seeds=c.task_seeds,
        )
        sweep = Sweep(
            self.model,
            grid,
            self.make_data,
            c.output_dir,
            zero_shot=zero_shot_tasks(c),
            latency=c.latency,
            device=trainer.strategy.root_device,
        )
        result = sweep.run()
        Console().print(Markdown(markdown(result)))
        Console().print(f"Saved to {c.output_dir}", soft_wrap=True)

    def make_data(self, seed: int, text: str | None) -> TextDataModule:
        """Returns the data of ``--data`` for a seed, with an evaluation text, or with none."""
        given = self.config.data.as_dict() | {"seed": seed, "text": text}
        return TextDataModule(**given | ({"eval_windows": 0} if text is None else {}))


def add_task_arguments(parser: LightningArgumentParser) -> None:
    """Adds the flags of zero-shot tasks, named as lm-eval names them where it has them."""
    parser.add_argument(
        "--tasks",
        type=str | list[str] | None,
        default=None,
        help="lm-eval tasks, separated by commas; paper10, llmpruner7 and zpruner5 are the papers' lists",
    )
    parser.add_argument("--limit", type=int | None, default=None, help="items per task: the first so many")
    parser.add_argument("--num_fewshot", type=int, default=0, help="examples in the prompt")
    parser.add_argument(
        "--task_data", type=str | None, default=None, help="folder of released data sets, for offline use"
    )
    parser.add_argument("--include_path", type=str | None, default=None, help="folder of task files of your own")
    parser.add_argument("--task_batch_size", type=int, default=8, help="requests per forward pass")
    parser.add_argument(
        "--share_prefixes",
        type=bool | None,
        default=None,
        help="run what answers share once; false: lm-eval's own model class (default: share on the CPU)",
    )


def zero_shot_tasks(config: Namespace) -> ZeroShotTasks | None:
    """Returns the tasks that the flags ask for, None when they ask for none.

    Raises:
        ConfigError: A task flag was given without ``--tasks``, or its value cannot be used.
    """
    if config.tasks is None:
        for name in ("limit", "task_data", "include_path"):
            if config[name] is not None:
                raise ConfigError(f"--{name} belongs to zero-shot tasks: give --tasks, for example paper10.")
        return None
    listed = config.tasks if isinstance(config.tasks, list) else [config.tasks]
    names = [name.strip() for item in listed for name in item.split(",") if name.strip()]
    return ZeroShotTasks(
        names,
        data_dir=config.task_data,
        include_path=config.include_path,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        batch_size=config.task_batch_size,
        share_prefixes=config.share_prefixes,
    )


CLASSES: dict[str, type[BaseCLI]] = {"fit": RunCLI, "prune": RunCLI, "evaluate": EvaluateCLI, "sweep": SweepCLI}


def launch(command: str, args: list[str]) -> None:
    """Parses ``args`` for ``command`` and runs it.

    Raises:
        HFPruneError: Bad input, in one line; Lightning's own complaints included.
    """
    if not sys.warnoptions:
        _quieten()
    try:
        cli = CLASSES[command](command, args)
        try:
            cli.run()
        except SystemExit as error:
            if cli.trainer.interrupted:  # Lightning turns Ctrl-C into exit status 1
                raise KeyboardInterrupt from error
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # gloo's threads may abort a process that exits over them
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error


def _one_line(error: ArgumentError, parser: LightningArgumentParser) -> str:
    """Returns the parser's complaint in one line, with the nearest option when one is not known."""
    text = " ".join(str(error).split())
    known = [name.lstrip("-") for action in parser._actions for name in (*action.option_strings, action.dest)]
    for pattern in (r"unrecognized arguments: --([\w.]+)", r"[Oo]ption '([\w.]+)' is not accepted"):
        if (unknown := re.search(pattern, text)) and (near := difflib.get_close_matches(unknown[1], known, n=1)):
            return f"{text}. Did you mean '{near[0]}'?"
    value = re.search(r'Parser key "([\w.]+)": .*Subtypes: \[(.*)\] Errors: .*Given value: (.*)$', text)
    if value is None:
        return text
    kinds = [kind.rpartition(".")[2] for kind in re.findall(r"'([\w.]+)'", value[2]) if kind != "NoneType"]
    kinds_of = [c for kind in Criterion.__subclasses__() for c in kind.__subclasses__()]
    expected = [c.__name__ for c in kinds_of] if kinds == ["Criterion"] else kinds
    return f"--{value[1]} {value[3]}: expected {' or '.join(expected) or value[2]}."


def _quieten() -> None:
    """Hides what a user of the command line can do nothing about, and prints other warnings as one line."""
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {' '.join(str(message).split())}\n"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
        warnings.filterwarnings("ignore", message=text)
