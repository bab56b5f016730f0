"""Circuits of a layer: projections that read heads or neurons, with the projections that produce them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from hfprune.models.derivation.trace import Flow, Reach, Trace


@dataclass(frozen=True, slots=True)
class Circuit:
    """A projection of a layer that writes the residual stream, and the projections that it reads.

    Attributes:
        layer: Index of the layer.
        reader: Name of the projection relative to the layer.
        flows: Name of a producer relative to the layer -> how it reaches the reader.
        mixes: Whether values move between positions, as in attention.
        problem: Why its units cannot be removed, or an empty string.
    """

    layer: int
    reader: str
    flows: Mapping[str, Flow] = field(default_factory=dict)
    mixes: bool = False
    problem: str = ""


def layer_kinds(layers: nn.ModuleList) -> list[int]:
    """Returns the index of the first layer of the same structure, for each layer."""
    found = [_structure(layer) for layer in layers]
    return [found.index(structure) for structure in found]


def first_circuits(trace: Trace) -> list[Circuit]:
    """Returns the circuits of the first layer."""
    return _of_layer(trace, 0, {})


def find_circuits(trace: Trace) -> list[list[Circuit]]:
    """Returns the circuits of each layer; layers of equal structure are traced once."""
    kinds = layer_kinds(trace.stack)
    layers = {index: trace.readers_of_layer(index) for index in range(len(trace.stack))}
    found = {index: _of_layer(trace, index, layers) for index in sorted(set(kinds))}
    return [found[kind] for kind in kinds]


def _of_layer(trace: Trace, index: int, layers: Mapping[int, frozenset[str]]) -> list[Circuit]:
    """Returns the circuits of a layer.

    Args:
        trace: Trace of the model.
        index: Index of the layer.
        layers: Index of a layer -> projections that read any of its projections.
    """
    stream, names = trace.stream_readers(index), trace.within(index)
    reaches = {name: trace.reach(name) for name in names}
    readers = [name for name in names if name not in stream and reaches[name].writes]
    found = []
    for reader in readers:
        producers = [name for name, reach in reaches.items() if reader in reach.readers]
        short, mixes = _short(trace, index, reader), any(reader in reaches[name].mixed for name in producers)
        problem = _problem(reader, {name: reaches[name] for name in producers})
        others = [other for other, read in layers.items() if other != index and reader in read]
        if others:
            problem = f"'{reader}' reads values of layer {others[0]}"
        if problem:
            found.append(Circuit(index, short, mixes=mixes, problem=problem))
        elif producers:
            flows = {_short(trace, index, name): trace.flow(name, reader) for name in producers}
            found.append(Circuit(index, short, flows, mixes=mixes))
    return found


def _problem(reader: str, producers: Mapping[str, Reach]) -> str:
    """Returns why the units between producers and their reader are not theirs alone."""
    for name, reach in producers.items():
        if reach.writes:
            return f"the output of '{name}' is read by '{reader}' and by the residual stream"
        others = sorted(reach.readers - {reader})
        if others:
            return f"the output of '{name}' has several readers: '{reader}' and '{others[0]}'"
    return ""


def _short(trace: Trace, index: int, name: str) -> str:
    return name.removeprefix(f"{trace.layers}.{index}.")


def _structure(layer: nn.Module) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Returns names and classes of a layer's modules, and names and shapes of its parameters."""
    modules = [(name, type(module).__name__, ()) for name, module in layer.named_modules()]
    return (*modules, *((name, "", tuple(p.shape)) for name, p in layer.named_parameters()))
