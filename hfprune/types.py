"""What every part of hfprune agrees on: units, groups, the slices they own, and how far to go (the budget)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hfprune.errors import ConfigError

UnitKind = Literal["mlp", "heads", "experts", "blocks", "channels"]
"""What can be removed: MLP neurons, attention heads (a key-value head with the query heads that read it), experts of
mixture-of-experts layers, layers, hidden channels (those of the residual stream)."""

Side = Literal["out", "in"]
"""Which channels of a projection a slice covers: ``out`` (rows of an ``nn.Linear`` weight) or ``in`` (columns)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The channels that each unit of a group owns on one side of one projection.

    Unit ``j`` owns channels ``offset + j * width`` up to ``offset + (j + 1) * width``. Scoring, masking and surgery all
    read this table, so they cannot disagree on what a unit is.

    Attributes:
        module: Qualified name of the projection, relative to the Hugging Face model; an embedding or a norm where the
            units are hidden channels.
        side: ``out`` or ``in`` channels.
        offset: First channel (fused projections hold several blocks side by side).
        width: Channels per unit.
        parameter: Attribute of the module that holds the weights; experts have several.
    """

    module: str
    side: Side
    offset: int = 0
    width: int = 1
    parameter: str = "weight"

    def channels(self, units: Iterable[int]) -> list[int]:
        """Returns the channels that ``units`` own, in the order of the units."""
        return [self.offset + unit * self.width + k for unit in units for k in range(self.width)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Units that share one index: the gate, up and down projections of one layer, for example.

    Attributes:
        name: Unique name, for example ``model.layers.3.mlp``.
        kind: Unit kind: ``mlp`` (MLP neurons), ``heads`` (key-value heads, each with the query heads that read it),
            ``experts`` (of a mixture), ``block`` (whole layers), ``channels`` (hidden channels of the residual stream);
            one group for the model of each of these two.
        num_units: Number of units in the dense model.
        slices: What each unit owns; none for ``block``.
        layer: Index of the layer that the units are in; None for ``block``, ``channels`` and modules without layers.
        least: Fewest units that can stay: of experts as many as a token goes through.
    """

    name: str
    kind: str
    num_units: int
    slices: tuple[Slice, ...]
    layer: int | None = None
    least: int = 1

    def inputs(self) -> tuple[Slice, ...]:
        """Returns the slices on the input side, where a unit's activation can be read."""
        return tuple(s for s in self.slices if s.side == "in")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How far to go: exactly one of the first four fields, or none where the allocation says how much goes.

    Attributes:
        pruning_ratio: Share of ALL parameters to remove, in (0, 1); tied weights count once.
        target_params: Number of parameters to keep.
        intermediate_size: MLP width to keep in every layer.
        mlp_ratio: MLP width to keep as a multiple of the hidden size, truncated as in the HFPrune script.
        round_to: Kept MLP widths and hidden sizes are multiples of this (1 for the exact numbers; 8, 64 or 128 for fast
            kernels). Heads and layers are counted one by one.
        allocated: The allocation says how much goes, and none of the four is given.
    """

    pruning_ratio: float | None = None
    target_params: int | None = None
    intermediate_size: int | None = None
    mlp_ratio: float | None = None
    round_to: int = 1
    allocated: bool = False

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` when not exactly one target is given or a value is out of range."""
        names = ("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio")
        given = [name for name in names if getattr(self, name) is not None]
        if self.allocated and given:
            raise ConfigError(f"The allocation says how much goes: leave out --{given[0]}, or choose another one.")
        if not self.allocated and len(given) != 1:
            found = "none was" if not given else " and ".join(f"--{name}" for name in given) + " were"
            raise ConfigError(f"Give exactly one of {', '.join('--' + n for n in names)}; {found} given.")
        if self.pruning_ratio is not None and not 0 < self.pruning_ratio < 1:
            raise ConfigError(
                f"--pruning_ratio {self.pruning_ratio} is not between 0 and 1 (both excluded): it is the share of all "
                "parameters to remove, for example 0.2."
            )
        for name in ("target_params", "intermediate_size", "mlp_ratio", "round_to"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} {value} is not positive.")

    def describe(self) -> str:
        """Returns the budget as the user typed it, for example ``pruning_ratio=0.2``."""
        names = ("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        return ", ".join(given if self.round_to == 1 else [*given, f"round_to={self.round_to}"])
