"""A model that was pruned in memory writes its plan with its weights."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hfprune
from hfprune import PruningModule, PruningPlan
from hfprune.io.recorded_plan import recorded_plan
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, token_ids


def pruned(name="llama", keep=20):
    model = tiny(name, dtype=torch.float32)
    plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(keep) for i in range(3)})
    hfprune.apply_plan(model, plan)
    return model, plan


def test_save_pretrained_writes_the_plan_and_prune_refuses_the_folder(tmp_path):
    model, plan = pruned()
    model.save_pretrained(tmp_path)
    assert PruningPlan.load(tmp_path) == plan
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.intermediate_size == 20
    with pytest.raises(ConfigError, match="was already pruned"):
        PruningModule(str(tmp_path))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_write_the_plan_with_their_own_weights(how, tmp_path):
    model, plan = pruned()
    again = how(model)
    with torch.no_grad():
        again.lm_head.weight.add_(1.0)
    again.save_pretrained(tmp_path)
    assert recorded_plan(again) == PruningPlan.load(tmp_path) == plan
    ids = token_ids()
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=ids).logits
        assert torch.equal(saved, again(input_ids=ids).logits)
        assert not torch.equal(saved, model(input_ids=ids).logits)


def test_only_the_pruned_instance_is_changed(tmp_path):
    model, plan = pruned()
    dense = tiny(dtype=torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense/plan.json").exists()
    assert recorded_plan(dense) is None
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other/plan.json").exists()
    LlamaForCausalLM.save_pretrained(model, tmp_path / "class")
    assert not (tmp_path / "class/plan.json").exists()
    hfprune.save(model, tmp_path / "saved")
    assert PruningPlan.load(tmp_path / "saved") == plan


def test_pruned_models_are_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model, _ = pruned()
        found = weakref.ref(model)
        del model
        assert found() is None
    finally:
        gc.enable()


def test_a_second_plan_replaces_the_first(tmp_path):
    model, _ = pruned()
    plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(16) for i in range(3)})
    hfprune.apply_plan(model, plan)
    model.save_pretrained(tmp_path)
    assert PruningPlan.load(tmp_path) == plan


def test_plans_of_models_whose_layers_differ_are_all_written(tmp_path):
    model, first = pruned()
    second = hfprune.make_plan(model, keep={"model.layers.1.mlp": range(10)})
    hfprune.apply_plan(model, second)
    third = hfprune.make_plan(model, keep={"model.layers.1.mlp": range(8)})
    hfprune.apply_plan(model, third)
    model.save_pretrained(tmp_path)
    assert PruningPlan.load(tmp_path) == third
    assert hfprune.load(tmp_path).model.layers[1].mlp.up_proj.out_features == 8
    assert first != third
