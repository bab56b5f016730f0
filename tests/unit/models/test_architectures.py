"""Every architecture table against the stock transformers class."""

import copy
import dataclasses
import functools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM

from hfprune.models import (
    ARCHITECTURES,
    ArchSpec,
    SliceTemplate,
    backbone,
    check_stock,
    config_values,
    find_groups,
    find_spec,
    head_counts,
    output_head,
    parameter_count,
    register,
    unit_cost,
)
from hfprune.models.projection import weight_of
from hfprune.models.surgery import apply_plan, cut_optimizer_state, mask_plan, new_names, plan_cuts
from hfprune.plan import PruningPlan
from hfprune.utils.errors import ConfigError, UnsupportedArchitectureError
from tests.helpers.models import HEADED, MIXTURES, NAMES, configs, inventory, tiny, token_ids

UNITS = [("mlp",), ("heads",), ("layers",), ("mlp", "heads", "layers")]
CASES = [(name, units) for name in NAMES for units in UNITS if "heads" not in units or name in HEADED]
KINDS = {"mlp": 11, "heads": 1, "layers": 2}


@functools.cache
def _dense(name):
    return tiny(name)


def dense(name):
    """Returns a copy of the tiny model that tests may change."""
    return copy.deepcopy(_dense(name))


def every(name):
    """Returns all unit kinds of a dense model but hidden channels."""
    return UNITS[-1] if name in HEADED else ("mlp", "layers")


def some(units, width, generator):
    return tuple(sorted(torch.randperm(units, generator=generator)[:width].tolist()))


def random_plan(model, units=("mlp",), *, widths=KINDS, differ=False, seed=0):
    """Returns a plan that keeps random units, the same number in every layer or, where they ``differ``, some more."""
    groups = find_groups(model, units)
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for number, group in enumerate(groups):
        more = number % 3 if differ and group.kind != "layers" else 0
        keep[group.name] = some(group.num_units, min(widths[group.kind] + more, group.num_units), generator)
    config = config_values(model, groups, keep)
    return PruningPlan(model_class=find_spec(model).model_class, groups=groups, keep=keep, config=config)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


