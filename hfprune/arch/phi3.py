"""Phi-3 and Phi-4: gate and up are one fused projection, q, k and v another."""

from dataclasses import replace

from hfprune.arch.spec import STREAM, ArchSpec, AttentionSpec, HeadTemplate, SliceTemplate, register

PHI3 = register(
    ArchSpec(
        model_class="Phi3ForCausalLM",
        backbone="model",
        layers="model.layers",
        mlp=(
            SliceTemplate(module="mlp.gate_up_proj", side="out", block=0),
            SliceTemplate(module="mlp.gate_up_proj", side="out", block=1),
            SliceTemplate(module="mlp.down_proj", side="in"),
        ),
        width_key="intermediate_size",
        lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        attention=AttentionSpec(
            module="self_attn",
            heads=(
                HeadTemplate(module="self_attn.qkv_proj", side="out", queries=1),
                HeadTemplate(module="self_attn.qkv_proj", side="out", keys_values=1),
                HeadTemplate(module="self_attn.qkv_proj", side="out", keys_values=1),
                HeadTemplate(module="self_attn.o_proj", side="in", queries=1),
            ),
            factors_fix_heads=True,
            attributes=(("num_key_value_heads", "keys_values"),),
            reads_config=True,
        ),
        stream=replace(STREAM, attributes=("hidden_size",)),
    )
)
