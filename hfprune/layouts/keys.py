"""Which config keys say how many units of a kind a layer has, and what they say of one layer."""

from collections.abc import Sequence
from typing import Any

from hfprune.arch.experts import EXPERTS, experts_table
from hfprune.arch.groups import attention_table
from hfprune.arch.spec import ArchSpec
from hfprune.arch.stream import CHANNELS, stream_table
from hfprune.plan import PruningPlan

Overrides = dict[int, dict[str, int]]
"""Layer -> config keys that it has a value of its own for, as in transformers' ``per_layer_config``."""


def kind_values(config: Any, spec: ArchSpec, kind: str, *, kept: int, units: int) -> dict[str, int] | None:
    """Returns the config keys of a unit kind with their values at ``kept`` of ``units`` units.

    None for kinds that no number of a config expresses (whole blocks).

    Args:
        config: The dense config. Heads keep their size; query and key-value heads shrink in proportion.
        spec: The architecture's table.
        kind: Unit kind.
        kept: Units that stay.
        units: Units of the dense model.
    """
    if kind == "mlp":
        return {spec.width_key: kept}
    if kind == "heads":
        table = attention_table(spec)
        keys = [key for key in (table.heads_key, table.keys_values_key) if key is not None]
        values = {key: getattr(config, key) * kept // units for key in keys}
        if table.size_key is None:
            return values
        return values | {table.size_key: _head_size(config, spec)}
    if kind == EXPERTS:
        return {experts_table(spec).count_key: kept}
    if kind == CHANNELS:
        stream, size_key = stream_table(spec), attention_table(spec).size_key
        return {stream.hidden_key: kept} | ({} if size_key is None else {size_key: _head_size(config, spec)})
    return None


def _head_size(config: Any, spec: ArchSpec) -> int:
    table = attention_table(spec)
    found: int = getattr(config, table.size_key or "", None) or config.hidden_size // getattr(config, table.heads_key)
    return found


def layer_overrides(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan], *, num_layers: int) -> Overrides:
    """Returns what the config keys of each layer say after ``plans``.

    Empty where plans took whole layers: those that are left have new numbers, and the plans alone tell.

    Args:
        config: The dense config.
        spec: The architecture's table.
        plans: What was pruned, the first plan from the dense model, each other one from what the one before left.
        num_layers: Layers that the pruned model has.
    """
    if num_layers != config.num_hidden_layers:
        return {}
    units: dict[str, int] = {}
    found: Overrides = {}
    for group, kept in ((group, len(plan.keep[group.name])) for plan in plans for group in plan.groups):
        index = group.name.removeprefix(f"{spec.layers}.").partition(".")[0]
        units.setdefault(group.name, group.num_units)
        values = kind_values(config, spec, group.kind, kept=kept, units=units[group.name])
        if values is not None and index.isdigit():
            found.setdefault(int(index), {}).update(values)
    return found


def implied_values(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan]) -> dict[str, int]:
    """Returns the config keys that the dense config leaves to a rule which no longer holds after ``plans``."""
    groups = {group.kind: group for plan in plans for group in plan.groups}.values()
    found = [kind_values(config, spec, g.kind, kept=g.num_units, units=g.num_units) or {} for g in groups]
    return {key: value for values in found for key, value in values.items() if not hasattr(config, key)}
