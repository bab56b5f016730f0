"""Base class of the commands: the common parser, and errors in one line that name flags."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from hfprune.cli.argument_errors import check_nulls, first_cause, not_built, one_line, refused
from hfprune.cli.config_files import by_precedence, check_files, with_config_paths
from hfprune.cli.flag_names import settings_of, with_flags
from hfprune.cli.flags import OLD_FLAGS
from hfprune.cli.guesses import not_used
from hfprune.cli.old_names import rename_keys, with_new_flags
from hfprune.cli.typed import Typed
from hfprune.data import TextDataModule
from hfprune.modules import PruningModule
from hfprune.trainer import PruneTrainer
from hfprune.utils.compat import parser_actions
from hfprune.utils.errors import ConfigError, HFPruneError
from hfprune.utils.files import user_path

_log = logging.getLogger("hfprune")

_PATHS: tuple[str, ...] = (
    "model.path",
    "model.distillation.cache",
    "output_dir",
    "ckpt_path",
    "dense",
    "dense_cache",
    "output",
    "trainer.default_root_dir",
)
"""Flags outside ``--data`` that name files or folders: a leading ``~`` is the home folder, in YAML as well."""


class BaseCLI(LightningCLI):
    """A LightningCLI for one command: a flat parser without subcommands; classes are instantiated, nothing is run.

    Args:
        command: Name of the command.
        args: The command line without it, in the parser's own words.
        typed: The command line as it was typed; defaults to ``args``.

    Raises:
        ConfigError: The command line cannot be used as given.
    """

    given: Namespace
    """What the command line and its files give, without defaults."""
    result: Mapping[str, Any] | None = None
    """What the command found, once it has run."""
    notes: Sequence[str] = ()
    """What the command assumes, known after parsing."""

    def __init__(self, command: str, args: list[str], *, typed: Typed | None = None) -> None:
        self.command = command
        self.typed = Typed.of(command, args) if typed is None else typed
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

    @classmethod
    def uses(cls, flag: str) -> bool:
        """Returns whether the command does something with a flag of its parser; others are refused."""
        return True

    def run(self) -> None:
        """Runs the command."""
        raise NotImplementedError

    def advice(self) -> str | None:
        """Returns what to do after an interruption, None by default."""
        return None

    def instantiate_classes(self) -> None:
        """Builds the classes; raises ``ConfigError`` in one line where one cannot be built as given."""
        with self.naming_flags():
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

    def dumped(self) -> dict[str, Any]:
        """Returns the configuration as plain data, without the access token."""
        found: dict[str, Any] = json.loads(self.parser.dump(self.config, format="json"))
        found.get("model", {}).pop("token", None)
        return found

    def log_notes(self) -> None:
        """Logs what the run assumes."""
        for note in self.notes:
            _log.info(note)

    def check_no_training(self) -> None:
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
        actions = parser_actions(parser)
        with self.naming_flags():
            args = with_config_paths(args)
            check_files(args)
            args = with_new_flags(by_precedence(args, {action.dest for action in actions}))
            try:
                self.config = parser.parse_args(args)
                self.given = parser.parse_args(args, defaults=False)
            except ArgumentError as error:
                raise ConfigError(one_line(error, parser)) from error
            rename_keys(self.config, self.given)
            for name in _PATHS:
                if isinstance(value := self.config.get(name), str):
                    self.config[name] = user_path(value, name)
        self._check_used()
        if self.given.get("model.path") is None:
            self.notes = [f"No model was given: the run uses the embedded demo model, {self.config.model.path}."]
        plain = {action.dest: action.default for action in actions if "." not in action.dest}
        plain.pop("seed_everything", None)  # null there is Lightning's: a seed is drawn
        check_nulls(self.config, self.classes(), {name: value for name, value in plain.items() if name in self.config})

    def _check_used(self) -> None:
        """Raises ``ConfigError`` for a given flag that the command does not use."""
        for flag in settings_of(self.given):
            if not self.uses(flag):
                raise ConfigError(not_used(flag, self.command))

    @contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Lets errors of the library name the flags of this command in place of Python arguments."""
        try:
            yield
        except HFPruneError as error:
            parser = getattr(self, "parser", None)
            flags = () if parser is None else {action.dest for action in parser_actions(parser)} - OLD_FLAGS.keys()
            text = with_flags(
                str(error), settings_of(getattr(self, "config", None), flags, without=self.unused_groups())
            )
            if text != str(error):
                error.args = (text,)
            raise

    def unused_groups(self) -> set[str]:
        """Returns the groups of options that this run does not use."""
        return set()

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return {"trainer": PruneTrainer, "model": PruningModule, "data": TextDataModule}
