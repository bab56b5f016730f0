import math

import pytest
import torch

from hfprune.criteria import Magnitude, Random
from hfprune.models import find_groups
from hfprune.pruning.accumulator import weight_scores
from hfprune.utils.errors import ConfigError
from tests.helpers.models import NAMES, tiny


def loop_norm(model, group, unit, norm):
    """Every weight of one unit, one by one."""
    values = []
    for part in group.slices:
        module = model.get_submodule(part.module)
        weight = module.weight if type(module) is torch.nn.Linear else module.weight.T
        for channel in part.channels([unit]):
            values += (weight[channel] if part.side == "out" else weight[:, channel]).tolist()
    return math.fsum(map(abs, values)) if norm == "l1" else math.sqrt(math.fsum(v * v for v in values))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_magnitude_equals_a_loop(name, norm):
    model = tiny(name)
    groups = find_groups(model)
    scores = weight_scores(model, groups, Magnitude(norm=norm))
    for group in groups:
        expected = [loop_norm(model, group, unit, norm) for unit in range(group.num_units)]
        torch.testing.assert_close(scores[group.name], torch.tensor(expected, dtype=torch.float64))


def test_random_scores_follow_from_the_seed():
    model = tiny()
    groups = find_groups(model)
    one, again, other = (weight_scores(model, groups, Random(seed=seed)) for seed in (0, 0, 1))
    names = [group.name for group in groups]
    assert all(torch.equal(one[n], again[n]) for n in names)
    assert not any(torch.equal(one[n], other[n]) for n in names)
    assert not torch.equal(one[names[0]], one[names[1]])  # layers differ
    assert all(0 <= float(s.min()) < float(s.max()) < 1 for s in one.values())


def test_settings_are_checked_and_told():
    with pytest.raises(ConfigError, match="l1, l2"):
        Magnitude(norm="l3")
    with pytest.raises(ConfigError, match="negative"):
        Random(seed=-1)
    assert Magnitude(norm="l1").describe() == {"name": "magnitude", "norm": "l1"}
    assert Random(seed=3).describe() == {"name": "random", "seed": "3"}
