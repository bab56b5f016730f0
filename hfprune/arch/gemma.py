"""Gemma 2 and the text models of Gemma 3."""

from dataclasses import replace

from hfprune.arch.spec import ATTENTION, GATED_LORA_TARGETS, GATED_MLP, STREAM, ArchSpec, register

GEMMA2 = register(
    ArchSpec(
        model_class="Gemma2ForCausalLM",
        backbone="model",  # scales its embeddings itself
        layers="model.layers",
        mlp=GATED_MLP,
        width_key="intermediate_size",
        softcap_key="final_logit_softcapping",
        width_attributes=("mlp.intermediate_size",),
        lora_targets=GATED_LORA_TARGETS,
        attention=replace(ATTENTION, divides_hidden=True),
        layer_lists=("layer_types",),
        stream=replace(
            STREAM,
            norms=(*STREAM.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            norm_offset=1.0,
            scales_embedding=True,
        ),
        needs_bos=True,
    )
)
GEMMA3 = register(replace(GEMMA2, model_class="Gemma3ForCausalLM"))
