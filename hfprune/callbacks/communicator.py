"""Communicator of a Lightning Trainer, and logging on process 0."""

from typing import Any

from lightning import Trainer
from torch import Tensor

from hfprune.pruning import communicator as core


class LightningCommunicator:
    """The processes of a ``Trainer``, for scoring and planning; see :class:`hfprune.pruning.communicator.Communicator`.

    Args:
        trainer: The trainer, with its strategy set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        return self._trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._trainer.world_size

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of ``tensor`` over all processes."""
        total: Tensor = self._trainer.strategy.reduce(tensor.clone(), reduce_op="sum")
        return total

    def broadcast(self, value: Any) -> Any:
        """Returns the ``value`` of process 0."""
        return self._trainer.strategy.broadcast(value)


def say(trainer: Trainer, text: str) -> None:
    """Logs ``text`` on process 0."""
    core.say(LightningCommunicator(trainer), text)


def warn(trainer: Trainer, text: str) -> None:
    """Logs a warning on process 0, unless ``text`` is empty."""
    core.warn(LightningCommunicator(trainer), text)
