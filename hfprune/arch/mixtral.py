"""Mixtral: Mistral's attention, a mixture of experts in place of the MLP."""

from hfprune.arch.spec import ATTENTION, ArchSpec, ExpertsSpec, register

MIXTRAL = register(
    ArchSpec(
        model_class="MixtralForCausalLM",
        backbone="model",
        layers="model.layers",
        mlp=(),
        width_key="intermediate_size",
        experts=ExpertsSpec(),
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        attention=ATTENTION,
        no_stream="its experts hold their weights in stacks, which are cut by experts only",
    )
)
