"""Perplexity with its protocol spelled out."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.arch import output_head
from hfprune.errors import ConfigError
from hfprune.evaluation.hidden import final_hidden
from hfprune.objectives import OBJECTIVES, OutputHead, chunked_objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """exp of the mean next-token cross-entropy over non-overlapping windows.

    Attributes:
        value: Perplexity; infinite when exp overflows, NaN when the model's predictions are.
        nll: Mean cross-entropy, nats per predicted token.
        num_tokens: Predicted tokens: W - 1 in each window.
        num_windows: N.
        window: W, in tokens.
    """

    value: float
    nll: float
    num_tokens: int
    num_windows: int
    window: int

    @property
    def protocol(self) -> str:
        """What was measured, in words."""
        return (
            f"{self.num_windows} non-overlapping windows of {self.window} tokens, no BOS added, mean over "
            f"{self.window - 1} predictions a window"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns figures and protocol, for reports."""
        return asdict(self) | {"protocol": self.protocol}


def perplexity(model: nn.Module, windows: Tensor, *, batch_size: int = 1) -> Perplexity:
    """Returns the perplexity of ``model`` on ``windows`` [N, W].

    Equals exp(mean NLL) from whole logits; logits exist for a chunk of tokens at a time.

    Args:
        model: A supported Hugging Face causal LM.
        windows: Token ids, int64, no padding.
        batch_size: Windows per forward pass.

    Raises:
        ConfigError: There is nothing to predict: no windows, or windows of fewer than two tokens.
    """
    _check(windows)
    return perplexity_of(final_hidden(model, windows, batch_size=batch_size), output_head(model), windows)


def perplexity_of(hidden: Tensor, head: OutputHead, windows: Tensor) -> Perplexity:
    """Returns the perplexity from final hidden states [N, W, D]; see :func:`perplexity`."""
    _check(windows)
    objective, device = OBJECTIVES.get("cross_entropy"), head.weight.device
    total = 0.0
    with torch.no_grad():
        for row, ids in zip(hidden, windows, strict=True):
            targets = ids[1:].to(device)
            total += float(chunked_objective(objective, row[:-1].to(device), head, targets))
    count = windows.shape[0] * (windows.shape[1] - 1)
    nll = total / count
    return Perplexity(value=_exp(nll), nll=nll, num_tokens=count, num_windows=windows.shape[0], window=windows.shape[1])


def _check(windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ConfigError(
            f"Perplexity needs windows [N, W] with N >= 1 and W >= 2 tokens; got shape {list(windows.shape)}."
        )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
