"""Cross-entropy with labels that the model draws from its own output: no labels needed (Fisher scores)."""

import torch
from torch import Tensor

from hfprune.objectives.base import OBJECTIVES, Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import cross_entropy
from hfprune.utils.random_numbers import GOLDEN, inverse_cdf, logical_shift, splitmix64

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
    return inverse_cdf(p, numbers.to(torch.float64) * 2.0**-_BITS)


def position_numbers(input_ids: Tensor, attention_mask: Tensor, seed: int) -> Tensor:
    """Returns a random number in [0, 2^48) for every position, [B, T] int64, from real tokens only.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], 1 for real tokens; padding on either side makes no difference.
        seed: Mixed into every number.
    """
    real = attention_mask.to(torch.int64)
    place = real.cumsum(1)
    tokens = splitmix64(input_ids * GOLDEN + place) * real
    sequence = splitmix64(tokens.sum(dim=1, keepdim=True) + seed)
    return logical_shift(splitmix64(sequence + place * GOLDEN), 64 - _BITS)
