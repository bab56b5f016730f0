"""Budgets, to the neuron, on meta-device models of the real sizes."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hfprune.allocation import Inventory, allocate, keep_top, target_params
from hfprune.models import find_groups
from hfprune.plan import Budget, Group, Slice
from hfprune.utils.errors import ConfigError

LLAMA3 = {"vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8}
MODELS = {
    "llama2_7b": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                             num_attention_heads=32, tie_word_embeddings=False),
    "llama32_1b": LlamaConfig(**LLAMA3 | {"head_dim": 64}, hidden_size=2048, intermediate_size=8192,
                              num_hidden_layers=16, num_attention_heads=32, tie_word_embeddings=True),
    "llama32_3b": LlamaConfig(**LLAMA3, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                              num_attention_heads=24, tie_word_embeddings=True),
    "llama31_8b": LlamaConfig(**LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                              num_attention_heads=32, tie_word_embeddings=False),
    "qwen25_7b": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                             num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False),
    "qwen25_1b5": Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                              num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen25_0b5": Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                              num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "smollm2_135m": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
}  # fmt: skip
# parameters, exact widths at 20 and 30 %, rounded to 128
TABLE = {
    "llama2_7b": (6_738_415_616, 7580.66, 5867.00, 7552, 5888),
    "llama32_1b": (1_235_814_400, 5677.73, 4420.59, 5632, 4480),
    "llama32_3b": (3_212_749_824, 5701.96, 4456.94, 5760, 4480),
    "llama31_8b": (8_030_261_248, 10251.60, 8209.40, 10240, 8192),
    "qwen25_7b": (7_615_616_512, 13884.73, 11355.10, 13824, 11392),
    "qwen25_1b5": (1_543_714_304, 6567.09, 5370.63, 6528, 5376),
    "qwen25_0b5": (494_032_768, 3332.40, 2566.60, 3328, 2560),
    "smollm2_135m": (134_515_008, 1017.04, 757.56, 1024, 768),
}


def resolved(name, **budget):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name])
    return allocate(Inventory.of(model, find_groups(model)), Budget(**budget))


@pytest.mark.parametrize("name", MODELS)
def test_ratio_to_width_as_in_the_table(name):
    params, *rest = TABLE[name]
    for ratio, exact, rounded in ((0.2, rest[0], rest[2]), (0.3, rest[1], rest[3])):
        found = resolved(name, pruning_ratio=ratio)
        assert found.dense_params == params
        assert found.exact_width == pytest.approx(exact, abs=0.006)
        assert found.width == round(exact)
        assert abs(found.removed_share - ratio) * params <= (params - found.params) / (found.dense_width - found.width)
        assert resolved(name, pruning_ratio=ratio, round_to=128).width == rounded


def test_llama2_7b_at_20_percent_leaves_what_the_paper_calls_5_4b():
    found = resolved("llama2_7b", pruning_ratio=0.2)
    assert (found.width, found.params) == (7581, 5_390_864_384)
    assert resolved("llama2_7b", target_params=5_390_864_384).width == 7581
    assert resolved("llama2_7b", intermediate_size=7581).params == 5_390_864_384


@pytest.mark.parametrize(
    ("ratio", "width", "share"),
    [(2.8, 5734, 19.55), (2.774, 5681, 19.97), (2.741, 5613, 20.51), (2.161, 4425, 29.97), (1.548, 3170, 39.95),
     (3.9, 7987, 1.63)],
)  # fmt: skip
def test_official_mlp_ratios_on_llama32_1b(ratio, width, share):
    found = resolved("llama32_1b", mlp_ratio=ratio)
    assert found.width == width
    assert 100 * found.removed_share == pytest.approx(share, abs=0.0051)


def test_the_papers_own_ratio_is_refused_with_the_largest_possible():
    with pytest.raises(ConfigError, match=r"mlp_ratio=2.8 is impossible.*11008 wide.*2.6875.*largest possible.*2.6873"):
        resolved("llama2_7b", mlp_ratio=2.8)


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({"pruning_ratio": 0.7}, r"2,410,287,104 to 6,738,415,616.*largest possible `pruning_ratio` is 0.6423\.$"),
        ({"pruning_ratio": 1e-9}, "smallest possible `pruning_ratio` is 5.8e-05"),
        ({"target_params": 10}, "smallest possible `target_params` is 2410287104"),
        ({"target_params": 7_000_000_000}, "largest possible `target_params` is 6738022400"),
        ({"intermediate_size": 11008}, "11008 wide; the largest possible `intermediate_size` is 11007"),
        ({"intermediate_size": 11000, "round_to": 128}, "largest possible `intermediate_size` is 10880"),
        ({"intermediate_size": 40, "round_to": 128}, "smallest possible `intermediate_size` is 128"),
        ({"mlp_ratio": 0.001, "round_to": 8}, "smallest possible `mlp_ratio` is 0.0020"),
        ({"pruning_ratio": 0.1, "round_to": 16384}, "no unit can be removed with round_to=16384"),
    ],
)
def test_impossible_budgets_say_what_is_possible(budget, match):
    with pytest.raises(ConfigError, match=match) as caught:
        resolved("llama2_7b", **budget)
    for name, value in re.findall(r"possible `(\w+)` is ([\d.e-]*\d)", str(caught.value)):
        possible = float(value) if "ratio" in name else int(value)
        assert resolved("llama2_7b", **budget | {name: possible}).params < TABLE["llama2_7b"][0]


@pytest.mark.parametrize("ratio", [0, 1, -0.2, 1.5, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ConfigError, match="not between 0 and 1"):
        Budget(pruning_ratio=ratio)


@pytest.mark.parametrize("key", ["target_params", "intermediate_size", "mlp_ratio"])
def test_values_must_be_positive(key):
    with pytest.raises(ConfigError, match=f"{key}=0 must be positive"):
        Budget(**{key: 0})


def test_exactly_one_target():
    with pytest.raises(ConfigError, match="none was given"):
        Budget()
    with pytest.raises(ConfigError, match="`pruning_ratio` and `mlp_ratio` were given"):
        Budget(pruning_ratio=0.2, mlp_ratio=2.0)


def inventory(*units, cost=1, total=100, hidden_size=4):
    groups = tuple(
        Group(name=f"g{i}", kind="mlp", num_units=number, slices=(Slice(module="m", side="in"),), layer=i)
        for i, number in enumerate(units)
    )
    return Inventory(groups=groups, costs=(cost,) * len(units), dense_params=total, hidden_size=hidden_size)


@pytest.mark.parametrize(
    ("budget", "params"),
    [
        ({"pruning_ratio": 0.25}, 75),
        ({"target_params": 90}, 90),
        ({"intermediate_size": 5}, 94),
        ({"mlp_ratio": 1.6}, 96),
    ],
)
def test_every_budget_is_a_parameter_count(budget, params):
    assert target_params(Budget(**budget), inventory(8, 8)) == params


@pytest.mark.parametrize("budget", [{"intermediate_size": 5}, {"mlp_ratio": 1.5}])
def test_one_width_needs_layers_of_one_width_and_a_hidden_size(budget):
    with pytest.raises(
        ConfigError, match="one MLP width for all layers, but the dense widths are 8, 9.*`pruning_ratio`"
    ):
        allocate(inventory(8, 9), Budget(**budget))
    with pytest.raises(ConfigError, match="no hidden size"):
        allocate(inventory(8, 8, hidden_size=None), Budget(mlp_ratio=1.5))


@pytest.mark.parametrize(
    ("exact", "round_to", "width"), [(40, 16, 48), (39, 16, 32), (35, 10, 40), (77, 2, 78), (7, 2, 8)]
)
def test_halves_are_rounded_up(exact, round_to, width):
    """For every number of layers and cost: no error of floating-point arithmetic decides a tie."""
    for layers in (1, 3, 7, 30):
        for cost in (1, 3, 1729):
            stock = inventory(*[80] * layers, cost=cost, total=100_000_000)
            found = allocate(stock, Budget(intermediate_size=exact, round_to=round_to))
            assert (found.width, found.exact_width) == (width, exact)


@given(
    ratio=st.floats(0.01, 0.99),
    round_to=st.sampled_from([1, 8, 64]),
    units=st.integers(64, 4096),
    layers=st.integers(1, 40),
    cost=st.integers(1, 10_000),
    other=st.integers(0, 10**9),
)
def test_budget_is_met_within_one_rounding_step(ratio, round_to, units, layers, cost, other):
    total = units * layers * cost + other
    exact = units - ratio * total / (layers * cost)
    try:
        found = allocate(
            inventory(*[units] * layers, cost=cost, total=total), Budget(pruning_ratio=ratio, round_to=round_to)
        )
    except ConfigError:
        assert exact < round_to + 1 or exact > units - 1 - round_to
        return
    assert found.width % round_to == 0
    assert abs(found.params - (1 - ratio) * total) <= round_to * layers * cost / 2 + 1


@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=30), data=st.data())
def test_keep_top_is_sorted_unique_and_breaks_ties_by_index(scores, data):
    width = data.draw(st.integers(1, len(scores)))
    keep = keep_top(torch.tensor(scores, dtype=torch.float64), width)
    assert list(keep) == sorted(set(keep))
    best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:width]
    assert list(keep) == sorted(best)
    assert keep == keep_top(torch.tensor(scores, dtype=torch.float64) * 7, width)
