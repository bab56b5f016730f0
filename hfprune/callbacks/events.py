"""The two moments that hfprune adds to Lightning's lifecycle."""

from lightning import LightningModule, Trainer

from hfprune.plan import PruningPlan


class PruningEvents:
    """Mix into a callback to be told when a model is about to be calibrated and when it has been pruned.

    Both run inside ``on_fit_start``, on every rank, in the order of ``trainer.callbacks``.
    """

    @property
    def needs_stock(self) -> bool:
        """Whether what the callback writes is described by a stock config of the model's class."""
        return False

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with the dense model in place, before calibration."""

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, plan: PruningPlan) -> None:
        """Called with the pruned model in place, before adapters are added and optimizers rebuilt."""


def listeners(trainer: Trainer) -> list[PruningEvents]:
    """Returns the trainer's callbacks that listen."""
    return [callback for callback in trainer.callbacks if isinstance(callback, PruningEvents)]  # type: ignore[attr-defined]


def needs_stock(trainer: Trainer) -> bool:
    """Returns whether a stock config has to describe what pruning leaves, because a callback writes it so."""
    return any(listener.needs_stock for listener in listeners(trainer))
