"""GPT-NeoX and Pythia: plain MLP with biases, attention and MLP in parallel, untied head."""

from hfprune.arch.spec import LAYER_NORMS, ArchSpec, AttentionSpec, HeadTemplate, SliceTemplate, register

GPT_NEOX = register(
    ArchSpec(
        model_class="GPTNeoXForCausalLM",
        backbone="gpt_neox",
        layers="gpt_neox.layers",
        mlp=(
            SliceTemplate(module="mlp.dense_h_to_4h", side="out"),
            SliceTemplate(module="mlp.dense_4h_to_h", side="in"),
        ),
        width_key="intermediate_size",
        lora_targets=("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
        no_stream=LAYER_NORMS,
        attention=AttentionSpec(
            module="attention",
            heads=(
                HeadTemplate(module="attention.query_key_value", side="out", queries=1, keys_values=2),  # head by head
                HeadTemplate(module="attention.dense", side="in", queries=1),
            ),
            size_attribute="head_size",
            ratio_attribute=None,
            keys_values_key=None,
            size_key=None,
        ),
    )
)
