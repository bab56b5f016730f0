"""Groups of prunable units, of registered architectures and of custom modules."""

import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hfprune.models.config_keys import config_value
from hfprune.models.expert_neurons import neuron_groups
from hfprune.models.experts import expert_groups, mixture_layers
from hfprune.models.projection import bias_of, num_channels, submodule, weight_of
from hfprune.models.residual_stream import CHANNELS, channel_cost, channel_group
from hfprune.models.spec import ARCHITECTURES, SHAPES, ArchSpec, AttentionSpec
from hfprune.models.sublayers import has_sublayer, sublayer_cost, sublayer_groups
from hfprune.plan import (
    ATTENTION_SUBLAYERS,
    LAYERS,
    MLP_SUBLAYERS,
    SUBLAYERS,
    UNIT_KINDS,
    Group,
    Side,
    Slice,
    unit_kinds,
)
from hfprune.utils.errors import ConfigError, UnsupportedArchitectureError


def find_spec(model: nn.Module) -> ArchSpec:
    """Returns the table of ``model``: pinned to it, of its exact class, or derived from the class and proven.

    A class without a table is derived and proven on a tiny model, once per machine; so are tables that users register.

    Raises:
        UnsupportedArchitectureError: The class cannot be described, or its table is wrong; the message has the reason.
    """
    pinned: ArchSpec | None = model.__dict__.get(_PINNED)
    if pinned is not None:
        return pinned
    name = class_name(model)
    table = ARCHITECTURES.get(name) if name in ARCHITECTURES or not _is_language_model(model) else None
    if table is not None and (_own_tables().get(name) is table or not hasattr(model, "config")):
        return table
    from hfprune.models.described import proven_spec  # it derives and proves with the functions of this module

    return proven_spec(model, table)


def is_supported(model: nn.Module) -> bool:
    """Returns whether ``model`` or its exact class has an architecture table, or one can be derived and proven."""
    if _PINNED in model.__dict__ or class_name(model) in ARCHITECTURES:
        return True
    if not _is_language_model(model):
        return False
    try:
        find_spec(model)
    except UnsupportedArchitectureError:
        return False
    return True


