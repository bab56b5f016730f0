import random

import numpy
import torch

from hfprune.evaluation.overlap import ngram_hashes
from hfprune.utils.random_numbers import inverse_cdf, isolated_rng

HASHES = ["392d6d2e5bcc9bf8", "392e9b8cc0e7e4e2"]


def test_hashes_of_saved_plans_stay():
    """A plan holds such hashes; another mixer would make its text look unseen."""
    assert [f"{h:016x}" for h in ngram_hashes(range(14)).tolist()] == HASHES


def test_random_states_come_back():
    def drawn():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    try:
        with isolated_rng():
            random.seed(2), numpy.random.seed(2), torch.manual_seed(2)
            drawn()
            raise KeyError
    except KeyError:
        pass
    assert drawn() == expected


def test_draws_follow_the_cumulative_probabilities():
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(5, 4)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(p, numbers).tolist() == [0, 0, 2, 3, 3]
    assert inverse_cdf(3 * p, numbers).tolist() == [0, 0, 2, 3, 3]
