"""What every command's parser has, and errors in one line."""

from typing import Any, cast

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from hfprune.cli.argument_errors import check_nulls, first_cause, not_built, one_line, refused
from hfprune.cli.precedence import check_files, settled
from hfprune.data import TextDataModule
from hfprune.modules import PruningModule
from hfprune.trainer import PruneTrainer
from hfprune.utils.errors import ConfigError, HFPruneError
from hfprune.utils.files import user_path

_PATHS: tuple[str, ...] = (
    "model.path",
    "model.distillation.cache",
    "output_dir",
    "ckpt_path",
    "dense",
    "dense_cache",
    "output",
)
_PATHS += ("trainer.default_root_dir",)
"""Flags that name files or folders outside ``--data``: a leading ``~`` is the home folder, in YAML, too."""


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

    def advice(self) -> str | None:
        """Returns what to do after an interruption, None where there is nothing to say."""
        return None

    def instantiate_classes(self) -> None:
        """Builds the classes; raises ``ConfigError`` in one line where one cannot be built as given."""
        try:
            super().instantiate_classes()
        except HFPruneError:
            raise
        except Exception as error:  # classes of the command line may be anybody's
            cause = first_cause(error)
            if isinstance(cause, HFPruneError):
                raise cause from error
            raise ConfigError(refused(str(error)) or not_built(error, cause)) from error

    def instantiate_trainer(self, **kwargs: Any) -> PruneTrainer:
        """Builds the trainer; raises ``ConfigError`` in one line where Lightning refuses a flag or the environment."""
        try:
            return cast(PruneTrainer, super().instantiate_trainer(**kwargs))
        except HFPruneError:
            raise
        except Exception as error:
            missing = "a variable is missing: " if isinstance(error, KeyError) else ""
            text = " ".join(str(error).replace("HINT:", "").split())
            raise ConfigError(f"The trainer cannot be built: {missing}{text}") from error

    def check_trainer(self) -> None:
        """Raises ``ConfigError`` for flags that only a training loop obeys: this command runs none."""
        if self.trainer.world_size > 1:
            raise ConfigError(f"{self.command} runs on one device: give --trainer.devices 1.")
        if str(self.trainer.precision) != "32-true":
            raise ConfigError(
                f"{self.command} runs models in their own type: give --model.dtype in place of --trainer.precision "
                f"{self.trainer.precision}."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` alone; raises ``ConfigError`` in one line for what the parser refuses."""
        check_files(args)
        try:
            self.config = parser.parse_args(settled(args, {action.dest for action in parser._actions}))
        except ArgumentError as error:
            raise ConfigError(one_line(error, parser)) from error
        for name in _PATHS:
            if isinstance(value := self.config.get(name), str):
                self.config[name] = user_path(value, f"--{name}")
        plain = {action.dest: action.default for action in parser._actions if "." not in action.dest}
        plain.pop("seed_everything", None)  # null there is Lightning's: a seed is drawn
        check_nulls(self.config, self.classes(), {name: value for name, value in plain.items() if name in self.config})

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return {"trainer": PruneTrainer, "model": PruningModule, "data": TextDataModule}
