"""Llama 1 to 3 and models that use its class (SmolLM, TinyLlama, Yi, ...)."""

from dataclasses import replace

from hfprune.arch.spec import ATTENTION, GATED_LORA_TARGETS, GATED_MLP, STREAM, ArchSpec, register

LLAMA = register(
    ArchSpec(
        model_class="LlamaForCausalLM",
        backbone="model",
        layers="model.layers",
        mlp=GATED_MLP,  # gate and up carry a bias when config.mlp_bias is set; down's bias is kept
        width_key="intermediate_size",
        width_attributes=("mlp.intermediate_size",),
        stream=STREAM,
        lora_targets=GATED_LORA_TARGETS,
        attention=replace(ATTENTION, divides_hidden=True),
    )
)
