"""Tied groups: groups of one kind in one layer keep equal numbers of units, and an allocation sees them as one."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from hfprune.allocation.base import Allocation, Inventory, Scores
from hfprune.allocation.explicit import Explicit
from hfprune.plan import Group
from hfprune.utils.errors import ConfigError

_EXPERTS = "experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """An inventory in which the tied groups of each layer are one group.

    Unit j of the joint group stands for the unit of rank j in each of its members: its cost and its score are the sums
    over the members.

    Attributes:
        inventory: The joint groups.
        members: For each joint group, the positions of its members in the inventory of single groups.
        single: The inventory of single groups.
    """

    inventory: Inventory
    members: tuple[tuple[int, ...], ...]
    single: Inventory

    @classmethod
    def of(cls, inventory: Inventory) -> "Ties":
        """Returns the joint groups of an inventory; its own groups where none are tied."""
        places: dict[Any, list[int]] = {}
        for place, group in enumerate(inventory.groups):
            tied = group.layer is not None and inventory.count is None
            places.setdefault((group.kind, group.layer) if tied else place, []).append(place)
        members = tuple(map(tuple, places.values()))
        if len(members) == len(inventory.groups):
            return cls(inventory=inventory, members=members, single=inventory)
        for numbers in members:
            _check_sizes([inventory.groups[i] for i in numbers])
        groups = tuple(inventory.groups[numbers[0]] for numbers in members)
        costs = tuple(sum(inventory.costs[i] for i in numbers) for numbers in members)
        return cls(inventory=replace(inventory, groups=groups, costs=costs), members=members, single=inventory)

    @property
    def step(self) -> int:
        """Widths of experts are multiples of this: rows of 16 bytes, as the grouped matrix products of torch need.

        It is 8, or the largest power of two below that divides the dense width; 1 without neurons within experts.
        """
        within = [g.num_units for g in self.single.groups if any("." in part.parameter for part in g.slices)]
        return gcd(*within, 8) if within else 1

    def check(self, widths: Sequence[int]) -> None:
        """Raises ``ConfigError`` if a width of experts, set by the user, is no multiple of :attr:`step`."""
        for group, width in zip(self.inventory.groups, widths, strict=True):
            if group.kind == "mlp" and width % self.step:
                raise ConfigError(
                    f"{group.name} would keep {width} neurons; the grouped matrix products that run experts need "
                    f"multiples of {self.step}."
                )

    @property
    def tied(self) -> bool:
        """Whether a group has more than one member."""
        return len(self.members) < len(self.single.groups)

    def scores(self, scores: Scores | None) -> Scores | None:
        """Returns the scores of the joint groups: sums over the members, by rank."""
        if scores is None or not self.tied:
            return scores
        found = dict(scores)
        for group, numbers in zip(self.inventory.groups, self.members, strict=True):
            if len(numbers) > 1:
                names = [self.single.groups[i].name for i in numbers]
                found[group.name] = sum(scores[name].double().cpu().sort(descending=True).values for name in names)  # type: ignore[assignment]
        return found

    def spread(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Returns the width of every single group, from those of the joint groups."""
        found = [0] * len(self.single.groups)
        for width, numbers in zip(widths, self.members, strict=True):
            for i in numbers:
                found[i] = width
        return tuple(found)

    def joined(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Returns the width of every joint group, from those of the single groups."""
        return tuple(widths[numbers[0]] for numbers in self.members)

    def check_skipped(self, skipped: Collection[str]) -> None:
        """Raises ``ConfigError`` if only some members of a joint group are skipped.

        Args:
            skipped: Names of the single groups that keep all units.
        """
        for numbers in self.members:
            names = [self.single.groups[i].name for i in numbers]
            left = [name for name in names if name not in skipped]
            if left and len(left) < len(names):
                kind = self.single.groups[numbers[0]].kind
                raise ConfigError(
                    f"The {len(names)} groups of {kind} in a layer keep equal numbers of units, but skip_layers keeps "
                    f"only {len(names) - len(left)} of them, without {left[0]}, as they are. Skip the whole layer."
                )

    def factor(self, place: int) -> int:
        """Returns how many units a unit of a joint group counts for: for experts, the number of its members."""
        return len(self.members[place]) if self.inventory.groups[place].kind == _EXPERTS else 1

    def adapted(self, allocation: Allocation) -> Allocation:
        """Returns the allocation for the joint groups: numbers of experts are divided by the groups of a router.

        Raises:
            ConfigError: The allocation reads measurements of single groups, or a number of experts cannot be divided.
        """
        if not self.tied:
            return allocation
        if hasattr(allocation, "curves"):
            tied = next(self.inventory.groups[i] for i, numbers in enumerate(self.members) if len(numbers) > 1)
            raise ConfigError(
                f"{type(allocation).__name__} prunes one group at a time, but the groups of {tied.kind} in a layer of "
                "this model must keep equal numbers of units. Use Uniform, GlobalRank or Explicit."
            )
        parts = max((self.factor(i) for i in range(len(self.members))), default=1)
        if not isinstance(allocation, Explicit) or allocation.experts is None or parts == 1:
            return allocation
        asked = [allocation.experts] if isinstance(allocation.experts, int) else allocation.experts
        if any(number % parts for number in asked):
            raise ConfigError(
                f"{allocation}: the routers of this model choose among {parts} groups of experts of equal size, so the "
                f"number of experts must be a multiple of {parts}."
            )
        each = [number // parts for number in asked]
        settings = {**allocation.settings(), _EXPERTS: each[0] if isinstance(allocation.experts, int) else each}
        return Explicit(**settings)


def _check_sizes(groups: Sequence[Group]) -> None:
    """Raises ``ConfigError`` unless tied groups have equal numbers of units."""
    sizes = {group.num_units for group in groups}
    if len(sizes) > 1:
        raise ConfigError(
            f"{groups[0].name} and the other groups of {groups[0].kind} in its layer must keep equal numbers of units, "
            f"but they have {min(sizes)} to {max(sizes)}."
        )
