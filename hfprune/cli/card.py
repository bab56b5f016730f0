"""Writes the model card of a finished run, README.md in its model folder, from report.json and plan.json.

``hfprune card OUT``
"""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("folder", metavar="OUT", help="folder of a run, or a model folder that hfprune wrote")
    parser.add_argument("--base_model", metavar="ID", help="hub id of the dense model (default: what the run recorded)")
    parser.add_argument("--license", metavar="ID", help="for example apache-2.0 (default: that of the base's card)")
    parser.add_argument("--repo", metavar="ID", help="hub id under which the model will be found")
    parser.add_argument("--print", action="store_true", help="print the card, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that is there")


def run(arguments: Namespace) -> None:
    """Writes or prints the card."""
    from hfprune.publishing.card import model_card, write_card

    settings = {"base_model": arguments.base_model, "license": arguments.license, "repo": arguments.repo}
    if arguments.print:
        print(model_card(arguments.folder, **settings))
        return
    print(f"Wrote {write_card(arguments.folder, overwrite=arguments.overwrite, **settings)}")
