"""Measuring sensitivity curves within ``fit``, between calibration and pruning."""

from collections.abc import Mapping

from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from hfprune.allocation import Allocation, Sensitivity
from hfprune.arch import is_supported
from hfprune.callbacks.layerwise import share, summed
from hfprune.callbacks.progress import layer_progress
from hfprune.callbacks.target import Target
from hfprune.curves import kl_curves
from hfprune.errors import ConfigError
from hfprune.types import Group


def check_curves(target: Target, allocation: Allocation | None) -> None:
    """Raises ``ConfigError`` when curves are to be measured on what they cannot be, before it is loaded.

    Args:
        target: What is pruned.
        allocation: How the budget is spent.
    """
    if not isinstance(allocation, Sensitivity) or allocation.curves is not None:
        return
    if target.sharded:
        raise ConfigError("Sensitivity measures on whole models: under FSDP2 give it curves.")
    if target.known and not is_supported(target.shapes()):
        raise ConfigError("Sensitivity measures a Hugging Face model that hfprune knows; here is none.")


def measured(
    trainer: Trainer,
    target: Target,
    groups: tuple[Group, ...],
    scores: Mapping[str, Tensor],
    allocation: Allocation | None,
    *,
    seed: int,
) -> Allocation | None:
    """Returns ``allocation``, with curves where it is to measure them; the same on every rank.

    Args:
        trainer: The trainer, in ``fit``.
        target: What is pruned, dense still.
        groups: Its groups.
        scores: Group name -> importance [U].
        allocation: How the budget is spent.
        seed: Seed of the loader's shuffling.
    """
    if not isinstance(allocation, Sensitivity) or allocation.curves is not None:
        return allocation
    strategy = trainer.strategy
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with isolate_rng(), layer_progress(enabled=shown, text="Sensitivity") as done:
        batches = [strategy.batch_to_device(b) for b in share(trainer, seed, sequences=allocation.sequences)]
        with strategy.precision_plugin.forward_context():
            curves = kl_curves(
                target.model,
                groups,
                scores,
                batches,
                allocation.shares,
                reduce=lambda tensor: summed(trainer, tensor),
                done=done,
            )
    return allocation.with_curves(curves)
