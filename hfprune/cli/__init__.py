"""The command line: ``hfprune fit|prune|evaluate|sweep|export|plan|inspect|chat|card|push``."""

from hfprune.cli.entry import main

__all__ = ["main"]
