"""Shared data types: slices, groups of units, budgets and the pruning plan."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, Literal

from hfprune.utils.errors import ConfigError, PlanError
from hfprune.utils.files import write_text

UnitKind = Literal["mlp", "heads", "experts", "attention_sublayers", "mlp_sublayers", "layers", "channels", "blocks"]
"""Name of a unit kind, as in ``UNIT_KINDS``; ``blocks`` is the deprecated name of ``layers``."""

LAYERS = "layers"
"""The unit kind of whole layers."""

ATTENTION_SUBLAYERS, MLP_SUBLAYERS = "attention_sublayers", "mlp_sublayers"
"""The unit kinds of whole attentions and of whole MLPs, each with its norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindInfo:
    """One kind of units that can be removed.

    Attributes:
        name: Name of the kind in units lists, plans and reports.
        plural: The units in words.
        label: The number of units in words, for example ``MLP width``.
        per_layer: Whether each layer has a group of its own; otherwise the model has one group.
        rounded: Whether kept numbers are multiples of ``round_to``; the other kinds are counted one by one.
        parts: Kinds of the units within one unit of this kind, in the same layer; for whole sub-layers only.
        old_name: Name of the kind in earlier versions.
    """

    name: str
    plural: str
    label: str
    per_layer: bool = True
    rounded: bool = False
    parts: tuple[str, ...] = ()
    old_name: str | None = None


UNIT_KINDS: Mapping[str, KindInfo] = {
    kind.name: kind
    for kind in (
        KindInfo(name="mlp", plural="MLP neurons", label="MLP width", rounded=True),
        KindInfo(name="heads", plural="key-value heads", label="key-value heads"),
        KindInfo(name="experts", plural="experts", label="experts"),
        KindInfo(
            name=ATTENTION_SUBLAYERS, plural="attention sub-layers", label="attention sub-layers", parts=("heads",)
        ),
        KindInfo(name=MLP_SUBLAYERS, plural="MLP sub-layers", label="MLP sub-layers", parts=("mlp", "experts")),
        KindInfo(name=LAYERS, plural="layers", label="layers", per_layer=False, old_name="blocks"),
        KindInfo(name="channels", plural="hidden channels", label="hidden size", per_layer=False, rounded=True),
    )
}
"""Name -> unit kind: MLP neurons, attention heads (a key-value head with its query heads), experts of
mixture-of-experts layers, whole attentions, whole MLPs, layers, and hidden channels of the residual stream."""

SUBLAYERS = tuple(kind.name for kind in UNIT_KINDS.values() if kind.parts)
"""The kinds of whole sub-layers. Each layer has a group of one unit, which may be removed."""

DEPTH_KINDS = (*SUBLAYERS, LAYERS)
"""The kinds of units that are removed in depth; their groups have no slices."""

_FILED = {"block": LAYERS, "blocks": LAYERS}
"""Kinds in plans of earlier versions -> current names."""


def kind_name(kind: str) -> str:
    """Returns the plural of a unit kind, also for names from earlier versions.

    >>> kind_name("mlp"), kind_name("block")
    ('MLP neurons', 'layers')
    """
    name = _FILED.get(kind, kind)
    return UNIT_KINDS[name].plural if name in UNIT_KINDS else kind


def unit_kinds(units: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of unit kinds. Deprecated names are replaced, with a ``FutureWarning``.

    >>> unit_kinds(["mlp", "heads"])
    ('mlp', 'heads')
    """
    renamed = {kind.old_name: kind.name for kind in UNIT_KINDS.values() if kind.old_name}
    names = []
    for unit in units:
        if unit in renamed:
            text = f"The unit kind '{unit}' is now '{renamed[unit]}'; the old name will be removed in the next release."
            warnings.warn(text, FutureWarning, stacklevel=3)
        names.append(renamed.get(unit, unit))
    return tuple(names)


def skip_text(patterns: Mapping[str, Any] | None) -> str:
    """Returns patterns of layers and modules that are not pruned as a setting; empty without any.

    Args:
        patterns: ``skip`` and ``only``, as plans record them: a list, or unit kind -> list.

    >>> skip_text({"skip": [0, -1], "only": {"mlp": ["4-29"]}})
    'skip_layers=0,-1, only_layers={mlp: 4-29}'
    """
    found = patterns or {}
    named = ((f"{name}_layers", found[name]) for name in ("skip", "only") if found.get(name) is not None)
    return ", ".join(f"{name}={pattern_text(value)}" for name, value in named)


def pattern_text(value: Any) -> str:
    """Returns a list of patterns, or unit kind -> list, as text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{kind}: {pattern_text(patterns)}" for kind, patterns in value.items()) + "}"
    return ",".join(map(str, value))


