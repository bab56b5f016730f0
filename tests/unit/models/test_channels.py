"""Hidden channels of the residual stream: the surgery against dense models with zeros, configs, costs, layouts."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfprune
from hfprune.io.layouts import LAYOUTS, is_per_layer
from hfprune.models import check_stock, find_groups, find_spec, hidden_step, parameter_count, surgery, unit_cost
from hfprune.models.residual_stream import Fold, scaled_epsilon
from hfprune.models.surgery import apply_plan, cut_optimizer_state, mask_plan, plan_cuts
from hfprune.plan import PruningPlan
from hfprune.utils.errors import ConfigError, UnsupportedArchitectureError
from tests.helpers.models import NAMES, STREAMS, configs, inventory, token_ids
from tests.reference.channels import norm_with_zeros, silence
from tests.unit.models.test_architectures import KINDS, dense, logits, random_plan, shapes

OTHERS = [name for name in NAMES if name.startswith(("gpt", "opt"))]
MIXES = [("channels",), ("mlp", "heads", "layers", "channels")]
WIDTHS = KINDS | {"channels": 12}
FLOAT32 = 2e-5
"""Norms compute in float32, whatever the model's type."""


def plan_for(model, units, **kwargs):
    return random_plan(model, units, widths=kwargs.pop("widths", WIDTHS), **kwargs)


def same_epsilon(pruned, model):
    """Gives norms of queries and keys the dense epsilon; those of the stream have one of their own."""
    for module, old in zip(pruned.model.layers, model.model.layers, strict=False):
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(module.self_attn, name, None)) is not None:
                attribute = "eps" if hasattr(norm, "eps") else "variance_epsilon"
                setattr(norm, attribute, getattr(getattr(old.self_attn, name), attribute))


@pytest.mark.parametrize("units", MIXES, ids="+".join)
@pytest.mark.parametrize("name", STREAMS)
def test_pruned_equals_masked(name, units):
    for differ in (False, True):
        pruned, masked = dense(name), dense(name)
        plan = plan_for(pruned, units, differ=differ)
        apply_plan(pruned, plan)
        mask_plan(masked, plan)
        same_epsilon(pruned, masked)
        torch.testing.assert_close(logits(pruned), logits(masked), atol=FLOAT32, rtol=FLOAT32)
        assert (logits(pruned) - logits(dense(name))).abs().max() > 1e-2


@pytest.mark.parametrize("name", STREAMS)
def test_silencing_what_writes_the_channels_is_pruning(name, monkeypatch):
    """The pruned model equals the dense one whose writers of the removed channels are zero; not so with unscaled norms."""
    pruned, silent = dense(name), dense(name)
    plan = plan_for(pruned, ("channels",))
    silence(silent, plan.removed(plan.groups[0]))
    apply_plan(pruned, plan)
    same_epsilon(pruned, silent)
    torch.testing.assert_close(logits(pruned), logits(silent), atol=FLOAT32, rtol=FLOAT32)
    monkeypatch.setattr(surgery, "plan_folds", lambda model, plan: {})
    sliced = dense(name)
    apply_plan(sliced, plan)
    assert (logits(sliced) - logits(silent)).abs().max() > 1e-2


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_folded_norm_is_the_norm_over_zeros(offset):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    kept, eps = [0, 3, 4, 7], 0.3  # large enough to be seen
    small, folded = x[kept], Fold(factor=(9 / 4) ** 0.5, offset=offset)(weight[kept])
    for epsilon, equal in ((scaled_epsilon(eps, 9, 4), True), (eps, False)):
        found = small / (small.square().mean() + epsilon).sqrt() * (offset + folded)
        expected = torch.tensor(norm_with_zeros(x.tolist(), weight.tolist(), kept, eps, offset), dtype=torch.float64)
        assert torch.allclose(found, expected, atol=1e-14, rtol=0) == equal


@pytest.mark.parametrize("name", STREAMS)
def test_keeping_everything_is_the_identity(name):
    model = dense(name)
    plan = plan_for(model, MIXES[-1], widths=dict.fromkeys(WIDTHS, 99))
    apply_plan(model, plan)
    assert torch.equal(logits(model), logits(dense(name)))
    assert "hidden_size" not in plan.config


@pytest.mark.parametrize("name", STREAMS)
def test_saved_model_reloads_with_the_stock_class(name, tmp_path):
    tied = dense(name).config.tie_word_embeddings
    for number, (units, size) in enumerate([(("channels",), 12), (("channels",), 8), (MIXES[-1], 12)]):
        model = dense(name)
        plan = plan_for(model, units, widths=WIDTHS | {"channels": size})
        check_stock(model, plan.groups, plan.keep)
        apply_plan(model, plan)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        model.save_pretrained(tmp_path / str(number))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float64).eval()
        assert type(reloaded) is type(model)
        assert reloaded.config.hidden_size == size
        assert parameter_count(reloaded) == parameter_count(model)
        torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-6, rtol=1e-6)  # Gemma: sqrt(12) in float32


@pytest.mark.parametrize("name", STREAMS)
def test_hidden_sizes_that_the_table_refuses_are_refused_by_transformers(name):
    model = dense(name)
    step = hidden_step(model)
    for size in range(1, 16):
        plan = plan_for(model, ("channels",), widths={"channels": size})
        config = copy.deepcopy(model.config)
        config.hidden_size, config.head_dim = size, model.model.layers[0].self_attn.head_dim
        if size % step == 0:
            check_stock(model, plan.groups, plan.keep)
            type(config).from_dict(config.to_dict())
            continue
        assert not plan.config
        with pytest.raises(
            UnsupportedArchitectureError, match=f"hidden size of {size}; it supports multiples of {step}"
        ):
            check_stock(model, plan.groups, plan.keep)
        with pytest.raises(Exception, match="is not a multiple of the number of attention heads"):
            type(config).from_dict(config.to_dict())


