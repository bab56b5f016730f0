"""Random numbers: a 64-bit mixer, draws from a distribution, and a context that restores random states."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""0x9E3779B97F4A7C15, 2^64 divided by the golden ratio, as int64."""


def splitmix64(x: Tensor) -> Tensor:
    """Returns the 64 bits of ``x`` mixed: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).

    Every bit of the input changes every bit of the output with probability one half. Products wrap.

    >>> f"{splitmix64(torch.tensor(GOLDEN)).item() % 2**64:016x}"  # the first number of SplitMix64 with seed 0
    'e220a8397b1dcdaf'

    Args:
        x: int64, any shape.
    """
    x = (x ^ logical_shift(x, 30)) * -4658895280553007687
    x = (x ^ logical_shift(x, 27)) * -7723592293110705685
    return x ^ logical_shift(x, 31)


def logical_shift(x: Tensor, bits: int) -> Tensor:
    """Returns ``x``, int64, shifted to the right by ``bits``, with zeros from the left.

    >>> logical_shift(torch.tensor(-1), 60).item()
    15
    """
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def inverse_cdf(p: Tensor, numbers: Tensor) -> Tensor:
    """Returns the first index per row at which the cumulative probability exceeds the row's number, [N] int64.

    Columns keep their order and are not sorted by probability: rounding of ``p`` then shifts the boundaries between
    indices slightly, but never exchanges two indices.

    >>> p = torch.tensor([[0.2, 0.0, 0.8], [0.2, 0.0, 0.8]])
    >>> inverse_cdf(p, torch.tensor([0.1, 0.2], dtype=torch.float64))
    tensor([0, 2])

    Args:
        p: Weights [N, V], not negative; rows need not sum to 1. They are summed in float64.
        numbers: [N], float64, in [0, 1).
    """
    cumulative = p.cumsum(-1, dtype=torch.float64)
    goals = numbers[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goals, right=True).squeeze(-1).clamp_(max=p.shape[-1] - 1)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch (CPU and CUDA) after the block.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> with isolated_rng():
    ...     before = torch.rand(1)
    >>> torch.equal(torch.rand(1), before)
    True
    """
    python, state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(state)
