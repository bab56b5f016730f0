"""``round_to="auto"``: the coarsest width that fast kernels and quantised files like, where it costs little."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from hfprune.allocation.budget import ResolvedBudget
from hfprune.plan import Budget
from hfprune.utils.errors import ConfigError

RoundTo = int | Literal["auto"]

STEPS = (256, 128, 64)
"""Multiples that are tried, the coarsest first: k-quants read rows of 256, tensor cores and splits want 128 or 64."""
TOLERANCE = 0.03
"""Share of the removed parameters by which a rounded width may miss the budget."""


def rounding(round_to: RoundTo) -> dict[str, Any]:
    """Returns the arguments of :class:`hfprune.plan.Budget` for a number or ``auto``.

    >>> rounding(64), rounding("auto")
    ({'round_to': 64}, {'auto_round': True})

    Raises:
        ConfigError: It is another word.
    """
    if round_to == "auto":
        return {"auto_round": True}
    if not isinstance(round_to, int):
        raise ConfigError(f"round_to={round_to!r} is neither a number nor 'auto'.")
    return {"round_to": round_to}


def auto_rounded(
    budget: Budget, resolve: Callable[[Budget], ResolvedBudget], *, shapes: Callable[[Budget], ResolvedBudget]
) -> ResolvedBudget:
    """Returns the budget, resolved with the largest of 256, 128 and 64 that misses it by at most 3 %, else exactly.

    Args:
        budget: With ``auto_round``.
        resolve: Resolves a budget with a ``round_to`` of its own.
        shapes: The same from shapes alone, so that the choice is the same before and after calibration.

    Raises:
        ConfigError: The budget is out of reach with every width.
    """
    exact = shapes(replace(budget, auto_round=False))
    step = next((step for step in STEPS if _fits(budget, step, exact, shapes)), 1)
    chosen = replace(budget, auto_round=False, round_to=step)
    found = resolve(chosen)
    asked = found.asked.replace(chosen.describe(), budget.describe(), 1)
    note = _note(step, exact, found)
    return replace(found, asked=asked, note="; ".join(part for part in (found.note, note) if part))


def _fits(budget: Budget, step: int, exact: ResolvedBudget, shapes: Callable[[Budget], ResolvedBudget]) -> bool:
    dense = [width for kind in exact.kinds if kind.kind == "mlp" for width in kind.dense]
    if not dense or step >= min(dense):
        return False
    try:
        found = shapes(replace(budget, auto_round=False, round_to=step))
    except ConfigError:  # out of reach with such coarse widths: finer ones may do
        return False
    return abs(found.params - exact.target_params) <= TOLERANCE * (exact.dense_params - exact.target_params)


def _note(step: int, exact: ResolvedBudget, found: ResolvedBudget) -> str:
    """Returns what was chosen in place of which width, empty where no width is rounded."""
    if all(kind.kind != "mlp" for kind in exact.kinds):
        return ""
    if step == 1:
        return f"round_to auto: no multiple of {STEPS[-1]} is within {TOLERANCE:.0%} of the budget, the width is exact"
    if exact.width is None or found.width is None:
        return f"round_to auto: MLP widths are multiples of {step}"
    return f"round_to auto: MLP width {found.width}, a multiple of {step}, in place of {exact.width}, the exact one"
