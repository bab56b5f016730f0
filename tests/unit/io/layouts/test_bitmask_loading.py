"""Loading sparse models that were stored without their zeros: what comes along, memory, and what is damaged."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import hfprune
from hfprune.callbacks import ReportCallback
from hfprune.io.layouts.bitmask import INDEX_FILE, unpack
from hfprune.io.load_sharded import load_sharded
from hfprune.utils.errors import ConfigError
from tests.helpers.models import mixtures, tiny
from tests.helpers.sparse_models import logits, sparse, written


@pytest.fixture
def folder(tmp_path):
    model = sparse(tiny(dtype=torch.float32))
    written(model, tmp_path / "m")
    return tmp_path / "m", model


def test_what_belongs_to_the_model_comes_along(tmp_path):
    model = sparse(tiny(dtype=torch.float32))
    model.generation_config = GenerationConfig(eos_token_id=[5, 7], do_sample=True, temperature=0.3)
    written(model, tmp_path / "m")
    for found in (hfprune.load(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="m")):
        assert found.generation_config.eos_token_id == [5, 7]
        assert found.generation_config.temperature == 0.3
        assert found.generation_config.do_sample
    assert hfprune.load(tmp_path / "m").config.name_or_path == str(tmp_path / "m")
    own = GenerationConfig(eos_token_id=3)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", generation_config=own, attn_implementation="eager")
    assert found.generation_config.eos_token_id == 3
    assert found.config._attn_implementation == "eager"


def test_the_config_is_the_familys_and_can_be_saved_again(folder, tmp_path):
    path, model = folder
    config = AutoConfig.from_pretrained(path)
    assert isinstance(config, LlamaConfig)
    assert (config.model_type, config.num_hidden_layers) == ("llama", model.config.num_hidden_layers)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        copied.save_pretrained(tmp_path / "c")
        again = AutoConfig.from_pretrained(tmp_path / "c")
        assert type(again) is type(config)
        assert json.loads((tmp_path / "c/config.json").read_text())["model_type"] == "hfprune_bitmask"
    shutil.copy(tmp_path / "c/config.json", path / "config.json")
    assert torch.equal(logits(hfprune.load(path)), logits(model))
    assert type(AutoModelForCausalLM.from_config(config)) is LlamaForCausalLM
    assert type(AutoModelForCausalLM.from_config(config).config) is LlamaConfig


@pytest.mark.parametrize("name", sorted(mixtures()))
def test_experts_that_are_stacked_in_memory_are_packed(name, tmp_path):
    model = tiny(name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key and parameter.dim() == 3:  # few of one expert alone: 1 in 32 pays in float32
                part = parameter if name in ("gpt_oss", "granitemoe", "llama4") else parameter[1]  # files stack them
                part[torch.rand(part.shape, generator=generator) < 0.08] = 0
    written(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / INDEX_FILE).read_text())["shapes"]
    found = hfprune.load(tmp_path / "m").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], value)


def test_few_matrices_are_there_beside_the_model(folder, monkeypatch):
    path, _ = folder
    alive, most = [], []

    def counted(*args):
        tensor = unpack(*args)
        alive.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr("hfprune.io.layouts.bitmask.unpack", counted)
    hfprune.load(path, dtype="float16")
    assert len(most) == 21
    assert max(most) <= 5  # transformers reads in four threads


def test_runs_and_sharded_strategies_name_the_way_round(folder, tmp_path):
    path, _ = folder
    with pytest.raises(ConfigError, match="layout='bitmask' is written from a saved model: .*export 'out/model'"):
        ReportCallback("out", layout="bitmask")
    with pytest.raises(ConfigError, match="layout='uniform' first"):
        load_sharded(str(path), None)


def test_another_process_stops_without_hfprune_and_finds_the_same_logits_with_it(folder, tmp_path):
    path, model = folder
    code = f"""
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(path)!r})
except ValueError as error:
    print(error)
import hfprune.auto
from tests.helpers.models import token_ids
with torch.no_grad():
    torch.save(AutoModelForCausalLM.from_pretrained({str(path)!r})(input_ids=token_ids()).logits, {str(tmp_path / "l")!r})
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hfprune_bitmask" in ran.stdout
    assert torch.equal(torch.load(tmp_path / "l"), logits(model))
    with pytest.raises(OSError, match="model.safetensors"):
        LlamaForCausalLM.from_pretrained(path)


def test_damaged_folders_are_errors(folder, tmp_path):
    path, _ = folder
    (file,) = path.glob("bitmask-*.safetensors")
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith(".bits"))

    def broken(change):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(path, tmp_path / "b")
        change(tmp_path / "b")
        with pytest.raises(ConfigError) as error:
            hfprune.load(tmp_path / "b")
        return str(error.value)

    other = tensors | {key: tensors[key] ^ 1}
    assert "damaged" in broken(lambda b: save_file(other, b / file.name))
    less = {name: t for name, t in tensors.items() if name != key}
    assert "lack" in broken(lambda b: save_file(less, b / file.name))
    assert "damaged" in broken(lambda b: (b / file.name).write_bytes(file.read_bytes()[:-100]))
    assert f"no {file.name}" in broken(lambda b: (b / file.name).unlink())
    assert f"no {INDEX_FILE}" in broken(lambda b: (b / INDEX_FILE).unlink())
    config = json.loads((path / "config.json").read_text())
    for change, text in (({"version": 99}, "another version"), ({"family": "x"}, "'x'"), ({"family": None}, "'None'")):
        other = config | {"hfprune": config["hfprune"] | change}
        assert text in broken(lambda b, data=other: (b / "config.json").write_text(json.dumps(data)))
    index = json.loads((path / INDEX_FILE).read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    turned, negative = index["shapes"][name][::-1], [-side for side in index["shapes"][name]]
    for text, said in (
        ("{", "is damaged"),
        ("[]", "another version"),
        (json.dumps(index | {"files": None}), "is damaged"),
        (json.dumps(index | {"files": ["../x"]}), "is damaged"),
        (json.dumps(index | {"files": []}), "lack"),
        (json.dumps(index | {"shapes": index["shapes"] | {name: negative}}), "is damaged"),
        (
            json.dumps(index | {"shapes": index["shapes"] | {name: turned}}),
            f"{name} has the shape {turned} in the weight files",
        ),
    ):
        assert said in broken(lambda b, text=text: (b / INDEX_FILE).write_text(text))
