"""Divergences between two next-token distributions, per token.

Shape legend: T tokens, V vocabulary, K stored tokens of a distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune.utils.errors import ConfigError

JACCARD_K = (5, 15)
"""Values of k for the top-k Jaccard indices; the HFPrune paper uses 15."""

QUANTITIES = ("kl", "reverse_kl", "js_distance", "top1_agreement", *(f"jaccard_{k}" for k in JACCARD_K))
"""Columns of :func:`divergences`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The K most likely tokens of a distribution and its normaliser.

    Attributes:
        logits: [..., K], float32 or wider, descending.
        indices: [..., K], int64.
        lse: Log-sum-exp over the vocabulary, [...].
    """

    logits: Tensor
    indices: Tensor
    lse: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> "TopK":
        """Returns the ``k`` largest of ``logits`` [T, V], or all if V is smaller."""
        values, indices = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return cls(logits=values, indices=indices, lse=logits.logsumexp(-1))

    def __getitem__(self, part: int | slice) -> "TopK":
        """Returns a part of the tokens."""
        return TopK(logits=self.logits[part], indices=self.indices[part], lse=self.lse[part])

    def to(self, device: torch.device) -> "TopK":
        """Returns a copy on ``device``."""
        return TopK(logits=self.logits.to(device), indices=self.indices.to(device), lse=self.lse.to(device))

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.lse)

    def log_probs(self) -> Tensor:
        """Returns the log-probabilities [..., K]."""
        return self.logits - self.lse.unsqueeze(-1)


def divergences(dense: Tensor | TopK, logits: Tensor) -> Tensor:
    """Returns the ``QUANTITIES`` of every token, [T, len(QUANTITIES)], float64.

    With p and q the distributions of the dense and the other model, the quantities are: KL(p || q) and KL(q || p) in
    nats; the Jensen-Shannon distance sqrt((KL(p || m) + KL(q || m)) / 2) with m = (p + q) / 2 and natural logarithms,
    at most sqrt(ln 2) = 0.833; whether the most likely token is the same; and |A & B| / |A | B| of the k most likely
    tokens. KL is infinite if q is zero where p is not (or the reverse). NaN is propagated.

    If only the top K of p are known, the other tokens count as one token in both distributions, which makes the three
    divergences lower bounds (data-processing inequality). The other quantities are exact for k <= K.

    >>> p, q = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    >>> columns = dict(zip(QUANTITIES, divergences(p, q)[0].tolist()))
    >>> round(columns["kl"], 4), round(columns["reverse_kl"], 4), columns["jaccard_5"]
    (0.1308, 0.1438, 1.0)

    Args:
        dense: Logits [T, V] of the dense model, or their top K, K >= 15.
        logits: Logits [T, V] of the other model.

    Raises:
        ConfigError: The vocabularies differ, or K is too small.
    """
    count = max(JACCARD_K)
    if isinstance(dense, TopK):
        if dense.indices.shape[-1] < min(count, logits.shape[-1]):
            raise ConfigError(f"The top {dense.indices.shape[-1]} logits are too few: {count} are compared.")
        top_p, log_p, log_q = dense.indices[:, :count], *_coarse(dense, logits)
    else:
        _check_vocabulary(dense, logits)
        top_p = TopK.of(dense, count).indices
        log_p, log_q = torch.log_softmax(dense, -1), torch.log_softmax(logits, -1)
    top_q = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
    same = top_p[:, 0] == top_q[:, 0]
    columns = [*_divergences(log_p, log_q), same.to(torch.float64), *_jaccard(top_p, top_q, JACCARD_K)]
    return torch.stack(columns, dim=-1)


def _check_vocabulary(dense: Tensor, logits: Tensor) -> None:
    if dense.shape != logits.shape:
        raise ConfigError(f"Logits of shapes {list(dense.shape)} and {list(logits.shape)} cannot be compared.")


def _coarse(dense: TopK, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both log-probabilities [T, K + 1], with one token for all tokens outside the dense top K."""
    log_p = dense.log_probs()
    log_q = logits.gather(-1, dense.indices) - logits.logsumexp(-1, keepdim=True)
    if log_p.shape[-1] == logits.shape[-1]:
        return log_p, log_q
    return _with_rest(log_p), _with_rest(log_q)


def _with_rest(log_probs: Tensor) -> Tensor:
    known = log_probs.to(torch.float64).exp().sum(-1, keepdim=True)
    rest = (1 - known).clamp(min=torch.finfo(log_probs.dtype).eps)  # smaller values are rounding errors
    return torch.cat([log_probs, rest.log().to(log_probs.dtype)], dim=-1)


def _divergences(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns KL(p || q), KL(q || p) and the Jensen-Shannon distance, [T] each, float64."""
    p, q = log_p.exp(), log_q.exp()
    d = log_p - log_q
    kl, reverse = torch.linalg.vecdot(p, d), -torch.linalg.vecdot(q, d)
    if kl.isnan().any() or reverse.isnan().any():  # 0 * inf for a token with probability zero
        d.masked_fill_((log_p == -torch.inf) & (log_q == -torch.inf), 0.0)
        kl, reverse = ((w * e).masked_fill_(w == 0, 0.0).sum(-1) for w, e in ((p, d), (q, -d)))
    d.clamp_(-80.0, 80.0)  # exp(-80) is negligible relative to 1
    t = math.log(2) - torch.neg(d).exp_().log1p_()  # log(p / m); that of q is t - d; both exactly 0 for p = q
    js = 0.5 * (torch.linalg.vecdot(p, t) + torch.linalg.vecdot(q, t) - torch.linalg.vecdot(q, d))
    return kl.to(torch.float64), reverse.to(torch.float64), _root(js.to(torch.float64))


def _root(squared: Tensor) -> Tensor:
    """Returns the square root, 0 for negative rounding errors; NaN is propagated."""
    return torch.where(squared < 0, torch.zeros_like(squared), squared).sqrt()


def _jaccard(top_p: Tensor, top_q: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Returns the Jaccard index [T] of the first k columns for every k."""
    indices = []
    for k in sizes:
        a, b = top_p[:, :k], top_q[:, :k]
        common = (a.unsqueeze(-1) == b.unsqueeze(-2)).sum((-1, -2)).to(torch.float64)
        indices.append(common / (2 * a.shape[-1] - common))
    return indices
