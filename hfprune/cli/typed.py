"""The command line as it was typed, and the command lines that are proposed from it."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hfprune.cli.arguments import split
from hfprune.cli.flags import Given

_SHORT = {"pruning_ratio": "--ratio", "output_dir": "-o"}
"""Flag -> its short form, which proposed commands use."""


@dataclass(frozen=True, slots=True)
class Typed:
    """A command line as it was typed, without recipes and methods.

    Attributes:
        command: Name of the command.
        given: Its flags, by their full names.
    """

    command: str
    given: tuple[Given, ...]

    @classmethod
    def of(cls, command: str, args: Sequence[str]) -> "Typed":
        """Returns the flags of a command line.

        Args:
            command: Name of the command.
            args: The command line without the command.

        Raises:
            ConfigError: A word belongs to no flag, or a value is missing.
        """
        return cls(command, tuple(split(command, args)))

    def line(
        self, command: str | None = None, *, without: Collection[str] = (), settings: Mapping[str, str] | None = None
    ) -> str:
        """Returns a command line that differs in some flags, quoted for a shell, with the model first.

        Args:
            command: Name of the command; that of this command line if not given.
            without: Flags to leave out.
            settings: Flag -> value, in place of the value that was given.

        >>> typed = Typed.of("prune", ["--overwrite", "M", "--ratio", "0.2", "--output", "my out"])
        >>> typed.line("fit", without=["overwrite"], settings={"data.recovery": "FILE"})
        "hfprune fit M --ratio 0.2 -o 'my out' --data.recovery FILE"
        """
        settings = dict(settings or {})
        left_out = {*without, *settings}
        items = [item for item in self.given if item.name not in left_out]
        items += [Given(name, value) for name, value in settings.items()]
        models = [item for item in items if item.name == "model.path" and item.value]
        words = [item.value or "" for item in models]
        for item in items:
            if item not in models:
                words += _words(item)
        return shlex.join(["hfprune", command or self.command, *words])


def _words(item: Given) -> list[str]:
    if item.name == "model.token":
        return [f"--{item.name}", "TOKEN"]
    name = _SHORT.get(item.name, f"--{item.name}")
    if item.value is None:
        return [name]
    return [f"--{item.name}={item.value}"] if item.value.startswith("-") else [name, item.value]
