import pytest
import torch

from hfprune.allocation import KeptHistory
from hfprune.plan import Group
from hfprune.utils.errors import ConfigError

GROUPS = (Group(name="a", kind="mlp", num_units=4, slices=()), Group(name="b", kind="mlp", num_units=3, slices=()))


def scores(a, b):
    return {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}


def test_stability_and_convergence_by_hand():
    history = KeptHistory(GROUPS, [2, 1])
    first = scores([4, 3, 2, 1], [1, 2, 3])  # keeps a: 0 1, b: 2
    second = scores([4, 1, 3, 2], [1, 2, 3])  # a: 0 2, b: 2
    last = scores([1, 2, 4, 3], [3, 2, 1])  # a: 2 3, b: 0
    assert history.add(10, first) is None
    assert history.add(20, second) == pytest.approx(2 / 3)
    assert history.add(30, second) == 1.0
    assert history.convergence(last) == [(10, 0.0), (20, pytest.approx(1 / 3)), (30, pytest.approx(1 / 3))]


def test_goes_through_its_state():
    history = KeptHistory(GROUPS, [2, 1])
    history.add(10, scores([4, 3, 2, 1], [1, 2, 3]))
    again = KeptHistory(GROUPS, [2, 1])
    again.load(history.state())
    last = scores([1, 2, 4, 3], [3, 2, 1])
    assert again.add(20, last) == history.add(20, last)
    assert again.convergence(last) == history.convergence(last)
    empty = KeptHistory(GROUPS, [2, 1])
    empty.load(KeptHistory(GROUPS, [2, 1]).state())
    assert empty.convergence(last) == []
    with pytest.raises(ConfigError, match="other groups"):
        KeptHistory(GROUPS[:1], [2]).load(history.state())
