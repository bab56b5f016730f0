"""What the commands build from their arguments: one LightningCLI for each, in a file of its own."""

from collections.abc import Sequence

from hfprune.commands.base import BaseCLI
from hfprune.commands.evaluate import EvaluateCLI
from hfprune.commands.export import ExportCLI
from hfprune.commands.lora_prune import FLAGS as LORA_PRUNE_FLAGS
from hfprune.commands.lora_prune import LoraPruneCLI
from hfprune.commands.run import RunCLI
from hfprune.commands.sparse import FLAGS as SPARSE_FLAGS
from hfprune.commands.sparse import SparseCLI, asks_for
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
    """Returns the LightningCLI of ``command``; ``fit`` and ``prune`` have others for methods of another kind."""
    if command in ("fit", "prune") and asks_for(args, SPARSE_FLAGS):
        return SparseCLI
    if command == "fit" and asks_for(args, LORA_PRUNE_FLAGS):
        return LoraPruneCLI
    return CLASSES[command]


__all__ = ["CLASSES", "BaseCLI", "command_class"]
