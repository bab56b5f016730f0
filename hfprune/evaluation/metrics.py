"""Fidelity to a dense model as a ``torchmetrics`` metric, computed in chunks of tokens.

Shape legend: N windows, W tokens of a window, V vocabulary, Q quantities (``divergence.QUANTITIES``).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from hfprune.evaluation.divergence import QUANTITIES, TopK, divergences
from hfprune.evaluation.predictions import Fidelity, Logits
from hfprune.objectives.chunked import CHUNK_BYTES, chunk_tokens
from hfprune.utils.errors import ConfigError


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
