"""Predictions of a model on a window, and their fidelity to the dense model's.

Shape legend: W tokens of a window, D hidden size, T tokens of a part of it, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from hfprune.evaluation.divergence import TopK
from hfprune.objectives import OutputHead


class Logits(Protocol):
    """Lazily computed logits of one window."""

    def __len__(self) -> int:
        """Returns the number of tokens."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, also for top K logits."""

    def __getitem__(self, part: slice) -> Tensor | TopK:
        """Returns the logits [T, V] of ``part``, or their top K."""


@dataclass(frozen=True, slots=True)
class HeadLogits:
    """Logits computed from final hidden states for the requested tokens.

    Attributes:
        head: The output head.
        hidden: Final hidden states [W, D], on any device.
    """

    head: OutputHead
    hidden: Tensor

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.hidden)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V."""
        return int(self.head.weight.shape[0])

    def __getitem__(self, part: slice) -> Tensor:
        """Returns logits [T, V], float32 or wider, on the head's device."""
        return self.head.logits(self.hidden[part].to(self.head.weight.device))

    def part(self, part: slice) -> "HeadLogits":
        """Returns the logits of a part of the window."""
        return self if part == slice(None) else HeadLogits(self.head, self.hidden[part])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Fidelity of a model's predictions to the dense model's, averaged over tokens and windows.

    The quantities are defined in :func:`hfprune.evaluation.divergence.divergences`. Standard errors are over windows,
    and None for a single window or a mean that is not finite.

    Attributes:
        kl: KL(dense || model), nats per token; infinite if the model gives a possible token probability zero.
        kl_stderr: Its standard error.
        reverse_kl: KL(model || dense), nats per token.
        reverse_kl_stderr: Its standard error.
        js_distance: Jensen-Shannon distance per token, natural logarithm: 0 to 0.833.
        js_distance_stderr: Its standard error.
        top1_agreement: Share of positions with the same most likely token.
        top1_agreement_stderr: Its standard error.
        jaccard_5: Jaccard index of the five most likely tokens.
        jaccard_5_stderr: Its standard error.
        jaccard_15: Jaccard index of the fifteen most likely tokens.
        jaccard_15_stderr: Its standard error.
        kl_by_position: Mean KL at each position of the windows.
        num_tokens: Number of compared positions.
        num_windows: Number of compared windows.
        dense_top_k: Number of known tokens of the dense distribution, for which divergences are lower bounds; None if
            all are known.
    """

    kl: float
    kl_stderr: float | None
    reverse_kl: float
    reverse_kl_stderr: float | None
    js_distance: float
    js_distance_stderr: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None
    jaccard_5: float
    jaccard_5_stderr: float | None
    jaccard_15: float
    jaccard_15_stderr: float | None
    kl_by_position: tuple[float, ...]
    num_tokens: int
    num_windows: int
    dense_top_k: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as plain data."""
        return asdict(self)
