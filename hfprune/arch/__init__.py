"""Architectures as data: one table per Hugging Face model class, and how a table becomes groups of units."""

from hfprune.arch.custom import Neurons, custom_groups, pruned_count
from hfprune.arch.groups import (
    backbone,
    class_name,
    find_groups,
    find_spec,
    is_supported,
    output_head,
    parameter_count,
    unit_cost,
)
from hfprune.arch.spec import ARCHITECTURES, ArchSpec, SliceTemplate, register

__all__ = [
    "ARCHITECTURES",
    "ArchSpec",
    "Neurons",
    "SliceTemplate",
    "backbone",
    "class_name",
    "custom_groups",
    "find_groups",
    "find_spec",
    "is_supported",
    "output_head",
    "parameter_count",
    "pruned_count",
    "register",
    "unit_cost",
]
