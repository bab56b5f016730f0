"""Models: architecture tables of Hugging Face classes, groups of units, forward passes and surgery."""

from hfprune.models.experts import EXPERTS
from hfprune.models.groups import (
    Neurons,
    backbone,
    check_units,
    class_name,
    custom_groups,
    find_groups,
    find_spec,
    is_supported,
    layer_params,
    mlp_widths,
    parameter_count,
    pruned_count,
    unit_cost,
)
from hfprune.models.output_head import check_head, output_head
from hfprune.models.residual_stream import CHANNELS, channel_cost, per_channel
from hfprune.models.spec import (
    ARCHITECTURES,
    ArchSpec,
    AttentionSpec,
    ExpertsSpec,
    HeadTemplate,
    SliceTemplate,
    StreamSpec,
    SublayerSpec,
    SublayersSpec,
    register,
)
from hfprune.models.stock_config import check_stock, config_values, head_counts, hidden_step

__all__ = [
    "ARCHITECTURES",
    "CHANNELS",
    "EXPERTS",
    "ArchSpec",
    "AttentionSpec",
    "ExpertsSpec",
    "HeadTemplate",
    "Neurons",
    "SliceTemplate",
    "StreamSpec",
    "SublayerSpec",
    "SublayersSpec",
    "backbone",
    "channel_cost",
    "check_head",
    "check_stock",
    "check_units",
    "class_name",
    "config_values",
    "custom_groups",
    "find_groups",
    "find_spec",
    "head_counts",
    "hidden_step",
    "is_supported",
    "layer_params",
    "mlp_widths",
    "output_head",
    "parameter_count",
    "per_channel",
    "pruned_count",
    "register",
    "unit_cost",
]
