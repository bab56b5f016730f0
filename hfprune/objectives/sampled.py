"""Cross-entropy with labels sampled from the model's own predictions, for Fisher scores."""

import torch
from torch import Tensor

from hfprune.objectives.base import OBJECTIVES, Objective, ValueAndGrad, softmax_statistics
from hfprune.objectives.cross_entropy import cross_entropy
from hfprune.utils.random_numbers import GOLDEN, inverse_cdf, logical_shift, splitmix64

_BITS = 48  # of a random number; float64 holds them exactly


class Sampled(Objective):
    """-log p_y at every real position, with label y drawn from p.

    The random numbers are a hash of the sequence's tokens, the position and the seed. A sequence therefore draws the
    same labels for every batch, chunk size and process. The label is the first token whose cumulative probability, in
    float64, exceeds the random number.

    Args:
        seed: Seed of the random numbers.
    """

    name = "sampled"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def value_and_grad(self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None = None) -> ValueAndGrad:
        """Returns the cross-entropy with sampled labels; ``targets`` holds the random numbers."""
        assert targets is not None
        return cross_entropy(logits, draw(softmax_statistics(logits)[0], targets))

    def targets(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns a random number for every position; every real token counts, also where ``labels`` is masked."""
        return position_numbers(input_ids, attention_mask, self.seed), attention_mask.bool()


OBJECTIVES.add(Sampled.name, Sampled())


def draw(p: Tensor, numbers: Tensor) -> Tensor:
    """Samples the label of each token, [T] int64, by inverse transform sampling.

    Args:
        p: Probabilities [T, V].
        numbers: Random numbers [T], int64 in [0, 2^48).
    """
    return inverse_cdf(p, numbers.to(torch.float64) * 2.0**-_BITS)


def position_numbers(input_ids: Tensor, attention_mask: Tensor, seed: int) -> Tensor:
    """Returns a random number in [0, 2^48) for every position, [B, T] int64, derived from the real tokens.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], 1 for real tokens; padding on either side makes no difference.
        seed: Seed of the random numbers.
    """
    real = attention_mask.to(torch.int64)
    place = real.cumsum(1)
    tokens = splitmix64(input_ids * GOLDEN + place) * real
    sequence = splitmix64(tokens.sum(dim=1, keepdim=True) + seed)
    return logical_shift(splitmix64(sequence + place * GOLDEN), 64 - _BITS)
