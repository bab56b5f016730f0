"""What a stock config can say of a pruned model, and the config keys that say it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hfprune.arch.groups import attention_table, find_layers, find_spec, head_shape
from hfprune.errors import UnsupportedArchitectureError
from hfprune.types import Group

Kept = Mapping[str, Sequence[int]]
"""Group name -> kept units."""


def head_counts(model: nn.Module) -> tuple[int, ...]:
    """Returns the numbers of units (key-value heads) per layer that a stock config of ``model``'s class can state.

    The same number holds in every layer; the dense number is always among them.
    """
    table, config = attention_table(find_spec(model)), _config(model)
    queries = getattr(config, table.heads_key)
    dense = getattr(config, table.keys_values_key) if table.keys_values_key else queries
    ratio = queries // dense
    rotary = getattr(config, "rope_parameters", None) or {}
    factors = table.factors_fix_heads and rotary.get("short_factor") is not None
    if table.size_key is None or factors:
        return (dense,)
    fits = [n for n in range(1, dense + 1) if not table.divides_hidden or config.hidden_size % (n * ratio) == 0]
    return tuple(sorted({*fits, dense}))


def config_values(model: nn.Module, groups: Sequence[Group], keep: Kept) -> dict[str, Any]:
    """Returns the config keys that change when ``model`` keeps ``keep``, with their new values.

    Keys of widths and head counts are there where one value describes every layer that stays and the class can state
    it; those of the number of layers always.

    Args:
        model: The dense model; the meta device will do.
        groups: Its groups.
        keep: What stays of each.
    """
    spec, values = find_spec(model), dict[str, Any]()
    stay = _staying(model, groups, keep)
    width = _common(groups, keep, "mlp", stay)
    if width is not None:
        values[spec.width_key] = width
    heads = _common(groups, keep, "heads", stay)
    if heads is not None and heads in head_counts(model):
        values |= _head_values(model, heads)
    if len(stay) < len(find_layers(model)):
        values[spec.layers_key] = len(stay)
        lists = {key: getattr(_config(model), key, None) for key in spec.layer_lists}
        values |= {key: [known[index] for index in stay] for key, known in lists.items() if known is not None}
    return values


def check_stock(model: nn.Module, groups: Sequence[Group], keep: Kept) -> None:
    """Raises unless a stock config can describe what is left of ``model``.

    Args:
        model: The dense model; the meta device will do.
        groups: Its groups.
        keep: What stays of each.

    Raises:
        UnsupportedArchitectureError: It cannot; the message says what it could, and names the layout that can.
    """
    stay = _staying(model, groups, keep)
    for kind, what in (("mlp", "MLP neurons"), ("heads", "key-value heads")):
        kept = [len(keep[g.name]) for g in groups if g.kind == kind and g.layer in stay]
        if len(set(kept)) > 1:
            raise UnsupportedArchitectureError(
                f"The layers would keep different numbers of {what} ({min(kept)} to {max(kept)}), and a stock config "
                "states one for all. Give an allocation with one width, Uniform() for example, or a layout with a "
                "config per layer: --layout per_layer."
            )
    heads = _common(groups, keep, "heads", stay)
    if heads is None or heads in (possible := head_counts(model)):
        return
    name = find_spec(model).model_class
    raise UnsupportedArchitectureError(
        f"A stock config of {name} cannot state {heads} key-value heads per layer; it can state "
        f"{', '.join(map(str, possible))}. Give the budget another value, name one of these with the allocation "
        "Explicit(heads=...), leave 'heads' out of the units, or choose a layout that needs no stock config: "
        "--layout per_layer."
    )


def _head_values(model: nn.Module, heads: int) -> dict[str, int]:
    spec = find_spec(model)
    table = attention_table(spec)
    size, ratio = head_shape(find_layers(model, spec)[0].get_submodule(table.module), table)
    values = {table.heads_key: heads * ratio}
    if table.keys_values_key is not None:
        values[table.keys_values_key] = heads
    return values if table.size_key is None else values | {table.size_key: size}


def _staying(model: nn.Module, groups: Sequence[Group], keep: Kept) -> list[int]:
    """Returns the layers that stay."""
    found = [keep[group.name] for group in groups if group.kind == "block"]
    return list(found[0]) if found else list(range(len(find_layers(model))))


def _common(groups: Sequence[Group], keep: Kept, kind: str, stay: Sequence[int]) -> int | None:
    """Returns the number of units that every staying layer keeps of a kind, None where they differ or none is given."""
    kept = [len(keep[g.name]) for g in groups if g.kind == kind and g.layer in stay]
    return kept[0] if len(kept) == len(stay) and len(set(kept)) == 1 else None


def _config(model: nn.Module) -> Any:
    return model.config
