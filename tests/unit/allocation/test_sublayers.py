"""Budgets over whole sub-layers and other units: exact costs, equal shares, lists, curves."""

import itertools

import pytest
import torch

import hfprune
from hfprune.allocation import (
    CosineSoftmax,
    Explicit,
    GlobalRank,
    Inventory,
    Protected,
    Sensitivity,
    Uniform,
    allocate,
    kept_units,
)
from hfprune.io.layouts import apply_plan
from hfprune.models import class_name, config_values, find_groups, parameter_count
from hfprune.plan import SUBLAYERS, Budget, PruningPlan
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny

OWN = Budget(allocated=True)


def scores_of(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.num_units, generator=generator, dtype=torch.float64) for g in groups}


def pruned(model, units, budget, allocation=None, *, seed=0):
    """Returns the resolved budget and the plan, after checking the parameters of the pruned model."""
    groups = find_groups(model, units)
    inventory, scores = Inventory.of(model, groups), scores_of(groups, seed)
    resolved = allocate(inventory, budget, allocation, scores=scores)
    keep = kept_units(scores, groups, resolved)
    config = config_values(model, groups, keep)
    plan = PruningPlan(model_class=class_name(model), groups=groups, keep=keep, config=config)
    apply_plan(model, plan)
    assert parameter_count(model) == resolved.params
    return resolved, plan


def lost(plan, kind):
    return [g.layer for g in plan.groups if g.kind == kind and not plan.keep[g.name]]


KINDS = ("mlp", "heads", *SUBLAYERS, "layers")
MIXES = [units for n in range(1, 6) for units in itertools.combinations(KINDS, n) if set(units) & set(SUBLAYERS)]


@pytest.mark.parametrize("units", MIXES, ids="+".join)
def test_any_mix_meets_one_budget(units):
    model = tiny("llama_mha_relu")
    dense = parameter_count(model)
    resolved, plan = pruned(model, units, Budget(pruning_ratio=0.2))
    step = {"mlp": 3 * 48, "heads": 3 * 256, "attention_sublayers": 1040, "mlp_sublayers": 1168, "layers": 2208}
    assert abs(resolved.params - 0.8 * dense) <= min(step[kind] for kind in units) / 2 + 1
    for kind in set(units) & set(SUBLAYERS):
        assert len(lost(plan, kind)) < 3


def test_the_lowest_scores_are_removed():
    model = tiny("llama")
    groups = find_groups(model, ("attention_sublayers",))
    scores = {g.name: torch.tensor([value]) for g, value in zip(groups, [0.3, 0.1, 0.2], strict=True)}
    resolved = allocate(Inventory.of(model, groups), OWN, Explicit(attention_sublayers=1), scores=scores)
    assert resolved.widths == (1, 0, 0)
    assert "attention sub-layers 3 -> 1" in resolved.describe()
    share = allocate(Inventory.of(model, groups), OWN, Uniform(share=0.4), scores=scores)
    assert share.widths == (1, 0, 1)


def test_units_within_removed_sublayers_cost_nothing():
    model = tiny("gemma2")
    given = Explicit(mlp=[20, 9, 24], heads=[1, 2, 1], attention_sublayers=[0], mlp_sublayers=[1, 2], layers=[2])
    resolved, plan = pruned(model, ("mlp", "heads", *SUBLAYERS, "layers"), OWN, given)
    assert lost(plan, "attention_sublayers") == [0]
    assert [kind.kept for kind in resolved.kinds if kind.kind == "mlp"] == [(20,)]
    assert [kind.kept for kind in resolved.kinds if kind.kind == "heads"] == [(2,)]


def test_protected_layers_keep_their_sublayers():
    for seed in range(4):
        _, plan = pruned(tiny("qwen3"), SUBLAYERS, Budget(pruning_ratio=0.2), Protected(first=1, last=0), seed=seed)
        assert 0 not in {*lost(plan, "attention_sublayers"), *lost(plan, "mlp_sublayers")}


def test_curves_of_neurons_and_attentions_are_spent_together():
    model = tiny("llama")
    groups = find_groups(model, ("mlp", "attention_sublayers"))
    curves = {g.name: ({0.0: 1.0} if g.kind != "mlp" else {0.5: 0.3}) for g in groups}
    curves["model.layers.1.attention_sublayer"] = {0.0: 0.001}
    resolved, plan = pruned(model, ("mlp", "attention_sublayers"), Budget(pruning_ratio=0.25), Sensitivity(curves))
    assert lost(plan, "attention_sublayers") == [1]
    assert abs(resolved.params - resolved.target_params) <= 48 / 2 + 1
    straight = Sensitivity(shares=(0.5,))
    before = allocate(Inventory.of(tiny("llama"), groups), Budget(pruning_ratio=0.25), straight)
    assert before.provisional


@pytest.mark.parametrize(
    ("units", "budget", "allocation", "message"),
    [
        (SUBLAYERS, Budget(pruning_ratio=0.2), GlobalRank(), "GlobalRank cannot remove whole sub-layers"),
        (SUBLAYERS, Budget(pruning_ratio=0.2), CosineSoftmax(), "'attention_sublayers' out of the units"),
        (("heads", SUBLAYERS[0]), Budget(pruning_ratio=0.2), Sensitivity(), "'heads' are parts of 'attention_sub"),
        (SUBLAYERS, OWN, Explicit(attention_sublayers=4), "from 0 to 3 attention_sublayers can be kept"),
        (SUBLAYERS, OWN, Explicit(mlp_sublayers=[3]), "layer 3 has no mlp_sublayer that can be removed"),
        (SUBLAYERS, OWN, Explicit(attention_sublayers=0, mlp_sublayers=0), "removes both sub-layers of every layer"),
        (("mlp",), OWN, Explicit(mlp_sublayers=1), "add 'mlp_sublayers' to `units`"),
        (SUBLAYERS[:1], Budget(pruning_ratio=0.9), None, "largest possible `pruning_ratio`"),
    ],
)
def test_what_is_refused(units, budget, allocation, message):
    model = tiny("llama")
    groups = find_groups(model, units)
    with pytest.raises(ConfigError, match=message):
        allocate(Inventory.of(model, groups), budget, allocation, scores=scores_of(groups))


def test_a_plan_is_made_from_scores():
    model = tiny("llama")
    scores = scores_of(find_groups(model, ("mlp", "attention_sublayers")))
    plan = hfprune.make_plan(model, scores, budget=0.3)
    assert {group.kind for group in plan.groups} == {"mlp", "attention_sublayers"}
    assert plan.provenance["budget"]["kinds"]["attention_sublayers"]["dense"] == [1, 1, 1]
