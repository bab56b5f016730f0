"""Cross-entropy with labels that the model draws from its own output: no labels needed (Fisher scores)."""

import torch
from torch import Tensor

from hfprune.objectives.base import OBJECTIVES, Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import cross_entropy

_BITS = 48  # of a random number; float64 holds them exactly


class Sampled(Objective):
    """-log p_y at every real position, y drawn from p with a random number that belongs to the sequence and position.

    The random numbers are a hash of the sequence's tokens, the position and the seed, so the same sequence draws the
    same labels whatever it is batched with, how its logits are cut into chunks, and which process runs it. The label
    is where the cumulative probability passes the number, found in float64.

    Args:
        seed: Which random numbers.
    """

    name = "sampled"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None = None) -> ValueAndGrad:
        """Returns the cross-entropy with the drawn labels; ``targets`` holds the random numbers."""
        assert targets is not None
        return cross_entropy(logits, draw(softmax_statistics(logits)[0], targets))

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns a random number for every position; every real token counts, whatever ``labels`` masks."""
        return position_numbers(input_ids, attention_mask, self.seed), attention_mask.bool()


OBJECTIVES.add(Sampled.name, Sampled())


def draw(p: Tensor, numbers: Tensor) -> Tensor:
    """Returns the label of each token, [T] int64: where the cumulative probability of ``p`` [T, V] passes its number.

    Args:
        p: Probabilities.
        numbers: [T] int64 in [0, 2^48).
    """
    cumulative = p.cumsum(-1, dtype=torch.float64)
    goal = numbers.to(torch.float64)[:, None] * 2.0**-_BITS * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True).squeeze(-1).clamp_(max=p.shape[-1] - 1)


def position_numbers(input_ids: Tensor, attention_mask: Tensor, seed: int) -> Tensor:
    """Returns a random number in [0, 2^48) for every position, [B, T] int64, from real tokens only.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], 1 for real tokens; padding on either side makes no difference.
        seed: Mixed into every number.
    """
    real = attention_mask.to(torch.int64)
    place = real.cumsum(1)
    tokens = _mix(input_ids * _ODD + place) * real
    sequence = _mix(tokens.sum(dim=1, keepdim=True) + seed)
    return _logical_shift(_mix(sequence + place * _ODD), 64 - _BITS)


_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: 2^64 divided by the golden ratio


def _mix(x: Tensor) -> Tensor:
    """Returns the 64 bits of ``x``, int64, scrambled (the finaliser of splitmix64); sums and products wrap."""
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
