"""The one place where ``~`` in a path that a user gave becomes a folder."""

import os
from collections.abc import MutableMapping
from typing import Any

from hfprune.errors import ConfigError


def expand_user(path: str) -> str:
    """Returns ``path`` with ``~`` or ``~name`` at its start replaced by that home folder.

    Shells expand ``~`` in a word of its own only: not in YAML, not behind ``=``, not inside quotes.

    Raises:
        ConfigError: There is no such user, or the home folder is not known.

    >>> expand_user("a/~/b"), expand_user("hub/name:config")
    ('a/~/b', 'hub/name:config')
    """
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        name = path.split("/", 1)[0]
        raise ConfigError(f"'{path}': the home folder '{name}' is not known. For a file of this name write './{path}'.")
    return found


def expand_paths(config: MutableMapping[str, Any] | Any, names: tuple[str, ...]) -> None:
    """Expands ``~`` in the values of a namespace, in place.

    Args:
        config: Holds the values as attributes; dots in a name reach into namespaces.
        names: Of the values that are paths; those that are missing or no text stay as they are.
    """
    for name in names:
        value = config.get(name)
        if isinstance(value, str):
            config[name] = expand_user(value)
