"""GPT-2: plain MLP built of transformers' Conv1D, whose weight is stored transposed."""

from hfprune.arch.spec import LAYER_NORMS, ArchSpec, AttentionSpec, HeadTemplate, SliceTemplate, register

GPT2 = register(
    ArchSpec(
        model_class="GPT2LMHeadModel",
        backbone="transformer",
        layers="transformer.h",
        mlp=(SliceTemplate(module="mlp.c_fc", side="out"), SliceTemplate(module="mlp.c_proj", side="in")),
        width_key="n_inner",  # None in most configs, meaning 4 * n_embd; surgery writes a number
        lora_targets=("c_attn", "c_proj", "c_fc"),  # c_proj matches attention and MLP alike
        no_stream=LAYER_NORMS,
        attention=AttentionSpec(
            module="attn",
            heads=(
                HeadTemplate(module="attn.c_attn", side="out", queries=1),
                HeadTemplate(module="attn.c_attn", side="out", keys_values=1),
                HeadTemplate(module="attn.c_attn", side="out", keys_values=1),
                HeadTemplate(module="attn.c_proj", side="in", queries=1),
            ),
            ratio_attribute=None,
            keys_values_key=None,
            size_key=None,
            attributes=(("num_heads", "queries"), ("split_size", "query_channels")),
        ),
        position_key="scale_attn_by_inverse_layer_idx",
    )
)
