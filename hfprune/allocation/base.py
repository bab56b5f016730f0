"""Inventories of a model's groups, and the base class of allocations."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hfprune.allocation.rounding import bisected
from hfprune.models import (
    CHANNELS,
    channel_cost,
    find_spec,
    head_counts,
    hidden_size,
    hidden_step,
    is_supported,
    layer_params,
    parameter_count,
    per_channel,
    pruned_count,
    unit_cost,
)
from hfprune.models.skip_layers import SkipLayers
from hfprune.plan import DEPTH_KINDS, LAYERS, SUBLAYERS, UNIT_KINDS, Group
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import Configured


def keep_top(scores: Tensor, width: int) -> tuple[int, ...]:
    """Returns the ``width`` units with the largest scores, ascending; of equal scores, the lower index is kept.

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
    """Parameters of one hidden channel in the dense model.

    Attributes:
        per_unit: Those that also belong to one unit of each group; 0 for ``layers`` and ``channels`` groups.
        per_layer: Those within each layer.
        per_model: Those of the whole model.
        step: Hidden sizes that a stock config states are multiples of this: the number of query heads, or 1.
    """

    per_unit: tuple[int, ...]
    per_layer: tuple[int, ...]
    per_model: int
    step: int

    @classmethod
    def of(cls, model: Any, groups: tuple[Group, ...]) -> "ChannelCosts | None":
        """Returns the costs for a supported model, or None if hidden channels are not pruned."""
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
    """The groups of a model and the parameters of their units.

    Attributes:
        groups: The groups of the dense model.
        costs: Parameters of one unit of each group, 0 for ``layers`` groups. A parameter belongs to one unit at most,
            and in addition to a sub-layer and a hidden channel.
        dense_params: Parameters of the dense model, tied weights once.
        hidden_size: Hidden size of the model; None for a module that has none.
        layer_params: Parameters of each layer.
        fixed_layers: Layers that may not be removed.
        channels: Parameters of a hidden channel; None if hidden channels are not pruned.
        head_counts: Numbers of key-value heads to choose from, one for all layers: those that a stock config can state.
            None: any number.
        count: Kept units per group -> parameters of the model, where groups share matrices so that costs do not add up.
        skipped: Groups that keep all units (``skip_layers``).
        skip: The setting that skips them, in words; empty without one.
    """

    groups: tuple[Group, ...]
    costs: tuple[int, ...]
    dense_params: int
    hidden_size: int | None
    layer_params: tuple[int, ...] = ()
    fixed_layers: frozenset[int] = field(default_factory=frozenset)
    channels: ChannelCosts | None = None
    head_counts: tuple[int, ...] | None = None
    count: Callable[[Sequence[int]], int] | None = None
    skipped: tuple[Group, ...] = ()
    skip: str = ""

    @classmethod
    def of(
        cls, model: Any, groups: tuple[Group, ...], *, stock: bool = False, skip: SkipLayers | None = None
    ) -> "Inventory":
        """Returns the inventory of some groups of a model.

        Args:
            model: The dense model, which may be on the meta device: a supported Hugging Face model, or any module whose
                groups were described by their projections.
            groups: Its groups.
            stock: Whether a stock config has to state the number of heads. Classes that can state the dense number only
                are not restricted here; pruning their heads is refused elsewhere.
            skip: Layers and modules that are not pruned.

        Raises:
            ConfigError: ``skip`` does not fit the model, or leaves nothing to prune.
        """
        found = cls._of(model, groups, stock=stock)
        return found if skip is None else found.skipping(skip, find_spec(model).layers if is_supported(model) else "")

    @classmethod
    def _of(cls, model: Any, groups: tuple[Group, ...], *, stock: bool) -> "Inventory":
        if not is_supported(model):
            costs, count = tuple(unit_cost(model, group) for group in groups), partial(pruned_count, model, groups)
            return cls(groups=groups, costs=costs, dense_params=parameter_count(model), hidden_size=None, count=count)
        heads = any(group.kind == "heads" for group in groups)
        counts = head_counts(model) if stock and heads else ()
        return cls(
            groups=groups,
            costs=tuple(0 if group.kind == LAYERS else unit_cost(model, group) for group in groups),
            dense_params=parameter_count(model),
            hidden_size=hidden_size(model),
            layer_params=layer_params(model),
            channels=ChannelCosts.of(model, groups),
            head_counts=counts if len(counts) > 1 else None,
        )

    @property
    def layers(self) -> Group | None:
        """The group of whole layers, or None if layers are not pruned."""
        return next((group for group in self.groups if group.kind == LAYERS), None)

    @property
    def stream(self) -> int:
        """Position of the group of hidden channels, which must be pruned."""
        return next(i for i, group in enumerate(self.groups) if group.kind == CHANNELS)

    def at(self, kept: int) -> "Inventory":
        """Returns the inventory of the model with ``kept`` hidden channels, without the group of hidden channels."""
        costs = self.channels
        assert costs is not None
        number = self.stream
        removed = self.groups[number].num_units - kept
        others = [i for i in range(len(self.groups)) if i != number]
        return replace(
            self,
            groups=tuple(self.groups[i] for i in others),
            costs=tuple(self.costs[i] - removed * costs.per_unit[i] for i in others),
            dense_params=self.dense_params - removed * costs.per_model,
            hidden_size=kept,
            layer_params=tuple(n - removed * each for n, each in zip(self.layer_params, costs.per_layer, strict=True)),
            channels=None,
            head_counts=None,
        )

    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of the groups, each once."""
        return tuple(dict.fromkeys(group.kind for group in self.groups))

    @property
    def depth_kinds(self) -> tuple[str, ...]:
        """The kinds of layers and sub-layers that are pruned."""
        kinds = self.kinds()
        return tuple(kind for kind in DEPTH_KINDS if kind in kinds)

    def numbers(
        self, kind: str, *, removed_layers: Collection[int] = (), widths: Sequence[int] | None = None
    ) -> list[int]:
        """Returns the positions of the groups of a kind in kept layers and, where widths are given, kept sub-layers."""
        absent = set() if widths is None else self.absent(widths, removed_layers)
        found = [i for i, g in enumerate(self.groups) if g.kind == kind and g.layer not in removed_layers]
        return found if kind in SUBLAYERS else [i for i in found if i not in absent]

    def absent(self, widths: Sequence[int], removed_layers: Collection[int] = ()) -> set[int]:
        """Returns the positions of the groups in removed layers, and of those within removed sub-layers.

        Args:
            widths: Kept units per group.
            removed_layers: Removed layers.
        """
        lost = {
            (part, g.layer)
            for g, width in zip(self.groups, widths, strict=True)
            if g.kind in SUBLAYERS and not width
            for part in UNIT_KINDS[g.kind].parts
        }
        return {i for i, g in enumerate(self.groups) if g.layer in removed_layers or (g.kind, g.layer) in lost}

    def dense_widths(self) -> tuple[int, ...]:
        """Returns the units of each group."""
        return tuple(group.num_units for group in self.groups)

    def params(self, widths: Sequence[int], removed_layers: Collection[int] = ()) -> int:
        """Returns the parameters of a pruned model.

        Args:
            widths: Kept units per group; values for removed layers, for units within removed sub-layers and for the
                ``layers`` group are ignored.
            removed_layers: Removed layers.
        """
        if self.count is not None:
            return self.count(widths)
        if self.channels is not None:
            place = self.stream
            return self.at(widths[place]).params([*widths[:place], *widths[place + 1 :]], removed_layers)
        removed = sum(self.layer_params[layer] for layer in removed_layers)
        absent = self.absent(widths, removed_layers)
        for number, (group, cost, width) in enumerate(zip(self.groups, self.costs, widths, strict=True)):
            if number not in absent:
                removed += (group.num_units - width) * cost
        return self.dense_params - removed

    def params_of(self, allotment: "Allotment") -> int:
        """Returns the parameters that an allotment leaves."""
        return self.params(allotment.widths, allotment.removed_layers)

    def common_share(self, target: int) -> float:
        """Returns the share of every kind to remove that meets the target before rounding; without hidden channels."""
        kinds = self.kinds()
        inner = {part for kind in SUBLAYERS if kind in kinds for part in UNIT_KINDS[kind].parts}
        total = {True: 0, False: 0}  # whether units are within sub-layers that are pruned, too
        for group, cost in zip(self.groups, self.costs, strict=True):
            total[group.kind in inner] += group.num_units * cost
        movable = sum(n for layer, n in enumerate(self.layer_params) if layer not in self.fixed_layers)

        def too_small(share: float) -> bool:
            layers = share if self.layers is not None else 0.0
            within = share * total[False] + share * (1 - share) * total[True]
            return layers * movable + (1 - layers) * within < self.dense_params - target

        return bisected(too_small)[1]

    def select(self, numbers: Sequence[int]) -> "Inventory":
        """Returns an inventory of some of the groups, of the same model; the other groups keep all units."""
        groups, costs = tuple(self.groups[i] for i in numbers), tuple(self.costs[i] for i in numbers)
        channels, count, dense = self.channels, self.count, self.dense_widths()
        if channels is not None:
            channels = replace(channels, per_unit=tuple(channels.per_unit[i] for i in numbers))
        heads = any(group.kind == "heads" for group in groups)
        return replace(
            self,
            groups=groups,
            costs=costs,
            channels=channels,
            head_counts=self.head_counts if heads else None,
            count=None if count is None else lambda widths: count(_put(dense, numbers, widths)),
        )

    def skipping(self, skip: SkipLayers, prefix: str) -> "Inventory":
        """Returns the inventory in which some groups keep all units and some layers are not removed.

        Args:
            skip: Layers and modules that are not pruned.
            prefix: Module name of the list of layers; empty for a model without layers.

        Raises:
            ConfigError: ``skip`` does not fit the groups, or leaves nothing to prune.
        """
        where: dict[str, Any] = {"prefix": prefix, "layers": len(self.layer_params)}
        names = set(skip.groups(self.groups, **where))
        fixed = self.fixed_layers | skip.layers(self.groups, **where)
        skipped = tuple(group for group in self.groups if group.name in names)
        left = [group for group in self.groups if group.name not in names]
        if not left or (all(group.kind == LAYERS for group in left) and len(fixed) >= len(self.layer_params)):
            raise ConfigError(f"{skip} skips every unit: nothing is left to prune.")
        return replace(self, skipped=skipped, skip=str(skip), fixed_layers=fixed)

    def open_groups(self) -> list[int]:
        """Returns the positions of the groups that may lose units."""
        names = {group.name for group in self.skipped}
        return [i for i, group in enumerate(self.groups) if group.name not in names]

    def worst_layers(self, scores: Scores | None, number: int) -> tuple[int, ...]:
        """Returns the ``number`` removable layers with the lowest scores, ascending; without scores, the last ones."""
        group = self.layers
        assert group is not None
        layers = [layer for layer in range(len(self.layer_params)) if layer not in self.fixed_layers]
        if scores is None:
            return tuple(layers[len(layers) - number :])
        kept = keep_top(scores[group.name][layers], len(layers) - number)
        return tuple(layer for place, layer in enumerate(layers) if place not in kept)

    def worst_sublayers(
        self, kind: str, scores: Scores | None, number: int, *, removed_layers: Collection[int] = ()
    ) -> list[int]:
        """Returns the positions of the ``number`` sub-layers with the lowest scores; without scores, the last ones.

        Args:
            kind: Unit kind of the sub-layers.
            scores: Group name -> importance [1]; None before calibration.
            number: How many to return.
            removed_layers: Removed layers, whose sub-layers do not count.
        """
        members = self.numbers(kind, removed_layers=removed_layers)
        if scores is None:
            return members[len(members) - number :]
        found = torch.cat([scores[self.groups[i].name].double().cpu() for i in members]) if members else torch.zeros(0)
        kept = keep_top(found, len(members) - number)
        return [i for place, i in enumerate(members) if place not in kept]


def _put(widths: Sequence[int], numbers: Sequence[int], values: Sequence[int]) -> list[int]:
    """Returns ``widths`` with ``values`` at the positions ``numbers``."""
    found = list(widths)
    for number, value in zip(numbers, values, strict=True):
        found[number] = value
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """How many units each group keeps.

    Attributes:
        widths: Kept units per group; all units for the groups of removed layers.
        removed_layers: Removed layers, ascending.
        exact_width: The MLP width that meets the target before rounding; None if MLPs differ in width.
    """

    widths: tuple[int, ...]
    removed_layers: tuple[int, ...] = ()
    exact_width: float | None = None

    def within(self, inventory: Inventory, numbers: Sequence[int]) -> "Allotment":
        """Returns the allotment of all groups of an inventory, of which this one is for those at ``numbers``.

        The other groups keep all units.

        Args:
            inventory: All groups.
            numbers: Positions of the groups of this allotment.
        """
        exact = self.exact_width
        if any(group.kind == "mlp" for i, group in enumerate(inventory.groups) if i not in numbers):
            exact = None
        return replace(self, widths=tuple(_put(inventory.dense_widths(), numbers, self.widths)), exact_width=exact)


class Measurements(Protocol):
    """Measurements on the dense model and the first calibration sequences, the same on every rank.

    ``hfprune.pruning`` implements them.
    """

    def kl_curves(self, shares: Sequence[float]) -> dict[str, dict[float, float]]:
        """Returns group name -> kept share -> KL to the dense model, nats per token, with that group alone pruned."""

    def layer_cosines(self) -> dict[int, float]:
        """Returns layer -> mean over tokens of the cosine between the layer's input and output."""


