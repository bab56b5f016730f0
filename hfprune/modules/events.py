"""PruningEvents: the hooks that a callback can add to Lightning's to follow pruning."""

from lightning import LightningModule, Trainer

from hfprune.plan import PruningPlan


class PruningEvents:
    """Mix into a Lightning callback to receive the events of pruning; every hook does nothing by default.

    The hooks run on every rank, in the order of ``trainer.callbacks``.

    Example:
        >>> from lightning.pytorch.callbacks import Callback
        >>> class PrintSize(Callback, PruningEvents):
        ...     def on_pruning_end(self, trainer, pl_module, plan):
        ...         print(sum(p.numel() for p in pl_module.parameters()))
    """

    @property
    def needs_stock(self) -> bool:
        """Whether the callback writes the model with a stock config of its class, which restricts allocations."""
        return False

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called in ``on_fit_start`` with the dense model in place, before calibration."""

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, plan: PruningPlan) -> None:
        """Called with the pruned model in place, before adapters are added and optimizers rebuilt."""

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before every optimizer step of a ``PruningModule``, with the gradients before they are clipped."""
