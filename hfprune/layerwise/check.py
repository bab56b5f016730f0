"""What goes through the layers one by one, and what it does not go with."""

from collections.abc import Sequence
from typing import Any

from hfprune.allocation import Allocation, Inventory
from hfprune.compensation import Compensation
from hfprune.criteria import Criterion, LayerwiseCriterion
from hfprune.errors import ConfigError

_REFUSED = (
    ("blocks", "none may go"),
    ("channels", "hidden channels go through all of them"),
    ("experts", "no one projection reads experts"),
)


def check_together(
    criterion: Criterion,
    compensation: Compensation | None,
    units: Sequence[str],
    allocation: Allocation | None,
    inventory: Inventory | None,
    *,
    model: Any,
) -> None:
    """Raises ``ConfigError`` when units or weights are to be found layer by layer and units or allocation forbid it.

    Args:
        criterion: How units are chosen.
        compensation: How weights are fitted.
        units: Unit kinds.
        allocation: How the budget is spent.
        inventory: The groups, None where they are not known yet.
        model: The dense model, or one with its shapes; read where there is an inventory.
    """
    if compensation is None and not isinstance(criterion, LayerwiseCriterion):
        return
    for name, why in _REFUSED:
        if name in units:
            raise ConfigError(
                f"{type(compensation or criterion).__name__} goes through the layers one by one, and {why}: leave "
                f"'{name}' out of the units."
            )
    if compensation is not None and compensation.needs_bias and inventory is not None:
        readers = {group.name: group.inputs()[0].module for group in inventory.groups}
        without = [name for name, module in readers.items() if model.get_submodule(module).bias is None]
        if without:
            raise ConfigError(
                f"{type(compensation).__name__} needs projections with a bias, and {readers[without[0]]} has none. "
                "LeastSquares and OutputRegression need none."
            )
    waits = allocation is not None and inventory is not None and allocation.needs_scores(inventory)
    if isinstance(criterion, LayerwiseCriterion) and waits:
        raise ConfigError(
            f"{type(criterion).__name__} scores a layer when those before it are pruned: {allocation} needs all scores "
            "beforehand."
        )
