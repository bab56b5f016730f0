"""Layers and modules that are not pruned: patterns, what they match, and what every way of pruning makes of them."""

import pytest
import torch

from hfprune import Budget, SkipLayers, apply_plan, make_plan, refit, score
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
from hfprune.criteria import Magnitude
from hfprune.models import Neurons, custom_groups, find_groups, parameter_count
from hfprune.plan import Group, skip_text
from hfprune.publishing.forecast import forecast, impossible_ratios
from hfprune.sparse import OutlierWeighed, SparseGPT, Sparsity, Wanda, sparse_method
from hfprune.sparse.engine import matrices_of, prune_sparse
from hfprune.sweep.grid import Method
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, token_ids

BATCHES = [{"input_ids": token_ids()}]
GROUPS = tuple(
    Group(name=f"model.layers.{i}.{name}", kind=kind, num_units=8, slices=(), layer=i)
    for kind, name in (("mlp", "mlp"), ("heads", "self_attn"))
    for i in range(12)
)
WHERE = {"prefix": "model.layers", "layers": 12}


def layers_of(skip, kind="mlp"):
    """The layers whose units of a kind are skipped."""
    found = SkipLayers.of(skip).groups(GROUPS, **WHERE)
    return [group.layer for group in GROUPS if group.kind == kind and group.name in found]


@pytest.mark.parametrize(
    ("patterns", "mlp", "heads"),
    [
        (0, [0], [0]),
        (-1, [11], [11]),
        ("0, -1", [0, 11], [0, 11]),
        ([0, "9-11"], [0, 9, 10, 11], [0, 9, 10, 11]),
        ("-2--1", [10, 11], [10, 11]),
        (":2", [0, 1], [0, 1]),
        ("-2:", [10, 11], [10, 11]),
        ("1:8:3", [1, 4, 7], [1, 4, 7]),
        (range(2), [0, 1], [0, 1]),
        ("model.layers.1", [1], [1]),
        ("model.layers.1?", [10, 11], [10, 11]),
        ("*.self_attn", [], list(range(12))),
        (r"re:.*\.(0|7)\.mlp", [0, 7], []),
        (r"re:model\.layers\.\d{1,1}", list(range(10)), list(range(10))),
        ({"mlp": "0-1", "heads": [-1]}, [0, 1], [11]),
        (SkipLayers(only="4-9"), [0, 1, 2, 3, 10, 11], [0, 1, 2, 3, 10, 11]),
        (SkipLayers(only={"mlp": [5]}), [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11], []),
        (SkipLayers(skip="*.self_attn", only="0-9"), [10, 11], list(range(12))),
    ],
)
def test_patterns(patterns, mlp, heads):
    assert (layers_of(patterns), layers_of(patterns, "heads")) == (mlp, heads)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (12, "there is no layer 12; layers are 0 to 11"),
        (-13, "there is no layer -13"),
        (270, 'YAML reads an unquoted 4:30 as 270: write "4:30" or 4-29'),
        ("5-2", "the range '5-2' is empty"),
        ("20:", "the slice '20:' is empty"),
        ("::0", "the slice '::0' is empty"),
        ("*.mpl", r"'\*.mpl' matches nothing. Names are model.layers.0.mlp to"),
        ("re:(", "is not a regular expression"),
        ("0,,1", "empty pattern"),
        ([], "empty pattern"),
        (True, "is not an index, a range"),
        (1.5, "is not an index, a range"),
        ({"mpl": 0}, "'mpl' is not a unit kind"),
        ({"experts": 0}, "'experts', which are not pruned. The units are mlp, heads"),
        ({"channels": 0}, "hidden channels belong to all layers"),
    ],
)
def test_wrong_patterns_are_refused_in_one_line(patterns, message):
    with pytest.raises(ConfigError, match=message) as error:
        layers_of(patterns)
    assert "\n" not in str(error.value)


def test_what_names_a_group():
    model = tiny()
    groups = find_groups(model, ("mlp", "heads"))
    where = {"prefix": "model.layers", "layers": 3}
    for pattern in ("model.layers.1.mlp.down_proj", "*.1.mlp.gate_proj", "model.layers.1.mlp"):
        assert SkipLayers(pattern).groups(groups, **where) == ("model.layers.1.mlp",)
    described = custom_groups(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)), [Neurons("0", "1")])
    assert SkipLayers("1").of("0*").groups(described, prefix="", layers=0) == ("1",)
    with pytest.raises(ConfigError, match="no numbered layers. Give names"):
        SkipLayers(0).groups(described, prefix="", layers=0)


