"""Model families that llama.cpp computes: its architecture, and the names of the tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_GATED = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS = {"mlp.gate": "ffn_gate_inp", "mlp.experts": "experts"}
_SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_SCALED = frozenset({"default", "linear", "yarn", "dynamic"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What llama.cpp has for one model class.

    Attributes:
        arch: Architecture with one width and one number of heads for all layers.
        names: Module of a layer -> name of its tensors in GGUF.
        top: Module outside the layers -> name of its tensors.
        per_layer: Architecture that computes the same model with a width and head counts per layer, or None.
        activations: Activation functions that ``arch`` computes.
        rope: Kinds of rotary scaling that ``arch`` states.
        full_heads: Whether the heads of ``arch`` must together be as wide as the residual stream.
        norm_offset: Constant that the class adds to the weights of its norms.
        windows: Whether ``arch`` computes sliding windows.
        transposed: Whether projections are stored as [in, out].
        tied: Whether ``arch`` has no separate output head.
        untied: Whether ``arch`` needs a separate output head.
        normed: Whether ``arch`` divides the weights of a token's experts by their sum; None without experts.
    """

    arch: str
    names: Mapping[str, str]
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    per_layer: str | None = None
    activations: frozenset[str] = frozenset({"silu"})
    rope: frozenset[str] = _SCALED
    full_heads: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    transposed: bool = False
    tied: bool = False
    untied: bool = False
    normed: bool | None = None


_LLAMA = Family(arch="llama", names=_GATED, per_layer="deci", rope=_SCALED | {"llama3"})
_QWEN3 = Family(arch="qwen3", names=_GATED | _HEAD_NORMS, per_layer="openelm")
_GEMMA2 = Family(
    arch="gemma2",
    names=_GATED | _GEMMA_NORMS,
    activations=frozenset({"gelu_pytorch_tanh"}),
    rope=frozenset({"default"}),
    norm_offset=1.0,
    windows=True,
    tied=True,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": replace(_LLAMA, arch="qwen2", rope=_SCALED, full_heads=True),
    "Qwen3ForCausalLM": _QWEN3,
    "MixtralForCausalLM": replace(_LLAMA, names=_GATED | _EXPERTS, per_layer=None, normed=True),
    "Qwen2MoeForCausalLM": replace(
        _LLAMA,
        arch="qwen2moe",
        names=_GATED | _EXPERTS | _SHARED_EXPERT,
        per_layer=None,
        rope=_SCALED,
        full_heads=True,
        untied=True,
        normed=False,
    ),
    "Qwen3MoeForCausalLM": replace(
        _QWEN3, arch="qwen3moe", names=_GATED | _HEAD_NORMS | _EXPERTS, per_layer=None, normed=True
    ),
    "GemmaForCausalLM": replace(_GEMMA2, arch="gemma", names=_GATED, windows=False),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": replace(
        _GEMMA2,
        arch="gemma3",
        names=_GATED | _GEMMA_NORMS | _HEAD_NORMS,
        rope=frozenset({"default", "linear"}),
        tied=False,
    ),
    "Phi3ForCausalLM": Family(
        arch="phi3",
        names={key: name for key, name in _GATED.items() if key.endswith(("norm", "o_proj", "down_proj"))}
        | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        per_layer="deci",
        rope=frozenset({"default", "longrope"}),
        full_heads=True,
    ),
    "GPTNeoXForCausalLM": Family(
        arch="gptneox",
        names={
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        top={
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "embed_out": "output",
            "lm_head": "output",
        },
        activations=frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"}),
        rope=frozenset({"default", "linear"}),
        full_heads=True,
        untied=True,
    ),
    "GPT2LMHeadModel": Family(
        arch="gpt2",
        names={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        top={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        activations=frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"}),
        rope=frozenset({"default"}),
        full_heads=True,
        transposed=True,
    ),
}
"""Model class -> its family in llama.cpp."""

PER_LAYER_ROPE = {"deci": frozenset({"default", "linear", "yarn", "dynamic", "llama3"}), "openelm": _SCALED}
"""Architecture with hyperparameters per layer -> the kinds of rotary scaling that it states."""
