"""Shows what a folder holds: the model, its units, what was removed, by which recipe, its figures, and what loads it.

``hfprune inspect OUT``, or ``hfprune inspect --all`` for every class of the installed transformers
"""

import json
import sys
from argparse import ArgumentParser, Namespace

from hfprune.cli.loading_arguments import add_loading_arguments, loading_of
from hfprune.utils.errors import ConfigError


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("path", metavar="OUT", nargs="?", help="folder of a run, model folder, plan folder, or hub id")
    parser.add_argument("--all", action="store_true", help="try every causal LM class of the installed transformers")
    chosen = "with --all: try these classes or model types only"
    parser.add_argument("--classes", nargs="+", default=None, metavar="NAME", help=chosen)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="with --all: processes (default: 1)")
    limit = "with --all: seconds for one class (default: 300)"
    parser.add_argument("--time_limit", type=float, default=300.0, metavar="S", help=limit)
    parser.add_argument("--markdown", action="store_true", help="with --all: print the page docs/architectures.md")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_loading_arguments(parser)


def run(arguments: Namespace) -> None:
    """Prints the inspection."""
    _check(arguments)
    if arguments.all:
        _run_all(arguments)
        return
    from hfprune.publishing.inspection import inspect_folder, inspection_text

    found = inspect_folder(arguments.path, loading=loading_of(arguments))
    print(json.dumps(found, indent=2) if arguments.json else inspection_text(found))


def _check(arguments: Namespace) -> None:
    """Raises ``ConfigError`` for arguments that do not fit together."""
    if arguments.all == (arguments.path is not None):
        raise ConfigError("Give either a folder or hub id (OUT), or --all.")
    if not arguments.all and (arguments.classes or arguments.markdown):
        raise ConfigError("--classes and --markdown need --all.")
    if arguments.json and arguments.markdown:
        raise ConfigError("Give either --json or --markdown.")


def _run_all(arguments: Namespace) -> None:
    from hfprune.publishing.survey import counts, survey
    from hfprune.publishing.survey_table import survey_page, survey_text

    rows = []
    for row in survey(arguments.classes or (), jobs=arguments.jobs, time_limit=arguments.time_limit):
        rows.append(row)
        print(f"{len(rows)}: {row.model_class}: {row.verdict} ({row.seconds:.1f} s)", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row.model_class)
    if arguments.json:
        print(json.dumps({"counts": counts(rows), "classes": [row.to_dict() for row in rows]}, indent=2))
    else:
        print(
            survey_page(rows) if arguments.markdown else survey_text(rows), end="\n" if not arguments.markdown else ""
        )
