"""Whole attentions and MLPs as units: pruned equals masked, costs, caches, optimizer states, refusals."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hfprune.evaluation.size_and_speed import measure_size
from hfprune.io.layouts import apply_plan, is_per_layer
from hfprune.models import (
    ArchSpec,
    SliceTemplate,
    check_stock,
    config_values,
    find_groups,
    find_spec,
    mlp_widths,
    parameter_count,
)
from hfprune.models.sublayers import NoAttention, NoMLP, cache_places, sublayer_groups
from hfprune.models.surgery import cut_optimizer_state, mask_plan, new_names, plan_cuts
from hfprune.plan import SUBLAYERS, PruningPlan
from hfprune.utils.errors import ConfigError, PlanError, UnsupportedArchitectureError
from tests.helpers.models import MIXTURES, NAMES, configs, inventory, tiny, token_ids

CLASSES = [name for name in (*NAMES, *MIXTURES) if name != "opt_350m_style"]
QUICK = ["gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "opt", "qwen3"]
MIXES = {
    "attention": ((), {"attention_sublayers": (0,)}),
    "mlp": ((), {"mlp_sublayers": (1,)}),
    "units": (("units", "heads"), {"attention_sublayers": (0, 2), "mlp_sublayers": (1, 2)}),
    "layers": (("units", "heads", "layers"), {"attention_sublayers": (0, 1, 2), "mlp_sublayers": (2,), "layers": (1,)}),
}
"""Name -> other unit kinds, and kind -> layers that lose the unit."""


def plan_for(model, mix):
    """Returns a plan that also removes some neurons or experts and heads, a different number in each layer."""
    others, lost = MIXES[mix] if isinstance(mix, str) else ((), mix)
    inner = "mlp" if find_spec(model).mlp else "experts"
    kinds = {inner if kind == "units" else kind for kind in others} | set(lost)
    groups = find_groups(model, sorted(kinds))
    keep = {}
    for group in groups:
        if group.kind in SUBLAYERS:
            keep[group.name] = () if group.layer in lost[group.kind] else (0,)
        elif group.kind == "layers":
            keep[group.name] = [unit for unit in range(group.num_units) if unit not in lost["layers"]]
        else:
            keep[group.name] = range(max(group.num_units - 1 - group.layer, group.least))
    config = config_values(model, groups, keep)
    return PruningPlan(model_class=find_spec(model).model_class, groups=groups, keep=keep, config=config)


def logits(model, ids=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids, **kwargs).logits


def decoded(model, ids, steps=4, **kwargs):
    """Returns greedy continuations, one token at a time without a cache or, with ``past_key_values``, with it."""
    cache, seen = kwargs.get("past_key_values"), ids
    for _ in range(steps):
        found = logits(model, seen, use_cache=cache is not None, **kwargs)
        ids = torch.cat([ids, found[:, -1:].argmax(-1)], dim=1)
        seen = ids if cache is None else ids[:, -1:]
    return ids


def check_mix(name, mix):
    model = tiny(name)
    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    plan = plan_for(model, mix)
    kept = [len(plan.keep[group.name]) for group in plan.groups]
    layers = [unit for group in plan.groups if group.kind == "layers" for unit in plan.removed(group)]
    cost = inventory(model, sorted({group.kind for group in plan.groups}, key=str))
    assert {g.name for g in cost.groups} == {g.name for g in plan.groups}
    by_name = dict(zip((g.name for g in plan.groups), kept, strict=True))
    expected = cost.params([by_name[g.name] for g in cost.groups], layers)
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    torch.testing.assert_close(logits(pruned), logits(masked), atol=1e-10, rtol=0)
    assert (logits(pruned) - logits(model)).abs().max() > 1e-3
    assert parameter_count(pruned) == expected
    ids = token_ids(2, 12)  # longer than the sliding windows
    plain = decoded(masked, ids)
    assert torch.equal(decoded(pruned, ids, past_key_values=DynamicCache(config=pruned.config)), plain)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", QUICK)
def test_pruned_equals_masked_with_and_without_a_cache(name, mix):
    check_mix(name, mix)


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in QUICK])
def test_pruned_equals_masked_in_the_other_classes(name, mix):
    check_mix(name, mix)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_generate_equals_decoding_of_the_masked_model(name):
    pruned, masked = tiny(name), tiny(name)
    plan = plan_for(pruned, {"attention_sublayers": (0, 2), "mlp_sublayers": (1,)})
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    for kwargs in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        expected = masked.generate(token_ids(2, 9), use_cache=False, **kwargs, **settings)
        assert torch.equal(pruned.generate(token_ids(2, 9), **kwargs, **settings), expected)


@pytest.mark.parametrize(("name", "lost"), [("gemma2", (0, 2)), ("gemma2", (1,)), ("gpt2", (0, 1, 2)), ("llama", (0,))])
def test_static_cache(name, lost):
    """Where a layer type has no attention left, a removed one counts the tokens in the first entry."""
    pruned, masked = tiny(name), tiny(name)
    plan = plan_for(pruned, {"attention_sublayers": lost})
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    ids = token_ids(2, 10)
    for cache in (DynamicCache(config=pruned.config), StaticCache(config=pruned.config, max_cache_len=32)):
        assert torch.equal(decoded(pruned, ids, past_key_values=cache), decoded(masked, ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_removed_attention_has_no_operations_and_no_cache(name):
    model = tiny(name)
    dense = measure_size(model, tokens=8)
    lean = copy.deepcopy(model)
    apply_plan(lean, plan_for(model, {"attention_sublayers": (1,)}))
    found = measure_size(lean, tokens=8)
    assert 3 * found.kv_cache_bytes == 2 * dense.kv_cache_bytes
    attention = sum(p.numel() for n, p in model.get_submodule(f"{find_spec(model).layers}.1").named_parameters()
                    if "attn" in n and p.dim() == 2)  # fmt: skip
    heads = model.config.num_attention_heads
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    assert dense.macs - found.macs == 8 * attention + 2 * heads * size * 8 * 8
    no_mlp = copy.deepcopy(model)
    apply_plan(no_mlp, plan_for(model, {"mlp_sublayers": (1,)}))
    assert measure_size(no_mlp, tokens=8).kv_cache_bytes == dense.kv_cache_bytes
    assert mlp_widths(no_mlp)[1] == 0
    assert mlp_widths(no_mlp)[0] == mlp_widths(model)[0]


def test_a_layer_without_both_is_removed():
    """A stock config states the result."""
    model, shorter = tiny("qwen3"), tiny("qwen3")
    apply_plan(model, plan_for(model, {"attention_sublayers": (1,), "mlp_sublayers": (1,)}))
    apply_plan(shorter, plan_for(shorter, {"layers": (1,)}))
    assert not is_per_layer(model.config)
    assert model.config.num_hidden_layers == 2
    assert torch.equal(logits(model), logits(shorter))


def test_attention_of_a_layer_and_mlp_of_another():
    model = tiny("llama")
    plan = plan_for(model, {"attention_sublayers": (0,), "mlp_sublayers": (2,)})
    assert plan.removed_layers() == ()
    assert [plan.removed_sublayers(kind) for kind in SUBLAYERS] == [(0,), (2,)]
    apply_plan(model, plan)
    layers = model.model.layers
    assert isinstance(layers[0].self_attn, NoAttention)
    assert isinstance(layers[0].input_layernorm, nn.Identity)
    assert isinstance(layers[2].mlp, NoMLP)
    assert [layers[i].self_attn.layer_idx for i in (1, 2)] == [0, 1]
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_cache_places_by_layer_type():
    assert cache_places(["a", "a", "b", "a"], [False, True, True, True]) == [None, 0, 2, 1]
    assert cache_places([""] * 3, [True] * 3) == [0, 1, 2]


def test_a_pruned_model_is_pruned_again():
    model = tiny("llama")
    apply_plan(model, plan_for(model, {"attention_sublayers": (0,), "mlp_sublayers": (2,)}))
    groups = find_groups(model, ("mlp", "heads", *SUBLAYERS, "layers"))
    names = [group.name.removeprefix("model.layers.") for group in groups]
    assert names[:4] == ["0.mlp", "1.mlp", "1.self_attn", "2.self_attn"]
    assert names[4:8] == ["1.attention_sublayer", "2.attention_sublayer", "0.mlp_sublayer", "1.mlp_sublayer"]
    masked = copy.deepcopy(model)
    keep = {g.name: range(g.num_units) for g in groups} | {"model.layers.1.attention_sublayer": ()}
    keep |= {"model.layers.2.self_attn": (1,), "model.layers.0.mlp": range(7)}
    plan = PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config={})
    apply_plan(model, plan)
    mask_plan(masked, plan)
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-10, rtol=0)
    ids = token_ids(1, 7)
    assert torch.equal(decoded(model, ids, past_key_values=DynamicCache(config=model.config)), decoded(masked, ids))
    with pytest.raises(UnsupportedArchitectureError, match="layers without attention or MLP.*'channels' out"):
        find_groups(model, ("channels",))
    with pytest.raises(PlanError, match="expects model.layers.1.attention_sublayer, which the model does not have"):
        apply_plan(model, plan)


@pytest.mark.parametrize("name", ["gpt2", "llama_untied_bias"])
def test_optimizer_states_follow(name):
    model = tiny(name)
    trained = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    trained.step()
    plan = plan_for(model, "layers")
    cuts, names = plan_cuts(model, plan), new_names(model, plan)
    order, state = list(model.named_parameters()), trained.state_dict()
    moments = {n: trained.state[p]["exp_avg"] for n, p in order}
    removed = {old for old, new in names.items() if new is None}
    assert cut_optimizer_state(state, [(n, p.shape) for n, p in order], cuts, removed=removed) == 0
    apply_plan(model, plan)
    assert [n for n, _ in model.named_parameters()] == [new for new in names.values() if new]
    again = torch.optim.AdamW(model.parameters(), lr=1e-3)
    again.load_state_dict(state)
    back = {new: old for old, new in names.items()}
    for new, parameter in model.named_parameters():
        expected = moments[back[new]]
        for axis, kept in cuts.get(back[new], ()):
            expected = expected.index_select(axis, kept)
        assert torch.equal(again.state[parameter]["exp_avg"], expected)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    again.step()


def test_groups_are_found_and_cut_on_the_meta_device():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(configs()["gemma3"])
    model = tiny("gemma3")
    plan = plan_for(model, "units")
    apply_plan(empty, plan)
    apply_plan(model, plan)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_what_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="do_layer_norm_before=False.*'mlp_sublayers' out"):
        find_groups(tiny("opt_350m_style"), ("mlp_sublayers",))
    config = configs()["gpt2"]
    config.scale_attn_by_inverse_layer_idx = True
    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedArchitectureError, match="no attention sub-layer can be removed"):
        find_groups(gpt2, ("attention_sublayers",))
    model = tiny("llama")
    with pytest.raises(ConfigError, match="'channels' cannot be combined with 'mlp_sublayers'"):
        find_groups(model, ("channels", "mlp_sublayers"))
    plan = plan_for(model, {"attention_sublayers": (1,)})
    with pytest.raises(UnsupportedArchitectureError, match="cannot state a layer without its attention.*per_layer"):
        check_stock(model, plan.groups, plan.keep)
    every = plan_for(model, dict.fromkeys(SUBLAYERS, (0, 1, 2)))
    with pytest.raises(PlanError, match="removes both sub-layers of every layer"):
        apply_plan(model, every)
    for kind in SUBLAYERS:
        bare = dataclasses.replace(find_spec(model), sublayers=None)
        with pytest.raises(UnsupportedArchitectureError, match=rf"its table does not describe them.*'{kind}' out"):
            sublayer_groups(model, bare, kind)
    templates = (SliceTemplate(module="up", side="out"), SliceTemplate(module="down", side="in"))
    spec = ArchSpec(
        model_class="Mine", backbone="", layers="blocks", mlp=templates, width_key="width", lora_targets=("up",)
    )
    assert spec.sublayers is None
