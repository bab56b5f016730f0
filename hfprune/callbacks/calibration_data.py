"""Calibration data of a Lightning Trainer: a ``calibration_dataloader()``, or the training batches."""

from functools import partial
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from hfprune.pruning.calibration import CalibrationData
from hfprune.utils.compat import training_source
from hfprune.utils.errors import ConfigError


def calibration_data(trainer: Trainer, seed: int) -> CalibrationData:
    """Returns the calibration data of a trainer's module or datamodule.

    Args:
        trainer: The trainer, with its module and data attached.
        seed: Seed of the loader's shuffling.
    """
    summary = partial(data_summary, trainer)
    return CalibrationData(batches=partial(data_loader, trainer), seed=seed, summary=summary)


def check_source(trainer: Trainer, *, limit: int | None) -> None:
    """Raises ``ConfigError`` if there is no calibration data; reads no data.

    Args:
        trainer: The trainer, with its module and data attached.
        limit: Number of batches to use; required if the training data are used.
    """
    if _owner(trainer) is not None:
        return
    if not training_source(trainer).is_defined():
        raise ConfigError(
            "Calibration data are missing: provide a datamodule or module with a calibration_dataloader() method, or "
            "training data and calibration_batches=N."
        )
    if limit is None:
        raise ConfigError(
            "There is no calibration_dataloader(), so the training data are used for calibration: set the number of "
            "batches with calibration_batches=N."
        )


def _owner(trainer: Trainer) -> Any:
    """Returns the datamodule or module that has a ``calibration_dataloader()``, or None."""
    owners: list[Any] = [trainer.datamodule, trainer.lightning_module]  # type: ignore[attr-defined]
    return next((o for o in owners if callable(getattr(o, "calibration_dataloader", None))), None)


def data_loader(trainer: Trainer) -> Any:
    """Returns the loader of the calibration batches: ``calibration_dataloader()``, or a new training loader.

    The training loader has no distributed sampler: every process reads the same batches in the same order, and uses its
    share of them.
    """
    owner = _owner(trainer)
    if owner is not None:
        return owner.calibration_dataloader()
    loader = training_source(trainer).dataloader()
    if isinstance(loader, list | tuple | dict):
        loader = CombinedLoader(loader, "max_size_cycle")
    if isinstance(loader, CombinedLoader):
        return (batch for batch, _, _ in loader)
    return loader


def data_summary(trainer: Trainer, role: str) -> Any:
    """Returns the provenance of the datamodule's data for ``role``, or None."""
    summary = getattr(trainer.datamodule, "summary", None)  # type: ignore[attr-defined]
    return summary().get(role) if callable(summary) else None
