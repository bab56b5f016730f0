"""What there is to spend a budget on, and the contract of whoever spends it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from hfprune.allocation.keep import keep_top
from hfprune.arch import layer_params, parameter_count, unit_cost
from hfprune.errors import ConfigError
from hfprune.types import Group

Scores = Mapping[str, Tensor]
"""Group name -> importance [U]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The groups of a model and what their units cost.

    Attributes:
        groups: The groups of the dense model.
        costs: Parameters that one unit of each group owns, 0 for ``block`` groups; no parameter belongs to two units.
        dense_params: Parameters of the dense model, tied weights once.
        hidden_size: Hidden size of the model.
        layer_params: Parameters of each layer.
        fixed_layers: Layers that may not be removed.
    """

    groups: tuple[Group, ...]
    costs: tuple[int, ...]
    dense_params: int
    hidden_size: int
    layer_params: tuple[int, ...] = ()
    fixed_layers: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of(cls, model: Any, groups: tuple[Group, ...]) -> "Inventory":
        """Returns the inventory of some groups of a supported Hugging Face model; the meta device will do."""
        return cls(
            groups=groups,
            costs=tuple(0 if group.kind == "block" else unit_cost(model, group) for group in groups),
            dense_params=parameter_count(model),
            hidden_size=model.config.hidden_size,
            layer_params=layer_params(model),
        )

    @property
    def block(self) -> Group | None:
        """The group of whole layers, None where layers are no units."""
        return next((group for group in self.groups if group.kind == "block"), None)

    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of the groups, each once."""
        return tuple(dict.fromkeys(group.kind for group in self.groups))

    def numbers(self, kind: str, *, removed_layers: Collection[int] = ()) -> list[int]:
        """Returns the positions of the groups of a kind in layers that stay."""
        return [i for i, g in enumerate(self.groups) if g.kind == kind and g.layer not in removed_layers]

    def dense_widths(self) -> tuple[int, ...]:
        """Returns the units of each group."""
        return tuple(group.num_units for group in self.groups)

    def params(self, widths: Sequence[int], removed_layers: Collection[int] = ()) -> int:
        """Returns the parameters of the model with ``widths`` units left per group and some layers gone.

        Args:
            widths: Kept units per group; those of removed layers and of the ``block`` group do not matter.
            removed_layers: Layers that go as a whole.
        """
        removed = sum(self.layer_params[layer] for layer in removed_layers)
        for group, cost, width in zip(self.groups, self.costs, widths, strict=True):
            if group.layer not in removed_layers:
                removed += (group.num_units - width) * cost
        return self.dense_params - removed

    def select(self, numbers: Sequence[int]) -> "Inventory":
        """Returns an inventory of some of the groups, of the same model."""
        groups, costs = tuple(self.groups[i] for i in numbers), tuple(self.costs[i] for i in numbers)
        return replace(self, groups=groups, costs=costs)

    def worst_layers(self, scores: Scores | None, number: int) -> tuple[int, ...]:
        """Returns the ``number`` removable layers with the lowest scores, ascending; without scores, the last ones."""
        layers = [layer for layer in range(len(self.layer_params)) if layer not in self.fixed_layers]
        block = self.block
        assert block is not None
        if scores is None:
            return tuple(layers[len(layers) - number :])
        stay = keep_top(scores[block.name][layers], len(layers) - number)
        return tuple(layer for place, layer in enumerate(layers) if place not in stay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """How many units each group keeps.

    Attributes:
        widths: Kept units per group; all units for groups of removed layers.
        removed_layers: Layers that go as a whole, ascending.
        exact_width: The MLP width that meets the target before rounding, where there is one.
    """

    widths: tuple[int, ...]
    removed_layers: tuple[int, ...] = ()
    exact_width: float | None = None


class Allocation(ABC):
    """Spreads a budget over groups. An instance holds settings only.

    Attributes:
        takes_blocks: Whether whole layers may be among the units.
    """

    takes_blocks: ClassVar[bool] = False

    @property
    def own_budget(self) -> bool:
        """Whether the allocation says itself how much goes, so that no budget is given."""
        return False

    def needs_scores(self, inventory: Inventory) -> bool:
        """Returns whether widths, or which layers go, depend on scores: by default where layers are among the units."""
        return inventory.block is not None

    @abstractmethod
    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns how many units each group keeps so that about ``target`` parameters are left.

        Where that is out of reach, the nearest that is within. Equal inputs give equal results: ties go to the lower
        layer, or to the lower index of a unit.

        Args:
            inventory: The groups.
            target: Parameters to leave; without meaning where ``own_budget``.
            round_to: Kept MLP widths are multiples of this, or the dense width.
            scores: Importance of the units; None before calibration: then widths that need scores are a guess.

        Raises:
            ConfigError: The settings do not fit the model.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns name and settings for the plan's provenance, JSON-able."""

    def __str__(self) -> str:
        """Returns name and settings as one would write them."""
        name, *settings = self.describe().items()
        return f"{name[1]}({', '.join(f'{key}={value}' for key, value in settings)})"

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` where whole layers are among the units and the allocation does not take them."""
        if inventory.block is not None and not self.takes_blocks:
            raise ConfigError(
                f"{type(self).__name__} does not say which whole layers go: leave 'blocks' out of the units, or use "
                "Uniform, Protected(Uniform) or Explicit."
            )
