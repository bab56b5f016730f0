"""Recovery by distillation: logits and hidden states of the dense model as targets.

Shape legend: B rows, T tokens, H hidden size, N real tokens of the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.groups import find_layers
from hfprune.utils.errors import ConfigError


class RecoveryLoss(ABC):
    """A term that recovery adds to the loss of the logits, computed from what its forward pass leaves.

    ``check`` is called before any model is loaded, ``start`` when recovery begins, then ``observing`` and the call for
    every batch. A new loss is a subclass and an entry in :meth:`DistillationRecovery.losses`.

    Args:
        weight: Factor of the term in the loss.

    Attributes:
        name: The term is logged as ``train_<name>``.
    """

    name: str

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def check(self, config: Any) -> None:
        """Raises ``ConfigError`` where the term does not fit the dense model's ``config``."""

    @abstractmethod
    def start(self, student: nn.Module, teacher: nn.Module | None, removed: Collection[int]) -> None:
        """Receives the models.

        Args:
            student: The pruned model.
            teacher: The dense model; None where it is not in memory.
            removed: Layers of the dense model that pruning removed.

        Raises:
            ConfigError: The term does not fit these models.
        """

    @abstractmethod
    def observing(self) -> AbstractContextManager[None]:
        """Returns a context around one forward pass of teacher and student."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, Tensor], counted: Tensor) -> Tensor:
        """Returns the term of the pass that was observed, summed over the tokens that count.

        Args:
            batch: ``input_ids`` [B, T] and the other tensors of the batch.
            counted: [B, T] boolean, the supervised positions.
        """


class HiddenMatching(RecoveryLoss):
    """Distance between the hidden states of the pruned and the dense model; see :func:`hidden_distance`.

    Args:
        weight: Factor of the term in the loss.
        layers: Layers of the dense model whose outputs are compared; None for all that were kept.
    """

    name = "hidden"

    def __init__(self, weight: float, layers: Collection[int] | None = None) -> None:
        super().__init__(weight)
        self.layers = layers

    def check(self, config: Any) -> None:
        """Raises ``ConfigError`` for layers that the dense model does not have."""
        number = config.num_hidden_layers
        if self.layers is not None and max(self.layers) >= number:
            raise ConfigError(
                f"distillation.hidden_layers names layer {max(self.layers)}; the model's {number} layers are 0 to "
                f"{number - 1}."
            )

    def start(self, student: nn.Module, teacher: nn.Module | None, removed: Collection[int]) -> None:
        """Matches the layers of both models."""
        assert teacher is not None, "the settings refuse hidden together with cache"
        check_sizes(student, teacher)
        self._student, self._teacher = student, teacher
        self._pairs = matched_layers(teacher.config.num_hidden_layers, removed, self.layers)  # type: ignore[union-attr, arg-type]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Keeps the outputs of both models' layers."""
        with layer_outputs(self._student) as pruned, layer_outputs(self._teacher) as dense:
            self._outputs = pruned, dense
            yield

    def __call__(self, batch: Mapping[str, Tensor], counted: Tensor) -> Tensor:
        """Returns the distance, summed over the tokens that count."""
        (pruned, dense), self._outputs = self._outputs, ([], [])
        matched = [pruned[i] for i, _ in self._pairs], [dense[j] for _, j in self._pairs]
        return hidden_distance(*matched, counted, batch.get("attention_mask"))


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads a default's __dict__
class DistillationRecovery:
    """Recovery minimises (1 - alpha) CE + alpha t^2 KL to the dense model at the supervised positions.

    The dense model is loaded a second time, frozen, when recovery begins: its weights stay in memory, and every batch
    costs one more forward pass. Logits of both exist a chunk of tokens at a time.

    With ``cache`` its predictions are computed once, before recovery, and kept on disk: the ``top_k`` most likely
    tokens of every supervised position, 6 bytes each, and the share of all others. It is not in memory while the pruned
    model is trained, and a later run on the same data does not load it. KL is then that of p and q with all other
    tokens taken as one: a lower bound.

    Attributes:
        alpha: Weight of KL, in [0, 1]; 1 needs no labels, 0 is plain cross-entropy.
        temperature: t > 0, of teacher and student.
        hidden: Weight of the distance between hidden states, >= 0, which is added to the loss: the mean over layers of
            |h - h_dense|^2 / |h_dense|^2. Not with ``cache``, which holds none.
        hidden_layers: Layers of the dense model whose ends are compared, from 0; those that pruning removed are left
            out. None compares all that are left.
        cache: Folder for the dense model's predictions; None keeps the model itself.
        top_k: How many tokens of each prediction are kept there.
    """

    alpha: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    hidden_layers: tuple[int, ...] | None = None
    cache: str | None = None
    top_k: int = 64

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for values out of range."""
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise ConfigError(
                f"distillation.alpha={self.alpha} must lie in [0, 1] and "
                f"distillation.temperature={self.temperature} must be positive."
            )
        if self.hidden < 0 or (self.hidden and self.cache is not None):
            raise ConfigError(
                f"distillation.hidden={self.hidden} must be a weight >= 0, and 0 with distillation.cache, which holds "
                "no hidden states."
            )
        layers = self.hidden_layers
        if layers is not None and (not self.hidden or not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ConfigError(
                f"distillation.hidden_layers={list(layers)} must name one or more different layers >= 0, and needs "
                f"distillation.hidden > 0 (it is {self.hidden})."
            )
        if self.top_k < 1:
            raise ConfigError(f"distillation.top_k={self.top_k} must be positive.")

    def losses(self) -> list[RecoveryLoss]:
        """Returns the terms that are added to the loss of the logits."""
        return [HiddenMatching(self.hidden, self.hidden_layers)] if self.hidden else []

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, for reports."""
        return asdict(self)


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that receives the output of every layer of a supported model, in order, as it runs.

    Outputs are [B, T, H], or [1, N, H] where packed rows run as one (see :mod:`hfprune.models.forward`).
    """
    found: list[Tensor] = []

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in find_layers(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hidden_distance(
    pruned: Sequence[Tensor], dense: Sequence[Tensor], counted: Tensor, real: Tensor | None = None
) -> Tensor:
    """Returns the sum over tokens of the mean over layers of |h - h_dense|^2 / |h_dense|^2, float32 or wider.

    Each state is measured against the dense one's own size, so that the few tokens and the late layers whose states are
    hundreds of times larger count like the others.

    Args:
        pruned: Outputs [B, T, H], or [1, N, H], of the pruned model's layers.
        dense: Those of the dense model's layers that they are matched with.
        counted: [B, T] boolean, the tokens that count.
        real: [B, T], 0 for padding; None where there is none.
    """
    real = torch.ones_like(counted) if real is None else real.bool()
    total: Tensor | float = 0.0
    for ours, theirs in zip(pruned, dense, strict=True):
        wide = torch.promote_types(ours.dtype, torch.float32)
        target = _chosen(theirs.detach(), counted, real).to(wide)
        error = (_chosen(ours, counted, real).to(wide) - target).square().sum(-1)
        total = total + (error / target.square().sum(-1).clamp(min=torch.finfo(wide).tiny)).sum()
    assert isinstance(total, Tensor)
    return total / len(pruned)


def _chosen(state: Tensor, counted: Tensor, real: Tensor) -> Tensor:
    """Returns the states of the tokens that count, row after row."""
    return state[counted] if state.shape[:2] == counted.shape else state[0, counted[real]]


def matched_layers(number: int, removed: Collection[int], chosen: Collection[int] | None) -> list[tuple[int, int]]:
    """Returns which layer of the pruned model is matched with which of the dense one.

    >>> matched_layers(4, removed=(1,), chosen=(1, 2))
    [(1, 2)]

    Args:
        number: Layers of the dense model.
        removed: Those of them that were removed.
        chosen: Those of them whose ends are compared; None for all.

    Raises:
        ConfigError: None is left.
    """
    kept = [layer for layer in range(number) if layer not in removed]
    found = [(place, layer) for place, layer in enumerate(kept) if chosen is None or layer in chosen]
    if not found:
        raise ConfigError(f"distillation.hidden_layers={sorted(chosen or ())} were all removed; kept layers: {kept}.")
    return found


def check_sizes(pruned: nn.Module, dense: nn.Module) -> None:
    """Raises ``ConfigError`` where hidden states have different sizes."""
    ours, theirs = (model.config.hidden_size for model in (pruned, dense))  # type: ignore[union-attr]
    if ours != theirs:
        raise ConfigError(
            f"distillation.hidden compares hidden states, but those of the pruned model have {ours} channels and those "
            f"of the dense model {theirs}: set it to 0, or remove 'channels' from the units."
        )
