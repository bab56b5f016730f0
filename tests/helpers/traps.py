"""Classes that a table of Llama or GPT-NeoX seems to describe, and does not: one per trap of the proof."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from hfprune.models.spec import HeadTemplate, SliceTemplate


class WithMLP(LlamaForCausalLM):
    """A Llama whose MLPs are of another class."""

    mlp: type

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = self.mlp(config.hidden_size, config.intermediate_size)


class MLP(nn.Module):
    """The MLP of Llama, with a place for each trap."""

    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def neurons(self, x):
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.neurons(x))


class FusedMLP(MLP):
    """Gate and up in one projection."""

    def __init__(self, hidden, width):
        super().__init__(hidden, width)
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=False)
        del self.gate_proj, self.up_proj

    def neurons(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class Interleaved(FusedMLP):
    """Gate and up of one neuron follow each other (gpt-oss)."""

    def neurons(self, x):
        both = self.gate_up_proj(x)
        return F.silu(both[..., ::2]) * both[..., 1::2]


class Swapped(FusedMLP):
    """The second half lists the neurons in another order."""

    def neurons(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.silu(gate) * up.flip(-1)


class SecondReader(MLP):
    """A gate that also reads the neurons."""

    def __init__(self, hidden, width):
        super().__init__(hidden, width)
        self.rank = nn.Linear(width, 1, bias=False)

    def forward(self, x):
        neurons = self.neurons(x)
        return self.down_proj(neurons) * torch.sigmoid(self.rank(neurons))


class SilentReader(MLP):
    """A second reader without weights, whose shapes fit any width."""

    def forward(self, x):
        neurons = self.neurons(x)
        return self.down_proj(neurons) + neurons.mean(-1, keepdim=True)


class NormBetween(MLP):
    """A norm over the neurons without weights."""

    def neurons(self, x):
        return F.layer_norm(super().neurons(x), [self.down_proj.in_features])


class TopNeurons(MLP):
    """Only the ten largest neurons of a token are active."""

    def neurons(self, x):
        found = super().neurons(x)
        return torch.where(found >= found.topk(10, dim=-1).values[..., -1:], found, 0)


def with_mlp(kind):
    """Returns a Llama class whose MLPs are ``kind``."""
    return type(f"{kind.__name__}ForCausalLM", (WithMLP,), {"mlp": kind})


class ScaledHeadForCausalLM(LlamaForCausalLM):
    """Scales its logits by a constant that no config key holds."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


class CappedHeadForCausalLM(LlamaForCausalLM):
    """Caps its logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class CountedLayersForCausalLM(LlamaForCausalLM):
    """Scales the output of each MLP by the number of layers in the config."""

    def __init__(self, config):
        super().__init__(config)
        scale = config.num_hidden_layers**-0.5
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: output * scale)


class PlacedLayersForCausalLM(LlamaForCausalLM):
    """Scales the output of each MLP by the index of its layer."""

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.mlp.register_forward_hook(lambda module, args, output, index=index: output * (index + 1))


class SharedHeadsForCausalLM(LlamaForCausalLM):
    """Normalises its queries over all heads (OLMo 2), without weights."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.q_proj.register_forward_hook(
                lambda module, args, output: F.rms_norm(output, [output.shape[-1]])
            )


class CountedPaddingForCausalLM(LlamaForCausalLM):
    """Adds to each token its place in the row, padding included."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(
            lambda module, args, output: output + 0.1 * torch.arange(output.shape[1]).to(output)[:, None]
        )


FUSED = (
    SliceTemplate(module="mlp.gate_up_proj", side="out", block=0),
    SliceTemplate(module="mlp.gate_up_proj", side="out", block=1),
    SliceTemplate(module="mlp.down_proj", side="in"),
)
"""Gate first, then up, as in Phi-3."""

CONSECUTIVE = (
    HeadTemplate(module="attention.query_key_value", side="out", queries=1),
    HeadTemplate(module="attention.query_key_value", side="out", keys_values=1),
    HeadTemplate(module="attention.query_key_value", side="out", keys_values=1),
    HeadTemplate(module="attention.dense", side="in", queries=1),
)
"""Queries of all heads first, as in GPT-2: not what GPT-NeoX does."""
