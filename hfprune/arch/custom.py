"""Neurons of modules that no table describes: a plain MLP, a vision transformer's block, a block of one's own."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from hfprune.arch.projection import num_channels
from hfprune.errors import ConfigError
from hfprune.types import Group, Side, Slice


@dataclass(frozen=True)
class Neurons:
    """Hidden neurons between projections, described by the names of the projections.

    Whatever lies between producer and consumer must act on each neuron alone (an activation, dropout), and nothing else
    may read the neurons.

    Attributes:
        produced_by: The projection, or projections, whose output channel j belongs to neuron j (``"net.0"``; gate and
            up of a gated MLP). ``*`` stands for one component of a dotted name: ``"blocks.*.mlp.c_fc"`` names the
            projection in every block.
        consumed_by: The projection, or projections, whose input channel j reads neuron j; each ``*`` stands for the
            same as in ``produced_by``.
    """

    produced_by: str | Sequence[str]
    consumed_by: str | Sequence[str]

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """Returns one group for every way in which ``*`` can be filled in, in the order of the modules.

        Raises:
            ConfigError: A name matches nothing, or the widths of producers and consumers differ.
        """
        makers = [_matches(model, name) for name in _listed(self.produced_by)]
        readers = [_matches(model, name) for name in _listed(self.consumed_by)]
        found = []
        for key in readers[0]:
            missing = [names for names in (*makers, *readers) if key not in names]
            if missing:
                raise ConfigError(
                    f"{self}: '{readers[0][key]}' has no counterpart; '*' must stand for the same names everywhere."
                )
            slices = [Slice(module=names[key], side="out") for names in makers]
            slices += [Slice(module=names[key], side="in") for names in readers]
            found.append(_group(model, readers[0][key], slices))
        return tuple(found)


def custom_groups(model: nn.Module, neurons: Iterable[Neurons]) -> tuple[Group, ...]:
    """Returns the groups of every description; raises ``ConfigError`` when two of them share channels."""
    groups = tuple(group for item in neurons for group in item.groups(model))
    owned: dict[tuple[str, Side], str] = {}
    for group in groups:
        for s in group.slices:
            if (s.module, s.side) in owned:
                raise ConfigError(f"The {s.side}-channels of '{s.module}' are described twice.")
            owned[s.module, s.side] = group.name
    return groups


def pruned_count(model: nn.Module, groups: Sequence[Group], widths: Sequence[int]) -> int:
    """Returns the parameters of ``model`` with ``widths`` units left in ``groups``, which may share matrices.

    Args:
        model: The dense model.
        groups: Its groups.
        widths: Kept units per group.
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
    """Returns what the stars stand for -> the module's name, for every module that ``name`` matches."""
    pattern = re.compile(r"([^.]+)".join(re.escape(part) for part in name.split("*")))
    found = {m.groups(): key for key, _ in model.named_modules() if (m := pattern.fullmatch(key))}
    if not found:
        known = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise ConfigError(f"Neurons: no module is called '{name}'. Linear projections here: {shown or 'none'}.")
    return found


def _group(model: nn.Module, name: str, slices: list[Slice]) -> Group:
    widths = {f"{s.module} ({s.side})": num_channels(model.get_submodule(s.module), s.side) for s in slices}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{key} {width}" for key, width in widths.items())
        raise ConfigError(f"Neurons: the widths of producers and consumers differ: {listed}.")
    return Group(name=name, kind="mlp", num_units=next(iter(widths.values())), slices=tuple(slices))
