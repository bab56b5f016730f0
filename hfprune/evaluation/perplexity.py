"""Perplexity with its protocol spelled out."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.arch import output_head
from hfprune.errors import ConfigError
from hfprune.evaluation.hidden import final_hidden
from hfprune.evaluation.windows import Windows
from hfprune.objectives import OBJECTIVES, OutputHead, chunked_objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """exp of the mean next-token cross-entropy.

    Attributes:
        value: Perplexity; infinite when exp overflows, NaN when the model's predictions are.
        nll: Mean cross-entropy, nats per predicted token.
        num_tokens: Predicted tokens.
        num_windows: N.
        window: W, in tokens.
        stride: Text tokens from one window to the next.
        bos: Whether every window begins with BOS.
        source: The corpus.
        sha256: Digest of the windows' token ids.
        protocol: All of this in words; figures of different protocols must not be compared.
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
        """Returns figures and protocol, for reports."""
        return asdict(self)


def perplexity(model: nn.Module, windows: Tensor | Windows, *, batch_size: int = 1) -> Perplexity:
    """Returns the perplexity of ``model`` on ``windows`` [N, W].

    Equals exp(mean NLL) from whole logits; logits exist for a chunk of tokens at a time.

    Args:
        model: A supported Hugging Face causal LM.
        windows: Token ids, int64, no padding; plain ids are windows that do not overlap.
        batch_size: Windows per forward pass.

    Raises:
        ConfigError: There is nothing to predict: no windows, or windows of fewer than two tokens.
    """
    found = _checked(windows)
    return perplexity_of(final_hidden(model, found.ids, batch_size=batch_size), output_head(model), found)


def perplexity_of(hidden: Tensor, head: OutputHead, windows: Tensor | Windows) -> Perplexity:
    """Returns the perplexity from final hidden states [N, W, D]; see :func:`perplexity`."""
    found = _checked(windows)
    objective, device = OBJECTIVES.get("cross_entropy"), head.weight.device
    total = 0.0
    with torch.no_grad():
        for index, (row, ids) in enumerate(zip(hidden, found.ids, strict=True)):
            first = found.first_target(index)
            targets = ids[first:].to(device)
            total += float(chunked_objective(objective, row[first - 1 : -1].to(device), head, targets))
    nll = total / found.num_targets
    return Perplexity(
        value=_exp(nll),
        nll=nll,
        num_tokens=found.num_targets,
        num_windows=len(found.ids),
        window=found.window,
        stride=found.stride,
        bos=found.bos,
        source=found.source,
        sha256=found.sha256,
        protocol=found.protocol,
    )


def _checked(windows: Tensor | Windows) -> Windows:
    found = Windows.of(windows)
    if len(found.ids) < 1 or found.window < 2:
        raise ConfigError(
            f"Perplexity needs windows [N, W] with N >= 1 and W >= 2 tokens; got shape {list(found.ids.shape)}."
        )
    return found


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
