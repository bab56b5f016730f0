"""Fidelity to the dense model, without two full [T, V] logit tensors in memory.

The dense model's predictions are stored exactly, as final hidden states and output head, or as the top K logits on
disk. Shape legend: N windows, W tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from hfprune.evaluation.divergence import QUANTITIES, TopK
from hfprune.evaluation.perplexity import Perplexity, Windows, perplexity_from
from hfprune.evaluation.predictions import Fidelity, HeadLogits, Logits
from hfprune.models import output_head
from hfprune.models.forward import window_hidden
from hfprune.objectives import OutputHead
from hfprune.objectives.chunked import CHUNK_BYTES
from hfprune.utils.errors import ConfigError
from hfprune.utils.progress import steps


class Reference(Protocol):
    """Predictions of the dense model on evaluation windows."""

    @property
    def windows(self) -> Windows:
        """The windows."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the dense model predicts."""

    def logits(self, index: int) -> Logits:
        """Returns the logits at the compared positions of one window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseReference:
    """Exact predictions of the dense model, as final hidden states and output head.

    Attributes:
        windows: N windows of W tokens.
        hidden: Final hidden states [N, W, D] of the dense model, on the CPU.
        head: Output head of the dense model.
    """

    windows: Windows
    hidden: Tensor
    head: OutputHead

    @classmethod
    def collect(
        cls, model: nn.Module, windows: Tensor | Windows, *, batch_size: int = 1, copy_head: bool = True
    ) -> "DenseReference":
        """Runs the dense model once.

        Args:
            model: The dense model.
            windows: Token ids [N, W], or windows with their protocol.
            batch_size: Number of windows per forward pass.
            copy_head: Whether to clone the head's weights; shared weights must not be trained.
        """
        head = output_head(model)
        if copy_head:
            bias = None if head.bias is None else head.bias.detach().clone()
            head = replace(head, weight=head.weight.detach().clone(), bias=bias)
        cut = Windows.of(windows)
        return cls(windows=cut, hidden=window_hidden(model, cut.ids, batch_size=batch_size), head=head)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the dense model predicts."""
        return int(self.head.weight.shape[0])

    def logits(self, index: int) -> Logits:
        """Returns the logits of one window, computed lazily."""
        return HeadLogits(self.head, self.hidden[index, self.windows.compared])


@dataclass(frozen=True, slots=True)
class TopLogits:
    """Top K logits of one window.

    Attributes:
        top: [W, K].
        vocab_size: V.
    """

    top: TopK
    vocab_size: int

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.top)

    def __getitem__(self, part: slice) -> TopK:
        """Returns the top K of a part of the tokens."""
        return self.top[part]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKReference:
    """Top K logits of the dense model, for storage on disk; see :mod:`hfprune.evaluation.cache`.

    Attributes:
        windows: N windows of W tokens.
        top: Top K logits of every window, [N, W, K].
        nll: Cross-entropy of token t + 1 at position t, [N, W - 1], nats, float64.
        vocab_size: V.
    """

    windows: Windows
    top: TopK
    nll: Tensor
    vocab_size: int

    def logits(self, index: int) -> Logits:
        """Returns the top K of one window."""
        return TopLogits(self.top[index][self.windows.compared], self.vocab_size)

    def of_dense(self) -> tuple[Perplexity, Fidelity]:
        """Returns perplexity and fidelity of the dense model itself, without a forward pass."""
        count, positions = len(self.windows.ids), len(range(self.windows.window)[self.windows.compared])
        error = 0.0 if count > 1 else None
        same: dict[str, Any] = {}
        for name in QUANTITIES:
            same |= {name: 0.0 if name in ("kl", "reverse_kl", "js_distance") else 1.0, f"{name}_stderr": error}
        figures = Fidelity(
            **same,
            kl_by_position=(0.0,) * positions,
            num_tokens=count * positions,
            num_windows=count,
            dense_top_k=self.top.indices.shape[-1],
        )
        return perplexity_from(self.nll, self.windows), figures


def fidelity(reference: Reference, model: nn.Module, *, batch_size: int = 1) -> Fidelity:
    """Returns the fidelity of ``model``'s predictions to those of the dense model.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).eval()
    >>> import torch
    >>> dense = DenseReference.collect(model, torch.arange(20).view(2, 10))
    >>> fidelity(dense, model).kl, fidelity(dense, model).top1_agreement
    (0.0, 1.0)

    Args:
        reference: The dense model's predictions on N windows.
        model: A supported Hugging Face causal LM with the same vocabulary.
        batch_size: Number of windows per forward pass.

    Raises:
        ConfigError: The vocabularies differ in size, or the reference has no windows.
    """
    hidden = window_hidden(model, reference.windows.ids, batch_size=batch_size)
    return fidelity_of(reference, hidden, output_head(model))


def fidelity_of(reference: Reference, hidden: Tensor, head: OutputHead, *, chunk_bytes: int = CHUNK_BYTES) -> Fidelity:
    """Returns the fidelity from final hidden states [N, W, D']; see :func:`fidelity`."""
    return compare_windows(reference, [HeadLogits(head, row) for row in hidden], chunk_bytes=chunk_bytes)


def compare_windows(reference: Reference, windows: Sequence[HeadLogits], *, chunk_bytes: int = CHUNK_BYTES) -> Fidelity:
    """Returns the fidelity from the logits of every window."""
    from hfprune.evaluation.metrics import FidelityMetric  # torchmetrics takes long to import

    if not reference.windows.ids.numel():
        raise ConfigError(f"The reference windows hold no tokens: windows {list(reference.windows.ids.shape)}.")
    if reference.vocab_size != windows[0].vocab_size:
        raise ConfigError(
            f"The dense model has {reference.vocab_size} tokens, the other model {windows[0].vocab_size}: their "
            "distributions cannot be compared."
        )
    metric = FidelityMetric(chunk_bytes=chunk_bytes, sync_on_compute=False)
    for index, logits in enumerate(windows):
        metric.update(reference.logits(index), logits.part(reference.windows.compared))
        steps(index + 1, len(windows), "compared window")
    return metric.result()
