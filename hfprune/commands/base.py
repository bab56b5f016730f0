"""What every command's parser has, and errors in one line."""

import difflib
import inspect
import re
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from hfprune.criteria import Criterion
from hfprune.data import TextDataModule
from hfprune.errors import ConfigError, HFPruneError
from hfprune.modules import PruningModule
from hfprune.trainer import PruneTrainer


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
            cause = _first_cause(error)
            if isinstance(cause, HFPruneError):
                raise cause from error
            raise ConfigError(_not_built(error, cause)) from error

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
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ConfigError(_one_line(error, parser)) from error


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
    expected = sorted(_concrete(Criterion)) if kinds == ["Criterion"] else kinds
    return f"--{value[1]} {value[3]}: expected {' or '.join(expected) or value[2]}."


def _first_cause(error: BaseException) -> BaseException:
    """Returns the error that others were raised from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _not_built(error: Exception, cause: BaseException) -> str:
    """Returns which class cannot be built, and why, in one line."""
    known = re.findall(r"class_path='([\w.]+)'", str(error)) or re.findall(r"class_path '([\w.]+)'", str(error))
    name = known[0].rpartition(".")[2] if known else "A class"
    lines = str(cause).split("HINT:")
    hint = lines[1].strip() if len(lines) > 1 else ""
    return f"{name} cannot be built: {' '.join(lines[0].split())}{' ' + hint if hint else ''}"


def _concrete(kind: type[Any]) -> set[str]:
    """Returns the names of all classes below ``kind`` that objects can be made of."""
    found: set[str] = set()
    for c in kind.__subclasses__():
        found |= _concrete(c)
    return found if inspect.isabstract(kind) else found | {kind.__name__}