def _is_language_model(model: nn.Module) -> bool:
    """Returns whether a module is a transformers model with one output per token of its vocabulary."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return False
    config: Any = model.config
    text = getattr(config, "text_config", None) or config
    vocabulary = getattr(text, "vocab_size", None)
    return any(getattr(module, "out_features", None) == vocabulary for module in model.modules())


@functools.cache
def _own_tables() -> dict[str, ArchSpec]:
    """Returns the tables of hfprune, which its tests prove; those of users are proven at their first use."""
    from hfprune.models import architectures

    return {value.model_class: value for value in vars(architectures).values() if isinstance(value, ArchSpec)}


def pin_spec(model: nn.Module, spec: ArchSpec) -> None:
    """Makes ``spec`` the table of one model, and of its deep copies, in place of a table of its class.

    Args:
        model: The model.
        spec: The table.
    """
    model.__dict__[_PINNED] = spec


_PINNED = "_hfprune_spec"
"""Attribute of a model that holds its architecture table."""


def class_name(model: nn.Module) -> str:
    """Returns the name of ``model``'s class, without the subclass that FSDP2 creates."""
    return next(c.__name__ for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def find_groups(
    model: nn.Module, units: Sequence[str] = ("mlp",), *, spec: ArchSpec | None = None
) -> tuple[Group, ...]:
    """Returns the groups of ``model``: of neurons, heads, experts and sub-layers by layer; of layers and of channels.

    A layer without attention or MLP has no groups of its units. Only shapes are read, so the function supports models
    on the meta device and models that were pruned before.

    Args:
        model: A Hugging Face model of a supported class.
        units: Unit kinds: ``mlp``, ``heads``, ``experts``, ``attention_sublayers``, ``mlp_sublayers``, ``layers``,
            ``channels``, in any order.
        spec: Architecture table; defaults to that of the model's class.

    Raises:
        ConfigError: A unit kind is unknown.
        UnsupportedArchitectureError: The class is unknown, does not support a unit kind, or does not match its table.
    """
    units = unit_kinds(units)
    check_units(units)
    spec = spec or find_spec(model)
    for kind in units:
        if reason := refusal(spec, kind):
            units_of = UNIT_KINDS[kind].plural
            raise UnsupportedArchitectureError(
                f"{units_of[:1].upper()}{units_of[1:]} of {spec.model_class} cannot be removed: {reason}. Leave "
                f"'{kind}' out of the units."
            )
    if spec.experts is not None and {"mlp", "experts"} <= set(units):
        raise UnsupportedArchitectureError(
            "One plan cannot remove experts and the neurons within experts, whose parameters overlap. Prune the "
            "experts first, then the neurons of the result."
        )
    return tuple(group for kind, find in _FINDERS.items() if kind in units for group in find(model, spec))


def refusal(spec: ArchSpec, kind: str) -> str:
    """Returns the reason why units that ``spec`` describes cannot be removed; empty if they can.

    Args:
        spec: Architecture table.
        kind: Unit kind.
    """
    return {"mlp": spec.no_mlp, "heads": spec.no_heads, "experts": spec.no_experts, LAYERS: spec.no_layers}.get(
        kind, ""
    )


def check_units(units: Sequence[str]) -> None:
    """Raises ``ConfigError`` unless every unit kind is known and given once."""
    if not units or len(set(units)) != len(units) or not set(units) <= set(_FINDERS):
        raise ConfigError(f"units {list(units)}: give each of {', '.join(_FINDERS)} at most once, and at least one.")
    whole = next((kind for kind in SUBLAYERS if kind in units), None)
    if whole and "channels" in units:
        raise ConfigError(f"units {list(units)}: 'channels' cannot be combined with '{whole}'. Leave one of them out.")


def find_layers(model: nn.Module, spec: ArchSpec | None = None) -> nn.ModuleList:
    """Returns the transformer layers of ``model``."""
    return (spec or find_spec(model)).find_layers(model)


def hidden_size(model: nn.Module) -> int:
    """Returns the number of channels of the hidden states between layers."""
    spec = find_spec(model)
    parts = {t.module for t in spec.mlp if t.side == "out"}
    if spec.attention is not None:
        parts |= {t.module for t in spec.attention.heads if t.side == "out"}
    for layer in find_layers(model, spec):
        for name, module in layer.named_modules():
            if name in parts:
                return num_channels(module, "in")
    return num_channels(submodule(model, spec.lm_head), "in")


def mlp_widths(model: nn.Module) -> tuple[int, ...]:
    """Returns the MLP width of each layer, 0 for a removed MLP; layers with a mixture of experts are left out."""
    spec = find_spec(model)
    if not spec.mlp:
        return ()
    widths = [(group.layer or 0, group.num_units) for group in _mlp_groups(model, spec)]
    layers = find_layers(model, spec)
    removed = [(i, 0) for i, layer in enumerate(layers) if not has_sublayer(layer, spec, MLP_SUBLAYERS)]
    return tuple(width for _, width in sorted(widths + removed))


def _mlp_groups(model: nn.Module, spec: ArchSpec) -> list[Group]:
    """Returns the neurons of every layer that has the MLP of the table, or of its experts."""
    if spec.experts is not None:
        return [_checked(model, spec, group) for group in neuron_groups(model, spec)]
    if not spec.mlp:
        raise UnsupportedArchitectureError(
            f"The MLPs of {spec.model_class} are mixtures of experts, whose neurons cannot be removed. Use the unit "
            "kinds heads or layers, for example units=['heads']."
        )
    names, present = {t.module for t in spec.mlp}, _having(model, spec, MLP_SUBLAYERS)
    layers = find_layers(model, spec)
    owners = [i for i in present if names <= {name for name, _ in layers[i].named_modules()}]
    return [_mlp_group(model, spec, index) for index in owners or present]


def _having(model: nn.Module, spec: ArchSpec, kind: str) -> list[int]:
    """Returns the indices of the layers that have the sub-layer of a kind."""
    return [i for i, layer in enumerate(find_layers(model, spec)) if has_sublayer(layer, spec, kind)]


def _mlp_group(model: nn.Module, spec: ArchSpec, index: int) -> Group:
    layer = f"{spec.layers}.{index}"
    consumer = next(t for t in spec.mlp if t.side == "in")
    width = num_channels(submodule(model, f"{layer}.{consumer.module}"), "in")
    slices = tuple(
        Slice(module=f"{layer}.{t.module}", side=t.side, offset=t.block * t.channels * width, width=t.channels)
        for t in spec.mlp
    )
    return _checked(model, spec, Group(name=f"{layer}.mlp", kind="mlp", num_units=width, slices=slices, layer=index))


def _head_groups(model: nn.Module, spec: ArchSpec) -> list[Group]:
    return [_head_group(model, spec, index) for index in _having(model, spec, ATTENTION_SUBLAYERS)]


def _head_group(model: nn.Module, spec: ArchSpec, index: int) -> Group:
    """Returns the heads of a layer; each unit is a key-value head with the query heads that read it."""
    layer, table = f"{spec.layers}.{index}", attention_table(spec)
    attention = submodule(model, f"{layer}.{table.module}")
    size, ratio = head_shape(attention, table)
    present = dict(find_layers(model, spec)[index].named_modules())
    heads = [t for t in table.heads if not t.optional or t.module in present]
    sizes = [sum(getattr(attention, name) for name in t.sizes) or size for t in heads]
    widths = [(t.queries * ratio + t.keys_values) * each for t, each in zip(heads, sizes, strict=True)]
    reader = next(i for i, t in enumerate(heads) if t.side == "in")
    units = num_channels(submodule(model, f"{layer}.{heads[reader].module}"), "in") // widths[reader]
    end: dict[tuple[str, str], int] = {}
    slices = []
    for template, width in zip(heads, widths, strict=True):
        offset = end.get((template.module, template.side), 0)
        end[template.module, template.side] = offset + units * width
        slices.append(Slice(module=f"{layer}.{template.module}", side=template.side, offset=offset, width=width))
    name = f"{layer}.{table.module}"
    sinks = tuple(Slice(module=name, side="out", width=ratio, parameter=parameter) for parameter in table.per_head)
    group = Group(name=name, kind="heads", num_units=units, slices=tuple(slices), layer=index, followers=sinks)
    return _checked(model, spec, group)


def attention_table(spec: ArchSpec) -> AttentionSpec:
    """Returns the table of the attention; raises ``UnsupportedArchitectureError`` if heads cannot be removed."""
    if spec.attention is None:
        raise UnsupportedArchitectureError(
            f"Heads of {spec.model_class} cannot be removed: {spec.no_attention}. Leave 'heads' out of the units."
        )
    return spec.attention


def head_shape(attention: nn.Module, table: AttentionSpec) -> tuple[int, int]:
    """Returns the size of a head and the number of query heads per key-value head."""
    size = int(attrgetter(table.size_attribute)(attention))
    if table.ratio_attribute == SHAPES:
        return size, _ratio(attention, table)
    return size, getattr(attention, table.ratio_attribute) if table.ratio_attribute else 1


def _ratio(attention: nn.Module, table: AttentionSpec) -> int:
    """Returns the number of query heads per key-value head from the shapes of the projections.

    With u units, ratio r and head size d, the reader has r u d inputs, and the producers have (a r + b) u d outputs.
    """
    prefix = f"{table.module}." if table.module else ""
    widths = {
        (t.module, t.side): num_channels(submodule(attention, t.module.removeprefix(prefix)), t.side)
        for t in table.heads
    }
    queries, keys_values = (
        sum(t.queries for t in table.heads if t.side == "out"),
        sum(t.keys_values for t in table.heads),
    )
    read = next(width for (_, side), width in widths.items() if side == "in")
    made = sum(width for (_, side), width in widths.items() if side == "out")
    return keys_values * read // (made - queries * read)


def _expert_groups(model: nn.Module, spec: ArchSpec) -> list[Group]:
    routers = mixture_layers(model, spec)
    if not routers:
        raise UnsupportedArchitectureError(
            f"Every layer of this {spec.model_class} has an MLP in place of a mixture of experts: leave 'experts' out "
            "of the units."
        )
    found = []
    for index, router in routers.items():
        parts = expert_groups(model, spec, index, router)
        found += [_checked(model, spec, part, parts) for part in parts]
    return found


def dense_mlp_groups(model: nn.Module, spec: ArchSpec) -> tuple[Group, ...]:
    """Returns the groups of neurons of the dense MLPs in a model with mixtures; empty if every layer has a mixture."""
    assert spec.experts is not None
    dense = set(_having(model, spec, MLP_SUBLAYERS)) - set(mixture_layers(model, spec))
    plain = replace(spec, mlp=spec.experts.dense_mlp)
    return tuple(_mlp_group(model, plain, index) for index in sorted(dense))


def _check_positions(model: nn.Module, spec: ArchSpec, kind: str) -> None:
    if spec.position_key is not None and config_value(model.config, spec.position_key):
        what = UNIT_KINDS[kind].plural.removesuffix("s")
        raise UnsupportedArchitectureError(
            f"config.{spec.position_key} makes each layer of this {spec.model_class} depend on its position, so that "
            f"no {what} can be removed. Leave '{kind}' out of the units."
        )


def _attention_groups(model: nn.Module, spec: ArchSpec) -> list[Group]:
    _check_positions(model, spec, ATTENTION_SUBLAYERS)
    return sublayer_groups(model, spec, ATTENTION_SUBLAYERS)


def _whole_mlp_groups(model: nn.Module, spec: ArchSpec) -> list[Group]:
    _check_positions(model, spec, MLP_SUBLAYERS)
    return sublayer_groups(model, spec, MLP_SUBLAYERS)


def _layer_groups(model: nn.Module, spec: ArchSpec) -> list[Group]:
    _check_positions(model, spec, LAYERS)
    return [Group(name=spec.layers, kind=LAYERS, num_units=len(find_layers(model, spec)), slices=())]


def _channel_groups(model: nn.Module, spec: ArchSpec) -> list[Group]:
    if not all(has_sublayer(layer, spec, kind) for layer in find_layers(model, spec) for kind in SUBLAYERS):
        raise UnsupportedArchitectureError(
            f"This {spec.model_class} has layers without attention or MLP, whose hidden channels cannot be removed. "
            "Leave 'channels' out of the units."
        )
    return [_checked(model, spec, channel_group(model, spec))]


_FINDERS: dict[str, Callable[[nn.Module, ArchSpec], list[Group]]] = {
    "mlp": _mlp_groups,
    "heads": _head_groups,
    "experts": _expert_groups,
    ATTENTION_SUBLAYERS: _attention_groups,
    MLP_SUBLAYERS: _whole_mlp_groups,
    LAYERS: _layer_groups,
    "channels": _channel_groups,
}


def _checked(model: nn.Module, spec: ArchSpec, group: Group, together: Sequence[Group] = ()) -> Group:
    """Returns ``group`` after checking that its slices, and those of ``together``, cover the projections they name."""
    listed = [(g.num_units, o) for g in together or (group,) for o in (*g.slices, *g.followers)]
    for s in (*group.slices, *group.followers):
        channels, key = num_channels(submodule(model, s.module), s.side, s.parameter), (s.module, s.parameter, s.side)
        expected = sum(units * o.width for units, o in listed if (o.module, o.parameter, o.side) == key)
        if channels != expected:
            raise UnsupportedArchitectureError(
                f"{s.module} of this {spec.model_class} has {channels} {s.side}-channels, but its table expects "
                f"{expected}: the model is not the stock architecture."
            )
    return group


def unit_cost(model: nn.Module, group: Group) -> int:
    """Returns the number of parameters of one unit of ``group`` (weights and output biases); tied weights count once.

    Raises:
        ConfigError: The layers of a ``layers`` group differ in size; see :func:`layer_params`.
    """
    if group.kind == LAYERS:
        sizes = layer_params(model)
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"The layers of this model differ in size, from {min(sizes):,} to {max(sizes):,} parameters."
            )
        return sizes[0]
    if group.kind == CHANNELS:
        return channel_cost(model, group)
    if group.kind in SUBLAYERS:
        return sublayer_cost(model, find_spec(model), group)
    cost = 0
    for s in group.slices:
        module = submodule(model, s.module)
        cost += s.width * num_channels(module, "in" if s.side == "out" else "out", s.parameter)
        if s.side == "out" and s.parameter == "weight" and bias_of(module) is not None:
            cost += s.width
    for s in group.followers:
        module = submodule(model, s.module)
        if s.parameter.partition(".")[0] in module._parameters:
            cost += s.width * weight_of(module, s.parameter).shape[1]
    return cost


