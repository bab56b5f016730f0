"""The attention of a class: projections of heads, the order of their channels, and what stores the number of heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from hfprune.models.derivation.circuits import Circuit, first_circuits
from hfprune.models.derivation.trace import Trace
from hfprune.models.derivation.units import blocks, connected
from hfprune.models.derivation.variants import Variants, attributes
from hfprune.models.spec import SHAPES, AttentionSpec, HeadTemplate, Quantity
from hfprune.models.twins import random_weights


@dataclass(frozen=True, slots=True)
class Heads:
    """Projections and counts of one layer's attention.

    Attributes:
        templates: Blocks of the projections.
        module: Name of the attention relative to the layer.
        queries: Number of query heads.
        units: Number of key-value heads.
        size: Size of a head.
    """

    templates: tuple[HeadTemplate, ...]
    module: str
    queries: int
    units: int
    size: int

    @property
    def reader(self) -> str:
        """Name of the projection that reads the heads."""
        return next(t.module for t in self.templates if t.side == "in")


def common_heads(circuits: Sequence[Sequence[Circuit]]) -> Heads | str:
    """Returns the attention that all layers share, or why their heads cannot be removed."""
    found: list[Heads] = []
    for index, layer in enumerate(circuits):
        mixing = [_heads(circuit) for circuit in layer if circuit.mixes]
        usable = [heads for heads in mixing if isinstance(heads, Heads)]
        if len(usable) != 1:
            reasons = [heads for heads in mixing if isinstance(heads, str)]
            if reasons or index == 0:
                return next(iter(reasons), f"no projection of layer {index} reads values of other positions by heads")
            return f"layer {index} has no attention of the kind of the layers before"
        found += usable
    if len(set(found)) > 1:
        return "its layers have attention of different kinds or sizes"
    return found[0]


def _heads(circuit: Circuit) -> Heads | str:
    """Returns the heads of a circuit, or why they cannot be removed."""
    if circuit.problem:
        return circuit.problem
    units = connected(circuit.flows)
    asked = connected(circuit.flows, {name: ~flow.mixes for name, flow in circuit.flows.items()})
    if units.count == 1:
        if asked.count > 1:
            return "all query heads read the same keys and values"
        return f"the input of '{circuit.reader}' mixes all heads, for example by a norm over all of them"
    if asked.count % units.count or len(asked.reader) % asked.count:
        return f"the heads that '{circuit.reader}' reads have different sizes"
    size, ratio = len(asked.reader) // asked.count, asked.count // units.count
    order = "the order of the heads in '{}' is none that a table can describe"
    if blocks(asked.reader.tolist(), asked.count) is None or blocks(units.reader.tolist(), units.count) is None:
        return order.format(circuit.reader)
    found = []
    for name, owners in units.sources.items():
        parts = blocks(owners.tolist(), units.count)
        if parts is None:
            return order.format(name)
        for part in parts:
            template = _template(circuit, name, part.offset, part.width, size=size, ratio=ratio, units=units.count)
            if template is None:
                return f"the units of '{name}' do not consist of whole heads of {size} channels"
            found.append(template)
    templates = (*found, HeadTemplate(module=circuit.reader, side="in", queries=1))
    module = _common_module([t.module for t in templates])
    return Heads(templates, module, queries=asked.count, units=units.count, size=size)


def _template(
    circuit: Circuit, name: str, offset: int, width: int, *, size: int, ratio: int, units: int
) -> HeadTemplate | None:
    """Returns a block of a projection, or None if its units are no whole heads."""
    mixes = circuit.flows[name].mixes[offset : offset + units * width].reshape(units, width)
    shared = int(mixes[0].sum())
    own = width - shared
    if bool((mixes != mixes[0]).any()) or shared % size or own % (ratio * size):
        return None
    return HeadTemplate(module=name, side="out", queries=own // (ratio * size), keys_values=shared // size)


def _common_module(names: Sequence[str]) -> str:
    """Returns the deepest module that contains all of ``names``.

    >>> _common_module(["self_attn.q", "self_attn.inner.k"])
    'self_attn'
    """
    parts = [name.split(".")[:-1] for name in names]
    same = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
    return ".".join(same)


def grouped(variants: Variants) -> dict[str, int]:
    """Returns the change of the config that makes key-value heads fewer than query heads; empty if there is none."""
    for key in _maybe_keys_values(variants):
        value = variants.values[key]
        for fewer in [n for n in (value // 2, value // 3) if n > 1 and value % n == 0]:
            shapes = variants.changed({key: fewer})
            if shapes is not None and shapes.keys() == variants.shapes.keys() and shapes != variants.shapes:
                return {key: fewer}
    return {}


def _maybe_keys_values(variants: Variants) -> list[str]:
    """Returns the config keys that may hold the number of key-value heads; what they do is seen by their shapes."""
    values = variants.values
    return [key for key, value in values.items() if "kv" in key.replace("key_value", "kv") and type(value) is int]


def attention_spec(trace: Trace, heads: Heads, variants: Variants) -> AttentionSpec | str:
    """Returns the table of the attention without stored counts, or why heads cannot be removed.

    Args:
        trace: Trace of the model.
        heads: Attention of its layers.
        variants: Variants of the model.
    """
    reader = f"{trace.layers}.0.{heads.reader}.weight"
    keys = _Keys(trace, heads, variants, reader)
    size_key = keys.size()
    keys_values = keys.keys_values()
    heads_key = keys.queries(keys_values, size_key)
    owner = trace.stack[0].get_submodule(heads.module)
    stored = _size_attribute(owner, heads, size_key)
    if stored is None:
        return "its attention stores no head size"
    if heads_key and not _keeps_order(
        trace, heads, variants.build(keys.doubled(heads_key, keys_values, size_key), real=True)
    ):
        return "the order of its heads depends on their number"
    return AttentionSpec(
        module=heads.module,
        heads=heads.templates,
        size_attribute=stored,
        ratio_attribute=SHAPES if keys_values else None,
        heads_key=heads_key,
        keys_values_key=keys_values,
        size_key=size_key if heads_key else None,
        divides_hidden=bool(heads_key and size_key) and keys.refuses_remainders(heads_key, keys_values, size_key),
        factors_fix_heads=True,
    )


class _Keys:
    """Search for the config keys of an attention: each is tried, and the shapes are compared."""

    def __init__(self, trace: Trace, heads: Heads, variants: Variants, reader: str) -> None:
        self._trace, self._heads, self._variants, self._reader = trace, heads, variants, reader
        self._inputs = self._width(variants.shapes)

    def _width(self, shapes: Any) -> int:
        """Returns the number of input channels of the projection that reads heads, from shapes of parameters."""
        own, shape = self._variants.shapes[self._reader], shapes[self._reader]
        axis = own.index(self._heads.queries * self._heads.size) if own[0] != own[1] else 1
        return int(shape[axis])

    def size(self) -> str | None:
        """Returns the config key of the size of a head."""
        heads, larger = self._heads, 2 * self._heads.size
        known = self._variants.values
        guess = self._variants.text_key("head_dim")
        guesses = [] if guess in known else [guess]
        for key in [*self._variants.numbers(heads.size), *self._variants.unset(), *guesses]:
            shapes = self._variants.changed({key: larger})
            if shapes is not None and self._reader in shapes and self._width(shapes) == heads.queries * larger:
                return key
        return None

    def keys_values(self) -> str | None:
        """Returns the config key of the number of key-value heads."""
        heads = self._heads
        prefix = f"{self._trace.layers}.0."
        for key in self._variants.numbers(heads.units):
            for other in [n for n in range(1, heads.queries + 1) if heads.queries % n == 0 and n != heads.units]:
                shapes = self._variants.changed({key: other})
                if shapes is None or shapes.keys() != self._variants.shapes.keys():
                    continue
                moved = {name for name, shape in shapes.items() if shape != self._variants.shapes[name]}
                producers = {f"{prefix}{t.module}" for t in heads.templates if t.side == "out" and t.keys_values}
                if moved and {n.rpartition(".")[0] for n in moved if n.startswith(prefix)} <= producers:
                    return key
        return None

    def queries(self, keys_values: str | None, size_key: str | None) -> str:
        """Returns the config key of the number of query heads, or an empty string."""
        heads = self._heads
        more = 2 * heads.queries
        for key in self._variants.numbers(heads.queries):
            if key == keys_values:
                continue
            model = self._variants.build(self.doubled(key, keys_values, size_key))
            if model is not None and self._has(model, more):
                return key
        return ""

    def doubled(self, heads_key: str, keys_values: str | None, size_key: str | None) -> dict[str, int]:
        """Returns the change of the config that doubles the number of heads of the same size."""
        heads = self._heads
        changes = {heads_key: 2 * heads.queries}
        if keys_values:
            changes[keys_values] = 2 * heads.units
        return changes | ({size_key: heads.size} if size_key else {})

    def _has(self, model: nn.Module, queries: int) -> bool:
        """Returns whether a model has another number of heads, from shapes or from what its attention stores."""
        shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        if self._reader not in shapes:
            return False
        width = self._width(shapes)
        if width != self._inputs:
            return width == queries * self._heads.size
        path = f"{self._trace.layers}.0.{self._heads.module}".rstrip(".")
        ours, theirs = self._trace.model.get_submodule(path), model.get_submodule(path)
        held = set(_direct(ours, self._heads.size)) & set(_direct(theirs, width // queries))
        return bool(held) or bool(set(_direct(ours, self._heads.queries)) & set(_direct(theirs, queries)))

    def refuses_remainders(self, heads_key: str, keys_values: str | None, size_key: str | None) -> bool:
        """Returns whether the config class refuses head counts that do not divide the hidden size."""
        hidden = self._trace.hidden_size

        def accepted(count: int) -> bool:
            changes: dict[str, Any] = {heads_key: count, size_key or "": self._heads.size}
            if keys_values:
                changes[keys_values] = count
            return self._variants.build(changes) is not None

        uneven = next(n for n in range(3, hidden) if hidden % n)
        even = next(n for n in range(uneven + 1, hidden + 1) if hidden % n == 0)
        return accepted(even) and not accepted(uneven)


def _keeps_order(trace: Trace, heads: Heads, model: nn.Module | None) -> bool:
    """Returns whether a model with twice the heads has the same blocks in its projections."""
    if model is None:
        return True
    random_weights(model)
    other = common_heads([first_circuits(Trace(model, trace.layers))])
    return isinstance(other, Heads) and (other.templates, other.units) == (heads.templates, 2 * heads.units)


def _direct(module: nn.Module, value: int) -> list[str]:
    return [name for name in attributes(module, value) if "." not in name]


def _size_attribute(owner: Any, heads: Heads, size_key: str | None) -> str | None:
    """Returns the attribute of the attention with the size of a head."""
    held = sorted(_direct(owner, heads.size), key=lambda name: ("head" not in name, "rot" in name, name))
    if held:
        return held[0]
    config = getattr(owner, "config", None)
    return f"config.{size_key}" if size_key and getattr(config, size_key, None) == heads.size else None


def with_counts(spec: AttentionSpec, heads: Heads, owner: nn.Module) -> Iterator[AttentionSpec]:
    """Yields the table with every way to keep the stored head counts, from the least to the most.

    Args:
        spec: Table without stored counts.
        heads: Attention of the layers.
        owner: Attention of a layer.
    """
    quantities: list[tuple[int, Quantity]] = [(heads.queries, "queries")]
    if heads.units != heads.queries:
        quantities.append((heads.units, "keys_values"))
    counts = tuple((name, quantity) for value, quantity in quantities for name in _direct(owner, value))
    channels: list[tuple[str, Quantity]] = [
        (name, "query_channels") for name in _direct(owner, heads.queries * heads.size)
    ]
    if heads.units != heads.queries:
        channels += [(name, "key_channels") for name in _direct(owner, heads.units * heads.size)]
    ways = dict.fromkeys(((), counts, tuple(channels), (*counts, *channels)))
    for reads, stored in product((False, True) if hasattr(owner, "config") else (False,), ways):
        yield replace(spec, attributes=stored, reads_config=reads)
