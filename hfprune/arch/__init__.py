"""Architectures as data: one table per Hugging Face model class, and how a table becomes groups of units."""

from hfprune.arch.groups import backbone, find_groups, find_spec, output_head, parameter_count, unit_cost
from hfprune.arch.spec import ARCHITECTURES, ArchSpec, SliceTemplate, register

__all__ = [
    "ARCHITECTURES",
    "ArchSpec",
    "SliceTemplate",
    "backbone",
    "find_groups",
    "find_spec",
    "output_head",
    "parameter_count",
    "register",
    "unit_cost",
]
