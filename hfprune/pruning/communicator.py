"""Communicators: the operations between processes that scoring and planning use."""

import logging
from typing import Any, Protocol

from torch import Tensor

_log = logging.getLogger("hfprune.pruning")


class Communicator(Protocol):
    """The processes that share a calibration.

    ``hfprune.callbacks.communicator.LightningCommunicator`` implements it for a Lightning ``Trainer``.
    """

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of ``tensor`` over all processes, as a new tensor. Collective."""

    def broadcast(self, value: Any) -> Any:
        """Returns the ``value`` of process 0. Collective."""


class LocalCommunicator:
    """Communicator of a single process.

    >>> import torch
    >>> LocalCommunicator().sum(torch.tensor([2.0]))
    tensor([2.])
    """

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns a copy of ``tensor``."""
        return tensor.clone()

    def broadcast(self, value: Any) -> Any:
        """Returns ``value``."""
        return value


def say(communicator: Communicator, text: str) -> None:
    """Logs ``text`` on process 0."""
    if communicator.rank == 0:
        _log.info(text)


def warn(communicator: Communicator, text: str) -> None:
    """Logs a warning on process 0, unless ``text`` is empty."""
    if text and communicator.rank == 0:
        _log.warning("WARNING: %s", text)
