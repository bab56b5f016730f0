"""What the commands build from their arguments: one LightningCLI for each, in a file of its own."""

from hfprune.commands.base import BaseCLI
from hfprune.commands.evaluate import EvaluateCLI
from hfprune.commands.export import ExportCLI
from hfprune.commands.run import RunCLI
from hfprune.commands.sweep import SweepCLI

CLASSES: dict[str, type[BaseCLI]] = {
    "fit": RunCLI,
    "prune": RunCLI,
    "evaluate": EvaluateCLI,
    "sweep": SweepCLI,
    "export": ExportCLI,
}
"""Command -> its LightningCLI."""

__all__ = ["CLASSES", "BaseCLI"]
