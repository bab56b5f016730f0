"""Resolves budgets: ratios, parameter counts and shares of units to widths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune.plan import UNIT_KINDS, Budget, Group
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KindWidths:
    """What stays of one kind of units.

    Attributes:
        kind: Unit kind.
        dense: Units per group of the dense model, of layers that stay.
        kept: Units that stay, in the same order.
    """

    kind: str
    dense: tuple[int, ...]
    kept: tuple[int, ...]

    def describe(self) -> str:
        """Returns dense and kept numbers, one where all groups have the same."""
        return f"{UNIT_KINDS[self.kind].label} {_listed(self.dense)} -> {_listed(self.kept)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBudget:
    """A budget turned into a kept width for every group, and what it means in parameters.

    Attributes:
        asked: The budget in the user's words.
        widths: Kept units per group; all of them for groups of layers that go as a whole.
        dense_widths: Units per group of the dense model.
        exact_width: The MLP width that meets the target before rounding; None where groups differ in width.
        dense_params: Parameters of the dense model, tied weights once.
        target_params: Parameters that were asked for.
        params: Parameters that ``widths`` gives.
        kinds: What stays by kind; empty where all groups are MLPs.
        removed_layers: Layers that go as a whole.
        provisional: Whether widths, or which layers go, wait for the scores.
        note: What limited the choice, in a few words.
    """

    asked: str
    widths: tuple[int, ...]
    dense_widths: tuple[int, ...]
    exact_width: float | None
    dense_params: int
    target_params: int
    params: int
    kinds: tuple[KindWidths, ...] = ()
    removed_layers: tuple[int, ...] = ()
    provisional: bool = False
    note: str = ""

    @property
    def by_kind(self) -> tuple[KindWidths, ...]:
        """What stays, by kind."""
        return self.kinds or (KindWidths(kind="mlp", dense=self.dense_widths, kept=self.widths),)

    @property
    def width(self) -> int | None:
        """Kept MLP width of every layer; None where layers differ, or no MLP neurons are among the units."""
        return next((common(k.kept) for k in self.by_kind if k.kind == "mlp"), None)

    @property
    def dense_width(self) -> int | None:
        """MLP width of every layer of the dense model; None as for ``width``."""
        return next((common(k.dense) for k in self.by_kind if k.kind == "mlp"), None)

    @property
    def removed_share(self) -> float:
        """Share of all parameters that goes."""
        return 1 - self.params / self.dense_params

    @property
    def removed_width_share(self) -> float | None:
        """Share of the MLP neurons, of layers that stay, that goes; None where they are no units."""
        return next((1 - sum(k.kept) / sum(k.dense) for k in self.by_kind if k.kind == "mlp"), None)

    @property
    def warning(self) -> str:
        """What has to be said loudly before anything is loaded: more than half of the parameters go. Else empty."""
        left = self.target_params if self.provisional else self.params
        if 2 * left >= self.dense_params:
            return ""
        widths = "" if self.provisional else "; " + ", ".join(k.describe() for k in self.by_kind)
        ratio = self.dense_width and self.exact_width is not None and self.asked.startswith("mlp_ratio")
        hint = " mlp_ratio is kept width / hidden size, not a share: see pruning_ratio." if ratio else ""
        return (
            f"{self.asked} removes {1 - left / self.dense_params:.1%} of the parameters, more than half: "
            f"{self.dense_params:,} -> {left:,}{widths}.{hint}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures, for reports."""
        found: dict[str, Any] = {
            "asked": self.asked,
            "width": self.width,
            "dense_width": self.dense_width,
            "exact_width": self.exact_width,
            "dense_params": self.dense_params,
            "target_params": self.target_params,
            "params": self.params,
            "removed_share": self.removed_share,
            "removed_width_share": self.removed_width_share,
        }
        if self.kinds:
            found["kinds"] = {k.kind: {"dense": list(k.dense), "kept": list(k.kept)} for k in self.kinds}
            found["removed_layers"] = list(self.removed_layers)
        return found

    def describe(self) -> str:
        """Returns target and achieved, for parameters and units, in one line."""
        if self.provisional:
            return (
                f"{self.asked}: parameters {self.dense_params:,} -> about {self.target_params:,}; what each layer "
                "keeps follows from the scores"
            )
        parts = [k.describe() for k in self.by_kind]
        if self.removed_width_share is not None:
            exact = "" if self.exact_width is None else f"exact {self.exact_width:.2f}; "
            number = next(i for i, k in enumerate(self.by_kind) if k.kind == "mlp")
            parts[number] += f" ({exact}{self.removed_width_share:.2%} removed)"
        return (
            f"{self.asked}: parameters {self.dense_params:,} -> {self.params:,} (target {self.target_params:,}; "
            f"{self.removed_share:.2%} removed), {', '.join(parts)}{self.note and f'; {self.note}'}"
        )


def common(widths: Sequence[int]) -> int | None:
    """Returns the one value that all widths have, None where they differ."""
    return widths[0] if len(set(widths)) == 1 else None


def _listed(widths: Sequence[int]) -> str:
    """Returns the one number, or the smallest and the largest."""
    one = common(widths)
    return f"{min(widths)} to {max(widths)}" if one is None else str(one)


