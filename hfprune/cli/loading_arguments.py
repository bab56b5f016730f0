"""Flags of loading for commands with a parser of their own: ``--revision``, ``--subfolder``, ``--token`` and others."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfprune.io.loading import LoadingOptions


def add_loading_arguments(parser: ArgumentParser, *, weights: bool = False) -> None:
    """Adds the flags.

    Args:
        parser: Parser of the command.
        weights: Whether the command reads weights.
    """
    group = parser.add_argument_group("loading")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    group.add_argument("--subfolder", metavar="DIR", help="folder of the model within the folder or repository")
    group.add_argument("--token", metavar="T", help="access token of the hub (default: HF_TOKEN, or the saved one)")
    group.add_argument("--cache_dir", metavar="DIR", help="folder of downloaded files")
    group.add_argument("--local_files_only", action="store_true", help="read downloaded files only")
    if weights:
        group.add_argument("--dtype", default="auto", help="dtype of the weights (default: the saved one)")
        group.add_argument("--attn_implementation", metavar="NAME", help="sdpa, eager, flash_attention_2, ...")


def loading_of(arguments: Namespace) -> "LoadingOptions":
    """Returns the options that the flags give."""
    from hfprune.io.loading import LoadingOptions

    return LoadingOptions(
        dtype=getattr(arguments, "dtype", "auto"),
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        token=arguments.token,
        cache_dir=arguments.cache_dir,
        local_files_only=arguments.local_files_only,
        attn_implementation=getattr(arguments, "attn_implementation", None),
    )
