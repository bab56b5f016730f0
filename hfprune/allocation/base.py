"""Allocations: widths from an inventory of groups and a budget."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hfprune.models import (
    CHANNELS,
    channel_cost,
    find_spec,
    head_counts,
    hidden_step,
    layer_params,
    parameter_count,
    per_channel,
    unit_cost,
)
from hfprune.plan import LAYERS, Group
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import Configured


def keep_top(scores: Tensor, width: int) -> tuple[int, ...]:
    """Returns the ``width`` units with the largest scores, ascending; equal scores: the lower index stays.

    >>> keep_top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
    (1, 2)
    """
    order = torch.sort(scores.cpu(), descending=True, stable=True).indices
    return tuple(sorted(order[:width].tolist()))


def uniform_keep(
    scores: Mapping[str, Tensor], groups: Sequence[Group], widths: int | Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Returns the kept units of every group, at one width or at a width for each."""
    listed = [widths] * len(groups) if isinstance(widths, int) else widths
    return {group.name: keep_top(scores[group.name], width) for group, width in zip(groups, listed, strict=True)}


Scores = Mapping[str, Tensor]
"""Group name -> importance [U]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelCosts:
    """What goes with one hidden channel, all other units being there.

    Attributes:
        per_unit: Parameters of one unit of each group, 0 for ``layers`` and ``channels`` groups.
        per_layer: Parameters of each layer.
        per_model: Parameters of the model.
        step: A stock config states hidden sizes that are multiples of this, one for every query head or 1.
    """

    per_unit: tuple[int, ...]
    per_layer: tuple[int, ...]
    per_model: int
    step: int

    @classmethod
    def of(cls, model: Any, groups: tuple[Group, ...]) -> "ChannelCosts | None":
        """Returns what goes with a channel of a supported model; None where hidden channels are no units."""
        channels = next((group for group in groups if group.kind == CHANNELS), None)
        if channels is None:
            return None
        layers = find_spec(model).layers
        return cls(
            per_unit=tuple(0 if group is channels else per_channel(model, channels, group) for group in groups),
            per_layer=tuple(
                channel_cost(model, channels, within=f"{layers}.{index}.") for index in range(len(layer_params(model)))
            ),
            per_model=channel_cost(model, channels),
            step=hidden_step(model) or 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The groups of a model and what their units cost.

    Attributes:
        groups: The groups of the dense model.
        costs: Parameters that one unit of each group owns, 0 for ``layers`` groups; no parameter belongs to two units,
            but for those that belong to a hidden channel, too.
        dense_params: Parameters of the dense model, tied weights once.
        hidden_size: Hidden size of the model.
        layer_params: Parameters of each layer.
        fixed_layers: Layers that may not be removed.
        channels: What goes with each hidden channel, None where these are no units.
        head_counts: Key-value heads per layer to choose from, where one number holds for all layers: those that a stock
            config can state. None: any number.
    """

    groups: tuple[Group, ...]
    costs: tuple[int, ...]
    dense_params: int
    hidden_size: int
    layer_params: tuple[int, ...] = ()
    fixed_layers: frozenset[int] = field(default_factory=frozenset)
    channels: ChannelCosts | None = None
    head_counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: Any, groups: tuple[Group, ...], *, stock: bool = False) -> "Inventory":
        """Returns the inventory of some groups of a supported Hugging Face model.

        Args:
            model: The dense model; the meta device will do.
            groups: Its groups.
            stock: A stock config has to state the number of heads. Classes that state the dense number alone are left
                unrestricted: heads that cannot be pruned are an error, not a choice.
        """
        heads = any(group.kind == "heads" for group in groups)
        counts = head_counts(model) if stock and heads else ()
        return cls(
            groups=groups,
            costs=tuple(0 if group.kind == LAYERS else unit_cost(model, group) for group in groups),
            dense_params=parameter_count(model),
            hidden_size=model.config.hidden_size,
            layer_params=layer_params(model),
            channels=ChannelCosts.of(model, groups),
            head_counts=counts if len(counts) > 1 else None,
        )

    @property
    def layers(self) -> Group | None:
        """The group of whole layers, None where layers are no units."""
        return next((group for group in self.groups if group.kind == LAYERS), None)

    @property
    def stream(self) -> int:
        """Position of the group of hidden channels; only where these are units."""
        return next(i for i, group in enumerate(self.groups) if group.kind == CHANNELS)

    def at(self, kept: int) -> "Inventory":
        """Returns the inventory of the model with ``kept`` hidden channels, which are no units of it any more."""
        costs = self.channels
        assert costs is not None
        number = self.stream
        gone = self.groups[number].num_units - kept
        others = [i for i in range(len(self.groups)) if i != number]
        return replace(
            self,
            groups=tuple(self.groups[i] for i in others),
            costs=tuple(self.costs[i] - gone * costs.per_unit[i] for i in others),
            dense_params=self.dense_params - gone * costs.per_model,
            hidden_size=kept,
            layer_params=tuple(n - gone * each for n, each in zip(self.layer_params, costs.per_layer, strict=True)),
            channels=None,
            head_counts=None,
        )

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
            widths: Kept units per group; those of removed layers and of the ``layers`` group do not matter.
            removed_layers: Layers that go as a whole.
        """
        if self.channels is not None:
            place = self.stream
            return self.at(widths[place]).params([*widths[:place], *widths[place + 1 :]], removed_layers)
        removed = sum(self.layer_params[layer] for layer in removed_layers)
        for group, cost, width in zip(self.groups, self.costs, widths, strict=True):
            if group.layer not in removed_layers:
                removed += (group.num_units - width) * cost
        return self.dense_params - removed

    def common_share(self, target: int) -> float:
        """Returns the share that meets the target when whole layers, heads and neurons could be divided.

        Hidden channels are not among the units.
        """
        low, high = 0.0, 1.0
        within = sum(g.num_units * cost for g, cost in zip(self.groups, self.costs, strict=True))
        movable = sum(n for layer, n in enumerate(self.layer_params) if layer not in self.fixed_layers)
        for _ in range(100):
            share = (low + high) / 2
            layers = share if self.layers is not None else 0.0
            removed = layers * movable + (1 - layers) * share * within
            low, high = (share, high) if removed < self.dense_params - target else (low, share)
        return high

    def select(self, numbers: Sequence[int]) -> "Inventory":
        """Returns an inventory of some of the groups, of the same model."""
        groups, costs = tuple(self.groups[i] for i in numbers), tuple(self.costs[i] for i in numbers)
        return replace(self, groups=groups, costs=costs)

    def worst_layers(self, scores: Scores | None, number: int) -> tuple[int, ...]:
        """Returns the ``number`` removable layers with the lowest scores, ascending; without scores, the last ones."""
        group = self.layers
        assert group is not None
        layers = [layer for layer in range(len(self.layer_params)) if layer not in self.fixed_layers]
        if scores is None:
            return tuple(layers[len(layers) - number :])
        stay = keep_top(scores[group.name][layers], len(layers) - number)
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


class Measurements(Protocol):
    """What an allocation can measure on the dense model and the first calibration sequences.

    Results are the same on every rank. The pruning room implements it.
    """

    def kl_curves(self, shares: Sequence[float]) -> dict[str, dict[float, float]]:
        """Returns group name -> kept share -> KL to the dense model, nats per token, that group alone being pruned."""

    def layer_cosines(self) -> dict[int, float]:
        """Returns layer -> mean over tokens of the cosine between the layer's input and output."""


