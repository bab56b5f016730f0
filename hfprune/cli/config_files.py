"""Config files: the configs of the package by name, and the precedence of flags over files.

A flag on the command line takes precedence over a file, and a later budget over an earlier one.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

_PACKAGE = Path(__file__).resolve().parents[1]

BUDGETS = ("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio")
"""Flags of which exactly one is given."""
ALLOCATION = "importance.allocation"
"""An allocation that sets the number of units itself, and so replaces a budget."""
GROUPS = ("trainer", "model", "data", "importance", "sparse", "lora_prune")
"""Groups of flags; each may have a file of its own."""


def shipped_configs() -> dict[str, Path]:
    """Returns the configs of the package: name (``quickstart``, ``methods/fisher``) -> file.

    An installed wheel has them in ``hfprune/configs``, a checkout in ``configs`` next to the package.

    >>> "quickstart" in shipped_configs()
    True
    """
    installed = _PACKAGE / "configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def config_path(config: str) -> str:
    """Returns the file that ``config`` names.

    Args:
        config: A YAML file, the name of a config of the package (``methods/fisher``; ``configs/`` in front and
            ``.yaml`` behind may be there or not), or YAML text. A file takes precedence.

    Raises:
        ConfigError: There is no such file and no config of this name.
    """
    if "\n" not in config and os.path.isfile(expanded := os.path.expanduser(config)):
        return expanded
    if _is_mapping(config):
        return config
    known = shipped_configs()
    name = config.removeprefix("configs/").removesuffix(".yaml")
    if name in known:
        return str(known[name])
    near = _near(name, known)
    guess = f"Did you mean {' or '.join(repr(other) for other in near)}?" if near else "'hfprune --help' lists them."
    raise ConfigError(f"config='{config}' does not exist, and no config of the package has this name. {guess}")


def with_config_paths(args: Sequence[str]) -> list[str]:
    """Returns a command line in which each ``--config`` names a file.

    Args:
        args: The command line, without the command.

    Raises:
        ConfigError: A config is neither a file nor a name.
    """
    found = list(args)
    for i, arg in enumerate(found):
        if arg.startswith("--config="):
            found[i] = f"--config={config_path(arg.removeprefix('--config='))}"
        elif i and found[i - 1] == "--config":
            found[i] = config_path(arg)
    return found


def _near(name: str, known: dict[str, Path]) -> list[str]:
    """Returns the names that ``name`` may stand for: the same last part, a misspelling, or the same folder."""
    folder, _, last = name.rpartition("/")
    same = [other for other in known if last and other.rpartition("/")[2] == last]
    if same:
        return same
    spelled = nearest(name, known)
    ends = {other.rpartition("/")[2]: other for other in known}
    close = [spelled] if spelled else get_close_matches(name, known, n=3, cutoff=0.75)
    close = close or [ends[end] for end in get_close_matches(last, ends, n=3, cutoff=0.75)]
    return close or [other for other in known if folder and other.rpartition("/")[0] == folder]


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def config_files(args: Sequence[str]) -> list[str]:
    """Returns the YAML files that ``--config`` names, in their order."""
    given = [(arg.partition("=")[2], i) for i, arg in enumerate(args) if arg.startswith("--config=")]
    given += [(value, i) for i, (flag, value) in enumerate(pairwise(args)) if flag == "--config"]
    return [path for path, _ in sorted(given, key=lambda item: item[1])]


def read_config(path: str) -> dict[str, Any]:
    """Returns the options in a YAML file or text, empty if it cannot be read: the parser reports the reason."""
    if "\n" in path or not Path(path).is_file():
        found = yaml.safe_load(path) if _is_mapping(path) else {}
        return found if isinstance(found, dict) else {}
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def check_files(args: Sequence[str]) -> None:
    """Raises ``ConfigError`` for groups of options that the parser ignores: without a mapping, or empty."""
    for path in config_files(args):
        for name, value in read_config(path).items():
            if name in GROUPS and not isinstance(value, Mapping | str):
                raise ConfigError(f"--config {path}: '{name}' is {value!r}, and takes a mapping of options.")
            if name == "lora_prune" and not value:
                raise ConfigError(f"--config {path}: '{name}' is empty. State one of its options, such as every: 10.")


def by_precedence(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """Returns the arguments in the order of their precedence, with one budget.

    Later arguments win: files of ``--config`` come first, then files of a group, then flags. A budget on the command
    line replaces that of a file, and a later file that of an earlier one. Two budgets of one source are left for the
    parser to refuse.

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
    """Returns whether an allocation, as written in YAML, sets the number of units itself."""
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
