"""The MLP of a class: which projections produce and consume its neurons, and which config key states their number."""

from collections.abc import Sequence
from dataclasses import dataclass

from hfprune.models.derivation.circuits import Circuit
from hfprune.models.derivation.trace import Trace
from hfprune.models.derivation.units import blocks, connected
from hfprune.models.derivation.variants import Variants, attributes
from hfprune.models.spec import SliceTemplate


@dataclass(frozen=True, slots=True)
class Mlp:
    """What a table says about the MLP.

    Attributes:
        slices: Sides of its projections; empty if neurons cannot be removed.
        reason: Why not, or an empty string.
        width_key: Config key of the width, or an empty string.
        width_attributes: Attributes of a layer's modules that store the width.
    """

    slices: tuple[SliceTemplate, ...] = ()
    reason: str = ""
    width_key: str = ""
    width_attributes: tuple[str, ...] = ()


def derive_mlps(trace: Trace, circuits: Sequence[Sequence[Circuit]], variants: Variants) -> list[Mlp]:
    """Returns what may be the MLP of the class, the one with the most neurons in all layers first; at least one entry.

    Args:
        trace: Trace of the model.
        circuits: Circuits of each layer.
        variants: Variants of the model.
    """
    widths: dict[tuple[SliceTemplate, ...], dict[int, int]] = {}
    reasons = []
    for index, layer in enumerate(circuits):
        for circuit in layer:
            slices, width = _slices(circuit)
            if isinstance(slices, str):
                reasons.append(slices)
            elif slices:
                widths.setdefault(slices, {})[index] = width
    if not widths:
        none = "no projection of a layer reads the outputs of others channel by channel"
        return [Mlp(reason=next(iter(reasons), none))]
    most = sorted(widths, key=lambda slices: -sum(widths[slices].values()))
    return [_mlp(trace, slices, widths[slices], variants) for slices in most]


def _mlp(trace: Trace, slices: tuple[SliceTemplate, ...], widths: dict[int, int], variants: Variants) -> Mlp:
    if reason := _incomplete(trace, slices, widths):
        return Mlp(reason=reason)
    key = _width_key(trace, slices, widths, variants)
    return Mlp(slices=slices, width_key=key, width_attributes=_attributes(trace, widths))


def _slices(circuit: Circuit) -> tuple[tuple[SliceTemplate, ...] | str, int]:
    """Returns the sides of the projections of a circuit and its width, or why its neurons cannot be removed."""
    if circuit.mixes:
        return (), 0
    if circuit.problem:
        return circuit.problem, 0
    units = connected(circuit.flows)
    width = len(units.reader)
    if units.count != width or int(units.reader.min()) < 0:
        return (
            f"the input of '{circuit.reader}' is not computed channel by channel, for example by a norm in between",
            0,
        )
    if width < 2:
        return (), 0
    found = []
    for name, owners in units.sources.items():
        parts = blocks(owners.tolist(), width)
        if parts is None or len({part.width for part in parts}) > 1:
            return f"the outputs of '{name}' have an order that a table cannot describe", 0
        found += [
            SliceTemplate(module=name, side="out", block=number, channels=part.width)
            for number, part in enumerate(parts)
        ]
    return (*found, SliceTemplate(module=circuit.reader, side="in")), width


def _incomplete(trace: Trace, slices: Sequence[SliceTemplate], widths: dict[int, int]) -> str:
    """Returns a reason if a layer has all projections of the MLP, but uses them in another way."""
    for index, layer in enumerate(trace.stack):
        names = {name for name, _ in layer.named_modules()}
        if index not in widths and all(s.module in names for s in slices):
            return f"layer {index} uses the projections of the MLP in another way than the others"
    return ""


def _width_key(trace: Trace, slices: Sequence[SliceTemplate], widths: dict[int, int], variants: Variants) -> str:
    """Returns the config key that sets the width of all layers to its value."""
    if len(set(widths.values())) > 1:
        return ""
    width = next(iter(widths.values()))
    wanted = width + 4
    of_mlp = {f"{trace.layers}.{index}.{s.module}." for index in widths for s in slices}
    readers = {f"{trace.layers}.{index}.{slices[-1].module}.weight" for index in widths}
    for key in [*variants.numbers(width), *variants.unset()]:
        shapes = variants.changed({key: wanted})
        if shapes is None or shapes.keys() != variants.shapes.keys():
            continue
        others = all(
            shape == variants.shapes[name] for name, shape in shapes.items() if not name.startswith(tuple(of_mlp))
        )
        if others and all(wanted in shapes[name] for name in readers):
            return key
    return ""


def _attributes(trace: Trace, widths: dict[int, int]) -> tuple[str, ...]:
    """Returns the attributes that hold the width in every layer with the MLP."""
    held = [set(attributes(trace.stack[index], width)) for index, width in widths.items()]
    return tuple(sorted(set.intersection(*held)))
