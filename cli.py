"""Launcher: ``python cli.py prune ...`` is ``hfprune prune ...``."""

import sys

from hfprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
