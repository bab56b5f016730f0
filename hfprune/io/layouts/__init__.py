"""Layouts: file formats of pruned models, models whose layers differ in width, and ``apply_plan``."""

from hfprune.io.layouts.apply import apply_plan, empty_copy, not_expressed, pruned_shapes, run_empty, shapes
from hfprune.io.layouts.base import LAYOUTS, Layout
from hfprune.io.layouts.per_layer import cut_of, is_per_layer

__all__ = [
    "LAYOUTS",
    "Layout",
    "apply_plan",
    "cut_of",
    "empty_copy",
    "is_per_layer",
    "not_expressed",
    "pruned_shapes",
    "run_empty",
    "shapes",
]
