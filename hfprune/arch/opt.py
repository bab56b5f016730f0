"""OPT: plain MLP with biases, ReLU."""

from hfprune.arch.spec import LAYER_NORMS, ArchSpec, AttentionSpec, HeadTemplate, SliceTemplate, register

OPT = register(
    ArchSpec(
        model_class="OPTForCausalLM",
        backbone="model.decoder",  # includes project_out of OPT-350m
        layers="model.decoder.layers",
        mlp=(SliceTemplate(module="fc1", side="out"), SliceTemplate(module="fc2", side="in")),
        width_key="ffn_dim",
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        no_stream=LAYER_NORMS,
        attention=AttentionSpec(
            module="self_attn",
            heads=(
                HeadTemplate(module="self_attn.q_proj", side="out", queries=1),
                HeadTemplate(module="self_attn.k_proj", side="out", keys_values=1),
                HeadTemplate(module="self_attn.v_proj", side="out", keys_values=1),
                HeadTemplate(module="self_attn.out_proj", side="in", queries=1),
            ),
            ratio_attribute=None,
            keys_values_key=None,
            size_key=None,
            attributes=(("num_heads", "queries"),),
        ),
        packing="mask",  # its decoder keeps the position ids from the function that makes the mask
    )
)
