"""Publishes a model, the plan that makes it from its base, or an adapter on the Hugging Face Hub, with a model card.

``hfprune push OUT OWNER/NAME``
"""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("folder", metavar="OUT", help="folder of a run, or a model folder that hfprune wrote")
    parser.add_argument("repo", metavar="REPO", help="hub id, owner/name; made where it does not exist")
    parser.add_argument(
        "--what",
        choices=("model", "plan", "adapter"),
        default="model",
        help="the model folder (default), what rebuilds it from its base, or adapters that were not merged",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument(
        "--base_model", metavar="ID", help="the dense model (default: what the run recorded); of an adapter the pruned"
    )
    parser.add_argument("--license", metavar="ID", help="for example apache-2.0 (default: that of the base's card)")


def run(arguments: Namespace) -> None:
    """Publishes, and prints where."""
    from hfprune.publishing.push import push

    address = push(
        arguments.folder,
        arguments.repo,
        what=arguments.what,
        private=arguments.private,
        base_model=arguments.base_model,
        license=arguments.license,
    )
    print(f"Published the {arguments.what} at {address}")