def layer_params(model: nn.Module) -> tuple[int, ...]:
    """Returns the number of parameters of each layer."""
    return tuple(parameter_count(layer) for layer in find_layers(model))


def parameter_count(model: nn.Module) -> int:
    """Returns the number of parameters of ``model``; tied weights count once."""
    return sum(p.numel() for p in model.parameters())


def backbone(model: nn.Module) -> nn.Module:
    """Returns the module that maps token ids to the final hidden states."""
    return submodule(model, find_spec(model).backbone)


def group_modules(model: nn.Module, groups: Iterable[Group]) -> dict[str, nn.Module]:
    """Returns name -> projection for every slice of ``groups``."""
    names: Sequence[str] = sorted({s.module for g in groups for s in (*g.slices, *g.followers)})
    return {name: submodule(model, name) for name in names}


@dataclass(frozen=True)
class Neurons:
    """Hidden neurons of a custom module, given by the names of the projections that produce and consume them.

    Modules between producer and consumer must act on each neuron separately (an activation, dropout), and no other
    module may read the neurons.

    Attributes:
        produced_by: Name or names of projections whose output channel j belongs to neuron j (``"net.0"``; gate and up
            of a gated MLP). ``*`` matches one component of a dotted name: ``"blocks.*.mlp.c_fc"`` is the projection in
            every block.
        consumed_by: Name or names of projections whose input channel j reads neuron j. Each ``*`` matches the same
            component as in ``produced_by``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [(group.name, group.num_units) for group in Neurons("0", "2").groups(model)]
        [('2', 3)]
    """

    produced_by: str | Sequence[str]
    consumed_by: str | Sequence[str]

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns one group for every match of ``*``, in the order of the modules.

        Args:
            model: The module that contains the projections.

        Raises:
            ConfigError: A name matches no module, or the widths of producers and consumers differ.
        """
        makers = [_matches(model, name) for name in _listed(self.produced_by)]
        readers = [_matches(model, name) for name in _listed(self.consumed_by)]
        found = []
        for key in readers[0]:
            missing = [names for names in (*makers, *readers) if key not in names]
            if missing:
                raise ConfigError(
                    f"{self}: '{readers[0][key]}' has no counterpart; '*' must match the same names everywhere."
                )
            slices = [Slice(module=names[key], side="out") for names in makers]
            slices += [Slice(module=names[key], side="in") for names in readers]
            found.append(_group(model, readers[0][key], slices))
        return tuple(found)


def custom_groups(model: nn.Module, neurons: Iterable[Neurons]) -> tuple[Group, ...]:
    """Returns the groups of all descriptions; raises ``ConfigError`` if two of them share channels."""
    groups = tuple(group for item in neurons for group in item.groups(model))
    owned: dict[tuple[str, Side], str] = {}
    for group in groups:
        for s in group.slices:
            if (s.module, s.side) in owned:
                raise ConfigError(f"The {s.side}-channels of '{s.module}' are described twice.")
            owned[s.module, s.side] = group.name
    return groups


def pruned_count(model: nn.Module, groups: Sequence[Group], widths: Sequence[int]) -> int:
    """Returns the number of parameters of ``model`` with ``widths`` units kept in ``groups``, which may share matrices.

    Args:
        model: The dense model.
        groups: Groups of the model.
        widths: Number of kept units per group.
    """
    removed: dict[tuple[str, Side], int] = {}
    for group, width in zip(groups, widths, strict=True):
        for s in group.slices:
            key = s.module, s.side
            removed[key] = removed.get(key, 0) + (group.num_units - width) * s.width
    total = sum(p.numel() for p in model.parameters())
    for name in {s.module for group in groups for s in group.slices}:
        module = model.get_submodule(name)
        outputs, inputs = num_channels(module, "out"), num_channels(module, "in")
        kept_outputs, kept_inputs = outputs - removed.get((name, "out"), 0), inputs - removed.get((name, "in"), 0)
        total -= outputs * inputs - kept_outputs * kept_inputs
        if module.bias is not None:
            total -= outputs - kept_outputs
    return total


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _matches(model: nn.Module, name: str) -> dict[tuple[str, ...], str]:
    """Returns matches of the stars -> module name, for every module that ``name`` matches."""
    pattern = re.compile(r"([^.]+)".join(re.escape(part) for part in name.split("*")))
    found = {m.groups(): key for key, _ in model.named_modules() if (m := pattern.fullmatch(key))}
    if not found:
        known = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise ConfigError(f"Neurons: no module has the name '{name}'. Linear projections here: {shown or 'none'}.")
    return found


def _group(model: nn.Module, name: str, slices: list[Slice]) -> Group:
    widths = {f"{s.module} ({s.side})": num_channels(model.get_submodule(s.module), s.side) for s in slices}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{key} {width}" for key, width in widths.items())
        raise ConfigError(f"Neurons: the widths of producers and consumers differ: {listed}.")
    return Group(name=name, kind="mlp", num_units=next(iter(widths.values())), slices=tuple(slices))
