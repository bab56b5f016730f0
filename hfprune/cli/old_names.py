"""Old names of flags and keys of config files, which are accepted for one release with a ``FutureWarning``."""

import warnings
from argparse import SUPPRESS
from collections.abc import Sequence

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from hfprune.cli.flags import OLD_FLAGS, new_name
from hfprune.utils.compat import parser_actions, type_hint
from hfprune.utils.errors import ConfigError


def add_old_names(parser: LightningArgumentParser) -> None:
    """Adds the old name of each flag that the parser has, hidden and without a default.

    Args:
        parser: Of a command, with all its flags.
    """
    hints = {action.dest: type_hint(action) for action in parser_actions(parser)}
    for old, new in OLD_FLAGS.items():
        if new in hints:
            parser.add_argument(f"--{old}", type=hints[new], default=SUPPRESS, help=SUPPRESS)


def with_new_flags(args: Sequence[str]) -> list[str]:
    """Returns a command line in which old flags have their new names; warns for each.

    Args:
        args: The command line, without the command.
    """
    found = []
    for arg in args:
        name, equals, value = arg.partition("=")
        new = new_name(name[2:]) if name.startswith("--") else None
        if new is not None:
            _warn(name, f"--{new}")
        found.append(arg if new is None else f"--{new}{equals}{value}")
    return found


def rename_keys(config: Namespace, given: Namespace) -> None:
    """Gives the options of config files that have an old name their new name; warns for each.

    Args:
        config: The parsed options, changed in place.
        given: Those without defaults, changed in place.

    Raises:
        ConfigError: An option is given under both names.
    """
    for old, new in OLD_FLAGS.items():
        if old not in given:
            continue
        if new in given:
            raise ConfigError(f"--{old} is the old name of --{new}: give one of them.")
        _warn(f"'{old}' in a config file", f"'{new}'")
        for options in (config, given):
            options[new] = options.pop(old)


def _warn(old: str, new: str) -> None:
    text = f"{old} is deprecated and will be removed in the next release: write {new}."
    warnings.warn(text, FutureWarning, stacklevel=3)
