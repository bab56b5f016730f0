"""OPT: plain MLP with biases, ReLU."""

from hfprune.arch.spec import ArchSpec, SliceTemplate, register

OPT = register(
    ArchSpec(
        model_class="OPTForCausalLM",
        backbone="model.decoder",  # includes project_out of OPT-350m
        layers="model.decoder.layers",
        mlp=(SliceTemplate(module="fc1", side="out"), SliceTemplate(module="fc2", side="in")),
        width_key="ffn_dim",
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    )
)
