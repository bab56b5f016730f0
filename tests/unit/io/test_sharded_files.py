"""Models that are built without weights and written parameter by parameter."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hfprune.io.load_sharded import _empty
from hfprune.io.save import _write_weights
from tests.helpers.models import configs, tiny


@pytest.mark.parametrize("name", ["llama", "llama_untied_bias", "gpt2", "gemma2"])
def test_an_empty_model_has_buffers_and_ties_but_no_weights(name):
    config = configs()[name]
    register = nn.Module.register_parameter
    model = _empty(config, torch.float32)
    assert nn.Module.register_parameter is register
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    for (name, buffer), (other, expected) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("file_bytes", [1, 1500, 4000, 2**30])
def test_files_that_are_written_one_by_one_load_as_the_model(tmp_path, file_bytes):
    """At 1,500 bytes the embedding exceeds a file, at 4,000 only the largest tensors share none."""
    model = tiny("llama_untied_bias", dtype=torch.float32)
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    _write_weights(model, parameters, tmp_path, file_bytes=file_bytes, facts={})
    model.config.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        listed = json.loads(index.read_text())
        assert sorted(set(listed["weight_map"].values())) == [file.name for file in files]
        assert all(one < two for one, two in pairwise(file.name for file in files))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
