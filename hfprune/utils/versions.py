"""Versions of the packages that determine a result."""

from importlib import metadata

import torch

from hfprune.version import __version__

OPTIONAL = ("lightning", "transformers")
"""Packages that the core runs without."""


def versions() -> dict[str, str]:
    """Returns package name -> version for the provenance of plans and reports; only of installed packages.

    >>> list(versions())[:2]
    ['hfprune', 'torch']
    """
    found = {"hfprune": __version__, "torch": str(torch.__version__)}
    for name in OPTIONAL:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
