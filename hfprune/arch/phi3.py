"""Phi-3 and Phi-4: gate and up are one fused projection, q, k and v another."""

from hfprune.arch.spec import ArchSpec, SliceTemplate, register

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
    )
)