Side = Literal["out", "in"]
"""Which channels of a projection a slice covers: ``out`` (rows of an ``nn.Linear`` weight) or ``in`` (columns)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The channels that each unit of a group owns on one side of one projection.

    Unit ``j`` owns channels ``offset + j * width`` up to ``offset + (j + 1) * width``. Scoring, masking and surgery all
    use this definition of a unit.

    Attributes:
        module: Qualified name of the projection, relative to the Hugging Face model. For hidden channels also an
            embedding or a norm.
        side: ``out`` or ``in`` channels.
        offset: First channel; not 0 within fused projections.
        width: Channels per unit.
        parameter: Attribute of the module that holds the weights; expert modules have several. ``gate_up_proj.3`` is
            the part of expert 3.
    """

    module: str
    side: Side
    offset: int = 0
    width: int = 1
    parameter: str = "weight"

    def channels(self, units: Iterable[int]) -> list[int]:
        """Returns the channels of ``units``, in the order of the units."""
        return [self.offset + unit * self.width + k for unit in units for k in range(self.width)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Units that share one index: the gate, up and down projections of one layer, for example.

    Attributes:
        name: Unique name, for example ``model.layers.3.mlp``.
        kind: Unit kind, a name of ``UNIT_KINDS``. Names from earlier versions are replaced.
        num_units: Number of units in the dense model; one for sub-layers.
        slices: The channels of each unit; empty for ``layers`` and sub-layers.
        layer: Index of the layer that contains the units; None for ``layers``, ``channels`` and modules without layers.
            Groups of one kind in one layer are tied: they keep equal numbers of units.
        least: Smallest number of units that must be kept. For experts, the router's top-k; 0 for sub-layers.
        followers: Further tensors that are cut with the units and scored by no criterion: biases of experts, the
            correction bias of a router (a buffer), attention sinks. The first axis holds the channels.
    """

    name: str
    kind: str
    num_units: int
    slices: tuple[Slice, ...]
    layer: int | None = None
    least: int = 1
    followers: tuple[Slice, ...] = ()

    def __post_init__(self) -> None:
        """Replaces the name of the kind from an earlier version."""
        object.__setattr__(self, "kind", _FILED.get(self.kind, self.kind))

    def inputs(self) -> tuple[Slice, ...]:
        """Returns the slices on the input side, where the activations of units are read."""
        return tuple(s for s in self.slices if s.side == "in")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to prune: exactly one of the first four fields, or none where the allocation sets the widths itself.

    Attributes:
        pruning_ratio: Share of all parameters to remove, in (0, 1); tied weights count once.
        target_params: Number of parameters to keep.
        intermediate_size: MLP width to keep in every layer.
        mlp_ratio: MLP width to keep as a multiple of the hidden size, truncated as in the HFPrune script.
        round_to: Kept MLP widths and hidden sizes are multiples of this: 8, 64 or 128 for fast kernels. Heads, experts
            and layers are not rounded.
        allocated: Whether the allocation sets the widths itself, without a budget.
        auto_round: Whether kept MLP widths are multiples of 256, 128 or 64, the largest that misses the budget by at
            most 3 %; they are exact if none does. ``round_to`` is then 1.
    """

    pruning_ratio: float | None = None
    target_params: int | None = None
    intermediate_size: int | None = None
    mlp_ratio: float | None = None
    round_to: int = 1
    allocated: bool = False
    auto_round: bool = False

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` unless exactly one target is given and every value is in range."""
        names = ("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio")
        given = [name for name in names if getattr(self, name) is not None]
        if self.allocated and given:
            raise ConfigError(f"The allocation sets the widths itself: leave out `{given[0]}`.")
        if not self.allocated and len(given) != 1:
            found = "none was" if not given else " and ".join(f"`{name}`" for name in given) + " were"
            raise ConfigError(f"Give exactly one of {', '.join(f'`{name}`' for name in names)}; {found} given.")
        if self.pruning_ratio is not None and not 0 < self.pruning_ratio < 1:
            raise ConfigError(
                f"pruning_ratio={self.pruning_ratio} is not between 0 and 1 (both excluded). It is the share of all "
                "parameters to remove, for example 0.2."
            )
        for name in ("target_params", "intermediate_size", "mlp_ratio", "round_to"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be positive.")

    def describe(self) -> str:
        """Returns the given fields, for example ``pruning_ratio=0.2``."""
        names = ("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        rounding = "auto" if self.auto_round else self.round_to
        return ", ".join(given if rounding == 1 else [*given, f"round_to={rounding}"])


PLAN_FILE = "plan.json"
PLAN_FORMAT = "hfprune-plan"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningPlan:
    """The kept units of every group, the config keys that change with them, and the provenance of the plan.

    Attributes:
        model_class: Exact class name of the model that the plan was made for.
        groups: The groups of the dense model.
        keep: Group name -> kept units, as indices of the dense model, each once. Any sequence of integers is accepted
            (a list, a range, a NumPy array, a tensor), in any order; it becomes a sorted tuple of ``int``.
        config: Config key -> new value. ``apply_plan`` adds the keys that follow from the kept units.
        provenance: How the plan was made (budget, criterion, seed, data hash, token count, versions, ...), JSON-able.
    """

    model_class: str
    groups: tuple[Group, ...]
    keep: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sorts the kept units; raises ``PlanError`` unless they are unique, in range and enough for every group."""
        object.__setattr__(self, "groups", tuple(self.groups))
        names = [g.name for g in self.groups]
        if sorted(names) != sorted(self.keep) or len(set(names)) != len(names):
            raise PlanError("A plan must list the kept units of each of its groups exactly once.")
        object.__setattr__(self, "keep", {name: _units(name, units) for name, units in self.keep.items()})
        object.__setattr__(self, "config", {key: _plain(value) for key, value in self.config.items()})
        for group in self.groups:
            keep = self.keep[group.name]
            if not keep and not group.least:
                continue
            if not keep or len(set(keep)) < len(keep) or keep[0] < 0 or keep[-1] >= group.num_units:
                raise PlanError(
                    f"The kept units of {group.name} must be unique, at least one, and from 0 to "
                    f"{group.num_units - 1}; got {_shown(keep)}."
                )
            if len(keep) < group.least:
                raise PlanError(
                    f"{group.name} must keep at least {group.least} of its units; the plan keeps {len(keep)}."
                )

    def removed(self, group: Group) -> list[int]:
        """Returns the removed units of ``group``, ascending."""
        keep = set(self.keep[group.name])
        return [unit for unit in range(group.num_units) if unit not in keep]

    def removed_layers(self) -> tuple[int, ...]:
        """Returns the removed layers, ascending; the kept units of their other groups are ignored.

        A layer that loses both sub-layers is removed.
        """
        return removed_layers(self.groups, self.keep)

    def removed_sublayers(self, kind: str) -> tuple[int, ...]:
        """Returns the kept layers that lose the sub-layer of a kind, ascending."""
        removed = self.removed_layers()
        found = (g.layer for g in self.groups if g.kind == kind and g.layer is not None and not self.keep[g.name])
        return tuple(sorted(layer for layer in found if layer not in removed))

    def absent(self) -> frozenset[str]:
        """Returns the names of the groups of which nothing is left, see :func:`absent_groups`."""
        return absent_groups(self.groups, self.keep)

    def widths(self) -> dict[str, int]:
        """Returns the number of kept units per group."""
        return {group.name: len(self.keep[group.name]) for group in self.groups}

    def to_json(self) -> str:
        """Returns the plan as JSON; ``from_json`` restores an equal plan."""
        groups = [{**_as_dict(g), "keep": list(self.keep[g.name])} for g in self.groups]
        head = {
            "format": PLAN_FORMAT,
            "version": _VERSION,
            "model_class": self.model_class,
            "config": dict(self.config),
        }
        text = json.dumps({**head, "provenance": dict(self.provenance), "groups": []}, indent=2)
        body = ",\n    ".join(json.dumps(g, separators=(",", ":")) for g in groups)  # one line per group
        return text.replace('"groups": []', f'"groups": [\n    {body}\n  ]') + "\n"

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that identify the plan: those of the SHA-256 of its JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Returns the plan in ``text``; raises ``PlanError`` if it contains none."""
        try:
            data = json.loads(text)
            if data["format"] != PLAN_FORMAT or data["version"] != _VERSION:
                raise PlanError(
                    f"This version cannot read the plan: format {data['format']!r}, version {data['version']!r}; "
                    f"expected {PLAN_FORMAT!r}, version {_VERSION}."
                )
            groups, keep = [], {}
            for item in data["groups"]:
                keep[item["name"]] = tuple(int(unit) for unit in item.pop("keep"))
                slices, followers = (tuple(Slice(**s) for s in item.pop(k, ())) for k in ("slices", "followers"))
                groups.append(Group(slices=slices, followers=followers, **item))
            return cls(
                model_class=data["model_class"],
                groups=tuple(groups),
                keep=keep,
                config=data["config"],
                provenance=data["provenance"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"Not a pruning plan: {type(error).__name__}: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Writes the plan to ``path`` atomically; raises ``OutputError``."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Reads a plan from a file, or from ``plan.json`` in a folder; raises ``PlanError``."""
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"Cannot read a plan from '{path}': {error}.") from error
        except PlanError as error:
            raise PlanError(f"'{path}': {error}") from error


Kept = Mapping[str, Sequence[int]]
"""Group name -> kept units."""


def removed_layers(groups: Iterable[Group], keep: Kept) -> tuple[int, ...]:
    """Returns the removed layers, ascending: those that were removed as layers, and those without any sub-layer.

    >>> groups = [Group(name=f"0.{k}", kind=k, num_units=1, slices=(), layer=0, least=0) for k in SUBLAYERS]
    >>> removed_layers(groups, {"0.attention_sublayers": [], "0.mlp_sublayers": []})
    (0,)
    """
    removed, lost = set[int](), dict[int, set[str]]()
    for group in groups:
        if group.kind == LAYERS:
            removed |= set(range(group.num_units)) - set(keep[group.name])
        elif group.kind in SUBLAYERS and group.layer is not None and not keep[group.name]:
            lost.setdefault(group.layer, set()).add(group.kind)
    return tuple(sorted(removed | {layer for layer, kinds in lost.items() if len(kinds) == len(SUBLAYERS)}))


def lost_parts(groups: Sequence[Group], keep: Kept) -> set[tuple[str, int]]:
    """Returns pairs of unit kind and layer for the kinds of which a layer has nothing left."""
    every = {(kind, layer) for layer in removed_layers(groups, keep) for kind in UNIT_KINDS}
    whole = [(g.kind, g.layer) for g in groups if g.kind in SUBLAYERS and g.layer is not None and not keep[g.name]]
    return every | {(part, layer) for kind, layer in whole for part in (kind, *UNIT_KINDS[kind].parts)}


def absent_groups(groups: Sequence[Group], keep: Kept) -> frozenset[str]:
    """Returns the names of the groups in removed layers, of removed sub-layers, and of the units within them.

    Their kept units are ignored.
    """
    lost = lost_parts(groups, keep)
    return frozenset(group.name for group in groups if (group.kind, group.layer) in lost)


def _as_dict(group: Group) -> dict[str, Any]:
    """Returns a group as plain data, without an empty list of followers."""
    found = asdict(group)
    return found if group.followers else {key: value for key, value in found.items() if key != "followers"}


def _units(name: str, units: Any) -> tuple[int, ...]:
    """Returns kept units as a sorted tuple of ``int``."""
    try:
        listed = [_plain(unit) for unit in _plain(units)]
        if any(isinstance(unit, bool) for unit in listed):
            raise PlanError(
                f"The kept units of {name} are a boolean mask. Give the indices of the kept units, for example "
                "mask.nonzero().flatten()."
            )
        return tuple(sorted(index(unit) for unit in listed))
    except TypeError as error:
        raise PlanError(f"The kept units of {name} must be a one-dimensional list of integers: {error}.") from error


def _plain(value: Any) -> Any:
    """Returns a NumPy number, array or tensor as plain Python, which JSON can represent."""
    return value.tolist() if hasattr(value, "tolist") else value


def _shown(units: tuple[int, ...]) -> str:
    """Returns a short description of invalid kept units: a repeated unit, or the first and the last."""
    if not units:
        return "none"
    repeated = sorted({unit for unit, following in pairwise(units) if unit == following})
    return f"{repeated[0]} twice" if repeated else f"{units[0]} to {units[-1]}"
