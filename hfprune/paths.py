"""Paths as users write them."""

import os
from pathlib import Path

from hfprune.errors import ConfigError


def user_path(path: str | Path, argument: str) -> str:
    """Returns ``path`` with a leading ``~`` or ``~user`` replaced by the home folder, as a shell does it.

    >>> user_path("runs/out", "output_dir")
    'runs/out'

    Args:
        path: A path; what does not start with ``~`` (a hub id, for example) is returned as it is.
        argument: The argument that gave it, for the message.

    Raises:
        ConfigError: The user's home folder is not known.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(f"{argument}='{text}': no such user. For a folder with this name give './{text}'.")
    return expanded
