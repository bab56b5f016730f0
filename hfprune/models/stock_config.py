"""Stock configs: pruned models that the config class of the architecture can describe, and their config keys."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hfprune.models.config_keys import config_value
from hfprune.models.experts import EXPERTS, experts_table, mixture_layers
from hfprune.models.groups import attention_table, find_groups, find_layers, find_spec, head_shape, hidden_size
from hfprune.models.residual_stream import CHANNELS, scaled_epsilon, stream_table
from hfprune.models.spec import ArchSpec
from hfprune.models.sublayers import has_sublayer
from hfprune.plan import ATTENTION_SUBLAYERS, SUBLAYERS, UNIT_KINDS, Group, Kept, absent_groups, removed_layers
from hfprune.utils.errors import UnsupportedArchitectureError


def head_counts(model: nn.Module, *, hidden: int | None = None) -> tuple[int, ...]:
    """Returns the numbers of units (key-value heads) per layer that a stock config can describe.

    All layers have the same number. For the dense hidden size, the dense number is always included.

    Args:
        model: The dense model.
        hidden: Hidden size of the pruned model; defaults to that of the dense model.
    """
    ratio, dense, divides, fixed = _head_rules(model)
    if fixed:
        return (dense,)
    size = hidden_size(model)
    hidden = hidden or size
    fits = [n for n in range(1, dense + 1) if not divides or hidden % (n * ratio) == 0]
    return tuple(sorted({*fits, dense} if hidden == size else fits))


def hidden_step(model: nn.Module, *, heads: int | None = None) -> int | None:
    """Returns the step of the hidden sizes that a stock config can describe; None if only the dense size is possible.

    Args:
        model: The dense model.
        heads: Key-value heads per layer of the pruned model; defaults to those of the dense model.
    """
    ratio, dense, divides, fixed = _head_rules(model)
    if fixed:
        return None
    return ratio * (heads or dense) if divides else 1


def _head_rules(model: nn.Module) -> tuple[int, int, bool, bool]:
    """Returns query heads per unit, units, whether heads must divide the hidden size, and whether both are fixed."""
    table, config = attention_table(find_spec(model)), _config(model)
    if not table.heads_key:
        return _dense_heads(model)[1], find_groups(model, ("heads",))[0].num_units, False, True
    queries = config_value(config, table.heads_key)
    dense = config_value(config, table.keys_values_key) if table.keys_values_key else queries
    rotary = getattr(config, "rope_parameters", None) or {}
    factors = table.factors_fix_heads and rotary.get("short_factor") is not None
    return queries // dense, dense, table.divides_hidden, table.size_key is None or factors


def unit_keys(spec: ArchSpec, kind: str) -> tuple[str, ...]:
    """Returns the config keys that hold the number of units of a kind in a layer; empty for layers and sub-layers.

    Heads have two keys where the class has key-value heads: query heads and key-value heads.

    Args:
        spec: Specification of the architecture.
        kind: Unit kind.
    """
    if kind == "mlp":
        return (spec.width_key,) if spec.width_key else ()
    if kind == "heads":
        table = attention_table(spec)
        if not table.heads_key:
            return ()
        return (table.heads_key, *(() if table.keys_values_key is None else (table.keys_values_key,)))
    if kind == EXPERTS:
        return (experts_table(spec).count_key,)
    return (stream_table(spec).hidden_key,) if kind == CHANNELS else ()


def config_values(model: nn.Module, groups: Sequence[Group], keep: Kept) -> dict[str, Any]:
    """Returns config key -> new value for a pruned model.

    Keys of widths and head counts are included if one value describes all kept layers and the config class supports it;
    the number of layers is always included if it changes.

    Args:
        model: The dense model, possibly on the meta device.
        groups: Groups of the model.
        keep: Group name -> kept units.
    """
    spec, values = find_spec(model), dict[str, Any]()
    stay = _staying(model, groups, keep)
    width = _common(model, groups, keep, "mlp", stay)
    if width is not None:
        values |= dict.fromkeys(unit_keys(spec, "mlp"), width)
    experts = _common(model, groups, keep, EXPERTS, stay)
    if experts is not None:
        values |= dict.fromkeys(unit_keys(spec, EXPERTS), experts)
    heads, hidden = _common(model, groups, keep, "heads", stay), _hidden(groups, keep)
    if heads is not None and heads in head_counts(model, hidden=hidden):
        values |= _head_values(model, heads)
    else:
        heads = None
    if hidden is not None and _states_hidden(model, hidden, heads):
        values |= _hidden_values(model, hidden)
    if len(stay) < len(find_layers(model)) and spec.layers_key:
        values[spec.layers_key] = len(stay)
        lists = {key: config_value(_config(model), key, None) for key in spec.layer_lists}
        values |= {key: [known[index] for index in stay] for key, known in lists.items() if known is not None}
        values |= _mixture_values(model, stay)
    return values


def _mixture_values(model: nn.Module, stay: Sequence[int]) -> dict[str, Any]:
    """Returns the config keys that say which of the kept layers have a mixture of experts; empty without experts."""
    spec = find_spec(model)
    table = spec.experts
    if table is None:
        return {}
    mixed = mixture_layers(model, spec)
    dense = [place for place, index in enumerate(stay) if index not in mixed]
    values = {
        table.leading_key: len(dense),  # a prefix of the layers, of which a part stays in front
        table.dense_key: dense,
        table.step_key: 1,
        table.sparse_key: [place for place, index in enumerate(stay) if index in mixed],
    }
    return {key: value for key, value in values.items() if key is not None and hasattr(_config(model), key)}


def check_stock(model: nn.Module, groups: Sequence[Group], keep: Kept) -> None:
    """Checks that a stock config can describe the pruned model.

    Args:
        model: The dense model, possibly on the meta device.
        groups: Groups of the model.
        keep: Group name -> kept units.

    Raises:
        UnsupportedArchitectureError: No stock config describes the model; the message names the alternatives.
    """
    _check_sublayers(model, groups, keep)
    stay = _staying(model, groups, keep)
    for kind, what in (("mlp", "MLP neurons"), ("heads", "key-value heads"), (EXPERTS, "experts")):
        kept = list(_by_layer(groups, keep, kind, stay).values())
        if len(set(kept)) > 1:
            raise UnsupportedArchitectureError(
                f"The layers would keep different numbers of {what} ({min(kept)} to {max(kept)}), but a stock config "
                "has one number for all layers. Use layout='per_layer', or keep the same number in every layer: an "
                "allocation such as Uniform(), and no skipped layers."
            )
    if any(g.kind == "mlp" and len(keep[g.name]) < g.num_units for g in groups) and not find_spec(model).width_key:
        raise UnsupportedArchitectureError(
            f"The config of {find_spec(model).model_class} has no value for the MLP width, so that no stock config "
            "describes the pruned model. Leave 'mlp' out of the units, or use layout='per_layer'."
        )
    heads, hidden = _common(model, groups, keep, "heads", stay), _hidden(groups, keep)
    if hidden is not None and not _states_hidden(model, hidden, heads):
        raise UnsupportedArchitectureError(_no_hidden(model, hidden, heads))
    if heads is None or heads in (possible := head_counts(model, hidden=hidden)):
        return
    name = find_spec(model).model_class
    raise UnsupportedArchitectureError(
        f"A stock config of {name} does not support {heads} key-value heads per layer; it supports "
        f"{', '.join(map(str, possible))}. Change the budget, set one of these by the allocation Explicit(heads=...), "
        "leave 'heads' out of the units, or use layout='per_layer'."
    )


def _check_sublayers(model: nn.Module, groups: Sequence[Group], keep: Kept) -> None:
    """Raises ``UnsupportedArchitectureError`` if a sub-layer is removed; which ones may not be known yet."""
    kind = next((group.kind for group in groups if group.kind in SUBLAYERS and not keep[group.name]), None)
    if kind is not None:
        raise UnsupportedArchitectureError(
            f"A stock config of {find_spec(model).model_class} cannot state a layer without its "
            f"{UNIT_KINDS[kind].plural.removesuffix('s').removesuffix(' sub-layer')}. Use layout='per_layer', "
            f"or leave '{kind}' out of the units."
        )


def _head_values(model: nn.Module, heads: int) -> dict[str, int]:
    _, ratio = _dense_heads(model)
    return dict(zip(unit_keys(find_spec(model), "heads"), (heads * ratio, heads), strict=False)) | _size_value(model)


def _hidden_values(model: nn.Module, hidden: int) -> dict[str, Any]:
    """Returns the config keys of a hidden size, with the size of a head and the rescaled epsilon."""
    stream, config = stream_table(find_spec(model)), _config(model)
    if hidden == hidden_size(model):
        return {}
    epsilon = scaled_epsilon(config_value(config, stream.epsilon_key), hidden_size(model), hidden)
    (key,) = unit_keys(find_spec(model), CHANNELS)
    return {key: hidden, stream.epsilon_key: epsilon} | _size_value(model)


def _size_value(model: nn.Module) -> dict[str, int]:
    """Returns the config key of the size of a head, which does not change; empty if the class has none."""
    key = attention_table(find_spec(model)).size_key
    return {} if key is None else {key: _dense_heads(model)[0]}


def _dense_heads(model: nn.Module) -> tuple[int, int]:
    """Returns the size of a head and the number of query heads per key-value head."""
    spec = find_spec(model)
    table = attention_table(spec)
    layer = next(layer for layer in find_layers(model, spec) if has_sublayer(layer, spec, ATTENTION_SUBLAYERS))
    return head_shape(layer.get_submodule(table.module), table)


def _hidden(groups: Sequence[Group], keep: Kept) -> int | None:
    """Returns the number of kept hidden channels; None if they are not pruned."""
    return next((len(keep[group.name]) for group in groups if group.kind == CHANNELS), None)


def _states_hidden(model: nn.Module, hidden: int, heads: int | None) -> bool:
    if hidden == hidden_size(model):
        return True
    step = hidden_step(model, heads=heads)
    return step is not None and hidden % step == 0


def _no_hidden(model: nn.Module, hidden: int, heads: int | None) -> str:
    """Returns the message for a hidden size that no stock config supports."""
    name, step = find_spec(model).model_class, hidden_step(model, heads=heads)
    if step is None:
        return (
            f"A stock config of this {name} derives the size of a head from the hidden size and supports only "
            f"{hidden_size(model)}. Leave 'channels' out of the units, or use layout='per_layer'."
        )
    return (
        f"A stock config of {name} with {step} query heads does not support a hidden size of {hidden}; it supports "
        f"multiples of {step}. Set one of these by the allocation Explicit(channels=...), leave 'channels' out of the "
        "units, or use layout='per_layer'."
    )


def _staying(model: nn.Module, groups: Sequence[Group], keep: Kept) -> list[int]:
    """Returns the indices of the kept layers."""
    removed = removed_layers(groups, keep)
    return [index for index in range(len(find_layers(model))) if index not in removed]


def _common(model: nn.Module, groups: Sequence[Group], keep: Kept, kind: str, stay: Sequence[int]) -> int | None:
    """Returns the number of kept units of a kind if it is the same in all kept layers that have such units."""
    kept = _by_layer(groups, keep, kind, stay)
    if len(set(kept.values())) != 1:
        return None
    if len(kept) < len(stay) and len(kept) < len({g.layer for g in find_groups(model, (kind,)) if g.layer in stay}):
        return None
    return next(iter(kept.values()))


def _by_layer(groups: Sequence[Group], keep: Kept, kind: str, stay: Sequence[int]) -> dict[int, int]:
    """Returns kept layer -> number of kept units of a kind; of experts, over all groups of the router."""
    absent = absent_groups(groups, keep)
    kept: dict[int, int] = {}
    for group in groups:
        if group.kind == kind and group.layer is not None and group.layer in stay and group.name not in absent:
            before = kept.get(group.layer, 0) if kind == EXPERTS else 0  # other tied groups keep equal numbers
            kept[group.layer] = before + len(keep[group.name])
    return kept


def _config(model: nn.Module) -> Any:
    return model.config