@pytest.mark.parametrize(("name", "units"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_pruned_equals_masked(name, units):
    model = dense(name)
    for differ in (False, True):
        pruned, masked = dense(name), dense(name)
        plan = random_plan(model, units, differ=differ)
        apply_plan(pruned, plan)
        mask_plan(masked, plan)
        torch.testing.assert_close(logits(pruned), logits(masked), atol=1e-10, rtol=0)
        if any(plan.removed(group) for group in plan.groups):  # not the one key-value head of multi-query attention
            assert (logits(pruned) - logits(model)).abs().max() > 1e-3  # the plan does something


@pytest.mark.parametrize("name", HEADED)
def test_zeroing_the_consumer_alone_is_pruning(name):
    """The pruned model equals the dense one whose consumers have zero columns for the removed units."""
    pruned, zeroed = dense(name), dense(name)
    plan = random_plan(pruned, ("mlp", "heads"), differ=True)
    apply_plan(pruned, plan)
    modules = dict(zeroed.named_modules())
    with torch.no_grad():
        for group in plan.groups:
            (part,) = group.inputs()
            weight = modules[part.module].weight
            for channel in part.channels(plan.removed(group)):
                if isinstance(modules[part.module], nn.Linear):
                    weight[:, channel] = 0
                else:
                    weight[channel] = 0
    torch.testing.assert_close(logits(pruned), logits(zeroed), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", HEADED)
def test_a_unit_of_heads_is_what_attention_reads_together(name):
    """The outputs of the query heads that a unit owns depend on that unit's rows of queries, keys and values alone."""
    model = dense(name)
    group = find_groups(model, ("heads",))[1]
    if group.num_units == 1:
        pytest.skip(f"{name} has one unit of heads, which attention reads whole")
    (reader,) = group.inputs()
    seen = []
    model.get_submodule(reader.module).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    ids = token_ids()
    logits(model, ids)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for part in group.slices:
            if part.side == "out":
                weight_of(modules[part.module])[part.channels([0])] += 1.0
    logits(model, ids)
    changed = (seen[0] != seen[1]).flatten(0, -2).any(0).nonzero().squeeze(1).tolist()
    assert changed == reader.channels([0])


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_identity(name):
    model, before = dense(name), dense(name)
    plan = random_plan(model, every(name), widths={"mlp": 99, "heads": 99, "layers": 99})
    apply_plan(model, plan)
    assert torch.equal(logits(model), logits(before))
    for key, value in plan.config.items():
        setattr(before.config, key, value)
    assert model.config.to_dict() == before.config.to_dict()  # n_inner of GPT-2 becomes a number, nothing else changes


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_reloads_with_the_stock_class(name, tmp_path):
    tied = _dense(name).get_input_embeddings().weight is _dense(name).get_output_embeddings().weight
    possible = head_counts(_dense(name)) if name in HEADED else (1,)
    for heads in possible:
        model = dense(name)
        plan = random_plan(model, every(name), widths=KINDS | {"heads": heads})
        check_stock(model, plan.groups, plan.keep)
        apply_plan(model, plan)
        folder = tmp_path / str(heads)
        model.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert type(reloaded) is type(model)
        assert parameter_count(reloaded) == parameter_count(model)
        assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) == tied
        assert torch.equal(logits(reloaded.eval()), logits(model))


@pytest.mark.parametrize("name", HEADED)
def test_head_counts_that_the_table_refuses_are_refused_by_transformers(name):
    model = _dense(name)
    units = find_groups(model, ("heads",))[0].num_units
    possible = head_counts(model)
    for heads in possible:
        assert stated(model, heads) is not None
    for heads in set(range(1, units + 1)) - set(possible):
        plan = random_plan(model, ("heads",), widths={"heads": heads})
        assert not plan.config
        with pytest.raises(
            UnsupportedArchitectureError, match=rf"does not support {heads} key-value.*{possible[-1]}.*layout"
        ):
            check_stock(model, plan.groups, plan.keep)
        pruned = dense(name)
        apply_plan(pruned, plan)
        assert stated(model, heads) != shapes(pruned)


def shapes(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def stated(model, heads):
    """Returns the shapes that transformers gives a model of ``heads`` key-value heads, None when it refuses the config."""
    table, config = find_spec(model).attention, copy.deepcopy(model.config)
    dense = getattr(config, table.keys_values_key or table.heads_key)
    queries = getattr(config, table.heads_key) // dense * heads
    setattr(config, table.heads_key, queries)
    if table.keys_values_key:
        setattr(config, table.keys_values_key, heads)
    if table.size_key:
        setattr(config, table.size_key, model.get_submodule(find_groups(model, ("heads",))[0].name).head_dim)
    try:
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            return shapes(AutoModelForCausalLM.from_config(config))
    except (ValueError, StrictDataclassError):
        return None


@pytest.mark.parametrize("differ", [False, True], ids=["uniform", "differing"])
@pytest.mark.parametrize("name", NAMES)
def test_cost_is_what_surgery_removes(name, differ):
    model = dense(name)
    stock = inventory(model, every(name))
    plan = random_plan(model, every(name), differ=differ)
    alone = [unit_cost(model, g) for g in plan.groups]
    assert alone[-1] == stock.layer_params[0]
    expected = stock.params(list(plan.widths().values()), plan.removed_layers())
    for group, cost in zip(plan.groups, alone, strict=True):
        other = dense(name)
        units = tuple(range(group.num_units))
        keep = {g.name: tuple(range(g.num_units)) for g in plan.groups} | {group.name: units[:-1] or units}
        values = config_values(other, plan.groups, keep)
        apply_plan(other, dataclasses.replace(plan, keep=keep, config=values))
        assert parameter_count(model) - parameter_count(other) == cost * (len(units) > 1)
    apply_plan(model, plan)
    assert parameter_count(model) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama_untied_bias", "phi3"])
def test_training_goes_on_with_what_survives(name):
    """Optimizer states and parameters are cut alike, whole layers included, and keep their order."""
    model = dense(name)
    trained = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    trained.step()
    plan = random_plan(model, UNITS[-1], differ=True)
    cuts, names = plan_cuts(model, plan), new_names(model, plan)
    order = list(model.named_parameters())
    moments = {n: trained.state[p]["exp_avg"] for n, p in order}
    state = trained.state_dict()
    gone = {old for old, new in names.items() if new is None}
    assert cut_optimizer_state(state, [(n, p.shape) for n, p in order], cuts, removed=gone) == 0
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


@pytest.mark.parametrize("name", NAMES)
def test_backbone_and_head_are_the_model(name):
    model, ids = _dense(name), token_ids()
    with torch.no_grad():
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        found = output_head(model).logits(hidden.flatten(0, 1))
    torch.testing.assert_close(found, logits(model, ids).flatten(0, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_found_and_cut_on_the_meta_device(name):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(configs()[name])
    model = dense(name)
    assert find_groups(empty, every(name)) == find_groups(model, every(name))
    assert parameter_count(empty) == parameter_count(model)
    plan = random_plan(model, every(name), differ=True)
    apply_plan(empty, plan)
    apply_plan(model, plan)
    assert shapes(empty) == shapes(model)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_model_generates_with_its_cache(name):
    model, ids = dense(name), token_ids(1, 5)
    apply_plan(model, random_plan(model, every(name), differ=True))
    out = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    for _ in range(3):
        scores = logits(model, ids)[:, -1]
        if model.generation_config.eos_token_id is not None:
            scores[:, model.generation_config.eos_token_id] = float("-inf")  # min_new_tokens
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, ids)


def test_a_pruned_model_is_pruned_again():
    """Groups, costs and head sizes are read from the modules, not from a config that may not say them."""
    model = dense("phi3")
    apply_plan(model, random_plan(model, ("mlp", "heads"), differ=True))
    masked = copy.deepcopy(model)
    again = random_plan(model, UNITS[-1], widths={"mlp": 7, "heads": 1, "layers": 1}, seed=1)
    assert [g.num_units for g in again.groups] == [11, 12, 13, 1, 2, 2, 3]
    apply_plan(model, again)
    mask_plan(masked, again)
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-10, rtol=0)


def test_layers_that_depend_on_their_index_stay():
    config = configs()["gpt2"]
    config.scale_attn_by_inverse_layer_idx = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    find_groups(model, ("mlp", "heads"))
    with pytest.raises(UnsupportedArchitectureError, match="scale_attn_by_inverse_layer_idx"):
        find_groups(model, ("layers",))


def test_rotary_factors_fix_the_heads_of_phi3():
    config = configs()["phi3"]
    config.rope_parameters = config.rope_parameters | {"short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configs()["phi3"])
    assert head_counts(model) == (1, 2)
    model.config = config
    assert head_counts(model) == (2,)


@pytest.mark.parametrize("units", [(), ("mlp", "mlp"), ("neurons",)])
def test_unit_kinds_are_checked(units):
    with pytest.raises(ConfigError, match="give each of mlp, heads, experts, attention_sublayers, .* at most once"):
        find_groups(_dense("llama"), units)


def test_table_covers_what_the_readme_promises():
    assert list(ARCHITECTURES) == sorted({find_spec(tiny(name)).model_class for name in (*NAMES, *MIXTURES)})


def test_unknown_class_lists_the_known_ones_and_shows_how_to_describe_one():
    class LlamaForCasualLM(nn.Module):
        pass

    with pytest.raises(UnsupportedArchitectureError) as caught:
        find_groups(LlamaForCasualLM())
    text = str(caught.value)
    assert "Did you mean 'LlamaForCausalLM'?" in text
    assert "GPT2LMHeadModel" in text
    assert "hfprune.models.register(ArchSpec(" in text


def test_user_described_architecture_is_found():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    class MineForCausalLM(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    spec = ArchSpec(
        model_class="MineForCausalLM",
        backbone="",
        layers="blocks",
        mlp=(SliceTemplate(module="up", side="out"), SliceTemplate(module="down", side="in")),
        width_key="width",
        lora_targets=("up", "down"),
    )
    try:
        register(spec)
        groups = find_groups(MineForCausalLM())
        assert [g.name for g in groups] == ["blocks.0.mlp", "blocks.1.mlp"]
        assert [g.num_units for g in groups] == [8, 8]
        assert find_groups(MineForCausalLM(), ("mlp",)) == groups
        with pytest.raises(UnsupportedArchitectureError, match="Heads of MineForCausalLM cannot be removed"):
            find_groups(MineForCausalLM(), ("heads",))
    finally:
        ARCHITECTURES.remove("MineForCausalLM")


def test_quantised_or_wrapped_projection_is_refused():
    class Fake(nn.Linear):
        pass

    model = tiny()
    old = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = Fake(old.in_features, old.out_features, bias=False)
    with pytest.raises(UnsupportedArchitectureError, match="Fake is not supported"):
        find_groups(model)
