"""From what the user asked for to a kept width, exactly (methods section 8)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hfprune.errors import ConfigError
from hfprune.types import Budget, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBudget:
    """A budget turned into one kept width for every layer, and what it means in parameters.

    Attributes:
        asked: The budget in the user's words.
        width: Kept units per layer.
        dense_width: Units per layer of the dense model.
        exact_width: The width that meets the target before rounding.
        dense_params: Parameters of the dense model, tied weights once.
        target_params: Parameters that were asked for.
        params: Parameters that ``width`` gives.
    """

    asked: str
    width: int
    dense_width: int
    exact_width: float
    dense_params: int
    target_params: int
    params: int

    @property
    def removed_share(self) -> float:
        """Share of all parameters that goes."""
        return 1 - self.params / self.dense_params

    @property
    def removed_width_share(self) -> float:
        """Share of MLP neurons that goes."""
        return 1 - self.width / self.dense_width

    def to_dict(self) -> dict[str, float | int | str]:
        """Returns all figures, for reports."""
        return asdict(self) | {
            "removed_share": self.removed_share,
            "removed_width_share": self.removed_width_share,
        }

    def describe(self) -> str:
        """Returns target and achieved, for parameters and MLP width, in one line."""
        return (
            f"{self.asked}: parameters {self.dense_params:,} -> {self.params:,} (target {self.target_params:,}; "
            f"{self.removed_share:.2%} removed), MLP width {self.dense_width} -> {self.width} (exact "
            f"{self.exact_width:.2f}; {self.removed_width_share:.2%} removed)"
        )


def resolve(
    budget: Budget, groups: Sequence[Group], costs: Sequence[int], *, dense_params: int, hidden_size: int
) -> ResolvedBudget:
    """Returns the uniform width that meets ``budget``.

    k* = I - r * P / sum of unit costs over layers, rounded to the nearest multiple of ``round_to``.

    Args:
        budget: What was asked.
        groups: The groups of the dense model, all of the same width.
        costs: Parameters that one unit of each group owns.
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
    target = dense_params - (dense - exact) * per_unit
    return ResolvedBudget(
        asked=budget.describe(),
        width=width,
        dense_width=dense,
        exact_width=exact,
        dense_params=dense_params,
        target_params=round(target),
        params=dense_params - (dense - width) * per_unit,
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
