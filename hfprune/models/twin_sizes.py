"""Sizes of twins: the numbers that replace those of a config, by the names that config classes give them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
"""Config keys of the number of decoder layers."""

LAYERS = 3
"""Layers of a twin whose layers are alike."""

LAYERS_MOST = 4
"""Layers of a twin with several kinds of layers, at most."""

HEADS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("num_attention_heads", "num_kv_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
)
"""Pairs of config keys: query heads and key-value heads."""

_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size", "attention_hidden_size")
_QUERIES = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "attention_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "num_decoder_attention_heads",
    "num_encoder_attention_heads",
    "swa_num_attention_heads",
)
_WIDTHS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "dff",
    "dim_ff",
    "d_inner",
    "ffn_hidden_size",
    "feed_forward_size",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "dense_intermediate_size",
    "intermediate_size_mlp",
)
_HEAD_SIZES = (
    "head_dim",
    "global_head_dim",
    "swa_head_dim",
    "d_head",
    "kv_channels",
    "dim_head",
    "attention_head_size",
)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "context_length",
    "model_max_length",
    "original_max_position_embeddings",
    "max_target_positions",
)

_FIXED: dict[str, int] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "eod_token_id": 2,
    "mask_token_id": 0,
    "image_token_id": 97,
    "image_token_index": 97,
    "video_token_id": 96,
    "audio_token_id": 95,
    "boi_token_id": 94,
    "eoi_token_id": 93,
    "boi_token_index": 94,
    "eoi_token_index": 93,
    "boa_token_id": 92,
    "eoa_token_id": 91,
    "eoa_token_index": 91,
    "vision_start_token_id": 90,
    "vision_end_token_id": 89,
    "encoder_layers": 2,
    "num_encoder_layers": 2,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_window_size": 8,
    "window_size": 8,
    "local_attention": 8,
    "attention_chunk_size": 8,
    "keep_window_size": 8,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 22,
    "expert_ffn_hidden_size": 22,
    "shared_expert_intermediate_size": 26,
    "shared_experts_intermediate_size": 26,
    "moe_shared_expert_intermediate_size": 26,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "zero_expert_num": 2,
    "q_lora_rank": 26,
    "kv_lora_rank": 30,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 10,
    "v_head_dim": 14,
    "o_lora_rank": 18,
    "index_n_heads": 2,
    "index_head_dim": 12,
    "index_topk": 64,
    "state_size": 9,
    "mamba_d_state": 9,
    "ssm_state_size": 9,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "mamba_num_heads": 6,
    "n_mamba_heads": 2,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "block_size": 8,
    "time_step_rank": 5,
    "mamba_dt_rank": 5,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_head_dim": 10,
    "linear_num_heads": 4,
    "lru_width": 48,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "global_attn_every_n_layers": 2,
    "vocab_size_per_layer_input": 101,
    "hidden_size_per_layer_input": 12,
    "laurel_rank": 11,
    "word_embed_proj_dim": 48,
    "num_kv_shared_layers": 0,
    "rotary_dim": 4,
    "block_multiple_of": 1,
    "make_vocab_size_divisible_by": 1,
    "image_size": 16,
    "patch_size": 4,
    "num_buckets": 8,
    "relative_max_distance": 16,
    "prompt_length": 4,
    "prompt_mid_dim": 12,
    "encoder_hash_byte_group_vocab": 31,
    "router_hidden_size": 20,
    "d_rel": 5,
    "rel_extent": 32,
    "dim_model_base": 24,
    "adapter_rank": 7,
    "type_vocab_size": 2,
}
"""Config key -> number, for keys whose number is small in every set of sizes."""

_LISTS: dict[str, list[Any]] = {"attention_types": [[["global", "local"], 1]], "eos_token_id": [2]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A set of small sizes.

    Attributes:
        hidden: Hidden size.
        heads: Query heads.
        keys_values: Key-value heads of grouped attention.
        head_size: Size of a head, where the class has a key for it.
        width: MLP width.
        vocabulary: Number of tokens.
        experts: Number of experts.
        fixed: Other keys.
        lists: Lists that are replaced as a whole.
        fills: Whether to fill in sizes that a default config leaves open.
    """

    hidden: int = 48
    heads: int = 6
    keys_values: int = 3
    head_size: int = 24
    width: int = 37
    vocabulary: int = 101
    experts: int = 6
    fixed: Mapping[str, int] = field(default_factory=dict)
    lists: Mapping[str, list[Any]] = field(default_factory=lambda: dict(_LISTS))
    fills: bool = False

    def number(self, key: str, value: int) -> int:
        """Returns the small number for a config key; ``value`` if the key is no size, or says that a part is absent.

        Args:
            key: Config key.
            value: Its value.
        """
        absent = value < 0 or (value == 0 and not key.endswith(("_id", "_index")))
        return value if absent else self.table().get(key, value)

    def table(self) -> dict[str, int]:
        """Returns config key -> small number."""
        table = {**_FIXED, **self.fixed}
        for names, number in (
            (_HIDDEN, self.hidden),
            (_QUERIES, self.heads),
            (_WIDTHS, self.width),
            (_HEAD_SIZES, self.head_size),
            (_EXPERTS, self.experts),
            (_CHOSEN, 2),
            (_POSITIONS, 64),
            (("vocab_size", "decoder_vocab_size", "unpadded_vocab_size"), self.vocabulary),
        ):
            table |= {name: number for name in names if name not in self.fixed}
        return table

    def filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns sizes for keys that are None in the config.

        Args:
            values: All values of the config.
        """
        if not self.fills:
            return {}
        known = {"num_key_value_heads": self.heads, "head_dim": self.head_size, "num_experts_per_tok": 2}
        known |= {"moe_intermediate_size": _FIXED["moe_intermediate_size"], "n_shared_experts": 1}
        known |= dict.fromkeys(_EXPERTS, self.experts)
        found: dict[str, Any] = {key: number for key, number in known.items() if values.get(key, 0) is None}
        if values.get("layer_types", 0) is None:
            found["layer_types"] = ["full_attention"] * LAYERS
        if values.get("rope_parameters", 0) == {} and isinstance(values.get("layer_types"), list):
            rotary = {"rope_type": "default", "rope_theta": 10000.0}
            found["rope_parameters"] = {kind: dict(rotary) for kind in values["layer_types"]}
        return found

    def rotary_pairs(self, values: Mapping[str, Any]) -> int:
        """Returns the number of rotary frequencies of a head in a config with small sizes.

        Args:
            values: All values of the config.
        """
        size = values.get("head_dim") or values.get("qk_rope_head_dim") or self.hidden // self.heads
        share = values.get("partial_rotary_factor")
        rotary = values.get("rope_parameters")
        if share is None and isinstance(rotary, Mapping):
            share = rotary.get("partial_rotary_factor")
        return int(size * (share or 1.0)) // 2


SIZES = (
    Sizes(),
    Sizes(head_size=16, fixed={"num_experts_per_tok": 1}),
    Sizes(head_size=8),
    Sizes(hidden=96, width=64, head_size=16),
    Sizes(hidden=64, heads=4, keys_values=2, head_size=16, width=96, vocabulary=128, experts=8),
    Sizes(fills=True),
)
"""Sets of sizes, tried in this order: the first has pairwise different sizes, later ones suit classes that bind some of
them together."""
