"""Which of several values of a flag counts: the command line over files, a later budget over an earlier one."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from hfprune.utils.errors import ConfigError

BUDGETS = ("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio")
"""Flags of which one is given."""
ALLOCATION = "importance.allocation"
"""Stands for an allocation that says itself how much goes, and so takes the place of a budget."""
GROUPS = ("trainer", "model", "data", "importance", "sparse", "lora_prune")
"""Groups of flags, which a file of their own may hold."""


def config_files(args: Sequence[str]) -> list[str]:
    """Returns the YAML files that ``--config`` names, in their order."""
    given = [(arg.partition("=")[2], i) for i, arg in enumerate(args) if arg.startswith("--config=")]
    given += [(value, i) for i, (flag, value) in enumerate(pairwise(args)) if flag == "--config"]
    return [path for path, _ in sorted(given, key=lambda item: item[1])]


def read_config(path: str) -> dict[str, Any]:
    """Returns what a YAML file holds; nothing where it cannot be read: what is wrong with it, the parser says."""
    if not Path(path).is_file():
        return {}
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def check_files(args: Sequence[str]) -> None:
    """Raises ``ConfigError`` where a file has a group of options that is none: the parser passes over these."""
    for path in config_files(args):
        for name, value in read_config(path).items():
            if name in GROUPS and not isinstance(value, Mapping | str):
                raise ConfigError(f"--config {path}: '{name}' is {value!r}, and takes a mapping of options.")


def settled(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """Returns the arguments in an order in which what is said on the command line counts, with one budget left.

    Values of files come first: of ``--config``, then of a group's own file. A budget on the command line takes the
    place of a file's, and a later file's that of an earlier one. Two budgets of one source are left for the parser to
    refuse.

    Args:
        args: The command line.
        flags: Names of the flags that the command has.
    """
    levels: tuple[list[str], ...] = ([], [], [])
    for flag in _flags(args):
        name = flag[0].partition("=")[0]
        level = 0 if name == "--config" or not name.startswith("-") else 1 if name[2:] in GROUPS else 2
        levels[level].extend(flag)
    replaced = [f"--{name}=null" for name in _replaced(args) if name in flags]
    return [*levels[0], *levels[1], *replaced, *levels[2]]


def _flags(args: Sequence[str]) -> list[list[str]]:
    """Returns each flag with its values; values without a flag come first."""
    found: list[list[str]] = []
    for arg in args:
        if not found or (arg.startswith("-") and arg[1:2] not in "0123456789."):
            found.append([])
        found[-1].append(arg)
    return found


def _replaced(args: Sequence[str]) -> list[str]:
    """Returns the budgets that a later source replaces."""
    sources = [_of_file(read_config(path)) for path in config_files(args)]
    stated = [source for source in (*sources, _of_flags(args)) if source]
    return [name for name in BUDGETS if stated and name not in stated[-1] and any(name in s for s in stated[:-1])]


def _of_file(config: Mapping[str, Any]) -> set[str]:
    """Returns the budgets that a file states."""
    importance = config.get("importance")
    allocation = importance.get("allocation") if isinstance(importance, Mapping) else None
    return {n for n in BUDGETS if config.get(n) is not None} | ({ALLOCATION} if _spends(allocation) else set())


def _of_flags(args: Sequence[str]) -> set[str]:
    """Returns the budgets that the command line states."""
    found = set()
    for flag in _flags(args):
        name, equals, value = flag[0].removeprefix("--").partition("=")
        given = _loaded(value if equals else " ".join(flag[1:]))
        if name in BUDGETS and given is not None:
            found.add(name)
        elif name.startswith(ALLOCATION):
            share = ".share" in name and given is not None
            if share or (name.endswith("allocation") and _spends(given)):
                found.add(ALLOCATION)
    return found


def _spends(allocation: Any) -> bool:
    """Returns whether an allocation, as YAML writes it, says itself how much goes."""
    if isinstance(allocation, str):
        return allocation.rpartition(".")[2] == "Explicit"
    if not isinstance(allocation, Mapping):
        return False
    settings = allocation.get("init_args")
    settings = settings if isinstance(settings, Mapping) else {}
    own = _spends(allocation.get("class_path")) or settings.get("share") is not None
    return own or _spends(settings.get("allocation"))


def _loaded(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
