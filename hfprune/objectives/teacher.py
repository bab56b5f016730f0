"""Teachers: models whose predictions an objective follows, in memory or on disk.

Shape legend: B rows, T tokens, V vocabulary, D hidden size, N tokens that count.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hfprune.objectives.output_head import OutputHead
from hfprune.objectives.top_k import KnownTop


class TokenPredictions(Protocol):
    """A teacher's predictions for N tokens."""

    def logits(self, part: slice) -> Any:
        """Returns the logits [C, V] of some tokens, or the :class:`~hfprune.objectives.top_k.KnownTop` of them."""


class Predictions(Protocol):
    """A teacher's predictions for a batch."""

    def at(self, valid: Tensor) -> TokenPredictions:
        """Returns the predictions at the N tokens where ``valid``, [B, T] boolean, holds, row after row."""


@dataclass(frozen=True, slots=True)
class HiddenPredictions:
    """Predictions as final hidden states and an output head, so that logits exist for one chunk of tokens only.

    Attributes:
        hidden: [B, T, D]; [N, D] once tokens were selected.
        head: The teacher's output head.
    """

    hidden: Tensor
    head: OutputHead

    def at(self, valid: Tensor) -> "HiddenPredictions":
        """Returns the predictions where ``valid`` [B, T] holds."""
        chosen = self.hidden.flatten(0, 1) if bool(valid.all()) else self.hidden[valid]
        return HiddenPredictions(chosen, self.head)

    def logits(self, part: slice) -> Tensor:
        """Returns the logits [C, V] of the selected tokens in ``part``, in memory of their own."""
        return self.head.logits(self.hidden[part])


Forward = Callable[[nn.Module], HiddenPredictions]
"""Runs a model on the batch at hand."""


class Teacher(ABC):
    """A model that an objective follows.

    Attributes:
        name: What an objective's name calls it.
        model: The model that is in memory for this purpose; None without one.
    """

    name: str
    model: nn.Module | None = None

    @abstractmethod
    def predict(self, student: nn.Module, batch: Mapping[str, Tensor], forward: Forward) -> Predictions:
        """Returns the predictions for a batch, without gradients; called before the student's forward pass.

        Args:
            student: The model that follows.
            batch: ``input_ids`` [B, T] and the other tensors of a batch.
            forward: Runs a model on ``batch``.
        """


class DenseModel(Teacher):
    """Another model in memory.

    Args:
        model: A supported causal LM with the student's vocabulary, in eval mode.
    """

    name = "the dense model"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def predict(self, student: nn.Module, batch: Mapping[str, Tensor], forward: Forward) -> HiddenPredictions:
        """Runs the model."""
        assert self.model is not None
        with torch.no_grad():
            return forward(self.model)


class UnmaskedSelf(Teacher):
    """The student itself while nothing of it is masked.

    Args:
        unmasked: Context in which the student's masks are lifted.
    """

    name = "the model itself"

    def __init__(self, unmasked: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.unmasked = unmasked

    def predict(self, student: nn.Module, batch: Mapping[str, Tensor], forward: Forward) -> HiddenPredictions:
        """Runs the student without its masks."""
        with torch.no_grad(), self.unmasked():
            return forward(student)


class CachedTopK(Teacher):
    """Predictions that were stored, of which the most likely tokens are known.

    Args:
        lookup: Takes a batch and where tokens count, [B, T]; returns what is stored for these N tokens.
    """

    name = "the dense model's cached predictions"

    def __init__(self, lookup: Callable[[Mapping[str, Tensor], Tensor], KnownTop]) -> None:
        self.lookup = lookup

    def predict(self, student: nn.Module, batch: Mapping[str, Tensor], forward: Forward) -> "_Stored":
        """Returns the predictions, which are read when the tokens that count are known."""
        return _Stored(self.lookup, batch)


@dataclass(frozen=True, slots=True)
class _Stored:
    lookup: Callable[[Mapping[str, Tensor], Tensor], KnownTop]
    batch: Mapping[str, Tensor]

    def at(self, valid: Tensor) -> KnownTop:
        return self.lookup(self.batch, valid)
