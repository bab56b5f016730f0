"""Every architecture table against the stock transformers class."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hfprune.arch import (
    ARCHITECTURES,
    ArchSpec,
    SliceTemplate,
    backbone,
    find_groups,
    find_spec,
    output_head,
    parameter_count,
    register,
    unit_cost,
)
from hfprune.errors import UnsupportedArchitectureError
from hfprune.plan import PruningPlan
from hfprune.surgery import apply_plan, mask_plan
from tests.models import NAMES, configs, tiny, token_ids


def random_plan(model, *, width=11, seed=0):
    groups = find_groups(model)
    generator = torch.Generator().manual_seed(seed)
    keep = {g.name: tuple(sorted(torch.randperm(g.num_units, generator=generator)[:width].tolist())) for g in groups}
    spec = find_spec(model)
    return PruningPlan(model_class=spec.model_class, groups=groups, keep=keep, config={spec.width_key: width})


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_masked(name):
    pruned, masked, dense = tiny(name), tiny(name), tiny(name)
    plan = random_plan(dense)
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    torch.testing.assert_close(logits(pruned), logits(masked), atol=1e-12, rtol=0)
    assert (logits(pruned) - logits(dense)).abs().max() > 1e-3  # the plan does something


@pytest.mark.parametrize("name", NAMES)
def test_zeroing_the_consumer_alone_is_pruning(name):
    """Acceptance test 8: pruned == dense with the removed neurons' down columns zeroed."""
    pruned, zeroed = tiny(name), tiny(name)
    plan = random_plan(pruned)
    apply_plan(pruned, plan)
    modules = dict(zeroed.named_modules())
    with torch.no_grad():
        for group in plan.groups:
            (part,) = group.inputs()
            weight = modules[part.module].weight
            for unit in plan.removed(group):
                if isinstance(modules[part.module], nn.Linear):
                    weight[:, unit] = 0
                else:
                    weight[unit] = 0
    torch.testing.assert_close(logits(pruned), logits(zeroed), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_identity(name):
    model, dense = tiny(name), tiny(name)
    groups = find_groups(model)
    keep = {g.name: tuple(range(g.num_units)) for g in groups}
    spec = find_spec(model)
    plan = PruningPlan(
        model_class=spec.model_class, groups=groups, keep=keep, config={spec.width_key: groups[0].num_units}
    )
    apply_plan(model, plan)
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_reloads_with_the_stock_class(name, tmp_path):
    model = tiny(name)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    apply_plan(model, random_plan(model))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(reloaded) is type(model)
    assert parameter_count(reloaded) == parameter_count(model)
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) == tied
    assert torch.equal(logits(reloaded.eval()), logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_unit_cost_is_what_surgery_removes(name):
    model = tiny(name)
    before = parameter_count(model)
    groups = find_groups(model)
    cost = sum(unit_cost(model, g) * (g.num_units - 11) for g in groups)
    apply_plan(model, random_plan(model))
    assert before - parameter_count(model) == cost


@pytest.mark.parametrize("name", NAMES)
def test_backbone_and_head_are_the_model(name):
    model, ids = tiny(name), token_ids()
    with torch.no_grad():
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        found = output_head(model).logits(hidden.flatten(0, 1))
    torch.testing.assert_close(found, logits(model, ids).flatten(0, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_found_on_the_meta_device(name):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(configs()[name])
    model = tiny(name)
    assert find_groups(empty) == find_groups(model)
    assert parameter_count(empty) == parameter_count(model)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_model_generates(name):
    model = tiny(name)
    apply_plan(model, random_plan(model))
    out = model.generate(token_ids(1, 5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= 8


def test_table_covers_what_the_readme_promises():
    assert list(ARCHITECTURES) == sorted({find_spec(tiny(name)).model_class for name in NAMES})


def test_unknown_class_lists_the_known_ones_and_shows_how_to_describe_one():
    class LlamaForCausalLMWithATwist(nn.Module):
        pass

    with pytest.raises(UnsupportedArchitectureError) as caught:
        find_groups(LlamaForCausalLMWithATwist())
    text = str(caught.value)
    assert "Did you mean 'LlamaForCausalLM'?" in text
    assert "GPT2LMHeadModel" in text
    assert "hfprune.arch.register(ArchSpec(" in text


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
    finally:
        ARCHITECTURES._items.pop("MineForCausalLM")


def test_quantised_or_wrapped_projection_is_refused():
    class Fake(nn.Linear):
        pass

    model = tiny()
    old = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = Fake(old.in_features, old.out_features, bias=False)
    with pytest.raises(UnsupportedArchitectureError, match="not a projection that hfprune can cut"):
        find_groups(model)
