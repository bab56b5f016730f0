"""Whole sub-layers: the attention or the MLP of a layer, with its norms, as a unit that can be removed.

A layer of a removed sub-layer adds nothing to the residual stream in its place. The modules stay callable: the last one
of a sub-layer is replaced by :class:`NoAttention` or :class:`NoMLP`, the others and the norms by the identity.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.projection import set_attribute, submodule
from hfprune.models.spec import ArchSpec, SublayerSpec
from hfprune.plan import ATTENTION_SUBLAYERS, SUBLAYERS, UNIT_KINDS, Group
from hfprune.utils.errors import UnsupportedArchitectureError


class NoMLP(nn.Module):
    """Takes the place of a removed MLP: its output is zero.

    Example:
        >>> NoMLP()(torch.ones(1, 2))
        tensor([[0., 0.]])
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns zeros of the shape of ``hidden_states``."""
        return torch.zeros_like(hidden_states)


class NoAttention(nn.Module):
    """Takes the place of a removed attention: its output is zero, and it has no keys and values.

    Caches of transformers read the number of seen tokens from their first entry. If no attention uses that entry, one
    removed attention counts the tokens there, with one number per token.

    Attributes:
        counts_at: Entry of the cache in which tokens are counted; None for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts_at: int | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Returns zeros of the shape of ``hidden_states`` [B, T, H], and no attention weights."""
        cache = next((v for v in (*kwargs.values(), *args) if hasattr(v, "get_seq_length")), None)
        if cache is not None and self.counts_at is not None:
            keys = hidden_states[:, None, :, :1]
            cache.update(torch.zeros_like(keys), keys[..., :0], self.counts_at)
        return torch.zeros_like(hidden_states), None


def sublayer_table(spec: ArchSpec, kind: str) -> SublayerSpec:
    """Returns the table of a sub-layer; raises ``UnsupportedArchitectureError`` if there is none."""
    if spec.sublayers is None:
        raise UnsupportedArchitectureError(
            f"The {UNIT_KINDS[kind].plural} of {spec.model_class} cannot be removed: {spec.no_sublayers}. Leave "
            f"'{kind}' out of the units."
        )
    return spec.sublayers.attention if kind == ATTENTION_SUBLAYERS else spec.sublayers.mlp


def has_sublayer(layer: nn.Module, spec: ArchSpec, kind: str) -> bool:
    """Returns whether a layer still has the sub-layer of a kind; true for classes without a table of sub-layers."""
    if spec.sublayers is None:
        return True
    return not isinstance(submodule(layer, sublayer_table(spec, kind).modules[-1]), NoAttention | NoMLP)


def owner_of_parts(kind: str) -> str | None:
    """Returns the kind of the sub-layers that contain units of ``kind``; None for layers, channels and sub-layers.

    >>> owner_of_parts("heads"), owner_of_parts("layers")
    ('attention_sublayers', None)
    """
    return next((name for name in SUBLAYERS if kind in UNIT_KINDS[name].parts), None)


def sublayer_groups(model: nn.Module, spec: ArchSpec, kind: str) -> list[Group]:
    """Returns one group of one unit for each layer that has the sub-layer.

    Raises:
        UnsupportedArchitectureError: The class has no table of its sub-layers, or the config normalises the stream.
    """
    table, name = sublayer_table(spec, kind), kind.removesuffix("s")
    key = None if spec.sublayers is None else spec.sublayers.pre_norm_key
    config: Any = getattr(model, "config", None)
    if key is not None and not getattr(config, key):
        raise UnsupportedArchitectureError(
            f"config.{key}=False makes this {spec.model_class} normalise the residual stream after each sub-layer, so "
            f"that no sub-layer can be removed. Leave '{kind}' out of the units."
        )
    found = []
    for index, layer in enumerate(spec.find_layers(model)):
        if has_sublayer(layer, spec, kind):
            for module in (*table.modules, *table.norms):
                submodule(layer, module)
            group = Group(name=f"{spec.layers}.{index}.{name}", kind=kind, num_units=1, slices=(), layer=index, least=0)
            found.append(group)
    return found


def missing_sublayers(model: nn.Module, spec: ArchSpec) -> dict[str, list[int]]:
    """Returns unit kind -> layers without this sub-layer; kinds that every layer has are left out."""
    layers: Any = spec.find_layers(model)
    found = {kind: [i for i, layer in enumerate(layers) if not has_sublayer(layer, spec, kind)] for kind in SUBLAYERS}
    return {kind: missing for kind, missing in found.items() if missing}


def sublayer_cost(model: nn.Module, spec: ArchSpec, group: Group) -> int:
    """Returns the number of parameters of a sub-layer, with its norms."""
    assert group.layer is not None
    layer, table = spec.find_layers(model)[group.layer], sublayer_table(spec, group.kind)
    return sum(p.numel() for name in (*table.modules, *table.norms) for p in submodule(layer, name).parameters())


def sublayer_output(model: nn.Module, spec: ArchSpec, kind: str, layer: int) -> nn.Module:
    """Returns the module whose output is that of a sub-layer, before a norm on this output."""
    return submodule(spec.find_layers(model)[layer], sublayer_table(spec, kind).modules[-1])


def adds_to_stream(layer: nn.Module, spec: ArchSpec, kind: str) -> nn.Module:
    """Returns the module of a layer whose output a sub-layer adds to the residual stream."""
    table = sublayer_table(spec, kind)
    return submodule(layer, table.added or table.modules[-1])


def silenced(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook that replaces the output of a sub-layer by zeros."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def is_within(name: str, prefix: str, table: SublayerSpec) -> bool:
    """Returns whether a parameter belongs to a sub-layer.

    Args:
        name: Name of the parameter.
        prefix: Name of the layer, with a dot.
        table: Table of the sub-layer.
    """
    return name.startswith(tuple(f"{prefix}{module}." for module in (*table.modules, *table.norms)))


def remove_sublayers(model: nn.Module, spec: ArchSpec, removed: Mapping[str, Sequence[int]]) -> None:
    """Removes sub-layers in place.

    Args:
        model: The model.
        spec: Its architecture table.
        removed: Unit kind -> layers that lose the sub-layer.
    """
    for kind, layers in removed.items():
        for index in layers:
            layer, table = spec.find_layers(model)[index], sublayer_table(spec, kind)
            for name in (*table.modules[:-1], *table.norms):
                set_attribute(layer, name, nn.Identity())
            substitute = NoAttention() if kind == ATTENTION_SUBLAYERS else NoMLP()
            set_attribute(layer, table.modules[-1], substitute.train(layer.training))


def number_cache_entries(model: nn.Module, spec: ArchSpec) -> None:
    """Sets the cache entry of every attention after layers or attentions were removed.

    Layer i uses entry i. If attentions are missing, those that are left use the first entries of their layer type: the
    class reads positions and lengths of masks from the first entry of each type.
    """
    layers: Any = spec.find_layers(model)
    module: Any
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    if spec.sublayers is None:
        return
    name, config = spec.sublayers.attention.modules[-1], getattr(model, "config", None)
    attentions = [submodule(layer, name) for layer in layers]
    listed = getattr(config, "layer_types", None)
    places = cache_places(listed or [""] * len(layers), [not isinstance(module, NoAttention) for module in attentions])
    for module, place in zip(attentions, places, strict=True):
        if place is not None:
            module.layer_idx = place
    for module in attentions:
        if isinstance(module, NoAttention):
            module.counts_at = None
    if 0 not in places and layers:
        next(module for module in attentions if isinstance(module, NoAttention)).counts_at = 0


def cache_places(types: Sequence[str], present: Sequence[bool]) -> list[int | None]:
    """Returns the cache entry of each layer's attention, None for a missing one.

    Args:
        types: Layer type of every entry.
        present: Whether the layer has an attention.

    >>> cache_places(["sliding", "full", "sliding", "full"], [False, True, True, False])
    [None, 1, 0, None]
    """
    entries = {kind: iter([i for i, other in enumerate(types) if other == kind]) for kind in set(types)}
    return [next(entries[kind]) if here else None for kind, here in zip(types, present, strict=True)]
