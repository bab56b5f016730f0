"""Recovery with distillation: logits and hidden states of the dense model as targets.

Shape legend: B rows, T tokens, H hidden size, N real tokens of the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfprune.models.groups import find_layers
from hfprune.utils.errors import ConfigError


class RecoveryLoss(ABC):
    """Base class of loss terms that are added to the loss of the logits.

    ``check`` is called before any model is loaded, and ``start`` when recovery starts. For every batch, the forward
    passes run inside ``observing``, and the call then returns the term. A new loss is a subclass, and a field and an
    entry of :class:`DistillationRecovery`.

    Args:
        weight: Factor of the term in the loss.

    Attributes:
        name: Field of :class:`DistillationRecovery` with the weight; the term is logged as ``train_<name>``.
        compares_states: Whether hidden states of both models are compared, which must have the same size.
    """

    name: ClassVar[str]
    compares_states: ClassVar[bool] = False

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def check(self, config: Any) -> None:
        """Raises ``ConfigError`` if the term is incompatible with the dense model's ``config``."""

    @abstractmethod
    def start(self, student: nn.Module, teacher: nn.Module | None, removed: Collection[int]) -> None:
        """Prepares the term for the models.

        Args:
            student: The pruned model.
            teacher: The dense model, or None if it is not in memory.
            removed: Indices of the removed layers of the dense model.

        Raises:
            ConfigError: The term is incompatible with these models.
        """

    @abstractmethod
    def observing(self) -> AbstractContextManager[None]:
        """Returns a context for one forward pass of teacher and student."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, Tensor], counted: Tensor) -> Tensor:
        """Returns the term of the observed forward pass, summed over supervised tokens.

        Args:
            batch: ``input_ids`` [B, T] and the other tensors of the batch.
            counted: Supervised positions [B, T], bool.
        """


class HiddenMatching(RecoveryLoss):
    """Distance between the hidden states of the pruned and the dense model; see :func:`hidden_distance`.

    Args:
        weight: Factor of the term in the loss.
        layers: Indices of the dense model's layers whose outputs are compared; None for all kept layers.
    """

    name = "hidden"
    compares_states = True

    def __init__(self, weight: float, layers: Collection[int] | None = None) -> None:
        super().__init__(weight)
        self.layers = layers

    def check(self, config: Any) -> None:
        """Raises ``ConfigError`` if the dense model does not have these layers."""
        number = config.num_hidden_layers
        if self.layers is not None and max(self.layers) >= number:
            raise ConfigError(
                f"distillation.hidden_layers contains layer {max(self.layers)}, but the model has layers 0 to "
                f"{number - 1}."
            )

    def start(self, student: nn.Module, teacher: nn.Module | None, removed: Collection[int]) -> None:
        """Matches the layers of both models."""
        assert teacher is not None, "the settings refuse hidden together with cache"
        check_sizes(student, teacher, self.name)
        self._student, self._teacher = student, teacher
        self._pairs = matched_layers(teacher.config.num_hidden_layers, removed, self.layers)  # type: ignore[union-attr, arg-type]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Records the outputs of the layers of both models."""
        with layer_outputs(self._student) as pruned, layer_outputs(self._teacher) as dense:
            self._outputs = pruned, dense
            yield

    def __call__(self, batch: Mapping[str, Tensor], counted: Tensor) -> Tensor:
        """Returns the distance, summed over supervised tokens."""
        (pruned, dense), self._outputs = self._outputs, ([], [])
        matched = [pruned[i] for i, _ in self._pairs], [dense[j] for _, j in self._pairs]
        return hidden_distance(*matched, counted, batch.get("attention_mask"))


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads a default's __dict__
class DistillationRecovery:
    """Recovery with the loss (1 - alpha) CE + alpha t^2 KL(dense || pruned) at supervised positions.

    Source: Hinton, Vinyals and Dean, 2015, arXiv:1503.02531.

    The frozen dense model is loaded when recovery starts, and runs one forward pass per batch. Logits of both models
    are computed for one chunk of tokens at a time.

    With ``cache``, the dense model's predictions are computed once before recovery and stored on disk: the ``top_k``
    most likely tokens of every supervised position, with 6 bytes each, and the total probability of the others. The
    dense model is not in memory during training, and later runs on the same data do not load it. The KL divergence then
    treats all other tokens as one, which gives a lower bound.

    Attributes:
        alpha: Weight of the KL divergence, in [0, 1]; 1 needs no labels, 0 is plain cross-entropy.
        temperature: Temperature t > 0 of teacher and student.
        hidden: Weight >= 0 of the distance between hidden states, the mean over layers of |h - h_dense|^2 /
            |h_dense|^2. Must be 0 with ``cache``.
        hidden_layers: Indices of the dense model's layers whose outputs are compared, without removed layers; None for
            all kept layers.
        cache: Folder for the dense model's predictions; None keeps the dense model in memory.
        top_k: Number of stored tokens per prediction.

    Example:
        >>> [loss.name for loss in DistillationRecovery(alpha=0.9, hidden=0.1).losses()]
        ['hidden']
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
                f"distillation.hidden={self.hidden} must be >= 0, and 0 with distillation.cache, which stores no "
                "hidden states."
            )
        layers = self.hidden_layers
        if layers is not None and (not self.hidden or not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ConfigError(
                f"distillation.hidden_layers={list(layers)} must contain one or more different layers >= 0, and "
                f"requires distillation.hidden > 0 (it is {self.hidden})."
            )
        if self.top_k < 1:
            raise ConfigError(f"distillation.top_k={self.top_k} must be positive.")

    def losses(self) -> list[RecoveryLoss]:
        """Returns the terms added to the loss of the logits."""
        return [HiddenMatching(self.hidden, self.hidden_layers)] if self.hidden else []

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, for reports."""
        return asdict(self)


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list to which the layers of a supported model append their outputs.

    Outputs are [B, T, H], or [1, N, H] if packed rows run as one (see :mod:`hfprune.models.forward`).
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

    The distance is relative to the norm of each dense state, since the states of few tokens and of late layers are
    hundreds of times larger than the others.

    Args:
        pruned: Outputs [B, T, H], or [1, N, H], of the pruned model's layers.
        dense: Outputs of the matching layers of the dense model.
        counted: Tokens to sum over [B, T], bool.
        real: Attention mask [B, T], 0 for padding; None without padding.
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
    """Returns the states of the counted tokens in row-major order."""
    return state[counted] if state.shape[:2] == counted.shape else state[0, counted[real]]


