"""One ranking over all groups, and curves of KL: against loops, within limits, measured and read."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hfprune.allocation import GlobalRank, Sensitivity, allocate, kept_units, measure_curves
from hfprune.plan import Budget, PruningPlan
from hfprune.utils.errors import ConfigError
from tests.reference.allocation import cheapest_pieces, ranked_removal
from tests.unit.allocation.test_allocations import curves, made, random_scores


@pytest.mark.parametrize("comparable", ["none", "per_parameter", "mean", "standard"])
@pytest.mark.parametrize(("floor", "ceiling"), [(0.0, 1.0), (0.5, 0.9)])
def test_global_ranking_is_the_loop(comparable, floor, ceiling):
    stock = made(5, mlp=20, heads=0)
    scores = random_scores(stock)
    scores = {name: value * (i + 1) + i for i, (name, value) in enumerate(scores.items())}
    found = allocate(
        stock, Budget(pruning_ratio=0.1), GlobalRank(comparable=comparable, floor=floor, ceiling=ceiling), scores=scores
    )
    expected = ranked_removal(
        [scores[g.name].tolist() for g in stock.groups],
        list(stock.costs),
        found.dense_params - found.target_params,
        comparable=comparable,
        bounds=(math.ceil(floor * 20) or 1, int(ceiling * 20)),
    )
    keep = kept_units(scores, stock.groups, found)
    assert [list(keep[g.name]) for g in stock.groups] == expected
    assert not found.provisional


def test_scores_of_another_scale_change_raw_rankings_only():
    stock = made(4, heads=4)
    scores = random_scores(stock)
    louder = {name: value * (1000 if "heads" in name else 1) for name, value in scores.items()}

    def widths(comparable, given):
        return allocate(stock, Budget(pruning_ratio=0.25), GlobalRank(comparable=comparable), scores=given).widths

    for comparable in ("mean", "standard"):
        assert widths(comparable, louder) == widths(comparable, scores)
    assert widths("none", louder) != widths("none", scores)
    assert all(width == 4 for width in widths("none", louder)[4:])


def test_ties_go_to_the_lower_unit_and_the_lower_layer():
    stock = made(3, mlp=4, heads=0)
    flat = {g.name: torch.ones(g.num_units) for g in stock.groups}
    found = allocate(stock, Budget(target_params=stock.dense_params - 3 * 30), GlobalRank(floor=0.5), scores=flat)
    assert kept_units(flat, stock.groups, found) == {"0.mlp": (0, 1), "1.mlp": (0, 1, 2), "2.mlp": (0, 1, 2, 3)}


def test_what_depends_on_scores_is_provisional_before_them():
    stock = made(4)
    before = allocate(stock, Budget(pruning_ratio=0.2), GlobalRank())
    assert before.provisional
    assert "follows from the scores" in before.describe()
    with pytest.raises(ConfigError, match="largest possible `pruning_ratio` is 0.6"):
        allocate(stock, Budget(pruning_ratio=0.9), GlobalRank(floor=0.25))


# ---- sensitivity -----------------------------------------------------------------------------------------------------


def test_sensitivity_goes_down_the_cheapest_pieces():
    stock = made(4, heads=0)
    found = allocate(stock, Budget(pruning_ratio=0.3), Sensitivity(curves(stock)))
    removal = found.dense_params - found.target_params
    expected = cheapest_pieces([curves(stock)[g.name] for g in stock.groups], [64] * 4, 30, removal)
    assert all(abs(a - b) <= 1 for a, b in zip(found.widths, expected, strict=True))
    flat = replace(stock)
    even = {g.name: {0.25: 0.75, 0.5: 0.5} for g in flat.groups} | {"2.mlp": {0.25: 7.5, 0.5: 5.0}}
    assert allocate(flat, Budget(pruning_ratio=0.2), Sensitivity(even)).widths[2] == 64  # ten times as expensive


def test_curves_are_measured_and_read(tmp_path):
    stock = made(2, mlp=10, heads=0)
    asked = []

    def measure(group, widths):
        asked.append((group.name, widths))
        return [1 - width / 10 for width in widths]

    found = measure_curves(stock.groups, [0.5, 0.25, 0.21], measure)
    assert asked == [(name, [5, 3, 2]) for name in ("0.mlp", "1.mlp")]
    assert found["1.mlp"] == {0.5: 0.5, 0.3: 0.7, 0.2: 0.8}
    (tmp_path / "curves.json").write_text(json.dumps(found))
    read = Sensitivity(str(tmp_path / "curves.json"))
    assert read.curves == found
    budget = Budget(pruning_ratio=0.05)
    assert allocate(stock, budget, read) == allocate(stock, budget, Sensitivity(found))
    with pytest.raises(
        ConfigError, match="smallest possible `target_params` is 5134"
    ):  # nothing goes beyond what was measured
        allocate(stock, Budget(target_params=stock.dense_params - 18 * 30), read)
    with pytest.raises(ConfigError, match="no curve for 0.heads"):
        allocate(made(2, mlp=10), budget, read)
    with pytest.raises(ConfigError, match="contains no curves"):
        Sensitivity(str(tmp_path / "none.json"))
    provenance = {"allocation": read.with_curves(found).describe()}
    plan = PruningPlan(model_class="Toy", groups=(), keep={}, config={}, provenance=provenance)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Sensitivity(str(tmp_path / "plan.json")).curves == found
    (tmp_path / "plan.json").write_text(replace(plan, provenance={}).to_json())
    with pytest.raises(ConfigError, match="contains no curves"):
        Sensitivity(str(tmp_path / "plan.json"))


def test_limits_of_curves_are_known_before_they_are_measured():
    stock = made(3, mlp=20, heads=0)
    asked = Sensitivity(shares=[0.8])
    with pytest.raises(ConfigError, match="smallest possible `target_params` is 6461"):  # 3 layers lose 4 of 20
        allocate(stock, Budget(target_params=6460), asked)
    assert allocate(stock, Budget(target_params=6461), asked).widths == (16, 16, 16)
    found = allocate(stock, Budget(target_params=6641), asked)
    assert found.provisional
    assert len(set(found.widths)) > 1  # so that a layout that cannot say it is refused beforehand
