"""Choosing units and fitting weights layer by layer, within ``fit``: the calibration data spread over the ranks."""

from collections.abc import Mapping
from itertools import islice

import torch
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from hfprune.allocation import Allocation
from hfprune.arch import is_supported
from hfprune.callbacks.calibrate import data_loader, seed_data
from hfprune.callbacks.progress import layer_progress
from hfprune.callbacks.target import Target
from hfprune.causal import as_batch
from hfprune.causal import sequences as split
from hfprune.compensation import Compensation
from hfprune.criteria import Criterion, LayerwiseCriterion
from hfprune.errors import ConfigError
from hfprune.layerwise import LayerwisePass, LayerwiseResult, check_together
from hfprune.recording import evaluating
from hfprune.types import Group


def check_layerwise(
    target: Target, criterion: Criterion, compensation: Compensation | None, allocation: Allocation | None = None
) -> None:
    """Raises ``ConfigError`` when units or weights are to be found layer by layer and that does not fit what is pruned.

    Args:
        target: What is pruned, before it is loaded.
        criterion: How units are chosen.
        compensation: How weights are fitted.
        allocation: How the budget is spent.
    """
    if compensation is None and not isinstance(criterion, LayerwiseCriterion):
        return
    asked = type(compensation or criterion).__name__
    if target.known and not is_supported(target.shapes()):
        raise ConfigError(f"{asked} goes through the layers of a Hugging Face model that hfprune knows; here is none.")
    inventory, model = (target.inventory(), target.shapes()) if target.known else (None, None)
    check_together(criterion, compensation, target.units, allocation, inventory, model=model)


def run_layerwise(
    trainer: Trainer,
    target: Target,
    groups: tuple[Group, ...],
    widths: Mapping[str, int],
    *,
    keep: Mapping[str, tuple[int, ...]] | None,
    criterion: LayerwiseCriterion | None,
    compensation: Compensation | None,
    limit: int | None,
    seed: int,
) -> LayerwiseResult:
    """Runs the pass through the layers on the calibration data and returns what it found, the same on every rank.

    Sequence i of the data, counted over all ranks, goes to rank ``i mod world_size``. Moments are summed over the ranks
    in floating point: with another number of processes the fitted weights may differ in their last bits.

    Args:
        trainer: The trainer, in ``fit``.
        target: What is pruned.
        groups: Its groups.
        widths: Kept units per group.
        keep: Kept units that were chosen before, or None.
        criterion: Chooses units where ``keep`` is None.
        compensation: How weights are fitted, or None.
        limit: Use at most this many batches.
        seed: Seed of the loader's shuffling.

    Raises:
        CalibrationError: A rank has no sequence.
    """
    strategy = trainer.strategy
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with isolate_rng(), evaluating(target.module), torch.no_grad(), layer_progress(enabled=shown) as done:
        batches = share(trainer, seed, limit=limit)
        work = LayerwisePass(
            target.model,
            groups,
            compensation=compensation,
            reduce=lambda tensor: summed(trainer, tensor),
        )
        with strategy.precision_plugin.forward_context():
            return work.run(batches, widths, keep=keep, criterion=criterion, done=done)


def share(
    trainer: Trainer, seed: int, *, limit: int | None = None, sequences: int | None = None
) -> list[dict[str, Tensor]]:
    """Returns this rank's calibration sequences: sequence i, counted over all ranks, goes to rank i mod world size.

    Args:
        trainer: The trainer, in ``fit``.
        seed: Seed of the loader's shuffling.
        limit: Use at most this many batches.
        sequences: Use at most this many sequences, of all ranks together.
    """
    seed_data(seed)
    found = (sequence for batch in islice(data_loader(trainer), limit) for sequence in split(as_batch(batch)))
    return list(islice(found, trainer.global_rank, sequences, trainer.world_size))


def summed(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Returns a tensor's sum over the ranks."""
    total: Tensor = trainer.strategy.reduce(tensor.clone(), reduce_op="sum")
    return total
