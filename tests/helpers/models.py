"""Tiny models of every supported class, with random weights, fixed seed and biases that are not zero."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfprune.allocation import Inventory
from hfprune.models import ARCHITECTURES, find_groups

COMMON = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = COMMON | {"intermediate_size": 24, "num_key_value_heads": 2}
OWN_HEAD_DIM = GATED | {"head_dim": 8}


def configs():
    """Name -> config: every supported class, GQA and MHA, tied and untied, biases, soft caps, each activation."""
    gemma = OWN_HEAD_DIM | {"sliding_window": 8, "query_pre_attn_scalar": 8}
    gpt2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 61}
    gpt2 |= {"bos_token_id": 1, "eos_token_id": 2}
    return {
        "llama": LlamaConfig(**GATED, tie_word_embeddings=True),
        "llama_untied_bias": LlamaConfig(**GATED, tie_word_embeddings=False, mlp_bias=True, attention_bias=True),
        "llama_mha_relu": LlamaConfig(**GATED | {"num_key_value_heads": 4}, hidden_act="relu"),
        "llama_mqa": LlamaConfig(**GATED | {"num_key_value_heads": 1}),
        "mistral": MistralConfig(**GATED, sliding_window=8),
        "qwen2": Qwen2Config(**GATED, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**OWN_HEAD_DIM),
        "gemma2": Gemma2Config(**gemma, final_logit_softcapping=5.0, attn_logit_softcapping=10.0),
        "gemma3": Gemma3TextConfig(**gemma),
        "phi3": Phi3Config(**GATED),
        "opt": OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
        "opt_350m_style": OPTConfig(
            **COMMON, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False, dropout=0.0
        ),
        "gpt2": GPT2Config(**gpt2),
        "gpt2_n_inner": GPT2Config(**gpt2, n_inner=20),
        "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=24),
        "gpt_neox_sequential": GPTNeoXConfig(**COMMON, intermediate_size=24, use_parallel_residual=False),
    }


def mixtures():
    """Name -> config: every supported class with mixtures of experts, and each way in which its routers choose."""
    qwen = OWN_HEAD_DIM | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    local = {"num_local_experts": 6, "num_experts_per_tok": 2}
    narrow = {"intermediate_size": 12}
    routed = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
    routed |= {"routed_scaling_factor": 1.5, "norm_topk_prob": True}
    latent = COMMON | routed | {"intermediate_size": 24, "n_shared_experts": 2, "kv_lora_rank": 8, "v_head_dim": 6}
    latent |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "num_key_value_heads": 4}
    groups = {"n_group": 2, "topk_group": 1}
    return {
        "deepseek_v2": DeepseekV2Config(**latent, q_lora_rank=None),
        "deepseek_v2_groups": DeepseekV2Config(**latent, **groups, q_lora_rank=6, topk_method="group_limited_greedy"),
        "deepseek_v3": DeepseekV3Config(**latent, n_group=1, topk_group=1, q_lora_rank=None),
        "deepseek_v3_groups": DeepseekV3Config(**latent, **groups, q_lora_rank=6),
        "glm4_moe": Glm4MoeConfig(**OWN_HEAD_DIM, **routed, use_qk_norm=True, attention_bias=True),
        "gpt_oss": GptOssConfig(**OWN_HEAD_DIM | local | narrow, sliding_window=8),
        "granitemoe": GraniteMoeConfig(
            **GATED | local | narrow, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0
        ),
        "llama4": Llama4TextConfig(
            **OWN_HEAD_DIM | local | narrow | {"num_experts_per_tok": 1},
            intermediate_size_mlp=24,
            moe_layers=[0, 2],
            no_rope_layer_interval=2,
            attention_chunk_size=8,
        ),
        "mixtral": MixtralConfig(**GATED, **local),
        "olmoe": OlmoeConfig(**GATED | narrow, num_experts=6, num_experts_per_tok=2),
        "olmoe_normalised": OlmoeConfig(**GATED | narrow, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True),
        "qwen2_moe": Qwen2MoeConfig(
            **{k: v for k, v in qwen.items() if k != "head_dim"}, shared_expert_intermediate_size=8, norm_topk_prob=True
        ),
        "qwen3_moe": Qwen3MoeConfig(**qwen),
    }


NAMES = sorted(configs())
MIXTURES = sorted(mixtures())
VARIANTS = ("deepseek_v2_groups", "deepseek_v3", "olmoe_normalised")
"""Further settings of the routers of a class."""
MIXTURE_CLASSES = [pytest.param(name, id=name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in MIXTURES]
"""One tiny model of each class with mixtures; the variants are slow tests."""
GROUPED = [name for name in MIXTURES if name.endswith("_groups")]
"""Mixtures whose routers choose among groups of experts first."""


def table(name):
    """Returns the architecture table of a tiny model's class."""
    return ARCHITECTURES.get(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[(configs() | mixtures())[name].model_type])