# ---- units -----------------------------------------------------------------------------------------------------------

UNITS = ("mlp", "heads")


def inventory_of(units=UNITS, skip="0,-1", stock=False):
    model = tiny("llama_mha_relu")
    return model, Inventory.of(model, find_groups(model, units), skip=SkipLayers.of(skip), stock=stock)


def random_scores(inventory):
    torch.manual_seed(1)
    return {g.name: torch.rand(g.num_units, dtype=torch.float64) for g in inventory.groups}


CURVES = {f"model.layers.{i}.{n}": {0.5: 0.1 * (i + 1), 0.25: 0.9} for i in range(3) for n in ("mlp", "self_attn")}


@pytest.mark.parametrize(
    "allocation",
    [
        None,
        Uniform(),
        GlobalRank(),
        CosineSoftmax({0: 0.9, 1: 0.5, 2: 0.2}),
        Sensitivity(CURVES),
        Protected(first=0, last=1),
        Uniform(share=0.25),
        CosineSoftmax({0: 0.9, 1: 0.5, 2: 0.2}, share=0.1, alpha=0.1),
        Explicit(mlp=10),
        Explicit(mlp=[24, 9, 24], heads=3),
    ],
    ids=str,
)
def test_every_allocation_keeps_skipped_groups_and_meets_the_budget(allocation):
    model, inventory = inventory_of()
    scores = random_scores(inventory)
    own = allocation is not None and allocation.own_budget
    budget = Budget(allocated=True) if own else Budget(pruning_ratio=0.06)
    found = allocate(inventory, budget, allocation, scores=scores)
    widths = dict(zip((g.name for g in inventory.groups), found.widths, strict=True))
    assert {w for n, w in widths.items() if ".1." not in n} == {24, 4}
    assert found.params < parameter_count(model)
    assert set(found.skipped) == {n for n in widths if ".1." not in n}
    assert "skip_layers=0,-1" in found.asked
    plan = make_plan(model, keep=kept_units(scores, inventory.groups, found))
    apply_plan(model, plan)
    assert parameter_count(model) == found.params
    if not own:
        assert abs(found.params - found.target_params) <= max(inventory.costs) / 2


def test_layers_and_channels():
    model, inventory = inventory_of(("mlp", "layers"), "0,-1")
    assert inventory.fixed_layers == {0, 2}
    with pytest.raises(ConfigError, match="the largest possible `pruning_ratio` is 0.2"):
        allocate(inventory, Budget(pruning_ratio=0.5))
    found = allocate(inventory, Budget(pruning_ratio=0.2), scores=random_scores(inventory))
    assert found.removed_layers in ((), (1,))
    assert inventory_of(("mlp", "layers"), {"mlp": "0"})[1].fixed_layers == frozenset()
    assert inventory_of(("mlp", "layers"), "*.2.mlp")[1].fixed_layers == {2}  # the layer holds the module
    assert inventory_of(("layers",), "*.2")[1].fixed_layers == {2}
    with pytest.raises(ConfigError, match="hidden channels are removed from all layers"):
        inventory_of(("mlp", "channels"), 0)
    _, inventory = inventory_of(("mlp", "channels"), {"mlp": 0})
    found = allocate(inventory, Budget(pruning_ratio=0.3))
    widths = dict(zip((g.kind for g in inventory.groups), found.widths, strict=True))
    assert (found.widths[0], widths["channels"] < 16, found.widths[1] < 24) == (24, True, True)
    pruned = make_plan(model, keep=kept_units(random_scores(inventory), inventory.groups, found))
    apply_plan(model, pruned)
    assert parameter_count(model) == found.params


def test_budgets_out_of_reach_name_the_largest_one():
    model, inventory = inventory_of(("mlp",))
    with pytest.raises(ConfigError, match="the largest possible `pruning_ratio` is 0") as error:
        allocate(inventory, Budget(pruning_ratio=0.3))
    largest = float(str(error.value).rstrip(".").rpartition(" ")[2])
    found = allocate(inventory, Budget(pruning_ratio=largest))
    assert abs(found.removed_share - largest) < 0.01
    with pytest.raises(ConfigError, match="pruning_ratio"):
        allocate(inventory, Budget(pruning_ratio=largest + 0.02))
    found = allocate(inventory, Budget(intermediate_size=10))  # the width of the other layers
    assert found.widths == (24, 10, 24)
    assert found.params == parameter_count(model) - 14 * inventory.costs[0]
    for units, skip in ((("mlp",), ":"), (("layers",), ":"), (UNITS, "*.mlp,*.self_attn")):
        with pytest.raises(ConfigError, match="skips every unit"):
            inventory_of(units, skip)
    with pytest.raises(ConfigError, match="leave nothing to prune"):
        allocate(inventory, Budget(pruning_ratio=0.01), Protected(first=2, last=0))
    with pytest.raises(ConfigError, match="mlp lists 9 units for layer 0, which skip_layers=0,-1 keeps at 24"):
        allocate(inventory, Budget(allocated=True), Explicit(mlp=[9, 9, 24]))
    _, inventory = inventory_of(UNITS, "*.mlp", stock=True)
    with pytest.raises(ConfigError, match=r"names units \(mlp\) that skip_layers=\*.mlp skips"):
        allocate(inventory, Budget(allocated=True), Explicit(mlp=9))


