"""Forecasts from shapes are what pruning then gives."""

import pytest
import torch

from hfprune.evaluation.size_and_speed import measure_size
from hfprune.functional import apply_plan, make_plan
from hfprune.io.layouts import empty_copy
from hfprune.plan import Budget
from hfprune.publishing.forecast import forecast, impossible_ratios
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny


@pytest.mark.parametrize("units", [("mlp",), ("mlp", "heads")], ids="+".join)
def test_a_forecast_is_the_size_of_the_pruned_model(units):
    model = tiny(dtype=torch.float32)
    (_, found) = forecast(empty_copy(model).to(torch.float32), [0.3], units=units, tokens=8)
    groups = make_plan(model, keep={}, units=units).groups
    scores = {group.name: torch.arange(float(group.num_units)) for group in groups}
    apply_plan(model, make_plan(model, scores, budget=Budget(pruning_ratio=0.3), units=units))
    size = measure_size(model, tokens=8)
    assert found.parameters == model.num_parameters()
    assert (found.weight_bytes, found.kv_cache_bytes) == (size.weight_bytes, size.kv_cache_bytes)
    assert found.macs_per_token == size.macs // 8
    assert found.widths == [model.config.intermediate_size] * 3


def test_the_dense_model_comes_first_and_ratios_in_order():
    dense, less, more = forecast(empty_copy(tiny()), [0.1, 0.3], tokens=8)
    assert dense.removed_share == 0
    assert dense.widths == [24, 24, 24]
    assert (less.pruning_ratio, more.pruning_ratio) == (0.1, 0.3)
    assert dense.parameters > less.parameters > more.parameters
    assert less.exact_width == pytest.approx(19.244, abs=1e-3)


def test_round_to_makes_multiples_and_odd_widths_lose_splits():
    dense, exact, rounded = (
        *forecast(empty_copy(tiny()), [0.1], tokens=8),
        forecast(empty_copy(tiny()), [0.1], round_to=4, tokens=8)[1],
    )
    assert (dense.multiple, exact.multiple, rounded.multiple) == (8, 1, 4)
    assert (dense.devices, exact.devices, rounded.devices) == ([2], [], [2])


def test_layers_are_forecast_as_provisional():
    (_, found) = forecast(empty_copy(tiny()), [0.25], units=("layers",), tokens=8)
    assert found.provisional or found.kept["layers"] == [2]


def test_an_impossible_ratio_names_the_largest():
    with pytest.raises(ConfigError, match="largest possible"):
        forecast(empty_copy(tiny()), [0.1, 0.95])


def test_experts_have_no_width_and_impossible_ratios_a_reason():
    (dense, found) = forecast(empty_copy(tiny("mixtral", dtype=torch.float32)), [0.14], units=("experts",), tokens=8)
    assert (dense.multiple, found.kept) == (None, {"experts": [5, 5, 5]})
    reasons = impossible_ratios(empty_copy(tiny()), [0.1, 0.95, 2.0])
    assert "largest possible" in reasons[0.95]
    assert "not between 0 and 1" in reasons[2.0]
    assert 0.1 not in reasons
