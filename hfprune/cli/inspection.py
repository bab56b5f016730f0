"""Shows what a folder holds: the model, what was removed, by which recipe, its figures, and what loads it.

``hfprune inspect OUT``
"""

import json
from argparse import ArgumentParser, Namespace

from hfprune.cli.loading_arguments import add_loading_arguments, loading_of


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("path", metavar="OUT", help="folder of a run, model folder, plan folder, or hub id")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_loading_arguments(parser)


def run(arguments: Namespace) -> None:
    """Prints the inspection."""
    from hfprune.publishing.inspection import inspect_folder, inspection_text

    found = inspect_folder(arguments.path, loading=loading_of(arguments))
    print(json.dumps(found, indent=2) if arguments.json else inspection_text(found))
