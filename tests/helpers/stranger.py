"""A decoder as a stranger might write it: no stock class, no usual name, and a fused projection of an order of its own.

Each key-value head follows its query heads in ``mix.qkv``; the gate comes after the value in ``ff``.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class StrangerConfig(PreTrainedConfig):
    model_type = "stranger"

    def __init__(
        self,
        vocab_size=61,
        channels=24,
        depth=3,
        queries=6,
        memories=3,
        per_head=8,
        neurons=20,
        softness=0.5,
        **kwargs,
    ):
        self.vocab_size, self.channels, self.depth = vocab_size, channels, depth
        self.queries, self.memories, self.per_head, self.neurons = queries, memories, per_head, neurons
        self.softness = softness
        super().__init__(**kwargs)


class Scaled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Mix(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size, self.groups = config.per_head, config.queries // config.memories
        self.qkv = nn.Linear(config.channels, (config.queries + 2 * config.memories) * self.size, bias=True)
        self.out = nn.Linear(config.queries * self.size, config.channels, bias=False)

    def forward(self, x, allowed):
        parts = self.qkv(x).unflatten(-1, (-1, self.groups + 2, self.size))
        q, k, v = parts[..., :-2, :], parts[..., -2:-1, :], parts[..., -1:, :]
        q, k, v = (t.expand(*parts.shape[:3], self.groups, -1).flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.mT / self.size**0.5).masked_fill(~allowed, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_in = nn.Linear(config.channels, config.neurons, bias=True)
        self.w_gate = nn.Linear(config.channels, config.neurons, bias=False)
        self.w_out = nn.Linear(config.neurons, config.channels, bias=True)

    def forward(self, x):
        return self.w_out(self.w_in(x) * F.silu(self.w_gate(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix, self.ff = Mix(config), Feed(config)
        self.before_mix, self.before_ff = Scaled(config.channels), Scaled(config.channels)

    def forward(self, x, allowed):
        x = x + self.mix(self.before_mix(x), allowed)
        return x + self.ff(self.before_ff(x))


class StrangerBase(PreTrainedModel):
    config_class = StrangerConfig
    base_model_prefix = "trunk"

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.1)


class Trunk(StrangerBase):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.last = Scaled(config.channels)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        x, length = self.words(input_ids), input_ids.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if position_ids is not None:
            document = (position_ids == 0).cumsum(dim=1)
            allowed = allowed & (document[:, None, :, None] == document[:, None, None, :])
        if attention_mask is not None:
            own = torch.eye(length, dtype=torch.bool, device=x.device)
            allowed = allowed & attention_mask.bool()[:, None, None, :] | own
        for block in self.blocks:
            x = block(x, allowed)
        return BaseModelOutputWithPast(last_hidden_state=self.last(x))


class StrangerLM(StrangerBase):
    def __init__(self, config):
        super().__init__(config)
        self.trunk = Trunk(config)
        self.speak = nn.Linear(config.channels, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.speak

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None, **kwargs):
        states = self.trunk(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        logits = self.speak(states) * self.config.softness
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


AutoConfig.register("stranger", StrangerConfig, exist_ok=True)
AutoModelForCausalLM.register(StrangerConfig, StrangerLM, exist_ok=True)
