"""Qwen 2 and 3 with a mixture of experts in every layer; that of Qwen 2 has a shared expert beside, which stays."""

from dataclasses import replace

from hfprune.arch.mixtral import MIXTRAL
from hfprune.arch.spec import ExpertsSpec, register

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
