"""Budgets: the parameter count that a budget asks for, whether it can be reached, and the resulting widths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune.allocation.base import Allotment, Inventory
from hfprune.plan import SUBLAYERS, UNIT_KINDS, Budget
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KindWidths:
    """Dense and kept widths of one kind of units.

    Attributes:
        kind: Unit kind.
        dense: Units per group of the dense model, without the groups of removed layers.
        kept: Kept units per group, in the same order.
    """

    kind: str
    dense: tuple[int, ...]
    kept: tuple[int, ...]

    def describe(self) -> str:
        """Returns dense and kept numbers: one number where all groups agree, else the range; sub-layers are counted."""
        if self.kind in SUBLAYERS:
            return f"{UNIT_KINDS[self.kind].label} {sum(self.dense)} -> {sum(self.kept)}"
        return f"{UNIT_KINDS[self.kind].label} {_listed(self.dense)} -> {_listed(self.kept)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBudget:
    """A budget turned into a kept width for every group, and the parameter counts that follow.

    Attributes:
        asked: The budget, with units and allocation, as the user wrote it.
        widths: Kept units per group; all units for the groups of removed layers.
        dense_widths: Units per group of the dense model.
        exact_width: The MLP width that meets the target before rounding; None if MLPs differ in width.
        dense_params: Parameters of the dense model, tied weights once.
        target_params: Parameters asked for.
        params: Parameters that ``widths`` and ``removed_layers`` leave.
        kinds: Dense and kept widths by unit kind, of the groups in kept layers and sub-layers.
        removed_layers: Removed layers, ascending.
        provisional: Whether widths or removed layers depend on scores that are not known yet.
        note: The constraint that limited the choice of widths; empty without one.
        skipped: Names of the groups that keep all units because ``skip_layers`` names them.
    """

    asked: str
    widths: tuple[int, ...]
    dense_widths: tuple[int, ...]
    exact_width: float | None
    dense_params: int
    target_params: int
    params: int
    kinds: tuple[KindWidths, ...]
    removed_layers: tuple[int, ...] = ()
    provisional: bool = False
    note: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def width(self) -> int | None:
        """Kept MLP width of every layer; None if layers differ or MLP neurons are not pruned."""
        return next((common(k.kept) for k in self.kinds if k.kind == "mlp"), None)

    @property
    def dense_width(self) -> int | None:
        """MLP width of every layer of the dense model; None as for ``width``."""
        return next((common(k.dense) for k in self.kinds if k.kind == "mlp"), None)

    @property
    def removed_share(self) -> float:
        """Share of all parameters that is removed."""
        return 1 - self.params / self.dense_params

    @property
    def removed_width_share(self) -> float | None:
        """Share of the MLP neurons in kept layers that is removed; None if MLP neurons are not pruned."""
        return next((1 - sum(k.kept) / sum(k.dense) for k in self.kinds if k.kind == "mlp"), None)

    @property
    def warning(self) -> str:
        """A warning where more than half of the parameters are removed; otherwise empty."""
        left = self.target_params if self.provisional else self.params
        if 2 * left >= self.dense_params:
            return ""
        widths = "" if self.provisional else "; " + ", ".join(k.describe() for k in self.kinds)
        ratio = self.dense_width and self.exact_width is not None and self.asked.startswith("mlp_ratio")
        hint = " mlp_ratio is kept width / hidden size, not a share: see pruning_ratio." if ratio else ""
        return (
            f"{self.asked} removes {1 - left / self.dense_params:.1%} of the parameters, more than half: "
            f"{self.dense_params:,} -> {left:,}{widths}.{hint}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures, for reports."""
        return {
            "asked": self.asked,
            "width": self.width,
            "dense_width": self.dense_width,
            "exact_width": self.exact_width,
            "dense_params": self.dense_params,
            "target_params": self.target_params,
            "params": self.params,
            "removed_share": self.removed_share,
            "removed_width_share": self.removed_width_share,
            "kinds": {k.kind: {"dense": list(k.dense), "kept": list(k.kept)} for k in self.kinds},
            "removed_layers": list(self.removed_layers),
        }

    def describe(self) -> str:
        """Returns the target and the result, for parameters and units, in one line."""
        if self.provisional:
            return (
                f"{self.asked}: parameters {self.dense_params:,} -> about {self.target_params:,}; the width of "
                "each layer follows from the scores"
            )
        parts = []
        for kind in self.kinds:
            parts.append(kind.describe())
            if kind.kind == "mlp":
                exact = "" if self.exact_width is None else f"exact {self.exact_width:.2f}; "
                parts[-1] += f" ({exact}{self.removed_width_share:.2%} removed)"
        return (
            f"{self.asked}: parameters {self.dense_params:,} -> {self.params:,} (target {self.target_params:,}; "
            f"{self.removed_share:.2%} removed), {', '.join(parts)}{self.note and f'; {self.note}'}"
        )


