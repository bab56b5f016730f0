"""The command line: ``hfprune fit|prune|evaluate|sweep|export``."""

from hfprune.cli.entry import main

__all__ = ["main"]
