"""Models whose layers differ in width: in memory, on disk, and what goes wrong."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

import hfprune
from hfprune.evaluation.size_and_speed import measure_latency, measure_size
from hfprune.io.layouts import cut_of, is_per_layer, not_expressed
from hfprune.models import find_groups, parameter_count
from hfprune.plan import PruningPlan
from hfprune.utils.errors import ConfigError, PlanError
from tests.helpers.models import GATED, NAMES, tiny, token_ids
from tests.helpers.plans import WIDTHS, head_plan, mlp_plan

KEPT_HEADS = ((0,), (0, 1), (1,))


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


def generated(model, **kwargs):
    return model.generate(token_ids(1, 6), max_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs)


def ragged(name="llama", **kwargs):
    model = tiny(name, dtype=torch.float32, **kwargs)
    hfprune.apply_plan(model, mlp_plan(model))
    return model


@pytest.fixture
def saved(tmp_path):
    model = ragged()
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m", model


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(name, tmp_path):
    model = ragged(name)
    model.generation_config.max_length = 33
    model.save_pretrained(tmp_path)
    for found in (hfprune.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(found) is type(model)
        assert [g.num_units for g in find_groups(found)] == list(WIDTHS)
        assert torch.equal(logits(found), logits(model))
        assert torch.equal(generated(found), generated(model))
        assert parameter_count(found) == parameter_count(model)
        assert found.generation_config.max_length == 33
        tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (found, model)]
        assert tied[0] == tied[1]
        for (key, one), other in zip(found.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(one, other), key


def test_config_says_what_differs_in_the_format_of_transformers(saved):
    folder, model = saved
    data = json.loads((folder / "config.json").read_text())
    assert data["per_layer_config"] == {str(i): {"intermediate_size": width} for i, width in enumerate(WIDTHS)}
    assert (data["model_type"], data["architectures"]) == ("hfprune", ["HFPruneLlamaForCausalLM"])
    assert data["intermediate_size"] == 24
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == model.config.model_type == "llama"
    assert [layer.intermediate_size for layer in config.per_layer_config] == list(WIDTHS)
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        _ = config.intermediate_size
    assert PruningPlan.load(folder).keep == mlp_plan(tiny()).keep


@pytest.mark.parametrize(
    ("name", "head_dim", "keep"),
    [
        ("llama", 4, KEPT_HEADS),
        ("llama_mha_relu", 4, ((0, 1, 2), (1, 3), (0, 1, 2, 3))),
        ("qwen2", 4, KEPT_HEADS),
        ("qwen3", 8, KEPT_HEADS),
    ],
)
def test_heads_per_layer_with_a_cache_and_pruned_twice(name, head_dim, keep, tmp_path):
    model = tiny(name, dtype=torch.float32)
    hfprune.apply_plan(model, head_plan(model, keep))
    kv_heads = [len(units) for units in keep]
    assert [layer.num_key_value_heads for layer in model.config.per_layer_config] == kv_heads
    assert {layer.head_dim for layer in model.config.per_layer_config} == {head_dim}
    for kwargs in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generated(model), generated(model, **kwargs))
    hfprune.apply_plan(model, mlp_plan(model))
    model.save_pretrained(tmp_path)
    assert {"plan-1.json", "plan.json"} <= {path.name for path in tmp_path.iterdir()}
    found = hfprune.load(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert [layer.intermediate_size for layer in found.config.per_layer_config] == list(WIDTHS)
    assert [layer.num_key_value_heads for layer in found.config.per_layer_config] == kv_heads


def test_size_and_speed_follow_the_layers():
    model = tiny(dtype=torch.float32)
    hfprune.apply_plan(model, head_plan(model, KEPT_HEADS))
    hfprune.apply_plan(model, mlp_plan(model))
    found = measure_size(model, tokens=10)
    kv_heads = [len(units) for units in KEPT_HEADS]
    macs = 0
    for kv, width in zip(kv_heads, WIDTHS, strict=True):
        query = 2 * kv * 4  # two query heads share each key-value head
        macs += 10 * (16 * query * 2 + 16 * kv * 4 * 2 + 3 * 16 * width) + 2 * query * 10 * 10
    assert found.macs == macs + 10 * 16 * 61
    assert found.kv_cache_bytes == sum(2 * kv * 4 * 10 * 4 for kv in kv_heads)
    assert found.weight_bytes == 4 * parameter_count(model)
    assert measure_latency(model, prompt_tokens=8, new_tokens=2, repeats=1).peak_bytes > found.weight_bytes


def test_uniform_again_is_a_stock_config(tmp_path):
    model = ragged()
    groups = find_groups(model)
    keep = {g.name: tuple(range(7)) for g in groups}
    hfprune.apply_plan(
        model,
        PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config={"intermediate_size": 7}),
    )
    assert not is_per_layer(model.config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_plan_without_config_keys_gets_those_that_follow_from_its_units():
    model = tiny(dtype=torch.float32)
    hfprune.apply_plan(model, mlp_plan(model, (8, 8, 8)))  # its plan rewrites no config key
    assert not is_per_layer(model.config)
    assert model.config.intermediate_size == 8
    model.config.intermediate_size = 24
    assert "gate_proj.weight would be [24, 16], it is [8, 16]" in not_expressed(model)


def test_what_stock_checks_refuse_is_not_called_uniform():
    """Three of four heads do not divide the hidden size, which LlamaConfig insists on when it is read."""
    model = tiny("llama_mha_relu", dtype=torch.float32)
    plan = head_plan(model, ((0, 1, 2),) * 3)
    plan = PruningPlan(
        model_class=plan.model_class,
        groups=plan.groups,
        keep=plan.keep,
        config={"num_attention_heads": 3, "num_key_value_heads": 3},
    )
    hfprune.apply_plan(model, plan)
    assert "not a multiple" in not_expressed(model)
    assert is_per_layer(model.config)
    assert cut_of(model.config).dense == {"num_attention_heads": 4, "num_key_value_heads": 4}


def test_values_rewritten_for_all_layers_beside_values_that_differ(tmp_path):
    model = tiny(dtype=torch.float32)
    heads = head_plan(model, ((0,),) * 3)
    mlp = mlp_plan(model)
    plan = PruningPlan(
        model_class=mlp.model_class,
        groups=(*heads.groups, *mlp.groups),
        keep={**heads.keep, **mlp.keep},
        config={"num_attention_heads": 2, "num_key_value_heads": 1},
    )
    hfprune.apply_plan(model, plan)
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert (data["num_attention_heads"], data["hfprune"]["dense"]["num_attention_heads"]) == (2, 4)
    assert set(data["per_layer_config"]["0"]) == {"intermediate_size"}
    assert torch.equal(logits(hfprune.load(tmp_path)), logits(model))


def test_copies_and_pickles(saved):
    folder, model = saved
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(config) is type(model.config)
        assert config.to_dict() == model.config.to_dict()
        assert cut_of(config) == cut_of(model.config)
    again = type(model.config).from_dict(AutoConfig.from_pretrained(folder).to_dict())
    assert again.to_dict()["per_layer_config"] == model.config.to_dict()["per_layer_config"]
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    other = AutoModelForCausalLM.from_config(model.config)
    assert [g.num_units for g in find_groups(other)] == list(WIDTHS)


def test_arguments_of_load(saved):
    folder, model = saved
    assert hfprune.load(folder, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    eager = AutoModelForCausalLM.from_pretrained(folder, dtype="float64", attn_implementation="eager")
    assert (eager.config._attn_implementation, eager.dtype) == ("eager", torch.float64)
    torch.testing.assert_close(logits(eager).float(), logits(model), atol=1e-5, rtol=0)
    within = AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name)
    assert torch.equal(logits(within), logits(model))
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]


# ---- what goes wrong --------------------------------------------------------------------------------------------------


def test_missing_plan(saved):
    folder, _ = saved
    (folder / "plan.json").unlink()
    for load in (hfprune.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PlanError, match=r"has no plan\.json.*Copy the file"):
            load(folder)
    assert AutoConfig.from_pretrained(folder).model_type == "llama"  # shapes are not asked for


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other", "version": 1}'])
def test_damaged_plan(saved, text):
    folder, _ = saved
    (folder / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json': (Not a pruning plan|This version cannot read the plan)"):
        hfprune.load(folder)


def test_plan_of_another_run(saved):
    folder, _ = saved
    mlp_plan(tiny(), (11, 8, 18)).save(folder / "plan.json")
    with pytest.raises(
        PlanError, match=r"layers\.1\.mlp.* has the shape \[16, 7\] in the weight files and \[16, 8\] in config"
    ):
        hfprune.load(folder)
    data = json.loads((folder / "config.json").read_text())
    other = tiny(dtype=torch.float32)
    hfprune.apply_plan(other, mlp_plan(other, (11, 8, 18)))
    other.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="the widths in per_layer_config"):
        hfprune.load(folder)


def test_plan_of_another_model(saved):
    folder, _ = saved
    mlp_plan(tiny("qwen2")).save(folder / "plan.json")
    with pytest.raises(PlanError, match="made for Qwen2ForCausalLM, the model is LlamaForCausalLM"):
        hfprune.load(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("model.norm.weight"), r"weight files lack model\.norm\.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "hold unexpected tensors: extra"),
    ],
)
def test_weights_that_are_not_those_of_the_plan(saved, change, text):
    folder, _ = saved
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=text):
        hfprune.load(folder)


@pytest.mark.parametrize(
    "section", [None, {"version": 2}, {"version": 1, "family": "nothing", "plans": 1, "dense": {}}]
)
def test_config_of_another_version(saved, section):
    folder, _ = saved
    data = json.loads((folder / "config.json").read_text())
    data = data | {"hfprune": section} if section else {k: v for k, v in data.items() if k != "hfprune"}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"another version of hfprune|does not know"):
        hfprune.load(folder)


def test_stock_classes_do_not_load_wrong_weights(saved, tmp_path):
    """What does not look at model_type fails too: on the widths per layer, or, without these, on shapes."""
    folder, _ = saved
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        LlamaForCausalLM.from_pretrained(folder)
    shutil.copytree(folder, tmp_path / "old")
    data = json.loads((folder / "config.json").read_text())
    del data["per_layer_config"], data["hfprune"]
    (tmp_path / "old/config.json").write_text(json.dumps(data | {"model_type": "llama"}))
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "old")


def test_transformers_does_not_build_layers_from_its_per_layer_config_yet():
    """Once a release does, ``per_layer`` folders need neither a model type nor code of their own."""
    config = LlamaConfig(**GATED, per_layer_config={0: {"intermediate_size": 8}})
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        LlamaForCausalLM(config)
