"""Budgets with hidden channels among the units: what everything else costs depends on their number."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfprune.allocation import CosineSoftmax, Explicit, GlobalRank, Inventory, Protected, Sensitivity, Uniform, allocate
from hfprune.models import check_stock, find_groups, parameter_count
from hfprune.plan import Budget
from hfprune.utils.errors import ConfigError
from tests.unit.allocation.test_budget import MODELS

MIXES = [
    ("channels",),
    ("mlp", "channels"),
    ("heads", "channels"),
    ("layers", "channels"),
    ("mlp", "heads", "channels"),
    ("mlp", "heads", "layers", "channels"),
]
OWN = Budget(allocated=True)


def meta(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name]))


def kept(found, kind):
    return next((k.kept[0] for k in found.kinds if k.kind == kind), None)


def rebuilt(model, found):
    """The parameters that transformers gives a model of the sizes in ``found``, from its config alone."""
    config = copy.deepcopy(model.config)
    config.head_dim = model.model.layers[0].self_attn.head_dim
    ratio = config.num_attention_heads // config.num_key_value_heads
    config.hidden_size = kept(found, "channels") or config.hidden_size
    config.intermediate_size = kept(found, "mlp") or config.intermediate_size
    config.num_key_value_heads = kept(found, "heads") or config.num_key_value_heads
    config.num_attention_heads = ratio * config.num_key_value_heads
    config.num_hidden_layers -= len(found.removed_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("meta"):
        return parameter_count(AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict())))


@pytest.mark.parametrize("units", MIXES, ids="+".join)
@pytest.mark.parametrize("name", ["llama32_1b", "qwen25_0b5"])
def test_budget_is_met_within_one_rounding_step(name, units):
    model = meta(name)
    stock = Inventory.of(model, find_groups(model, units))
    for ratio, round_to in ((0.1, 1), (0.3, 1), (0.55, 1), (0.3, 32)):
        found = allocate(stock, Budget(pruning_ratio=ratio, round_to=round_to))
        assert found.params == rebuilt(model, found)
        config, hidden = model.config, kept(found, "channels")
        layers = config.num_hidden_layers - len(found.removed_layers)
        queries = (
            config.num_attention_heads
            * (kept(found, "heads") or 1)
            // (config.num_key_value_heads if kept(found, "heads") else 1)
        )
        divisor = queries if name.startswith("llama") else 1
        neurons = 3 * hidden * layers * round_to
        step = neurons if "mlp" in units else stock.costs[-1] * max(divisor, round_to)
        assert abs(found.params - found.target_params) <= step / (2 if len(units) == 1 or "mlp" in units else 1)
        assert hidden % divisor == 0
        assert hidden % round_to == 0
        keep = {g.name: tuple(range(w)) for g, w in zip(stock.groups, found.widths, strict=True)}
        if "layers" not in units:
            check_stock(model, stock.groups, keep)


def test_kinds_lose_about_the_same_share():
    model = meta("qwen25_0b5")
    stock = Inventory.of(model, find_groups(model, ("mlp", "channels")))
    for ratio in (0.1, 0.3, 0.6):
        found = allocate(stock, Budget(pruning_ratio=ratio))
        shares = [1 - k.kept[0] / k.dense[0] for k in found.kinds]
        assert abs(shares[0] - shares[1]) < 2e-3
        assert 0 < shares[0] < ratio


def test_shares_and_published_rounding():
    """LLM-Pruner's channel-wise mode: C - int(C (1 - share)) channels go; stock configs take multiples of the heads."""
    model = meta("llama2_7b")
    stock = Inventory.of(model, find_groups(model, ("channels",)))
    published = allocate(stock, OWN, Uniform(share=0.2, compat="llm_pruner"))
    assert kept(published, "channels") == int(4096 * 0.8) == 3276
    assert kept(allocate(stock, OWN, Uniform(share=0.2)), "channels") == 3264
    named = allocate(stock, OWN, Explicit(channels=3200))
    assert (
        named.params == rebuilt(model, named) == 6_738_415_616 - 896 * (2 * 32000 + 32 * (4 * 4096 + 3 * 11008 + 2) + 1)
    )


@pytest.mark.parametrize(
    "allocation",
    [
        GlobalRank(),
        CosineSoftmax(dict.fromkeys(range(24), 0.9)),
        Sensitivity(),
        Protected(),
        Protected(allocation=GlobalRank()),
    ],
    ids=lambda allocation: json.dumps(allocation.describe()["name"]),
)
def test_allocations_over_layers_refuse_channels(allocation):
    model = meta("qwen25_0b5")
    stock = Inventory.of(model, find_groups(model, ("mlp", "channels")))
    with pytest.raises(
        ConfigError, match=rf"{type(allocation).__name__} cannot remove hidden channels.*Uniform or Explicit"
    ):
        allocate(stock, Budget(pruning_ratio=0.2), allocation)


def test_what_is_out_of_reach_is_refused():
    model = meta("smollm2_135m")
    stock = Inventory.of(model, find_groups(model, ("channels",)))
    with pytest.raises(ConfigError, match="multiples of the number of query heads, 9"):
        allocate(stock, Budget(pruning_ratio=0.2, round_to=64))
    with pytest.raises(ConfigError, match="largest possible `pruning_ratio` is 0.9"):
        allocate(stock, Budget(pruning_ratio=0.999))
    with pytest.raises(ConfigError, match="smallest possible `pruning_ratio` is 0.016"):
        allocate(stock, Budget(pruning_ratio=0.001))
    with pytest.raises(ConfigError, match="576 units and must keep at least 1; 577 cannot be kept"):
        allocate(stock, OWN, Explicit(channels=577))