def resolve(
    budget: Budget, groups: Sequence[Group], costs: Sequence[int], *, dense_params: int, hidden_size: int
) -> ResolvedBudget:
    """Returns the uniform width that meets ``budget``.

    k* = I - r * P / sum of unit costs over layers, rounded to the nearest multiple of ``round_to``.

    Args:
        budget: What was asked.
        groups: The groups of the dense model, all of the same width I.
        costs: Parameters that one unit of each group owns; no parameter belongs to units of two groups.
        dense_params: P, parameters of the dense model.
        hidden_size: For ``mlp_ratio``.

    Raises:
        ConfigError: The widths differ, or the budget asks for more than the MLPs hold or for nothing; the message gives
            the largest possible value.
    """
    dense = groups[0].num_units
    if any(group.num_units != dense for group in groups):
        raise ConfigError("The layers of this model differ in MLP width; uniform pruning needs one width for all.")
    per_unit = sum(costs)
    exact = _exact_width(budget, dense, per_unit, dense_params, hidden_size)
    width = round_width(exact, budget.round_to)
    if not budget.round_to <= width < dense:
        raise ConfigError(_impossible(budget, dense, per_unit, dense_params, hidden_size))
    return ResolvedBudget(
        asked=budget.describe(),
        widths=(width,) * len(groups),
        dense_widths=(dense,) * len(groups),
        exact_width=exact,
        dense_params=dense_params,
        target_params=round(dense_params - (dense - exact) * per_unit),
        params=dense_params - (dense - width) * per_unit,
    )


def resolve_shares(
    budget: Budget, groups: Sequence[Group], count: Callable[[Sequence[int]], int], *, dense_params: int
) -> ResolvedBudget:
    """Returns the widths that meet ``budget`` by removing the same share of every group, up to rounding.

    Args:
        budget: What was asked: ``pruning_ratio``, ``target_params``, or, for groups of one width,
            ``intermediate_size``.
        groups: The groups of the dense model; consecutive ones may share a matrix.
        count: Parameters of the model at given widths.
        dense_params: Parameters of the dense model.

    Raises:
        ConfigError: The budget is out of reach, or does not apply to these groups.
    """
    dense = [group.num_units for group in groups]

    def widths(share: float) -> list[int]:
        return [min(d, max(budget.round_to, round_width(d * (1 - share), budget.round_to))) for d in dense]

    if budget.pruning_ratio is not None:
        target = round(dense_params * (1 - budget.pruning_ratio))
    elif budget.target_params is not None:
        target = budget.target_params
    elif budget.intermediate_size is not None and common(dense) is not None:
        target = count([budget.intermediate_size] * len(dense))
    else:
        raise ConfigError(
            f"{budget.describe()}: the groups here have widths {sorted(set(dense))} and no hidden size; give "
            "--pruning_ratio or --target_params."
        )
    smallest = count(widths(1.0))
    if not smallest <= target < dense_params:
        raise ConfigError(
            f"{budget.describe()} is impossible here: the described groups can shrink the module from {dense_params:,} "
            f"to {smallest:,} parameters; the largest possible --pruning_ratio is {1 - smallest / dense_params:.4f}."
        )
    low, high = 0.0, 1.0  # the parameter count falls with the share
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if count(widths(middle)) > target else (low, middle)
    best = min((widths(low), widths(high)), key=lambda w: abs(count(w) - target))
    if best == dense:
        best = widths(high)
    return ResolvedBudget(
        asked=budget.describe(),
        widths=tuple(best),
        dense_widths=tuple(dense),
        exact_width=None,
        dense_params=dense_params,
        target_params=target,
        params=count(best),
    )


def round_width(exact: float, round_to: int) -> int:
    """Returns the multiple of ``round_to`` nearest to ``exact``; halves go up.

    >>> [round_width(7580.66, 1), round_width(7580.66, 128)]
    [7581, 7552]
    """
    return int(exact / round_to + 0.5) * round_to


def _exact_width(budget: Budget, dense: int, per_unit: int, dense_params: int, hidden_size: int) -> float:
    if budget.pruning_ratio is not None:
        return dense - budget.pruning_ratio * dense_params / per_unit
    if budget.target_params is not None:
        return dense - (dense_params - budget.target_params) / per_unit
    if budget.intermediate_size is not None:
        return float(budget.intermediate_size)
    assert budget.mlp_ratio is not None
    return float(int(hidden_size * budget.mlp_ratio))  # truncated, as the HFPrune script does


def _impossible(budget: Budget, dense: int, per_unit: int, dense_params: int, hidden_size: int) -> str:
    """Returns the message for a budget out of reach, with the values that are possible."""
    least, most = budget.round_to, (dense - 1) // budget.round_to * budget.round_to
    smallest_params = dense_params - (dense - least) * per_unit
    largest_params = dense_params - (dense - most) * per_unit
    facts = f"the model's MLPs are {dense} wide and hold {dense * per_unit / dense_params:.2%} of its parameters"
    if budget.pruning_ratio is not None:
        low, high = 1 - largest_params / dense_params, 1 - smallest_params / dense_params
        possible = f"the largest possible --pruning_ratio is {high:.4f}, the smallest {low:.2g}"
    elif budget.target_params is not None:
        possible = f"the largest possible --target_params is {largest_params}, the smallest {smallest_params}"
    elif budget.intermediate_size is not None:
        possible = f"the largest possible --intermediate_size is {most}, the smallest {least}"
    else:
        possible = (
            f"--mlp_ratio is kept width / hidden size ({hidden_size}), {dense / hidden_size:.4f} for the dense model; "
            f"the largest possible value is {most / hidden_size:.4f}"
        )
    return f"{budget.describe()} is impossible here: {facts}; {possible}."
