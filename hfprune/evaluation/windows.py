"""Evaluation windows and the protocol that cut them, so that two perplexities can be told to be comparable or not."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of a token stream.

    Attributes:
        ids: [N, W] int64, no padding.
        source: The corpus, as the user named it.
        stride: Text tokens from the start of one window to the next; windows overlap when it is smaller than the text
            tokens of a window, and each then scores its last ``stride`` tokens only, the first window all of its own.
        bos: Whether every window begins with the beginning-of-sequence token, which is not text.
        available: Windows that the text would give.
    """

    ids: Tensor
    source: str = ""
    stride: int
    bos: bool = False
    available: int

    @classmethod
    def of(cls, windows: "Tensor | Windows") -> "Windows":
        """Returns ``windows``; token ids [N, W] count as non-overlapping windows without BOS.

        Raises:
            ConfigError: They are not [N, W].
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

        Args:
            stream: Token ids of the whole text.
            window: W, the BOS token included.
            stride: None cuts windows that do not overlap.
            count: Use at most the first so many; all of them if None.
            bos_id: Put before every window.
            source: The corpus.
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
        """W, in tokens."""
        return int(self.ids.shape[1])

    @property
    def overlap(self) -> bool:
        """Whether windows share text."""
        return self.stride < self.window - self.bos

    def first_target(self, index: int) -> int:
        """Returns the position of the first token that window ``index`` scores: at least 1."""
        return self.window - self.stride if self.overlap and index else 1

    @property
    def compared(self) -> slice:
        """The positions whose predictions fidelity compares: all, or the last ``stride`` of windows that overlap."""
        return slice(self.window - self.stride, None) if self.overlap else slice(None)

    @property
    def num_targets(self) -> int:
        """Tokens that are scored, over all windows."""
        return sum(self.window - self.first_target(index) for index in range(len(self.ids)))

    @property
    def sha256(self) -> str:
        """Digest of the token ids."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    @property
    def protocol(self) -> str:
        """What is measured, in words: enough to measure it again."""
        corpus = f"{self.source}: " if self.source else ""
        which = f"all {len(self.ids)}" if len(self.ids) == self.available else f"first {len(self.ids)}"
        kind = f"overlapping windows of {self.window} tokens, stride {self.stride}" if self.overlap else (
            f"non-overlapping windows of {self.window} tokens"
        )  # fmt: skip
        bos = "each begins with BOS" if self.bos else "no BOS added"
        return f"{corpus}{which} {kind}, {bos}, mean over {self.num_targets:,} predicted tokens"