HEADED = [name for name in NAMES if table(name).attention is not None]
"""Dense models whose heads can be removed."""
HEADED_MIXTURES = [name for name in MIXTURES if table(name).attention is not None]
"""Mixtures whose heads can be removed."""
STREAMS = [name for name in HEADED if table(name).stream is not None]
"""Dense models whose hidden channels can be removed."""


def tiny(name="llama", *, seed=0, dtype=torch.float64, vocab=61):
    """Returns the tiny model ``name`` in eval mode; all weights random, norms and biases included."""
    torch.manual_seed(seed)
    config = (configs() | mixtures())[name]
    config.vocab_size = vocab
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if name in MIXTURES:
        model.set_experts_implementation("eager")  # the default has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(0.05 * torch.randn_like(buffer))
    return model


def own_units(group, channels):
    """Returns the units of a group among the channels of its projections: experts of one group of a router."""
    offset = group.slices[0].offset
    return tuple(c - offset for c in channels if offset <= c < offset + group.num_units)


def inventory(model, units):
    """Returns the groups of ``model`` and what their units cost."""
    return Inventory.of(model, find_groups(model, units))


def token_ids(batch=2, length=12, *, seed=0, vocab=61):
    """Returns random ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (batch, length), generator=generator)


def tiny_tokenizer(vocab_size=61):
    """Returns a byte-free BPE tokenizer of at most ``vocab_size`` tokens, trained on Python's documentation."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, limit_alphabet=vocab_size - 8, show_progress=False
    )
    tokenizer.train_from_iterator([topics["assert"], topics["while"]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(folder, name="llama", *, dtype=torch.float32, tokenizer=None, **kwargs):
    """Saves the tiny model ``name`` with a tokenizer, as a user would have it on disk; returns the folder as a string."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny(name, dtype=dtype, vocab=max(61, len(tokenizer)), **kwargs)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


STYLES = ("llama2", "metaspace_first", "metaspace_always", "gemma", "llama3")
"""Tokenizers with BOS: dummy prefix (as normalizer, before the first word, before every piece), none, byte level."""

_TURN = (
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + _TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
CHATS = {"gemma": GEMMA_CHAT, "llama3": LLAMA3_CHAT}


def styled_tokenizer(style):
    """Returns a small tokenizer that puts BOS before a text and knows every byte, built as the ``style``'s are.

    All but ``llama3`` fall back to bytes for characters that they do not know.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>"]
    if style == "llama3":
        vocab, merges = _trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
        tokens = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet()), *vocab]
    else:
        vocab, merges = _trained(pre_tokenizers.Metaspace())
        tokens = [*names, *(f"<0x{byte:02X}>" for byte in range(256)), *vocab]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=style != "llama3"))
    bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = bos
    spaces = [normalizers.Replace(" ", "▁")]
    if style == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
    elif style == "gemma":
        tokenizer.normalizer = normalizers.Sequence(spaces)
    elif style == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    else:
        scheme = style.removeprefix("metaspace_")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.ByteLevel() if style == "llama3" else decoders.Sequence(plain)
    turns = {"gemma": ["<start_of_turn>", "<end_of_turn>"], "llama3": ["<|start|>", "<|end|>"]}.get(style, [])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in [*names, *turns]])
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = CHATS.get(style, LLAMA2_CHAT)
    return found


def _trained(pre_tokenizer):
    """Returns the tokens and merges of a small BPE of Python's documentation, cut as ``pre_tokenizer`` cuts."""
    import json
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([topics["assert"]], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    found = json.loads(tokenizer.to_str())["model"]
    return sorted(found["vocab"], key=found["vocab"].get), [tuple(merge) for merge in found["merges"]]