def test_rotary_factors_fix_the_hidden_size_of_phi3():
    model = dense("phi3")
    model.config.rope_parameters = model.config.rope_parameters | {"short_factor": [1.0, 1.0]}
    plan = plan_for(model, ("channels",))
    with pytest.raises(UnsupportedArchitectureError, match="supports only 16"):
        check_stock(model, plan.groups, plan.keep)


@pytest.mark.parametrize("name", OTHERS)
def test_streams_with_layer_norms_are_refused_by_name(name):
    with pytest.raises(UnsupportedArchitectureError, match=r"LayerNorms subtract the mean.*Leave 'channels' out"):
        find_groups(dense(name), ("mlp", "channels"))


@pytest.mark.parametrize("differ", [False, True], ids=["uniform", "differing"])
@pytest.mark.parametrize("name", STREAMS)
def test_cost_is_what_surgery_removes(name, differ):
    model = dense(name)
    stock = inventory(model, MIXES[-1])
    plan = plan_for(model, MIXES[-1], differ=differ)
    expected = stock.params(list(plan.widths().values()), plan.removed_layers())
    alone = dataclasses.replace(plan, keep={g.name: tuple(range(g.num_units)) for g in plan.groups})
    alone = dataclasses.replace(alone, keep={**alone.keep, "channels": tuple(range(15))}, config={})
    other = dense(name)
    apply_plan(other, alone)
    assert parameter_count(model) - parameter_count(other) == unit_cost(model, plan.groups[-1])
    apply_plan(model, plan)
    assert parameter_count(model) == expected


@pytest.mark.parametrize("name", STREAMS)
def test_groups_are_found_and_cut_on_the_meta_device(name):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(configs()[name])
    model = dense(name)
    assert find_groups(empty, MIXES[-1]) == find_groups(model, MIXES[-1])
    plan = plan_for(model, MIXES[-1])
    assert PruningPlan.from_json(plan.to_json()) == plan
    apply_plan(empty, plan)
    apply_plan(model, plan)
    assert shapes(empty) == shapes(model)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_goes_on_with_what_survives(name):
    model = dense(name)
    trained = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    trained.step()
    plan = plan_for(model, ("mlp", "channels"))
    cuts, order, state = plan_cuts(model, plan), list(model.named_parameters()), trained.state_dict()
    assert cut_optimizer_state(state, [(n, p.shape) for n, p in order], cuts) == 0
    apply_plan(model, plan)
    again = torch.optim.AdamW(model.parameters(), lr=1e-3)
    again.load_state_dict(state)
    assert all(again.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    again.step()


@pytest.mark.parametrize("name", ["gemma3", "llama", "phi3"])
def test_a_pruned_model_is_pruned_again_and_generates(name):
    model = dense(name)
    apply_plan(model, plan_for(model, ("mlp", "channels"), differ=True))
    masked = copy.deepcopy(model)
    again = plan_for(model, MIXES[-1], widths={"mlp": 7, "heads": 1, "layers": 1, "channels": 8}, seed=1)
    apply_plan(model, again)
    mask_plan(masked, again)
    same_epsilon(model, masked)
    torch.testing.assert_close(logits(model), logits(masked), atol=FLOAT32, rtol=FLOAT32)
    assert model.generate(token_ids(1, 5), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 8)


@pytest.mark.parametrize("name", ["gemma2", "llama", "qwen2"])
def test_layers_that_differ_beside_a_smaller_stream(name, tmp_path):
    """Stock configs cannot say it: per_layer can, and padded where a stock config states the hidden size."""
    for size in (12, 11):
        model = dense(name)
        hfprune.apply_plan(model, plan_for(model, ("mlp", "channels"), differ=True, widths=WIDTHS | {"channels": size}))
        assert is_per_layer(model.config)
        model.save_pretrained(tmp_path / str(size))
        found = hfprune.load(tmp_path / str(size))
        torch.testing.assert_close(logits(found), logits(model), atol=1e-6, rtol=1e-6)
        if size % hidden_step(dense(name)):
            with pytest.raises(ConfigError, match="pads layers, not the hidden size"):
                LAYOUTS.get("padded").check(model)
        else:
            LAYOUTS.get("padded").written(model).save_pretrained(tmp_path / "padded")
            padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded", dtype=torch.float64).eval()
            assert type(padded) is type(model)
            assert padded.config.hidden_size == size
            torch.testing.assert_close(logits(padded), logits(model), atol=1e-6, rtol=1e-6)


def test_what_carries_the_stream_is_in_the_table():
    """Every parameter with an axis as long as the stream is cut there, and no other."""
    config = copy.deepcopy(configs()["gemma3"])
    config.hidden_size, config.intermediate_size, config.vocab_size = 22, 26, 61
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    before = {name: list(p.shape) for name, p in model.named_parameters()}
    plan = plan_for(model, ("channels",))
    assert plan.groups[0].num_units == 22
    apply_plan(model, plan)
    expected = {name: [12 if size == 22 else size for size in shape] for name, shape in before.items()}
    assert {name: list(p.shape) for name, p in model.named_parameters()} == expected
    assert find_spec(model).stream is not None