class Allocation(Configured, ABC):
    """Spreads a budget over groups. An instance holds settings only.

    Attributes:
        takes_layers: Whether whole layers may be among the units.
        takes_channels: Whether hidden channels may be.
        sequences: Calibration sequences that ``measure`` reads; of allocations that measure.
    """

    sequences: int = 0

    takes_layers: ClassVar[bool] = False
    takes_channels: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Reads the deprecated attribute ``takes_blocks`` as ``takes_layers``."""
        super().__init_subclass__(**kwargs)
        if "takes_blocks" in cls.__dict__:
            text = f"{cls.__name__}.takes_blocks is now takes_layers; the old name goes away in the next release."
            warnings.warn(text, FutureWarning, stacklevel=2)
            cls.takes_layers = cls.__dict__["takes_blocks"]

    @property
    def own_budget(self) -> bool:
        """Whether the allocation says itself how much goes, so that no budget is given."""
        return False

    @property
    def measures(self) -> str:
        """What is to be measured after calibration (``curves``, ``cosines``); empty where nothing is, or is known."""
        return ""

    def measure(self, on: Measurements) -> "Allocation":
        """Returns the allocation with what it measured; itself where it measures nothing.

        Args:
            on: What can be measured.
        """
        return self

    def needs_scores(self, inventory: Inventory) -> bool:
        """Returns whether widths, or which layers go, depend on scores: by default where layers are among the units."""
        return inventory.layers is not None

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

    def describe(self) -> dict[str, Any]:
        """Returns name and settings for the plan's provenance, JSON-able."""
        return {"name": type(self).__name__, **self.settings()}

    def __str__(self) -> str:
        """Returns name and settings as one would write them."""
        name, *settings = self.describe().items()
        return f"{name[1]}({', '.join(f'{key}={value}' for key, value in settings)})"

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` where whole layers or hidden channels are units and the allocation takes none."""
        if inventory.layers is not None and not self.takes_layers:
            raise ConfigError(
                f"{type(self).__name__} does not say which whole layers go: leave 'layers' out of the units, or use "
                "Uniform, Protected(Uniform) or Explicit."
            )
        self.check_channels(inventory)

    def check_channels(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` where hidden channels are among the units and the allocation does not take them."""
        if inventory.channels is not None and not self.takes_channels:
            raise ConfigError(
                f"{type(self).__name__} spreads a budget over layers, and a hidden channel goes through all of them: "
                "leave 'channels' out of the units, or use Uniform or Explicit."
            )
