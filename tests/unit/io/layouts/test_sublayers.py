"""Models without some attentions and MLPs on disk: per layer, padded, stock where whole layers are left."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import hfprune
import hfprune.auto  # registers the per-layer configs
from hfprune.io.layouts import LAYOUTS, apply_plan, is_per_layer
from hfprune.models import parameter_count
from hfprune.models.sublayers import NoAttention, NoMLP
from hfprune.publishing.folder import open_folder
from hfprune.publishing.inspection import inspect_folder, inspection_text
from hfprune.utils.errors import ConfigError, PlanError
from tests.helpers.models import MIXTURES, tiny, token_ids
from tests.unit.models.test_sublayers import logits, plan_for

LOST = {"attention_sublayers": (0,), "mlp_sublayers": (2,)}
CLASSES = ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"]
CLASSES += [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma3", "opt", "phi3", "qwen3_moe")]


def pruned(name="llama", mix=LOST, dtype=torch.float32):
    model = tiny(name, dtype=dtype)
    apply_plan(model, plan_for(model, mix))
    return model


def generated(model):
    return model.generate(token_ids(2, 9), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_per_layer_and_loaded_again(name, tmp_path):
    model = pruned(name, LOST if name in MIXTURES else "units")
    saved = hfprune.save(model, tmp_path / "m", layout="per_layer")
    assert saved["parameters"] == saved["parameters_needed"] == parameter_count(model)
    assert saved["max_logit_difference_after_reload"] == 0
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == saved["parameters"]  # noqa: SIM118
    for found in (hfprune.load(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")):
        assert type(found) is type(model)
        assert sum(isinstance(m, NoAttention | NoMLP) for m in found.modules()) == 2
        assert torch.equal(logits(found), logits(model))
        assert torch.equal(generated(found), generated(model))
        places = [m.layer_idx for m in found.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
        assert places == [
            m.layer_idx for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__
        ]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_padded_stores_zeros_in_their_place(name, tmp_path):
    model = pruned(name, dtype=torch.float64)
    saved = hfprune.save(model, tmp_path / "m", layout="padded")
    assert saved["parameters"] == parameter_count(tiny(name))
    assert saved["parameters_needed"] == parameter_count(model)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert not is_per_layer(stock.config)
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-9, rtol=0)
    assert open_folder(str(tmp_path / "m")).layout == "padded"


def test_padded_with_narrower_layers_and_a_removed_one(tmp_path):
    model = pruned("qwen3", "layers", dtype=torch.float64)
    hfprune.save(model, tmp_path / "m", layout="padded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-9, rtol=0)
    assert stock.config.num_hidden_layers == model.config.num_hidden_layers


@pytest.mark.parametrize("layout", ["uniform", "bitmask"])
def test_layouts_that_cannot_state_it(layout, tmp_path):
    with pytest.raises(ConfigError, match=r"self_attn.*missing.*Use layout='per_layer'"):
        hfprune.save(pruned(), tmp_path / "m", layout=layout)
    assert not (tmp_path / "m").exists()


def test_layers_without_both_are_saved_as_a_stock_model(tmp_path):
    model = pruned(mix={"attention_sublayers": (1,), "mlp_sublayers": (1,)})
    assert LAYOUTS.get("uniform").written(model) is model
    hfprune.save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llama"
    assert open_folder(str(tmp_path / "m")).layout == "uniform"
    assert inspect_folder(str(tmp_path / "m"))["layers"][1] == {"layer": 1, "removed": True}


def test_inspection_names_them(tmp_path):
    model = pruned(mix="units")
    hfprune.save(model, tmp_path / "m", layout="per_layer")
    found = inspect_folder(str(tmp_path / "m"))
    assert found["layout"] == "per_layer"
    assert found["removed"]["attention_sublayers"] == {"dense": 3, "kept": 1, "removed": 2}
    assert found["removed"]["heads"]["kept"] == 1
    text = inspection_text(found)
    assert "removed MLP sub-layers: 2 of 3 (66.7%), kept 1" in text
    assert "layer 0: no attention, MLP neurons 23 of 24" in text
    assert "layer 1: no MLP, key-value heads" in text
    assert "layer 2: removed" in text
    assert "layer 2: no" not in text


def test_config_lists_missing_sublayers(tmp_path):
    hfprune.save(pruned(mix="units"), tmp_path / "m", layout="per_layer")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    assert config["model_type"] == "hfprune"
    assert config["num_hidden_layers"] == 2  # a layer without both sub-layers is no layer
    assert config["hfprune"]["without"] == {"attention_sublayers": [0], "mlp_sublayers": [1]}
    config["hfprune"]["without"] = {"attention_sublayers": [1]}
    path.write_text(json.dumps(config))
    with pytest.raises(PlanError, match="lists other missing sub-layers than the plan"):
        hfprune.load(tmp_path / "m")


def test_pruned_twice(tmp_path):
    model = pruned(mix={"attention_sublayers": (0,)})
    hfprune.apply_plan(model, hfprune.make_plan(model, keep={"model.layers.1.mlp": range(9)}))
    hfprune.save(model, tmp_path / "m", layout="per_layer")
    found = hfprune.load(tmp_path / "m")
    assert torch.equal(logits(found), logits(model))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["hfprune"]["plans"] == 2
    hfprune.save(model, tmp_path / "padded", layout="padded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)
