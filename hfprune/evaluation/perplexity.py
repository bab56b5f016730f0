"""Perplexity over fixed windows of evaluation text."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.evaluation.predictions import HeadLogits
from hfprune.models import output_head
from hfprune.models.forward import window_hidden
from hfprune.objectives import OutputHead
from hfprune.objectives.chunked import chunk_tokens
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of a token stream.

    Attributes:
        ids: Token ids [N, W], int64, without padding.
        source: Name of the corpus as given by the user.
        stride: Number of text tokens between the starts of windows. With a stride smaller than the text tokens of a
            window, windows overlap, and only the last ``stride`` tokens of each are scored (all of the first window).
        bos: Whether every window starts with the beginning-of-sequence token, which is not text.
        available: Number of windows in the text.
    """

    ids: Tensor
    source: str = ""
    stride: int
    bos: bool = False
    available: int

    @classmethod
    def of(cls, windows: "Tensor | Windows") -> "Windows":
        """Returns ``windows``; token ids [N, W] become non-overlapping windows without BOS.

        Raises:
            ConfigError: Token ids do not have two axes.
        """
        if isinstance(windows, Windows):
            return windows
        if windows.dim() != 2:
            raise ConfigError(f"Evaluation windows are token ids [N, W]; got shape {list(windows.shape)}.")
        return cls(ids=windows, stride=windows.shape[1], available=len(windows))

    @classmethod
    def cut(
        cls,
        stream: Sequence[int],
        *,
        window: int,
        stride: int | None = None,
        count: int | None = None,
        bos_id: int | None = None,
        source: str = "",
    ) -> "Windows":
        """Returns the full windows of a token stream.

        >>> Windows.cut(range(7), window=3).ids.tolist()
        [[0, 1, 2], [3, 4, 5]]
        >>> overlapping = Windows.cut(range(7), window=4, stride=2)
        >>> overlapping.ids.tolist(), [overlapping.first_target(0), overlapping.first_target(1)]
        ([[0, 1, 2, 3], [2, 3, 4, 5]], [1, 2])

        Args:
            stream: Token ids of the whole text.
            window: W, including BOS.
            stride: Number of text tokens between the starts of windows; None for no overlap.
            count: Maximum number of windows, the first ones; None for all.
            bos_id: BOS id at the start of every window, or None.
            source: Name of the corpus.
        """
        head = [] if bos_id is None else [bos_id]
        body = window - len(head)
        step = body if stride is None else stride
        available = 0 if len(stream) < body else (len(stream) - body) // step + 1
        used = available if count is None else min(available, count)
        rows = [[*head, *stream[i * step : i * step + body]] for i in range(used)]
        ids = torch.tensor(rows, dtype=torch.int64).view(used, window)
        return cls(ids=ids, source=source, stride=step, bos=bool(head), available=available)

    @property
    def window(self) -> int:
        """Number of tokens W of a window."""
        return int(self.ids.shape[1])

    @property
    def overlap(self) -> bool:
        """Whether windows share text."""
        return self.stride < self.window - self.bos

    def first_target(self, index: int) -> int:
        """Returns the position of the first scored token of window ``index``, at least 1."""
        return self.window - self.stride if self.overlap and index else 1

    @property
    def compared(self) -> slice:
        """Positions compared for fidelity: all, or the last ``stride`` of overlapping windows."""
        return slice(self.window - self.stride, None) if self.overlap else slice(None)

    @property
    def num_targets(self) -> int:
        """Number of scored tokens over all windows."""
        return sum(self.window - self.first_target(index) for index in range(len(self.ids)))

    @property
    def sha256(self) -> str:
        """Digest of the token ids."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    @property
    def protocol(self) -> str:
        """Description of the protocol, sufficient for a reproduction."""
        corpus = f"{self.source}: " if self.source else ""
        which = f"all {len(self.ids)}" if len(self.ids) == self.available else f"first {len(self.ids)}"
        kind = f"overlapping windows of {self.window} tokens, stride {self.stride}" if self.overlap else (
            f"non-overlapping windows of {self.window} tokens"
        )  # fmt: skip
        bos = "each begins with BOS" if self.bos else "no BOS added"
        return f"{corpus}{which} {kind}, {bos}, mean over {self.num_targets:,} predicted tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Exponential of the mean next-token cross-entropy.

    Attributes:
        value: Perplexity; infinite on overflow, NaN if the model predicts NaN.
        nll: Mean cross-entropy, nats per predicted token.
        num_tokens: Number of predicted tokens.
        num_windows: Number of windows N.
        window: Number of tokens W per window.
        stride: Number of text tokens between the starts of windows.
        bos: Whether every window starts with BOS.
        source: Name of the corpus.
        sha256: Digest of the windows' token ids.
        protocol: Description of the protocol; values of different protocols must not be compared.
    """

    value: float
    nll: float
    num_tokens: int
    num_windows: int
    window: int
    stride: int
    bos: bool
    source: str
    sha256: str
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Returns results and protocol as plain data."""
        return asdict(self)


def perplexity(model: nn.Module, windows: Tensor | Windows, *, batch_size: int = 1) -> Perplexity:
    """Returns the perplexity of ``model`` on ``windows`` [N, W].

    Logits are computed for one chunk of tokens at a time.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).eval()
    >>> perplexity(model, torch.arange(20).view(2, 10)).protocol
    'all 2 non-overlapping windows of 10 tokens, no BOS added, mean over 18 predicted tokens'

    Args:
        model: A supported Hugging Face causal LM.
        windows: Token ids [N, W], int64, without padding, or windows with their protocol.
        batch_size: Number of windows per forward pass.

    Raises:
        ConfigError: There are no windows, or windows with fewer than two tokens.
    """
    cut = checked_windows(windows)
    return perplexity_of(window_hidden(model, cut.ids, batch_size=batch_size), output_head(model), cut)


def perplexity_of(hidden: Tensor, head: OutputHead, windows: Tensor | Windows) -> Perplexity:
    """Returns the perplexity from final hidden states [N, W, D]; see :func:`perplexity`."""
    cut = checked_windows(windows)
    rows = [ScoredLogits(head, row, ids) for row, ids in zip(hidden, cut.ids, strict=True)]
    size = chunk_tokens(head.weight.shape[0])
    with torch.no_grad():
        for row in rows:
            for start in range(0, len(row), size):
                row[start : start + size]
    return perplexity_from([row.nll for row in rows], cut)


def perplexity_from(nll: Sequence[Tensor] | Tensor, windows: Windows) -> Perplexity:
    """Returns the perplexity from the cross-entropies [W - 1] of every window, see :class:`ScoredLogits`."""
    total = sum(float(row[windows.first_target(index) - 1 :].sum()) for index, row in enumerate(nll))
    mean = total / windows.num_targets
    return Perplexity(
        value=_exp(mean),
        nll=mean,
        num_tokens=windows.num_targets,
        num_windows=len(windows.ids),
        window=windows.window,
        stride=windows.stride,
        bos=windows.bos,
        source=windows.source,
        sha256=windows.sha256,
        protocol=windows.protocol,
    )


@dataclass(frozen=True, slots=True)
class ScoredLogits(HeadLogits):
    """Lazy logits of one window that record the next-token cross-entropy when they are read.

    Attributes:
        ids: Token ids [W].
        nll: Cross-entropy of token t + 1 at position t, [W - 1], nats, float64; NaN if it has not been read.
    """

    ids: Tensor
    nll: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Allocates the cross-entropies."""
        nll = torch.full((max(len(self.ids) - 1, 0),), torch.nan, dtype=torch.float64)
        object.__setattr__(self, "nll", nll)

    def __getitem__(self, part: slice) -> Tensor:
        """Returns logits [T, V], float32 or wider, on the head's device."""
        logits = HeadLogits.__getitem__(self, part)
        start, stop, _ = part.indices(len(self))
        stop = min(stop, len(self.nll))
        if start < stop:
            targets = self.ids[start + 1 : stop + 1].to(logits.device)
            read = logits[: stop - start]
            nll = read.logsumexp(-1) - read.gather(-1, targets[:, None]).squeeze(-1)
            self.nll[start:stop] = nll.to("cpu", torch.float64)
        return logits


def checked_windows(windows: Tensor | Windows) -> Windows:
    """Returns ``windows``; raises ``ConfigError`` if they have no token to predict."""
    cut = Windows.of(windows)
    if len(cut.ids) < 1 or cut.window < 2:
        raise ConfigError(
            f"Perplexity requires windows [N, W] with N >= 1 and W >= 2; got shape {list(cut.ids.shape)}."
        )
    return cut


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