def matched_layers(number: int, removed: Collection[int], chosen: Collection[int] | None) -> list[tuple[int, int]]:
    """Returns pairs of a layer of the pruned model and the matching layer of the dense model.

    >>> matched_layers(4, removed=(1,), chosen=(1, 2))
    [(1, 2)]

    Args:
        number: Number of layers of the dense model.
        removed: Indices of the removed layers.
        chosen: Indices of the compared layers of the dense model; None for all.

    Raises:
        ConfigError: All chosen layers were removed.
    """
    kept = [layer for layer in range(number) if layer not in removed]
    found = [(place, layer) for place, layer in enumerate(kept) if chosen is None or layer in chosen]
    if not found:
        raise ConfigError(f"distillation.hidden_layers={sorted(chosen or ())} were all removed; kept layers: {kept}.")
    return found


def check_sizes(pruned: nn.Module, dense: nn.Module, name: str = HiddenMatching.name) -> None:
    """Raises ``ConfigError`` if the hidden states, which the loss ``name`` compares, have different sizes."""
    ours, theirs = (model.config.hidden_size for model in (pruned, dense))  # type: ignore[union-attr]
    if ours != theirs:
        raise ConfigError(
            f"distillation.{name} compares hidden states, which have {ours} channels in the pruned model and {theirs} "
            "in the dense model: set it to 0, or remove 'channels' from the units."
        )
