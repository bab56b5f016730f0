"""GPT-2: plain MLP built of transformers' Conv1D, whose weight is stored transposed."""

from hfprune.arch.spec import ArchSpec, SliceTemplate, register

GPT2 = register(
    ArchSpec(
        model_class="GPT2LMHeadModel",
        backbone="transformer",
        layers="transformer.h",
        mlp=(SliceTemplate(module="mlp.c_fc", side="out"), SliceTemplate(module="mlp.c_proj", side="in")),
        width_key="n_inner",  # None in most configs, meaning 4 * n_embd; surgery writes a number
        lora_targets=("c_attn", "c_proj", "c_fc"),  # c_proj matches attention and MLP alike
    )
)
