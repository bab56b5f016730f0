"""Mistral (dense models; Mixtral is another class)."""

from hfprune.arch.spec import ATTENTION, GATED_LORA_TARGETS, GATED_MLP, STREAM, ArchSpec, register

MISTRAL = register(
    ArchSpec(
        model_class="MistralForCausalLM",
        backbone="model",
        layers="model.layers",
        mlp=GATED_MLP,
        width_key="intermediate_size",
        width_attributes=("mlp.intermediate_size",),
        stream=STREAM,
        lora_targets=GATED_LORA_TARGETS,
        attention=ATTENTION,
    )
)
