"""Calibration data of a Lightning Trainer: a ``calibration_dataloader()``, or the training batches."""

from functools import partial
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from hfprune.pruning.calibration import CalibrationData
from hfprune.utils.errors import ConfigError


def calibration_data(trainer: Trainer, seed: int) -> CalibrationData:
    """Returns the calibration data of a trainer's module or datamodule.

    Args:
        trainer: The trainer, its module and data attached.
        seed: Seed of what the loader shuffles.
    """
    summary = partial(data_summary, trainer)
    return CalibrationData(batches=partial(data_loader, trainer), seed=seed, summary=summary)


def check_source(trainer: Trainer, *, limit: int | None) -> None:
    """Raises ``ConfigError`` unless there is calibration data: before any of it is read.

    Args:
        trainer: The trainer, its module and data attached.
        limit: Number of batches to use; needed when the training data serve.
    """
    if _owner(trainer) is not None:
        return
    if not trainer.fit_loop._data_source.is_defined():
        raise ConfigError(
            "TaylorImportanceCallback needs calibration data: a datamodule or module with a calibration_dataloader() "
            "method, or training data with calibration_batches=N."
        )
    if limit is None:
        raise ConfigError(
            "There is no calibration_dataloader(), so the training data calibrate: say how many of its batches with "
            "calibration_batches=N."
        )


def _owner(trainer: Trainer) -> Any:
    """Returns the datamodule or module that has calibration data of its own, None when neither has."""
    owners: list[Any] = [trainer.datamodule, trainer.lightning_module]  # type: ignore[attr-defined]
    return next((o for o in owners if callable(getattr(o, "calibration_dataloader", None))), None)


def data_loader(trainer: Trainer) -> Any:
    """Returns the calibration batches: ``calibration_dataloader()``, or the training batches read afresh.

    The training batches are read as the user's loader gives them, without a distributed sampler: each process sees the
    same batches in the same order, and takes its share of them.
    """
    owner = _owner(trainer)
    if owner is not None:
        return owner.calibration_dataloader()
    loader = trainer.fit_loop._data_source.dataloader()
    if isinstance(loader, list | tuple | dict):
        loader = CombinedLoader(loader, "max_size_cycle")
    if isinstance(loader, CombinedLoader):
        return (batch for batch, _, _ in loader)
    return loader


def data_summary(trainer: Trainer, role: str) -> Any:
    """Returns the provenance of the datamodule's data for ``role``, None when it has none."""
    summary = getattr(trainer.datamodule, "summary", None)  # type: ignore[attr-defined]
    return summary().get(role) if callable(summary) else None
