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
from hfprune.plan import Side


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
        no_stream="the weights of its experts are stacked tensors, which are cut along experts and neurons only",
    )
)


QWEN2 = register(  # also Qwen 2.5: same class, biases on q, k and v only
    replace(MISTRAL, model_class="Qwen2ForCausalLM", layer_lists=("layer_types",))
)
QWEN3 = register(  # its query and key norms are per channel of a head and are not cut
    replace(QWEN2, model_class="Qwen3ForCausalLM")
)


_QWEN_EXPERTS = ExpertsSpec(
    count_key="num_experts", dense_mlp=GATED_MLP, dense_key="mlp_only_layers", step_key="decoder_sparse_step"
)

QWEN2_MOE = register(
    replace(
        MIXTRAL,
        model_class="Qwen2MoeForCausalLM",
        width_key="moe_intermediate_size",
        experts=_QWEN_EXPERTS,
        layer_lists=("layer_types",),
    )
)
QWEN3_MOE = register(
    replace(
        QWEN2_MOE,
        model_class="Qwen3MoeForCausalLM",
        experts=replace(_QWEN_EXPERTS, count_key="num_local_experts"),
    )
)


OLMOE = register(
    replace(
        MIXTRAL,
        model_class="OlmoeForCausalLM",
        experts=ExpertsSpec(count_key="num_experts"),
        attention=None,
        no_attention="its query and key norms run over the channels of all heads",
    )
)


def _latent(*sizes: str, module: str, side: Side = "out", optional: bool = False) -> HeadTemplate:
    """Returns the block of a projection of multi-head latent attention, whose heads differ in size."""
    return HeadTemplate(module=f"self_attn.{module}", side=side, queries=1, sizes=sizes, optional=optional)


_LATENT_ATTENTION = AttentionSpec(  # heads share the compressed keys and values, and thereby the cache
    module="self_attn",
    heads=(
        _latent("qk_head_dim", module="q_proj", optional=True),
        _latent("qk_head_dim", module="q_b_proj", optional=True),
        _latent("qk_nope_head_dim", "v_head_dim", module="kv_b_proj"),
        _latent("v_head_dim", module="o_proj", side="in"),
    ),
    size_attribute="qk_rope_head_dim",
    ratio_attribute=None,
    size_key="qk_rope_head_dim",
    attributes=(("num_heads", "queries"),),
)

_ROUTED_EXPERTS = ExpertsSpec(
    count_key="n_routed_experts",
    loss_attribute=None,
    dense_mlp=GATED_MLP,
    leading_key="first_k_dense_replace",
    shared="mlp.shared_experts",
    shared_key="n_shared_experts",
)

DEEPSEEK_V3 = register(
    replace(
        MIXTRAL,
        model_class="DeepseekV3ForCausalLM",
        width_key="moe_intermediate_size",
        experts=_ROUTED_EXPERTS,
        attention=_LATENT_ATTENTION,
        lora_targets=("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    )
)
DEEPSEEK_V2 = register(
    replace(
        DEEPSEEK_V3,
        model_class="DeepseekV2ForCausalLM",
        attention=replace(_LATENT_ATTENTION, divides_hidden=True),
    )
)


GLM4_MOE = register(
    replace(MIXTRAL, model_class="Glm4MoeForCausalLM", width_key="moe_intermediate_size", experts=_ROUTED_EXPERTS)
)


GPT_OSS = register(
    replace(
        MIXTRAL,
        model_class="GptOssForCausalLM",
        experts=ExpertsSpec(
            router="mlp.router", attributes=("mlp.router.num_experts", "mlp.experts.num_experts"), interleaved=True
        ),
        attention=replace(ATTENTION, per_head=("sinks",)),
        layer_lists=("layer_types",),
        sublayers=None,
        no_sublayers="its layers read the MLP's output and the router's scores as a pair",
        packing="masks",  # its decoder does not pass position ids to the functions that create the masks
    )
)


LLAMA4 = register(
    replace(
        MIXTRAL,
        model_class="Llama4ForCausalLM",
        experts=ExpertsSpec(
            router="feed_forward.router",
            experts="feed_forward.experts",
            attributes=tuple(f"feed_forward.{name}num_experts" for name in ("", "router.", "experts.")),
            loss_attribute=None,
            dense_mlp=tuple(replace(t, module=t.module.replace("mlp", "feed_forward")) for t in GATED_MLP),
            sparse_key="moe_layers",
            shared="feed_forward.shared_expert",
        ),
        attention=replace(
            ATTENTION, attributes=(("num_attention_heads", "queries"), ("num_key_value_heads", "keys_values"))
        ),
        layer_lists=("no_rope_layers", "layer_types"),
        sublayers=None,
        no_sublayers="its layers read the MLP's output and the router's scores as a pair",
    )
)


GRANITE_MOE = register(
    replace(
        MIXTRAL,
        model_class="GraniteMoeForCausalLM",
        sublayers=replace(
            SUBLAYERS, mlp=SublayerSpec(modules=("block_sparse_moe",), norms=("post_attention_layernorm",))
        ),
        scale_key="logits_scaling",
        scale_divides=True,
        experts=ExpertsSpec(
            router="block_sparse_moe.router",
            experts="block_sparse_moe.experts",
            attributes=("block_sparse_moe.router.num_experts", "block_sparse_moe.experts.num_experts"),
        ),
    )
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
