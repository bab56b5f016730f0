"""Configs of the package by name: ``--config quickstart`` outside the repository."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_configs() -> dict[str, Path]:
    """Returns the configs of the package: name (``quickstart``, ``methods/fisher``) -> file.

    An installed wheel has them in ``hfprune/configs``, a checkout in ``configs`` beside the package.

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
    if Path(config).expanduser().is_file():
        return str(Path(config).expanduser())
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