def test_the_functional_api():
    model = tiny()
    scores = score(model, criterion=Magnitude())
    plan = make_plan(model, scores, budget=0.05, skip_layers=[0, -1])
    assert plan.keep["model.layers.0.mlp"] == plan.keep["model.layers.2.mlp"] == tuple(range(24))
    assert plan.provenance["skip_layers"] == {
        "skip": [0, -1],
        "groups": ["model.layers.0.mlp", "model.layers.2.mlp"],
        "layers": [],
    }
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert list(refit(model, plan, [token_ids()])) == ["model.layers.1.mlp"]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}
    with pytest.raises(ConfigError, match="remove budget, allocation and skip_layers"):
        make_plan(model, keep={}, skip_layers=0)
    assert skip_text(plan.provenance["skip_layers"]) == "skip_layers=0,-1"


def test_forecasts_and_sweeps():
    model = tiny()
    skip = SkipLayers(only="1")
    dense, pruned = forecast(model, [0.05], skip_layers=skip, tokens=8)
    assert (dense.widths, pruned.widths[0], pruned.widths[2]) == ([24, 24, 24], 24, 24)
    assert list(impossible_ratios(model, [0.05, 0.5], skip_layers=skip)) == [0.5]
    method = Method(name="m", skip_layers=[0], only_layers="0-1")
    assert str(method.skipped) == "skip_layers=0, only_layers=0-1"
    with pytest.raises(ConfigError, match="Method 'm': skip_layers='' has an empty pattern"):
        Method(name="m", skip_layers="").check()


# ---- single weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        ("0,-1", lambda name: name[0] in "02"),
        ("*.down_proj", lambda name: name.endswith("down_proj")),
        ("*.mlp", lambda name: ".mlp." in name),
        (SkipLayers(only="model.layers.1.mlp"), lambda name: not name.startswith("1.mlp.")),
    ],
)
def test_sparse_methods_leave_skipped_projections(skip, skipped):
    model = tiny(dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = list(prune_sparse(model, BATCHES, Wanda(), Sparsity(0.5), skip_layers=SkipLayers.of(skip)))
    pruned = {f"{layer.index}.{name}" for layer in found for name in layer.matrices}
    assert pruned == {matrix.path for matrix in matrices_of(model) if not skipped(matrix.path)}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"model.layers.{name}.weight" for name in pruned}
    zeros = sum(m.zeros for layer in found for m in layer.matrices.values())
    assert zeros * 2 == sum(m.weights for layer in found for m in layer.matrices.values())


def test_sparse_allocations_and_updates_with_skipped_layers():
    skip = SkipLayers("0")
    for method, settings in (
        (Wanda(), {"allocation": OutlierWeighed(threshold=2.0), "update": SparseGPT()}),
        (sparse_method("magnitude"), {}),
    ):
        model = tiny(dtype=torch.float32)
        found = list(prune_sparse(model, BATCHES, method, Sparsity(0.5), skip_layers=skip, **settings))
        assert found[0].matrices == {}
        weights = [m for layer in found for m in layer.matrices.values()]
        asked = sum(float(m.sparsity) * m.weights for m in weights) / sum(m.weights for m in weights)
        assert asked == pytest.approx(0.5, abs=1e-5)  # the mean over the projections that are pruned
    with pytest.raises(ConfigError, match="unit kinds apply to the removal of units"):
        prune_sparse(model, BATCHES, Wanda(), Sparsity(0.5), skip_layers=SkipLayers({"mlp": 0}))
    with pytest.raises(ConfigError, match="skips every projection"):
        prune_sparse(model, BATCHES, Wanda(), Sparsity(0.5), skip_layers=SkipLayers(":"))
