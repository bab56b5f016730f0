"""Qwen 2, 2.5 and 3 (dense models; the MoE classes are other architectures)."""

from dataclasses import replace

from hfprune.arch.spec import ATTENTION, GATED_LORA_TARGETS, GATED_MLP, STREAM, ArchSpec, register

QWEN2 = register(
    ArchSpec(
        model_class="Qwen2ForCausalLM",  # Qwen 2.5 too: same class, biases on q, k and v only
        backbone="model",
        layers="model.layers",
        mlp=GATED_MLP,
        width_key="intermediate_size",
        width_attributes=("mlp.intermediate_size",),
        stream=STREAM,
        lora_targets=GATED_LORA_TARGETS,
        attention=ATTENTION,  # norms of queries and keys (Qwen3) are per channel of a head: they stay
        layer_lists=("layer_types",),
    )
)
QWEN3 = register(replace(QWEN2, model_class="Qwen3ForCausalLM"))
