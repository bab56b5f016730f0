"""Twins: tiny random models of a config's class."""

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from hfprune.models.twins import twin, twin_config, twin_of
from hfprune.utils.errors import UnsupportedArchitectureError
from tests.helpers.models import tiny

CONFIGS = [
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_default_config_gives_a_small_model_with_random_weights(kind):
    model = twin(kind())
    assert type(model.config) is kind
    assert sum(p.numel() for p in model.parameters()) < 500_000
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float64
        assert parameter.flatten().unique().numel() > 1, f"{name} holds one value"
    assert torch.equal(twin(kind())(torch.tensor([[5, 6]])).logits, model(torch.tensor([[5, 6]])).logits)


def test_the_switches_of_a_config_are_kept():
    config = twin_config(LlamaConfig(mlp_bias=True, attention_bias=True, tie_word_embeddings=True, hidden_act="relu"))
    assert (config.mlp_bias, config.attention_bias, config.tie_word_embeddings, config.hidden_act) == (
        True,
        True,
        True,
        "relu",
    )
    assert twin_config(Gemma2Config(final_logit_softcapping=None)).final_logit_softcapping is None


@pytest.mark.parametrize(("keys_values", "expected"), [(32, 6), (8, 3), (1, 1)])
def test_the_kind_of_attention_is_kept(keys_values, expected):
    config = twin_config(LlamaConfig(num_attention_heads=32, num_key_value_heads=keys_values))
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, expected)


def test_a_twin_has_a_layer_of_each_kind():
    kinds = ["full_attention"] * 6 + ["sliding_attention"] * 2
    config = twin_config(Qwen2Config(num_hidden_layers=8, layer_types=kinds, use_sliding_window=True))
    assert config.num_hidden_layers == 3
    assert sorted(config.layer_types) == ["full_attention"] * 2 + ["sliding_attention"]


def test_sizes_differ_so_that_no_count_is_mistaken_for_another():
    config = twin_config(LlamaConfig(num_key_value_heads=8, head_dim=128))
    queries, shared = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    sizes = [config.hidden_size, config.intermediate_size, config.vocab_size, queries, shared, config.num_hidden_layers]
    assert len(set(sizes)) == len(sizes)


def test_weights_of_the_model_are_not_read():
    with torch.device("meta"):
        model = type(tiny())(LlamaConfig())
    assert type(twin_of(model)) is type(model)
    assert twin_of(model).model.embed_tokens.weight.device.type == "cpu"


def test_a_class_that_does_not_run_is_named_with_its_first_error():
    class Broken(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            raise ValueError("it needs pictures")

    with pytest.raises(
        UnsupportedArchitectureError, match="No tiny model of Broken runs on token ids alone: it needs pic"
    ):
        twin(LlamaConfig(), model_class=Broken)


class Named(PreTrainedConfig):
    """A config whose sizes have names of its own; memory and slots belong together."""

    model_type = "named"

    def __init__(self, vocab_size=32000, channels=2048, blocks=24, neurons=8192, slots=32, memory=64, **kwargs):
        self.vocab_size, self.channels, self.blocks, self.neurons = vocab_size, channels, blocks, neurons
        self.slots, self.memory = slots, memory
        super().__init__(**kwargs)
        if memory % slots:
            raise ValueError("memory is divided among the slots")


class NamedLM(PreTrainedModel):
    config_class = Named

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(config.channels, config.neurons), nn.Linear(config.neurons, config.channels))
            for _ in range(config.blocks)
        )
        self.memory = nn.Linear(config.channels, config.memory)
        self.read = nn.Linear(config.memory, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, **kwargs):
        states = self.words(input_ids)
        for block in self.blocks:
            states = states + block(states)
        return CausalLMOutput(logits=self.read(self.memory(states)))


def test_sizes_with_unknown_names_are_found_by_trial():
    config = twin(Named(), model_class=NamedLM).config
    sizes = [config.vocab_size, config.channels, config.blocks, config.neurons]
    assert sizes[0] == 101
    assert config.blocks == 3
    assert len(set(sizes)) == 4
    assert max(sizes) == 101