class Allocation(Configured, ABC):
    """Spreads a budget over groups. Instances hold settings only.

    Attributes:
        takes_layers: Whether it can remove whole layers.
        takes_sublayers: Whether it can remove whole sub-layers.
        takes_channels: Whether it can remove hidden channels.
        sequences: Number of calibration sequences that ``measure`` reads; 0 without measurements.
    """

    sequences: int = 0

    takes_layers: ClassVar[bool] = False
    takes_sublayers: ClassVar[bool] = False
    takes_channels: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Reads the deprecated attribute ``takes_blocks`` as ``takes_layers``."""
        super().__init_subclass__(**kwargs)
        if "takes_blocks" in cls.__dict__:
            text = f"{cls.__name__}.takes_blocks is now takes_layers; the old name will be removed in the next release."
            warnings.warn(text, FutureWarning, stacklevel=2)
            cls.takes_layers = cls.__dict__["takes_blocks"]

    @property
    def own_budget(self) -> bool:
        """Whether the allocation sets the number of removed units itself, without a budget."""
        return False

    @property
    def measures(self) -> str:
        """Name of the measurement needed after calibration (``curves``, ``cosines``); empty if none is needed."""
        return ""

    def measure(self, on: Measurements) -> "Allocation":
        """Returns the allocation with its measurements; itself if it needs none.

        Args:
            on: The measurements.
        """
        return self

    def needs_scores(self, inventory: Inventory) -> bool:
        """Returns whether widths or removed layers depend on scores; by default, with layers or sub-layers."""
        return bool(inventory.depth_kinds)

    @abstractmethod
    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns how many units each group keeps so that about ``target`` parameters are left.

        A target out of reach gives the nearest possible result. Equal inputs give equal results: in ties, the lower
        layer or the lower index of a unit is preferred.

        Args:
            inventory: The groups.
            target: Number of parameters to leave; ignored where ``own_budget``.
            round_to: Kept MLP widths are multiples of this, or the dense width.
            scores: Group name -> importance [U]; None before calibration, when widths that need scores are provisional.

        Raises:
            ConfigError: The settings do not fit the model.
        """

    def describe(self) -> dict[str, Any]:
        """Returns name and settings for the plan's provenance, JSON-able."""
        return {"name": type(self).__name__, **self.settings()}

    def __str__(self) -> str:
        """Returns name and settings, as in Python."""
        name, *settings = self.describe().items()
        return f"{name[1]}({', '.join(f'{key}={value}' for key, value in settings)})"

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` where layers, sub-layers or channels are pruned and not supported."""
        if inventory.layers is not None and not self.takes_layers:
            raise ConfigError(
                f"{type(self).__name__} cannot remove whole layers: leave 'layers' out of the units, or use Uniform, "
                "Protected(Uniform) or Explicit."
            )
        whole = next((kind for kind in inventory.depth_kinds if kind in SUBLAYERS), None)
        if whole is not None and not self.takes_sublayers:
            raise ConfigError(
                f"{type(self).__name__} cannot remove whole sub-layers: leave '{whole}' out of the units, or use "
                "Uniform, Protected(Uniform), Sensitivity or Explicit."
            )
        self.check_channels(inventory)

    def check_channels(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` where hidden channels are pruned and the allocation does not support them."""
        if inventory.channels is not None and not self.takes_channels:
            raise ConfigError(
                f"{type(self).__name__} cannot remove hidden channels, which all layers share: leave 'channels' out of "
                "the units, or use Uniform or Explicit."
            )
