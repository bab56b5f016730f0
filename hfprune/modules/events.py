"""PruningEvents: additional callback hooks for pruning."""

from lightning import LightningModule, Trainer

from hfprune.plan import PruningPlan


class PruningEvents:
    """Mixin for Lightning callbacks with hooks for pruning, which do nothing by default.

    The hooks run on every rank, in the order of ``trainer.callbacks``.

    Example:
        >>> from lightning.pytorch.callbacks import Callback
        >>> class PrintSize(Callback, PruningEvents):
        ...     def on_pruning_end(self, trainer, pl_module, plan):
        ...         print(sum(p.numel() for p in pl_module.parameters()))
    """

    @property
    def needs_stock(self) -> bool:
        """Whether the callback saves the model with a stock config, which restricts the allocation."""
        return False

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called in ``on_fit_start`` with the dense model, before calibration."""

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, plan: PruningPlan) -> None:
        """Called with the pruned model, before adapters are added and optimizers are rebuilt."""

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before every optimizer step of a ``PruningModule``, before gradients are clipped."""
