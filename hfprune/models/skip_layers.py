"""SkipLayers: layers and modules that pruning leaves unchanged, by index, range or name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hfprune.plan import LAYERS, UNIT_KINDS, Group, pattern_text, skip_text, unit_kinds
from hfprune.utils.errors import ConfigError

Patterns = int | str | Sequence[int | str]
"""Index, range or name pattern; several in a list, or in a text with commas."""

SkipPatterns = Patterns | Mapping[str, Patterns]
""":data:`Patterns` of all unit kinds, or unit kind -> patterns."""

_CHANNELS = "channels"
_RANGE = re.compile(r"(-?\d+)-(-?\d+)")
_SLICE = re.compile(r"(-?\d*):(-?\d*)(?::(-?\d+))?")
_REGEX = "re:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A part of a model that patterns can name.

    Attributes:
        kind: Unit kind; empty for single weights.
        layer: Index of its layer; None outside of layers.
        names: Module names that name the part: its own, those of its projections, and those of modules around it.
    """

    kind: str
    layer: int | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class SkipLayers:
    r"""Selection of layers and modules that pruning leaves unchanged.

    A pattern is one of the following:

    - an index: ``3``, or ``-1`` for the last layer;
    - a range: ``0-3`` (both ends included), or a slice as in Python: ``:4``, ``-2:``. YAML requires quotes around
      slices such as ``"4:30"``;
    - a module name with wildcards: ``*.self_attn``, ``model.layers.1?.mlp``. A name includes the modules within it;
    - a regular expression of whole module names after ``re:``, for example ``re:.*layers\.(0|7)\..*``.

    Patterns apply to all unit kinds, and to whole layers; a mapping gives patterns for each kind. A layer with a module
    that patterns of all kinds name is not removed as a whole either.

    Args:
        skip: Patterns of the parts that are skipped.
        only: Patterns of the parts that may be pruned; all others are skipped.

    Raises:
        ConfigError: A pattern is malformed, or a unit kind is unknown.

    Example:
        >>> from hfprune.plan import Group
        >>> groups = tuple(Group(name=f"h.{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(4))
        >>> SkipLayers([0, -1]).groups(groups, prefix="h", layers=4)
        ('h.0.mlp', 'h.3.mlp')
        >>> SkipLayers(only={"mlp": "1-2"}).groups(groups, prefix="h", layers=4)
        ('h.0.mlp', 'h.3.mlp')
    """

    skip: SkipPatterns | None = None
    only: SkipPatterns | None = None

    def __post_init__(self) -> None:
        """Brings patterns to one form: a list, or kind -> list; checks everything that needs no model."""
        for argument in ("skip", "only"):
            value = getattr(self, argument)
            if value is not None:
                object.__setattr__(self, argument, _normalised(value, self._named(argument)))

    @classmethod
    def of(cls, value: "SkipLayers | SkipPatterns | None", only: SkipPatterns | None = None) -> "SkipLayers | None":
        """Returns the selection for patterns of skipped and of pruned parts; None without patterns.

        Args:
            value: A selection, or patterns of the parts that are skipped.
            only: Patterns of the parts that may be pruned.
        """
        if isinstance(value, SkipLayers):
            return value if value.skip is not None or value.only is not None else None
        return None if value is None and only is None else cls(skip=value, only=only)

    def describe(self) -> dict[str, Any]:
        """Returns the patterns as plain data."""
        return {name: value for name in ("skip", "only") if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        """Returns the patterns as arguments of a budget."""
        return skip_text(self.describe())

    def groups(self, groups: Sequence[Group], *, prefix: str, layers: int) -> tuple[str, ...]:
        """Returns the names of the groups that keep all units; layers are not among them, see :meth:`layers`.

        Args:
            groups: Groups of the model.
            prefix: Module name of the list of layers; empty for a model without layers.
            layers: Number of layers.

        Raises:
            ConfigError: A pattern matches nothing, a kind is not pruned, or hidden channels would be skipped.
        """
        found = self._skipped(groups, prefix=prefix, layers=layers)
        return tuple(group.name for group in groups if group.name in found)

    def layers(self, groups: Sequence[Group], *, prefix: str, layers: int) -> frozenset[int]:
        """Returns the layers that may not be removed as a whole; arguments as in :meth:`groups`."""
        found = self._skipped(groups, prefix=prefix, layers=layers)
        fixed = {index for index in range(layers) if _layer_name(prefix, index) in found}
        if not isinstance(self.skip, Mapping) and not isinstance(self.only, Mapping):
            fixed |= {group.layer for group in groups if group.name in found and group.layer is not None}
        return frozenset(fixed)

    def matrices(self, names: Sequence[str], *, prefix: str, layers: int) -> frozenset[str]:
        """Returns the projections whose weights stay as they are.

        Args:
            names: Projections as ``LAYER.NAME``, for example ``3.mlp.down_proj``.
            prefix: Module name of the list of layers.
            layers: Number of layers.

        Raises:
            ConfigError: A pattern matches nothing, patterns are given per unit kind, or nothing is left to prune.
        """
        if isinstance(self.skip, Mapping) or isinstance(self.only, Mapping):
            raise ConfigError(
                f"{self}: unit kinds apply to the removal of units. Single weights are skipped by names of modules, "
                "for example '*.mlp' or '*.self_attn'."
            )
        places = [
            Place(kind="", layer=int(name.partition(".")[0]), names=_around(f"{prefix}.{name}", prefix))
            for name in names
        ]
        found = frozenset(name for name, hit in zip(names, self._hits(places, layers=layers), strict=True) if hit)
        if len(found) == len(names):
            raise ConfigError(f"{self} skips every projection: nothing is left to prune.")
        return found

    def _named(self, argument: str) -> str:
        return "skip_layers" if argument == "skip" else "only_layers"

    def _skipped(self, groups: Sequence[Group], *, prefix: str, layers: int) -> frozenset[str]:
        """Returns the names of skipped groups, and of layers that a pattern skips where layers are removed."""
        self._check_kinds({group.kind for group in groups})
        places: dict[str, Place] = {}
        for group in groups:
            if group.kind == LAYERS:
                for index in range(layers):
                    name = _layer_name(prefix, index)
                    places[name] = Place(kind=LAYERS, layer=index, names=(name,))
            elif group.kind != _CHANNELS:
                modules = (group.name, *(s.module for s in group.slices))
                names = dict.fromkeys(name for module in modules for name in _around(module, prefix))
                places[group.name] = Place(kind=group.kind, layer=group.layer, names=tuple(names))
        hits = self._hits(list(places.values()), layers=layers)
        return frozenset(name for name, hit in zip(places, hits, strict=True) if hit)

    def _check_kinds(self, pruned: set[str]) -> None:
        for name, value in self.describe().items():
            named = self._named(name)
            if not isinstance(value, Mapping):
                if _CHANNELS in pruned:
                    raise ConfigError(
                        f"{named}={pattern_text(value)}: hidden channels are removed from all layers, so that no "
                        f"layer stays unchanged. Give patterns per unit kind, for example {named}={{'mlp': ...}}."
                    )
                continue
            for kind in value:
                if kind == _CHANNELS:
                    raise ConfigError(f"{named}: hidden channels belong to all layers and cannot be skipped in some.")
                if kind not in pruned:
                    units = ", ".join(k for k in UNIT_KINDS if k in pruned)
                    raise ConfigError(f"{named} names '{kind}', which are not pruned. The units are {units}.")

    def _hits(self, places: Sequence[Place], *, layers: int) -> list[bool]:
        """Returns for every place whether it is skipped."""
        skip = _matches(self.skip, places, layers, self._named("skip"))
        only = _matches(self.only, places, layers, self._named("only"))
        limited = [self.only is not None and _applies(self.only, place) for place in places]
        return [s or (limit and not o) for s, o, limit in zip(skip, only, limited, strict=True)]


def _normalised(value: Any, argument: str) -> Any:
    if isinstance(value, Mapping):
        names = unit_kinds(value)
        unknown = [name for name in names if name not in UNIT_KINDS]
        if unknown or not names:
            raise ConfigError(f"{argument}: '{', '.join(unknown)}' is not a unit kind of {', '.join(UNIT_KINDS)}.")
        return {name: _listed(given, argument) for name, given in zip(names, value.values(), strict=True)}
    return _listed(value, argument)


def _listed(value: Any, argument: str) -> list[int | str]:
    """Returns patterns as a list of indices and texts."""
    given = [value] if isinstance(value, int | str) else list(value) if isinstance(value, Sequence | range) else None
    if given is None or any(isinstance(item, bool) or not isinstance(item, int | str) for item in given):
        raise ConfigError(f"{argument}={value!r} is not an index, a range, a name, or a list of these.")
    found: list[int | str] = []
    for item in given:
        if isinstance(item, str) and not item.startswith(_REGEX):
            found += [part.strip() for part in item.split(",")]
        else:
            found.append(item)
    if not found or "" in found:
        raise ConfigError(f"{argument}={value!r} has an empty pattern.")
    for item in found:
        if isinstance(item, str) and item.startswith(_REGEX):
            try:
                re.compile(item.removeprefix(_REGEX))
            except re.error as error:
                raise ConfigError(f"{argument}: '{item}' is not a regular expression: {error}.") from error
    return [int(item) if isinstance(item, str) and re.fullmatch(r"-?\d+", item) else item for item in found]


def _layer_name(prefix: str, index: int) -> str:
    return f"{prefix}.{index}"


def _around(module: str, prefix: str) -> tuple[str, ...]:
    """Returns the name of a module and of the modules around it, down to its layer."""
    parts = module.split(".")
    least = len(prefix.split(".")) + 1 if prefix and module.startswith(f"{prefix}.") else 1
    return tuple(".".join(parts[:number]) for number in range(len(parts), least - 1, -1)) or (module,)


def _applies(value: Any, place: Place) -> bool:
    return place.kind in value if isinstance(value, Mapping) else True


def _matches(value: Any, places: Sequence[Place], layers: int, argument: str) -> list[bool]:
    """Returns for every place whether a pattern matches it."""
    if value is None:
        return [False] * len(places)
    by_kind = value if isinstance(value, Mapping) else {None: value}
    found = [False] * len(places)
    for kind, patterns in by_kind.items():
        members = [i for i, place in enumerate(places) if kind in (None, place.kind)]
        for pattern in patterns:
            hits = _hit(pattern, [places[i] for i in members], layers, argument)
            if not any(hits):
                raise ConfigError(f"{argument}: '{pattern}' matches nothing. {_known(places[i] for i in members)}")
            for i, hit in zip(members, hits, strict=True):
                found[i] = found[i] or hit
    return found


def _hit(pattern: int | str, places: Sequence[Place], layers: int, argument: str) -> list[bool]:
    indices = _indices(pattern, layers, argument)
    if indices is not None:
        return [place.layer in indices for place in places]
    text = str(pattern)
    if text.startswith(_REGEX):
        regex = re.compile(text.removeprefix(_REGEX))
        return [any(regex.fullmatch(name) for name in place.names) for place in places]
    return [any(fnmatchcase(name, text) for name in place.names) for place in places]


def _indices(pattern: int | str, layers: int, argument: str) -> set[int] | None:
    """Returns the layers of an index or a range; None for a name."""
    if isinstance(pattern, int):
        return {_index(pattern, layers, argument)}
    if ends := _RANGE.fullmatch(pattern):
        first, last = (_index(int(end), layers, argument) for end in ends.groups())
        if first > last:
            raise ConfigError(f"{argument}: the range '{pattern}' is empty for {layers} layers.")
        return set(range(first, last + 1))
    if parts := _SLICE.fullmatch(pattern):
        start, stop, step = (int(part) if part else None for part in parts.groups())
        if step == 0 or not (found := set(range(layers)[start:stop:step])):
            raise ConfigError(f"{argument}: the slice '{pattern}' is empty for {layers} layers.")
        return found
    return None


def _index(number: int, layers: int, argument: str) -> int:
    if not layers:
        raise ConfigError(f"{argument}={number}: this module has no numbered layers. Give names of modules.")
    if not -layers <= number < layers:
        hint = ' (YAML reads an unquoted 4:30 as 270: write "4:30" or 4-29.)' if number > 60 else ""
        raise ConfigError(f"{argument}: there is no layer {number}; layers are 0 to {layers - 1}.{hint}")
    return number % layers


def _known(places: Iterable[Place]) -> str:
    names = [place.names[0] for place in places]
    return f"Names are {names[0]} to {names[-1]}." if names else "No unit is pruned."
