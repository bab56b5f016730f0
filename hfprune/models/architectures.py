"""Architecture tables: one :class:`ArchSpec` per Hugging Face model class."""

from dataclasses import replace

from hfprune.models.spec import (
    ATTENTION,
    GATED_LORA_TARGETS,
    GATED_MLP,
    LAYER_NORMS,
    STREAM,
    SUBLAYERS,
    ArchSpec,
    AttentionSpec,
    ExpertsSpec,
    HeadTemplate,
    SliceTemplate,
    SublayerSpec,
    SublayersSpec,
    register,
)


def _fused(projection: str, reader: str) -> tuple[HeadTemplate, ...]:
    """Returns the blocks of a projection with consecutive queries, keys and values, and of the projection after it."""
    blocks = (HeadTemplate(module=projection, side="out", queries=q, keys_values=1 - q) for q in (1, 0, 0))
    return (*blocks, HeadTemplate(module=reader, side="in", queries=1))


LLAMA = register(
    ArchSpec(
        model_class="LlamaForCausalLM",
        backbone="model",
        layers="model.layers",
        mlp=GATED_MLP,  # gate and up have biases if config.mlp_bias is set; the bias of down is kept
        width_key="intermediate_size",
        width_attributes=("mlp.intermediate_size",),
        stream=STREAM,
        sublayers=SUBLAYERS,
        lora_targets=GATED_LORA_TARGETS,
        attention=replace(ATTENTION, divides_hidden=True),
    )
)


MISTRAL = register(replace(LLAMA, model_class="MistralForCausalLM", attention=ATTENTION))


MIXTRAL = register(
    ArchSpec(
        model_class="MixtralForCausalLM",
        backbone="model",
        layers="model.layers",
        mlp=(),
        width_key="intermediate_size",
        experts=ExpertsSpec(),
        sublayers=SUBLAYERS,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        attention=ATTENTION,
        no_stream="the weights of its experts are stacked tensors, which can be cut along experts only",
    )
)


QWEN2 = register(  # also Qwen 2.5: same class, biases on q, k and v only
    replace(MISTRAL, model_class="Qwen2ForCausalLM", layer_lists=("layer_types",))
)
QWEN3 = register(  # its query and key norms are per channel of a head and are not cut
    replace(QWEN2, model_class="Qwen3ForCausalLM")
)


QWEN2_MOE = register(
    replace(
        MIXTRAL,
        model_class="Qwen2MoeForCausalLM",
        width_key="moe_intermediate_size",
        experts=ExpertsSpec(count_key="num_experts"),
        layer_lists=("layer_types",),
        position_key="mlp_only_layers",
    )
)
QWEN3_MOE = register(
    replace(QWEN2_MOE, model_class="Qwen3MoeForCausalLM", experts=ExpertsSpec(count_key="num_local_experts"))
)


GEMMA2 = register(
    replace(
        LLAMA,
        model_class="Gemma2ForCausalLM",
        softcap_key="final_logit_softcapping",
        layer_lists=("layer_types",),
        stream=replace(
            STREAM,
            norms=(*STREAM.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            norm_offset=1.0,
            scales_embedding=True,
        ),
        sublayers=SublayersSpec(
            attention=SublayerSpec(
                modules=("self_attn",),
                norms=("input_layernorm", "post_attention_layernorm"),
                added="post_attention_layernorm",
            ),
            mlp=SublayerSpec(
                modules=("mlp",),
                norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
                added="post_feedforward_layernorm",
            ),
        ),
        needs_bos=True,
    )
)
GEMMA3 = register(replace(GEMMA2, model_class="Gemma3ForCausalLM"))


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
            heads=_fused("self_attn.qkv_proj", "self_attn.o_proj"),
            factors_fix_heads=True,
            attributes=(("num_key_value_heads", "keys_values"),),
            reads_config=True,
        ),
        stream=replace(STREAM, attributes=("hidden_size",)),
        sublayers=SUBLAYERS,
    )
)


OPT = register(
    ArchSpec(
        model_class="OPTForCausalLM",
        backbone="model.decoder",  # includes project_out (OPT-350m)
        layers="model.decoder.layers",
        mlp=(SliceTemplate(module="fc1", side="out"), SliceTemplate(module="fc2", side="in")),
        width_key="ffn_dim",
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        no_stream=LAYER_NORMS,
        attention=replace(
            ATTENTION,
            heads=(*ATTENTION.heads[:3], HeadTemplate(module="self_attn.out_proj", side="in", queries=1)),
            ratio_attribute=None,
            keys_values_key=None,
            size_key=None,
            attributes=(("num_heads", "queries"),),
        ),
        sublayers=SublayersSpec(
            attention=SublayerSpec(modules=("self_attn",), norms=("self_attn_layer_norm",)),
            mlp=SublayerSpec(modules=("fc1", "fc2"), norms=("final_layer_norm",)),
            pre_norm_key="do_layer_norm_before",
        ),
        packing="mask",  # its decoder does not pass position ids to the function that creates the mask
    )
)


GPT2 = register(
    ArchSpec(
        model_class="GPT2LMHeadModel",
        backbone="transformer",
        layers="transformer.h",
        mlp=(SliceTemplate(module="mlp.c_fc", side="out"), SliceTemplate(module="mlp.c_proj", side="in")),
        width_key="n_inner",  # None (4 * n_embd) in most configs; surgery writes a number
        lora_targets=("c_attn", "c_proj", "c_fc"),  # c_proj matches attention and MLP
        no_stream=LAYER_NORMS,
        attention=AttentionSpec(
            module="attn",
            heads=_fused("attn.c_attn", "attn.c_proj"),
            ratio_attribute=None,
            keys_values_key=None,
            size_key=None,
            attributes=(("num_heads", "queries"), ("split_size", "query_channels")),
        ),
        sublayers=SublayersSpec(
            attention=SublayerSpec(modules=("attn",), norms=("ln_1",)),
            mlp=SublayerSpec(modules=("mlp",), norms=("ln_2",)),
        ),
        position_key="scale_attn_by_inverse_layer_idx",
    )
)


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
                HeadTemplate(module="attention.query_key_value", side="out", queries=1, keys_values=2),  # interleaved
                HeadTemplate(module="attention.dense", side="in", queries=1),
            ),
            size_attribute="head_size",
            ratio_attribute=None,
            keys_values_key=None,
            size_key=None,
        ),
        sublayers=SublayersSpec(
            attention=SublayerSpec(modules=("attention",), norms=("input_layernorm",)),
            mlp=SublayerSpec(modules=("mlp",), norms=("post_attention_layernorm",)),
            parallel_key="use_parallel_residual",
        ),
    )
)