def common(widths: Sequence[int]) -> int | None:
    """Returns the value that all widths share, or None if they differ."""
    return widths[0] if len(set(widths)) == 1 else None


def _listed(widths: Sequence[int]) -> str:
    one = common(widths)
    return f"{min(widths)} to {max(widths)}" if one is None else str(one)


def target_params(budget: Budget, inventory: Inventory) -> int:
    """Returns the number of parameters that a budget asks for.

    Args:
        budget: A budget that the allocation does not replace.
        inventory: The groups of the dense model. ``intermediate_size`` and ``mlp_ratio`` need MLPs of one width.

    Example:
        >>> from hfprune.plan import Group
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4)
        >>> [target_params(b, inventory) for b in (Budget(pruning_ratio=0.25), Budget(intermediate_size=6))]
        [150, 160]
    """
    if budget.pruning_ratio is not None:
        return round(inventory.dense_params * (1 - budget.pruning_ratio))
    if budget.target_params is not None:
        return budget.target_params
    width = budget.intermediate_size
    if width is None:
        assert budget.mlp_ratio is not None
        assert inventory.hidden_size is not None
        width = int(inventory.hidden_size * budget.mlp_ratio)  # truncated, as in the HFPrune script
    return inventory.params([width] * len(inventory.groups))


def check_reach(
    asked: str, budget: Budget, inventory: Inventory, target: int, allot: Callable[[int], Allotment]
) -> Allotment:
    """Returns the allotment for ``target``.

    Args:
        asked: The budget, with units and allocation, as the user wrote it.
        budget: The budget.
        inventory: The groups of the dense model.
        target: The parameter count that the budget asks for.
        allot: Target parameter count -> allotment.

    Raises:
        ConfigError: Fewer parameters are asked for than the units can leave, or no unit would be removed. The message
            gives the limit in the terms of the budget.
    """
    dense, least = inventory.dense_params, allot(0)
    smallest = inventory.params_of(least)
    problem = f"the units allow {smallest:,} to {dense:,} parameters"
    if smallest == dense:
        problem = "no unit can be removed" + (f" with round_to={budget.round_to}" if budget.round_to > 1 else "")
    elif target < smallest:
        problem += f"; {_limit(budget, inventory, least, most_removed=True)}"
    else:
        found = allot(min(target, dense))
        if target < dense and inventory.params_of(found) < dense:
            return found
        removal = 1
        while inventory.params_of(found := allot(dense - removal)) == dense:
            removal *= 2
        problem += f"; {_limit(budget, inventory, found, most_removed=False)}"
    raise ConfigError(f"{asked} is impossible here: {problem}.")


def _limit(budget: Budget, inventory: Inventory, allotment: Allotment, *, most_removed: bool) -> str:
    """Returns the largest or smallest possible value of the budget: the one that ``allotment`` corresponds to."""
    params, width = inventory.params_of(allotment), allotment.widths[0]
    share = 1 - params / inventory.dense_params
    if budget.pruning_ratio is not None:
        value = f"{int(share * 1e4) / 1e4:.4f}" if most_removed else f"{share:.2g}"
        return f"the {'largest' if most_removed else 'smallest'} possible `pruning_ratio` is {value}"
    name, value, fact, dense = "target_params", str(params), "", inventory.groups[0].num_units
    if budget.intermediate_size is not None:
        name, value = "intermediate_size", str(width)
    elif budget.mlp_ratio is not None:
        name, hidden = "mlp_ratio", inventory.hidden_size or 1
        value = f"{width / hidden:.4f}"
        fact = f"`mlp_ratio` is kept width / hidden size ({hidden}), {dense / hidden:.4f} for the dense model; "
    if name != "target_params":
        fact = f"the dense MLPs are {dense} wide; {fact}"
    return f"{fact}the {'smallest' if most_removed else 'largest'} possible `{name}` is {value}"
