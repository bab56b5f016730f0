"""Explicit allocation: the user gives the widths, one for all layers or one for each."""

from hfprune.allocation.base import Allocation, Allotment, Inventory, Scores
from hfprune.allocation.uniform import settled
from hfprune.plan import DEPTH_KINDS, SUBLAYERS, unit_kinds
from hfprune.utils.errors import ConfigError


class Explicit(Allocation):
    """Keeps the given numbers of units. Kinds without a number keep all units.

    Args:
        mlp: MLP neurons to keep: one number for all layers, or one for each layer of the dense model.
        heads: Key-value heads to keep, likewise.
        experts: Experts to keep, likewise.
        attention_sublayers: Number of attention sub-layers to keep, by score; or a list of the layers that lose theirs.
        mlp_sublayers: Number of MLP sub-layers to keep, or a list of layers, likewise.
        layers: Number of layers to keep, by score; or a list of the layers to remove.
        channels: Number of hidden channels to keep, the new hidden size.
        blocks: Deprecated name of ``layers``.

    Raises:
        ConfigError: No number is given.

    Example:
        >>> from hfprune.plan import Group
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4, layer_params=(80, 80))
        >>> Explicit(mlp=[6, 4]).allot(inventory, 0, round_to=1, scores=None).widths
        (6, 4)
    """

    takes_layers = True
    takes_sublayers = True
    takes_channels = True

    def __init__(
        self,
        *,
        mlp: int | list[int] | None = None,
        heads: int | list[int] | None = None,
        experts: int | list[int] | None = None,
        attention_sublayers: int | list[int] | None = None,
        mlp_sublayers: int | list[int] | None = None,
        layers: int | list[int] | None = None,
        channels: int | None = None,
        blocks: int | list[int] | None = None,
    ) -> None:
        if blocks is not None:
            if layers is not None:
                raise ConfigError("Explicit: `blocks` is the old name of `layers`; give `layers` only.")
            unit_kinds(["blocks"])
            layers = blocks
        self.mlp, self.heads, self.experts, self.channels, self.layers = mlp, heads, experts, channels, layers
        self.attention_sublayers, self.mlp_sublayers = attention_sublayers, mlp_sublayers
        if not self.settings():
            raise ConfigError(
                "Explicit: give the number of units to keep as mlp, heads, experts, attention_sublayers, "
                "mlp_sublayers, layers or channels."
            )

    @property
    def own_budget(self) -> bool:
        """Always."""
        return True

    def needs_scores(self, inventory: Inventory) -> bool:
        """Returns whether a number of layers or sub-layers was given rather than a list."""
        return any(isinstance(value, int) for kind, value in self.settings().items() if kind in DEPTH_KINDS)

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` if a kind is not pruned or a number does not fit the model."""
        for kind in self.settings():
            if kind not in inventory.kinds():
                if any(group.kind == kind for group in inventory.skipped):
                    raise ConfigError(f"{self} names units ({kind}) that {inventory.skip} skips in every layer.")
                raise ConfigError(f"{self} names units that are not pruned: add '{kind}' to `units`.")
        for kind, value in self._numbers().items():
            self._widths(inventory, kind, value)
            self._check_skipped(inventory, kind, value)
        removed = self._removed(inventory, None) if self.layers is not None else ()
        for kind in SUBLAYERS:
            self._lost(inventory, kind, removed, None)

    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns the given widths."""
        removed = self._removed(inventory, scores) if self.layers is not None else ()
        widths = list(inventory.dense_widths())
        for kind in SUBLAYERS:
            for number in self._lost(inventory, kind, removed, scores):
                widths[number] = 0
        absent = inventory.absent(widths, removed)
        for kind, value in self._numbers().items():
            for number, width in self._widths(inventory, kind, value).items():
                if number not in absent:
                    widths[number] = width
        self._check_left(inventory, widths, removed)
        return settled(inventory, widths, removed)

    def _check_left(self, inventory: Inventory, widths: list[int], removed: tuple[int, ...]) -> None:
        """Raises ``ConfigError`` if no layer keeps a sub-layer."""
        kinds = [kind for kind in SUBLAYERS if kind in inventory.kinds()]
        stay = {g.layer for g, w in zip(inventory.groups, widths, strict=True) if g.kind in kinds and w}
        if len(kinds) == len(SUBLAYERS) and not stay - set(removed):
            raise ConfigError(f"{self} removes both sub-layers of every layer.")

    def _numbers(self) -> dict[str, int | list[int]]:
        """Returns unit kind -> numbers of units to keep, without layers and sub-layers."""
        return {kind: value for kind, value in self.settings().items() if kind not in DEPTH_KINDS}

    def _lost(self, inventory: Inventory, kind: str, removed: tuple[int, ...], scores: Scores | None) -> list[int]:
        """Returns the positions of the removed sub-layers of a kind."""
        value = self.settings().get(kind)
        if value is None:
            return []
        members = inventory.numbers(kind, removed_layers=removed)
        if isinstance(value, int):
            if not 0 <= value <= len(members):
                raise ConfigError(f"{self}: from 0 to {len(members)} {kind} can be kept.")
            return inventory.worst_sublayers(kind, scores, len(members) - value, removed_layers=removed)
        layers = {inventory.groups[i].layer for i in inventory.numbers(kind)}
        missing = sorted(set(value) - layers)
        if missing:
            raise ConfigError(f"{self}: layer {missing[0]} has no {kind.removesuffix('s')} that can be removed.")
        return [i for i in members if inventory.groups[i].layer in value]

    def _removed(self, inventory: Inventory, scores: Scores | None) -> tuple[int, ...]:
        layers = len(inventory.layer_params)
        if isinstance(self.layers, int):
            least = max(len(inventory.fixed_layers), 1)
            if not least <= self.layers <= layers:
                raise ConfigError(f"{self}: from {least} to {layers} layers can be kept.")
            return inventory.worst_layers(scores, layers - self.layers)
        named = sorted(set(self.layers or ()))
        if len(named) >= layers or any(not 0 <= layer < layers or layer in inventory.fixed_layers for layer in named):
            raise ConfigError(f"{self} removes protected layers, layers that do not exist, or all of {layers}.")
        return tuple(named)

    def _check_skipped(self, inventory: Inventory, kind: str, value: int | list[int]) -> None:
        """Raises ``ConfigError`` if a list gives a skipped group another width than that of the dense model."""
        for group in inventory.skipped:
            if group.kind == kind and not isinstance(value, int) and value[group.layer or 0] != group.num_units:
                raise ConfigError(
                    f"{self}: {kind} lists {value[group.layer or 0]} units for layer {group.layer}, which "
                    f"{inventory.skip} keeps at {group.num_units}."
                )

    def _widths(self, inventory: Inventory, kind: str, value: int | list[int]) -> dict[int, int]:
        """Returns position of the group -> width."""
        members = inventory.numbers(kind)
        layers = len(inventory.layer_params)
        if not isinstance(value, int) and len(value) != layers:
            raise ConfigError(f"{self}: {kind} lists {len(value)} numbers for {layers} layers.")
        found = {}
        for number in members:
            group = inventory.groups[number]
            width = value if isinstance(value, int) else value[group.layer or 0]
            if not group.least <= width <= group.num_units:
                raise ConfigError(
                    f"{self}: {group.name} has {group.num_units} units and must keep at least {group.least}; {width} "
                    "cannot be kept."
                )
            found[number] = width
        return found
