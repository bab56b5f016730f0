"""Simple commands: ``plan``, ``inspect``, ``chat``, ``card`` and ``push``, with a plain argument parser each."""

import argparse
import re
import shlex
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

MODULES = {
    "plan": "hfprune.cli.plan",
    "inspect": "hfprune.cli.inspection",
    "chat": "hfprune.cli.chat",
    "card": "hfprune.cli.card",
    "push": "hfprune.cli.push",
}
"""Command -> the module with its ``add_arguments(parser)`` and ``run(arguments)``."""

SIMPLE_COMMANDS = {
    "plan": "widths, parameters, memory and speed at several ratios, from shapes alone",
    "inspect": "what a folder holds: model, removed units, recipe, figures, how to load it",
    "chat": "talk to a pruned model, side by side with the dense one",
    "card": "write the model card of a finished run",
    "push": "publish a model, a plan or an adapter on the Hugging Face Hub",
}
"""Command -> what it does."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ``ConfigError``, with the nearest flag."""

    word_flag = ""
    """The flag that a second word without a flag may belong to."""

    def error(self, message: str) -> NoReturn:
        """Raises the error; the flag that may have been meant is named."""
        flag = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        word = re.match(r"unrecognized arguments: ([^-].*)", message)
        near = nearest(flag[1].lstrip("-"), self.flags()) if flag else None
        if word and self.word_flag:
            raise ConfigError(
                f"'{word[1]}' belongs to no flag. Did you mean --{self.word_flag} {shlex.quote(word[1])}?"
            )
        raise ConfigError(f"{message}.{f' Did you mean --{near}?' if near else f' See {self.prog} --help.'}")

    def flags(self) -> list[str]:
        """Returns the names of all flags, without hyphens."""
        return [option.lstrip("-") for option in self._option_string_actions if option.startswith("--")]


def simple_parser(command: str) -> Parser:
    """Returns the argument parser of a simple command."""
    module = import_module(MODULES[command])
    description = (module.__doc__ or "").partition("\n")[0]
    parser = Parser(prog=f"hfprune {command}", description=description, allow_abbrev=False)
    parser.word_flag = getattr(module, "WORD_FLAG", "")
    module.add_arguments(parser)
    return parser


def run_simple(command: str, args: Sequence[str]) -> None:
    """Parses ``args`` for a simple command and runs it.

    Raises:
        HFPruneError: Bad input, in one line.
    """
    parser = simple_parser(command)
    try:
        arguments = parser.parse_args(args)
    except SystemExit:  # --help was printed; errors are raised
        return
    flags = {name: value for name, value in vars(arguments).items() if name in parser.flags()}
    try:
        import_module(MODULES[command]).run(arguments)
    except ConfigError as error:
        from hfprune.cli.flag_names import with_flags

        raise ConfigError(with_flags(str(error), flags)) from error


def columns(rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table as text: the first column to the left, others to the right; never cut off.

    >>> print(columns([["", "width"], ["dense", 1536], ["0.2", 1017]]))
           width
    dense   1536
    0.2     1017
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)
