"""The pruning plan: which units stay, where they came from, as a file that can be applied again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any

from hfprune.errors import PlanError
from hfprune.files import write_text
from hfprune.types import Group, Slice

PLAN_FILE = "plan.json"
PLAN_FORMAT = "hfprune-plan"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningPlan:
    """Kept units per group, the config keys that change with them, and the plan's provenance.

    Attributes:
        model_class: Exact class name of the model that the plan was made for.
        groups: The groups of the dense model.
        keep: Group name -> kept units in the dense model's numbering, each once. Any integers are taken (a list, a
            range, a NumPy array, a tensor), in any order; they become a sorted tuple of ``int``.
        config: Config keys to rewrite, with their new values. Applying a plan adds those that follow from the units.
        provenance: How the plan was made (budget, criterion, seed, data hash, token count, versions, ...), JSON-able.
    """

    model_class: str
    groups: tuple[Group, ...]
    keep: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sorts the kept units; raises ``PlanError`` unless each group has enough, each once and within its range."""
        object.__setattr__(self, "groups", tuple(self.groups))
        names = [g.name for g in self.groups]
        if sorted(names) != sorted(self.keep) or len(set(names)) != len(names):
            raise PlanError("A plan must list the kept units of each of its groups exactly once.")
        object.__setattr__(self, "keep", {name: _units(name, units) for name, units in self.keep.items()})
        object.__setattr__(self, "config", {key: _plain(value) for key, value in self.config.items()})
        for group in self.groups:
            keep = self.keep[group.name]
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
        """Returns the units of ``group`` that go, ascending."""
        keep = set(self.keep[group.name])
        return [unit for unit in range(group.num_units) if unit not in keep]

    def removed_layers(self) -> tuple[int, ...]:
        """Returns the layers that go as a whole, ascending; what the plan says of their other units does not matter."""
        return tuple(sorted(unit for group in self.groups if group.kind == "block" for unit in self.removed(group)))

    def widths(self) -> dict[str, int]:
        """Returns the number of kept units per group."""
        return {group.name: len(self.keep[group.name]) for group in self.groups}

    def to_json(self) -> str:
        """Returns the plan as JSON; ``from_json`` gives an equal plan back."""
        groups = [{**asdict(g), "keep": list(self.keep[g.name])} for g in self.groups]
        head = {
            "format": PLAN_FORMAT,
            "version": _VERSION,
            "model_class": self.model_class,
            "config": dict(self.config),
        }
        text = json.dumps({**head, "provenance": dict(self.provenance), "groups": []}, indent=2)
        body = ",\n    ".join(json.dumps(g, separators=(",", ":")) for g in groups)  # one line per group
        return text.replace('"groups": []', f'"groups": [\n    {body}\n  ]') + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Returns the plan that ``text`` describes; raises ``PlanError`` when it is not one."""
        try:
            data = json.loads(text)
            if data["format"] != PLAN_FORMAT or data["version"] != _VERSION:
                raise PlanError(
                    f"Not a plan that this version reads: format {data['format']!r}, version {data['version']!r}; "
                    f"expected {PLAN_FORMAT!r}, version {_VERSION}."
                )
            groups, keep = [], {}
            for item in data["groups"]:
                keep[item["name"]] = tuple(int(unit) for unit in item.pop("keep"))
                slices = tuple(Slice(**s) for s in item.pop("slices"))
                groups.append(Group(slices=slices, **item))
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
        """Writes the plan to ``path`` in one step; raises ``OutputError``."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Reads a plan; ``path`` may be the file or a folder that holds ``plan.json``."""
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"Cannot read a plan from '{path}': {error}.") from error
        except PlanError as error:
            raise PlanError(f"'{path}': {error}") from error


def _units(name: str, units: Any) -> tuple[int, ...]:
    """Returns kept units as a sorted tuple of ``int``."""
    try:
        listed = [_plain(unit) for unit in _plain(units)]
        if any(isinstance(unit, bool) for unit in listed):
            raise PlanError(
                f"The kept units of {name} are a mask of booleans: give the indices of what stays, for a mask "
                "mask.nonzero()."
            )
        return tuple(sorted(index(unit) for unit in listed))
    except TypeError as error:
        raise PlanError(f"The kept units of {name} must be a one-dimensional list of integers: {error}.") from error


def _plain(value: Any) -> Any:
    """Returns a number of NumPy or a tensor as one of Python, which JSON can hold."""
    return value.tolist() if hasattr(value, "tolist") else value


def _shown(units: tuple[int, ...]) -> str:
    """Returns what is wrong with kept units, shortly: the repeated ones, else the first and the last."""
    if not units:
        return "none"
    repeated = sorted({unit for unit, following in pairwise(units) if unit == following})
    return f"{repeated[0]} twice" if repeated else f"{units[0]} to {units[-1]}"
