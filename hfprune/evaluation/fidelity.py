"""Fidelity to the dense model, exact, without ever holding two [T, V] logit tensors.

The dense model is remembered by its final hidden states and its output head. Shape legend: N windows, W tokens, D
hidden size, V vocabulary.
"""

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.arch import output_head
from hfprune.errors import ConfigError
from hfprune.evaluation.hidden import final_hidden
from hfprune.objectives import OutputHead
from hfprune.objectives.chunked import CHUNK_BYTES, chunk_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseReference:
    """What later stages are compared with.

    Attributes:
        windows: [N, W] token ids.
        hidden: [N, W, D] final hidden states of the dense model, on the CPU.
        head: The dense model's output head.
    """

    windows: Tensor
    hidden: Tensor
    head: OutputHead

    @classmethod
    def collect(
        cls, model: nn.Module, windows: Tensor, *, batch_size: int = 1, copy_head: bool = True
    ) -> "DenseReference":
        """Runs the dense model once.

        Args:
            model: The dense model.
            windows: [N, W] token ids.
            batch_size: Windows per forward pass.
            copy_head: Clone the head's weights; False shares them, right only while nothing trains them.
        """
        head = output_head(model)
        if copy_head:
            bias = None if head.bias is None else head.bias.detach().clone()
            head = replace(head, weight=head.weight.detach().clone(), bias=bias)
        return cls(windows=windows, hidden=final_hidden(model, windows, batch_size=batch_size), head=head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How close a model's predictions are to the dense model's, over every position of the windows.

    Attributes:
        kl: KL(dense || model), nats per token; infinite when ``model`` rules out a token that the dense model does not.
        kl_stderr: Standard error of ``kl`` over windows; None for a single window or a ``kl`` that is not finite.
        top1_agreement: Share of positions with the same most likely token.
        num_tokens: Positions compared.
    """

    kl: float
    kl_stderr: float | None
    top1_agreement: float
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, for reports."""
        return asdict(self)


def fidelity(reference: DenseReference, model: nn.Module, *, batch_size: int = 1) -> Fidelity:
    """Returns the fidelity of ``model`` to the reference.

    Raises:
        ConfigError: The vocabularies differ in size, or the reference holds no windows.
    """
    hidden = final_hidden(model, reference.windows, batch_size=batch_size)
    return fidelity_of(reference, hidden, output_head(model))


def fidelity_of(
    reference: DenseReference, hidden: Tensor, head: OutputHead, *, chunk_bytes: int = CHUNK_BYTES
) -> Fidelity:
    """Returns the fidelity from final hidden states [N, W, D']; see :func:`fidelity`."""
    if reference.hidden[..., 0].numel() == 0:
        raise ConfigError(f"The reference windows hold no tokens: hidden states {list(reference.hidden.shape)}.")
    dense_vocab, vocab = reference.head.weight.shape[0], head.weight.shape[0]
    if dense_vocab != vocab:
        raise ConfigError(
            f"The dense model predicts {dense_vocab} tokens, the other one {vocab}: their distributions "
            "cannot be compared."
        )
    size = chunk_tokens(vocab, chunk_bytes=chunk_bytes)
    kls, same = [], 0
    with torch.no_grad():
        for dense_row, row in zip(reference.hidden, hidden, strict=True):
            total = 0.0
            for dense_part, part in zip(dense_row.split(size), row.split(size), strict=True):
                chunk_kl, agree = _compare(reference.head, dense_part, head, part)
                total, same = total + chunk_kl, same + agree
            kls.append(total / len(row))
    kl = statistics.fmean(kls)
    return Fidelity(
        kl=kl,
        kl_stderr=statistics.stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 and math.isfinite(kl) else None,
        top1_agreement=same / hidden[..., 0].numel(),
        num_tokens=hidden[..., 0].numel(),
    )


def _compare(dense_head: OutputHead, dense_hidden: Tensor, head: OutputHead, hidden: Tensor) -> tuple[float, int]:
    """Returns the summed KL of a chunk of tokens and how many agree on the most likely one."""
    dense_z = dense_head.logits(dense_hidden.to(dense_head.weight.device))
    z = head.logits(hidden.to(head.weight.device)).to(dense_z.device)
    agree = int((dense_z.argmax(-1) == z.argmax(-1)).sum())
    log_p, log_q = torch.log_softmax(dense_z, -1), torch.log_softmax(z, -1)
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, masked-out vocabulary included; NaN stays
    return float(terms.sum(dtype=torch.float64)), agree
