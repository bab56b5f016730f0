"""Fidelity to a dense model as a ``torchmetrics`` metric, computed in chunks of tokens.

Shape legend: N windows, W tokens of a window, V vocabulary, Q quantities (``divergence.QUANTITIES``).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from hfprune.evaluation.divergence import QUANTITIES, TopK, divergences
from hfprune.objectives import OutputHead
from hfprune.objectives.chunked import CHUNK_BYTES, chunk_tokens
from hfprune.utils.errors import ConfigError


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


class FidelityMetric(Metric):
    """Accumulates :class:`Fidelity` over windows and ranks.

    >>> metric = FidelityMetric()
    >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    >>> metric.compute()["kl"]
    tensor(0., dtype=torch.float64)

    Args:
        chunk_bytes: Size of one chunk of float32 logits; two chunks and a few temporaries are in memory.
    """

    full_state_update = False
    higher_is_better = None
    windows: list[Tensor]
    positions: list[Tensor]
    top_k: Tensor

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._chunk_bytes = chunk_bytes
        self.add_state("windows", default=[], dist_reduce_fx="cat")
        self.add_state("positions", default=[], dist_reduce_fx="cat")
        self.add_state("top_k", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    @torch.no_grad()
    def update(self, dense: Tensor | Logits, model: Tensor | Logits) -> None:
        """Adds one window, or a batch of windows.

        Args:
            dense: Logits [W, V] or [N, W, V] of the dense model, or lazy logits of one window.
            model: Logits of the other model.

        Raises:
            ConfigError: Vocabularies or lengths differ, a window has no tokens, or windows differ in length.
        """
        if isinstance(dense, Tensor) and isinstance(model, Tensor) and dense.dim() == 3:
            if len(dense) != len(model):
                raise ConfigError(f"{len(dense)} windows of the dense model, {len(model)} of the other one.")
            for one, other in zip(dense, model, strict=True):
                self.update(one, other)
            return
        if len(dense) != len(model) or not len(dense):
            raise ConfigError(f"Windows of {len(dense)} and {len(model)} tokens cannot be compared.")
        if self.positions and self.positions[-1].shape[-1] != len(dense):
            raise ConfigError(f"A window has {len(dense)} tokens, the one before {self.positions[-1].shape[-1]}.")
        by_token = self._by_token(dense, model)
        self.windows.append(by_token.mean(0, keepdim=True))
        self.positions.append(by_token[:, 0].unsqueeze(0))

    def _by_token(self, dense: Tensor | Logits, model: Tensor | Logits) -> Tensor:
        """Returns the quantities [W, Q] of one window, on the metric's device."""
        vocab = model.shape[-1] if isinstance(model, Tensor) else model.vocab_size
        size = chunk_tokens(vocab, chunk_bytes=self._chunk_bytes)
        parts = []
        for start in range(0, len(dense), size):
            p, q = dense[start : start + size], _as_logits(model[start : start + size])
            if isinstance(p, TopK):
                self.top_k.fill_(p.indices.shape[-1])
            else:
                p = _as_logits(p)
            parts.append(divergences(p.to(q.device), q).to(self.top_k.device))
        return torch.cat(parts)

    def compute(self) -> dict[str, Tensor]:
        """Returns the results by the names of :class:`Fidelity`, with NaN or 0 instead of None.

        Raises:
            ConfigError: No window was added.
        """
        if not len(self.windows):
            raise ConfigError("No window was compared.")
        windows = _joined(self.windows)
        count = len(windows)
        mean = windows.mean(0)
        stderr = windows.std(0) / count**0.5 if count > 1 else torch.full_like(mean, torch.nan)
        figures = dict(zip(QUANTITIES, mean, strict=True))
        figures |= {f"{name}_stderr": value for name, value in zip(QUANTITIES, stderr, strict=True)}
        positions = _joined(self.positions)
        counts = {"num_tokens": torch.tensor(positions.numel()), "num_windows": torch.tensor(count)}
        return figures | {"kl_by_position": positions.mean(0)} | counts | {"dense_top_k": self.top_k}

    def result(self) -> Fidelity:
        """Returns the results of :meth:`compute` as a :class:`Fidelity`."""
        figures: dict[str, Any] = {name: value.tolist() for name, value in self.compute().items()}
        for name in QUANTITIES:
            if not math.isfinite(figures[f"{name}_stderr"]):
                figures[f"{name}_stderr"] = None
        figures["kl_by_position"] = tuple(figures["kl_by_position"])
        return Fidelity(**figures | {"dense_top_k": figures["dense_top_k"] or None})


def _as_logits(logits: Tensor | TopK) -> Tensor:
    assert isinstance(logits, Tensor)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _joined(rows: list[Tensor] | Tensor) -> Tensor:
    """Returns a list state as one tensor; after a reduction over ranks it already is one."""
    return rows if isinstance(rows, Tensor) else torch.cat(rows)
