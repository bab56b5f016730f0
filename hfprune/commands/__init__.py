"""What the commands build from their arguments: one LightningCLI for each, in a file of its own."""

from collections.abc import Sequence

from hfprune.commands.base import BaseCLI
from hfprune.commands.evaluate import EvaluateCLI
from hfprune.commands.export import ExportCLI
from hfprune.commands.run import RunCLI
from hfprune.commands.sparse import SparseCLI, asks_for_sparsity
from hfprune.commands.sweep import SweepCLI

CLASSES: dict[str, type[BaseCLI]] = {
    "fit": RunCLI,
    "prune": RunCLI,
    "evaluate": EvaluateCLI,
    "sweep": SweepCLI,
    "export": ExportCLI,
}
"""Command -> its LightningCLI."""


def command_class(command: str, args: Sequence[str]) -> type[BaseCLI]:
    """Returns the LightningCLI of ``command``; ``fit`` and ``prune`` have another one for sparse methods."""
    found = CLASSES[command]
    return SparseCLI if found is RunCLI and asks_for_sparsity(args) else found


__all__ = ["CLASSES", "BaseCLI", "command_class"]
