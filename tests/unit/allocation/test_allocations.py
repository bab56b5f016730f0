"""Every allocation: budgets met with true costs, published accounting, rankings, ties, what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

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
from hfprune.plan import Budget, Group, Slice
from hfprune.utils.errors import ConfigError
from tests.helpers.models import inventory
from tests.reference.allocation import softmax_shares
from tests.unit.allocation.test_budget import MODELS

OWN = Budget(allocated=True)


def meta(name, units):
    with torch.device("meta"):
        return inventory(AutoModelForCausalLM.from_config(MODELS[name]), units)


def made(layers, *, mlp=64, heads=8, mlp_cost=30, head_cost=700, other=5000, blocks=False):
    """An inventory of made-up groups; sizes may be one number or one for each layer."""
    groups, costs = [], []
    for kind, units, cost, width in (("mlp", mlp, mlp_cost, 1), ("heads", heads, head_cost, 4)):
        for layer in range(layers):
            number = units[layer] if isinstance(units, list) else units
            if number:
                s = (Slice(module=f"{layer}.{kind}", side="in", width=width),)
                groups.append(Group(name=f"{layer}.{kind}", kind=kind, num_units=number, slices=s, layer=layer))
                costs.append(cost)
    within = [
        7 + sum(g.num_units * c for g, c in zip(groups, costs, strict=True) if g.layer == i) for i in range(layers)
    ]
    if blocks:
        groups.append(Group(name="layers", kind="layers", num_units=layers, slices=()))
        costs.append(0)
    total = sum(within) + other
    return Inventory(
        groups=tuple(groups), costs=tuple(costs), dense_params=total, hidden_size=16, layer_params=tuple(within)
    )


def random_scores(stock, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.num_units, generator=generator, dtype=torch.float64) for g in stock.groups}


def curves(stock, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in stock.groups:
        steepness = float(torch.rand(1, generator=generator)) + 0.1
        shares = (0.0, 0.25, 0.5, 0.75)
        found[group.name] = {share: steepness * (1 - share) ** 2 for share in shares}
    return found


ALLOCATIONS = {
    "uniform": lambda stock: Uniform(),
    "protected": lambda stock: Protected(first=1, last=1),
    "global": lambda stock: GlobalRank(floor=0.0),
    "global_ceiling": lambda stock: GlobalRank(floor=0.0, ceiling=0.75),
    "global_parameter": lambda stock: GlobalRank(comparable="per_parameter", floor=0.0),
    "cosine": lambda stock: CosineSoftmax({i: 0.8 + 0.02 * i for i in range(len(stock.layer_params))}, alpha=3.0),
    "sensitivity": lambda stock: Sensitivity(curves(stock)),
    "protected_global": lambda stock: Protected(first=1, last=0, allocation=GlobalRank(comparable="standard")),
}


# ---- budgets ---------------------------------------------------------------------------------------------------------


def bounds(stock, name, round_to):
    """The fewest and the most parameters that an allocation of ``ALLOCATIONS`` may leave."""
    layers = len(stock.layer_params)
    protected = {"protected": {0, layers - 1}, "protected_global": {0}}.get(name, set())
    share = 0.75 if name == "global_ceiling" else 1.0
    least, most = [], []
    for group in stock.groups:
        step = round_to if group.kind == "mlp" else 1
        floor = math.ceil(0.1 * group.num_units / step) * step if name == "protected_global" else step
        least.append(group.num_units if group.layer in protected else max(step, floor))
        most.append(max(int(group.num_units * share) // step * step, step))
    return stock.params(least), stock.params(most)


@example(name="protected_global", ratio=0.5, round_to=1, layers=3, heads=8, head_cost=1001, seed=0)
@example(name="protected_global", ratio=0.4375, round_to=1, layers=3, heads=8, head_cost=651, seed=0)
@example(name="protected_global", ratio=0.46875, round_to=1, layers=3, heads=8, head_cost=727, seed=0)
@given(
    name=st.sampled_from(sorted(ALLOCATIONS)),
    ratio=st.floats(0.01, 0.9),
    round_to=st.sampled_from([1, 8]),
    layers=st.integers(3, 8),
    heads=st.sampled_from([0, 1, 3, 8]),
    head_cost=st.integers(30, 3000),
    seed=st.integers(0, 3),
)
def test_budget_is_met_within_one_rounding_step(name, ratio, round_to, layers, heads, head_cost, seed):
    stock = made(layers, heads=heads, head_cost=head_cost)
    budget, allocation = Budget(pruning_ratio=ratio, round_to=round_to), ALLOCATIONS[name](stock)
    scores = random_scores(stock, seed)
    smallest, largest = bounds(stock, name, round_to)
    target = round(stock.dense_params * (1 - ratio))
    alone = name.startswith(("uniform", "protected")) and name != "protected_global"
    step = 30 * round_to * (layers if alone else 1)
    try:
        found = allocate(stock, budget, allocation, scores=scores)
    except ConfigError:
        assert target < smallest or target > largest - step  # else: out of reach, or less than one step
        return
    assert smallest <= target
    keep = kept_units(scores, stock.groups, found)
    assert [len(keep[g.name]) for g in stock.groups] == list(found.widths)
    assert all(
        w % round_to == 0 or w == g.num_units
        for g, w in zip(stock.groups, found.widths, strict=True)
        if g.kind == "mlp"
    )
    assert found.params == stock.params(found.widths)
    mlp = [i for i, g in enumerate(stock.groups) if g.kind == "mlp"]
    saturated = all(found.widths[i] <= round_to or found.widths[i] == 64 for i in mlp)
    if not saturated and found.params != largest:
        assert abs(found.params - found.target_params) <= step
    assert abs(found.params - found.target_params) <= max(step, head_cost * (layers if alone else 1))
    assert found == allocate(stock, budget, allocation, scores={k: v.clone() for k, v in scores.items()})


@given(
    ratio=st.floats(0.02, 0.8), layers=st.integers(3, 12), heads=st.sampled_from([0, 4]), mlp=st.sampled_from([0, 64])
)
def test_whole_layers_within_a_budget(ratio, layers, heads, mlp):
    stock = made(layers, heads=heads, mlp=mlp, blocks=True)
    scores = random_scores(stock)
    target = round(stock.dense_params * (1 - ratio))
    last_layer = sum(c for g, c in zip(stock.groups, stock.costs, strict=True) if g.layer == 0)  # one unit of each kind
    smallest = stock.dense_params - sum(stock.layer_params) + 7 + last_layer
    assume(target >= smallest)
    coarsest = layers * 30 if mlp else layers * 700 if heads else max(stock.layer_params)
    assume(stock.dense_params - target > coarsest / 2)  # less is nothing
    found = allocate(stock, Budget(pruning_ratio=ratio), scores=scores)
    gone = found.removed_layers
    worst = scores["layers"].sort(stable=True).indices[: len(gone)]
    assert sorted(gone) == sorted(worst.tolist())
    assert all(w == g.num_units for g, w in zip(stock.groups, found.widths, strict=True) if g.layer in gone)
    assert found.params == stock.params(found.widths, gone)
    left = layers - len(gone)
    step = left * 30 if mlp else left * 700 if heads else max(stock.layer_params)
    assert abs(found.params - found.target_params) <= max(step, 1)


@pytest.mark.parametrize("name", ["llama2_7b", "qwen25_1b5", "smollm2_135m"])
@pytest.mark.parametrize(
    "budget", [{"pruning_ratio": 0.2}, {"pruning_ratio": 0.3, "round_to": 128}, {"mlp_ratio": 1.5}]
)
def test_uniform_on_mlps_alone_is_the_closed_form(name, budget):
    stock = meta(name, ("mlp",))
    dense, step = stock.dense_widths()[0], budget.get("round_to", 1)
    exact = dense - budget.get("pruning_ratio", 0) * stock.dense_params / sum(stock.costs)
    if "mlp_ratio" in budget:
        exact = int(1.5 * stock.hidden_size)
    for allocation in (None, Uniform()):
        found = allocate(stock, Budget(**budget), allocation)
        assert set(found.widths) == {math.floor(exact / step + 0.5) * step} == {found.width}
        assert found.exact_width == pytest.approx(exact, abs=1e-4)
        assert found.params == stock.dense_params - (dense - found.width) * sum(stock.costs)


def test_uniform_takes_the_same_share_of_every_kind():
    found = allocate(meta("llama31_8b", ("mlp", "heads", "layers")), Budget(pruning_ratio=0.3))
    shares = [1 - k.kept[0] / k.dense[0] for k in found.kinds]
    assert max(shares) - min(shares) < 0.13  # one of eight key-value heads
    assert len(found.removed_layers) == 32 - found.kinds[2].kept[0] > 0
    assert found.provisional


def test_layers_of_different_widths_lose_the_same_share():
    stock = made(4, mlp=[64, 40, 32, 8], heads=0)
    found = allocate(stock, Budget(pruning_ratio=0.2))
    shares = [1 - w / g.num_units for g, w in zip(stock.groups, found.widths, strict=True)]
    assert max(shares) - min(shares) < 0.1
    assert abs(found.params - found.target_params) <= 4 * 30


# ---- published parameter counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "last", "share", "heads", "mlp", "params"),
    [
        ("llama2_7b", 4, 2, 0.25, 24, 8256, 5_422_977_024),  # LLaMA-7B has the same shapes
        ("llama2_7b", 3, 1, 0.6, 13, 4403, 3_350_188_032),
        ("llama31_8b", 4, 2, 0.25, 6, 10752, 6_612_586_496),
    ],
)
def test_llm_pruner_counts(name, first, last, share, heads, mlp, params):
    allocation = Protected(first=first, last=last, allocation=Uniform(share=share, compat="llm_pruner"))
    found = allocate(meta(name, ("mlp", "heads")), OWN, allocation)
    assert found.params == found.target_params == params
    dense_mlp = found.dense_widths[0]
    assert found.widths[:32] == (dense_mlp,) * first + (mlp,) * (32 - first - last) + (dense_mlp,) * last
    assert set(found.widths[32:]) == {found.dense_widths[32], heads}
    per_layer = [mlp if first <= i < 32 - last else dense_mlp for i in range(32)]
    per_head = [heads if first <= i < 32 - last else found.dense_widths[32] for i in range(32)]
    assert allocate(meta(name, ("mlp", "heads")), OWN, Explicit(mlp=per_layer, heads=per_head)).params == params


def test_rounding_rules():
    stock = made(1, mlp=[10], heads=[5])
    for compat, kept in ((None, (8, 4)), ("slimllm", (8, 4)), ("llm_pruner", (7, 4))):  # 2.5 of 10, 1.25 of 5
        assert allocate(stock, OWN, Uniform(share=0.25, compat=compat)).widths == kept
    by_kind = allocate(stock, OWN, Uniform(share={"mlp": 0.5}))
    assert by_kind.widths == (5, 5)


def test_slimllm_shares():
    cosines = {i: 0.6 + 0.1 * math.sin(i) for i in range(6)}
    stock = made(6, mlp=1000, heads=40)
    found = allocate(stock, OWN, CosineSoftmax(cosines, alpha=10.0, num_layers=4, share=0.25, compat="slimllm"))
    shares = softmax_shares([cosines[i] for i in range(6)], alpha=10.0, number=4, share=0.25)
    assert sum(shares) / 4 == pytest.approx(0.25)
    assert list(found.widths) == [1000 - round(1000 * s) for s in shares] + [40 - round(40 * s) for s in shares]
    budget = allocate(stock, Budget(target_params=found.params), CosineSoftmax(cosines, num_layers=4))
    assert max(abs(a - b) for a, b in zip(budget.widths, found.widths, strict=True)) <= 30  # heads round otherwise
    assert abs(budget.params - found.params) <= 15
    rounded = allocate(stock, replace(OWN, round_to=32), CosineSoftmax(cosines, num_layers=4, share=0.25))
    assert all(w % 32 == 0 or w == 1000 for w in rounded.widths[:6])
    assert max(abs(a - b) for a, b in zip(rounded.widths[:6], found.widths[:6], strict=True)) <= 16
    with pytest.raises(ConfigError, match=r"would remove 1\d\d% of \d.mlp"):
        allocate(stock, OWN, CosineSoftmax(cosines, alpha=40.0, share=0.5))


# ---- explicit --------------------------------------------------------------------------------------------------------


def test_explicit_layers():
    stock = made(4, blocks=True)
    named = allocate(stock, OWN, Explicit(layers=[1, 3], mlp=[10, 20, 30, 40]))
    assert (named.removed_layers, named.widths[:4], named.widths[-1]) == ((1, 3), (10, 64, 30, 64), 2)
    assert not named.provisional
    scores = random_scores(stock) | {"layers": torch.tensor([3.0, 1.0, 2.0, 4.0])}
    counted = allocate(stock, OWN, Explicit(layers=2), scores=scores)
    assert counted.removed_layers == (1, 2)
    assert kept_units(scores, stock.groups, counted)["layers"] == (0, 3)
    protected = Protected(first=1, last=1, allocation=Uniform(share={"layers": 0.5}))
    assert allocate(stock, OWN, protected, scores=scores | {"layers": torch.tensor([0.0, 1, 2, 0])}).removed_layers == (
        1,
        2,
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Explicit(), "give the number of units to keep"),
        (lambda: Uniform(share=1.0), "must be in"),
        (lambda: Uniform(share={"neurons": 0.2}), "kinds among mlp, heads, experts, attention_sub"),
        (lambda: Uniform(compat="llm_pruner"), "needs `share`"),
        (lambda: Protected(first=-1), "must not be negative"),
        (lambda: GlobalRank(comparable="rank"), "choose one of none, per_parameter, mean, standard"),
        (lambda: GlobalRank(floor=0.5, ceiling=0.4), "floor <= ceiling"),
        (lambda: CosineSoftmax({0: 2.0}), "must be within"),
        (lambda: CosineSoftmax({0: 0.5}, num_layers=2), "num_layers=2 must be from 1 to 1"),
        (lambda: CosineSoftmax({0: 0.5}, share=1.5), "not in"),
        (lambda: CosineSoftmax({0: 0.5}, compat="slimllm"), "needs `share`"),
        (lambda: Sensitivity({"a": {1.5: 0.1}}), "every kept share must be in"),
        (lambda: allocate(made(3), Budget(pruning_ratio=0.2), Explicit(mlp=9)), "sets the number of units itself: give no budget"),
        (lambda: allocate(made(3), OWN, Uniform()), "needs a budget"),
        (lambda: allocate(made(3), OWN, Explicit(layers=2)), "add 'layers' to `units`"),
        (lambda: allocate(made(3), OWN, Explicit(mlp=65)), "65 cannot be kept"),
        (lambda: allocate(made(3), OWN, Explicit(mlp=[1, 2])), "lists 2 numbers for 3 layers"),
        (lambda: allocate(made(3), OWN, Explicit(mlp=64)), "removes nothing"),
        (lambda: allocate(made(3, blocks=True), OWN, Explicit(layers=[0, 1, 2])), "or all of 3"),
        (lambda: allocate(made(3, blocks=True), OWN, Explicit(layers=4)), "from 1 to 3"),
        (lambda: allocate(made(3), Budget(pruning_ratio=0.2), Protected(first=2, last=1)), "all of the model's 3"),
        (lambda: allocate(made(3, blocks=True), Budget(pruning_ratio=0.2), GlobalRank()), "leave 'layers' out"),
        (lambda: allocate(made(3), Budget(pruning_ratio=0.2), CosineSoftmax({0: 0.5})), "no cosine for layers 1, 2"),
        (lambda: allocate(made(3), Budget(pruning_ratio=0.1), GlobalRank(ceiling=0.5)), "ceiling=0.5 already removes more"),
        (lambda: allocate(made(3, heads=0), OWN, Uniform(share={"mlp": 0.3, "heads": 0.5})), "names heads, units that"),
        (
            lambda: allocate(
                made(3, heads=0),
                Budget(pruning_ratio=0.1),
                Protected(first=1, last=1, allocation=CosineSoftmax({0: 0.9, 1: 0.1, 2: 0.8}, num_layers=2)),
            ),
            "none of the layers chosen by the cosines",
        ),
        (lambda: allocate(made(3), Budget(intermediate_size=8)), "but the units are mlp, heads. Use"),
        (lambda: allocate(made(3), Budget(target_params=10)), "smallest possible `target_params` is"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_settings_are_told_as_plain_data(name):
    told = ALLOCATIONS[name](made(4)).describe()
    assert json.loads(json.dumps(told)) == told
    resolved = allocate(made(4), Budget(pruning_ratio=0.2), ALLOCATIONS[name](made(4)), scores=random_scores(made(4)))
    assert told["name"] in resolved.asked
    assert json.loads(json.dumps(resolved.to_dict()))["kinds"]["heads"]["dense"][0] == 8
    assert "key-value heads 8 ->" in resolved.describe()
