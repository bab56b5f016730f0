"""Teachers of distillation objectives: models in memory, and cached predictions.

Shape legend: B rows, T tokens, V vocabulary, D hidden size, N tokens that count, C tokens of a chunk.
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
    """Predictions of a teacher for N tokens."""

    def logits(self, part: slice) -> Any:
        """Returns the logits [C, V] of a range of tokens, or their :class:`~hfprune.objectives.top_k.KnownTop`."""


class Predictions(Protocol):
    """Predictions of a teacher for a batch."""

    def at(self, valid: Tensor) -> TokenPredictions:
        """Returns the predictions at the N tokens selected by ``valid``, [B, T] boolean, in row-major order."""


@dataclass(frozen=True, slots=True)
class HiddenPredictions:
    """Predictions as final hidden states and an output head; logits are computed one chunk of tokens at a time.

    Attributes:
        hidden: [B, T, D], or [N, D] after :meth:`at`.
        head: Output head of the teacher.
    """

    hidden: Tensor
    head: OutputHead

    def at(self, valid: Tensor) -> "HiddenPredictions":
        """Returns the predictions at the tokens selected by ``valid`` [B, T]."""
        chosen = self.hidden.flatten(0, 1) if bool(valid.all()) else self.hidden[valid]
        return HiddenPredictions(chosen, self.head)

    def logits(self, part: slice) -> Tensor:
        """Returns the logits [C, V] of a range of the selected tokens, as a new tensor."""
        return self.head.logits(self.hidden[part])


Forward = Callable[[nn.Module], HiddenPredictions]
"""Function that runs a model on the current batch."""


class Teacher(ABC):
    """Base class of teachers.

    Attributes:
        name: Name of the teacher in the objective's name.
        model: Model held in memory by the teacher, or None.
    """

    name: str
    model: nn.Module | None = None

    @abstractmethod
    def predict(self, student: nn.Module, batch: Mapping[str, Tensor], forward: Forward) -> Predictions:
        """Returns the predictions for a batch, without gradients. Called before the student's forward pass.

        Args:
            student: The student.
            batch: ``input_ids`` [B, T] and the other tensors of a batch.
            forward: Function that runs a model on ``batch``.
        """


class DenseModel(Teacher):
    """Teacher that is a separate model in memory.

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
    """Teacher that is the student itself without masks.

    Args:
        unmasked: Context manager that disables the student's masks.
    """

    name = "the model itself"

    def __init__(self, unmasked: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.unmasked = unmasked

    def predict(self, student: nn.Module, batch: Mapping[str, Tensor], forward: Forward) -> HiddenPredictions:
        """Runs the student without its masks."""
        with torch.no_grad(), self.unmasked():
            return forward(student)


class CachedTopK(Teacher):
    """Teacher whose predictions were stored; only the most likely tokens are known.

    Args:
        lookup: Function of a batch and a mask [B, T] that returns the stored predictions of the N selected tokens.
    """

    name = "the dense model's cached predictions"

    def __init__(self, lookup: Callable[[Mapping[str, Tensor], Tensor], KnownTop]) -> None:
        self.lookup = lookup

    def predict(self, student: nn.Module, batch: Mapping[str, Tensor], forward: Forward) -> "_Stored":
        """Returns the stored predictions; they are read when tokens are selected."""
        return _Stored(self.lookup, batch)


@dataclass(frozen=True, slots=True)
class _Stored:
    lookup: Callable[[Mapping[str, Tensor], Tensor], KnownTop]
    batch: Mapping[str, Tensor]

    def at(self, valid: Tensor) -> KnownTop:
        return self.lookup(self.batch, valid)
