"""Hyperparameters of a model as keys of a GGUF file."""

from collections.abc import Sequence

from hfprune.io.gguf.description import Description
from hfprune.io.gguf.rope import Metadata, original_length, rope_metadata, rotary_size

_PATTERNS = {"gemma2": 2, "gemma3": 6}
"""Architecture -> every how many layers it attends to everything, unless the file lists the layers."""


def hyperparameters(found: Description) -> Metadata:
    """Returns the hyperparameters of the architecture.

    Args:
        found: Shapes and architecture of the model.
    """
    arch, config = found.arch, found.config
    keys: Metadata = {
        "block_count": len(found.widths),
        "context_length": context_length(found),
        "embedding_length": found.hidden,
        "feed_forward_length": _per_layer(found.widths, found.per_layer),
        "attention.head_count": _per_layer(found.heads, found.per_layer),
    }
    if arch not in ("gpt2", "gptneox"):
        keys["attention.head_count_kv"] = _per_layer(found.kv_heads, found.per_layer)
        keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
        keys |= {"attention.key_length": found.head_size, "attention.value_length": found.head_size}
    else:
        keys["attention.layer_norm_epsilon"] = float(
            getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon
        )
    if arch in ("llama", "deci", "openelm", "phi3", "gptneox"):
        keys["rope.dimension_count"] = rotary_size(config, found.head_size)
    if arch in ("llama", "deci"):
        keys["vocab_size"] = found.vocabulary
    if arch == "gptneox":
        keys["use_parallel_residual"] = bool(config.use_parallel_residual)
    if arch == "phi3":
        keys["rope.scaling.original_context_length"] = original_length(config)
        keys["attention.sliding_window"] = int(config.sliding_window or 0)
    keys |= _experts(found) | _gemma(found)
    return {f"{arch}.{key}": value for key, value in keys.items()} | rope_metadata(config, arch)


def context_length(found: Description) -> int:
    """Returns the context length: up to the sliding window, where the architecture has none."""
    config, window = found.config, found.window()
    length = int(getattr(config, "max_position_embeddings", None) or config.n_positions)
    return length if window is None or found.family.windows else min(length, window)


def _per_layer(values: Sequence[int], listed: bool) -> int | list[int]:
    return list(values) if listed else values[0]


def _experts(found: Description) -> Metadata:
    """Returns the numbers and the widths of experts; a Mixtral has no other MLP width."""
    count, config = found.experts[0], found.config
    if not count:
        return {}
    keys: Metadata = {"expert_count": count, "expert_used_count": int(config.num_experts_per_tok)}
    if found.arch != "llama":
        keys |= {"feed_forward_length": int(config.intermediate_size), "expert_feed_forward_length": found.widths[0]}
    if found.arch == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = int(config.shared_expert_intermediate_size)
    return keys


def _gemma(found: Description) -> Metadata:
    """Returns soft caps and sliding windows of Gemma."""
    config, window, keys = found.config, found.window(), Metadata()
    if found.arch == "gemma2":
        keys["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    if found.family.windows and getattr(config, "final_logit_softcapping", None):
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if found.family.windows and (window is not None or found.arch == "gemma2"):
        keys["attention.sliding_window"] = int(window or config.sliding_window)
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        period = _PATTERNS[found.arch]
        if slides != [index % period < period - 1 for index in range(len(slides))]:  # layers were removed
            keys["attention.sliding_window_pattern"] = slides
    return keys
