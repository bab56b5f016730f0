"""Which method of a sweep to take: the lowest KL at each ratio, and what cannot be distinguished from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune.sweep.grid import Method

RECIPE_FILE = "recommended.yaml"
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a caller runs the recommended method.

    Attributes:
        config: Returns the configuration of a run by a method at a ratio, which is written to ``recommended.yaml``.
        command: What runs that file, for the tables.
    """

    config: Callable[[Method, float], str]
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best method at one ratio.

    Attributes:
        pruning_ratio: Share of all parameters removed.
        method: The method with the lowest KL.
        kl: Its mean KL to the dense model, nats per token.
        alike: Methods whose KL is within the error of the difference.
    """

    pruning_ratio: float
    method: str
    kl: float
    alike: tuple[str, ...] = ()

    def text(self, name: str) -> str:
        """Returns the choice as a sentence; ``name`` is that of the evaluation text.

        >>> Choice(pruning_ratio=0.2, method="entropy", kl=0.5, alike=("norm",)).text("wiki")
        'At 20% entropy has the lowest KL to the dense model on wiki: 0.5000 nats/token. Not distinguishable: norm.'
        """
        first = f"At {self.pruning_ratio:.0%} {self.method} has the lowest KL to the dense model on {name}"
        rest = f" Not distinguishable: {', '.join(self.alike)}." if self.alike else ""
        return f"{first}: {self.kl:.4f} nats/token.{rest}"


def choices(rows: Sequence[Row], text: str, errors: Mapping[tuple[str, float], float]) -> list[Choice]:
    """Returns the best method of every ratio.

    Two methods are not distinguishable where their mean KLs differ by less than two standard errors of the difference.

    Args:
        rows: Rows of the sweep's table.
        text: The evaluation text that decides.
        errors: (method, ratio) -> standard error of the mean KL, nats per token; 0 where it is not known.

    >>> rows = [{"method": m, "pruning_ratio": 0.2, "t_kl": kl} for m, kl in (("a", 0.5), ("b", 0.52), ("c", 0.9))]
    >>> choices(rows, "t", {("a", 0.2): 0.01, ("b", 0.2): 0.01, ("c", 0.2): 0.01})
    [Choice(pruning_ratio=0.2, method='a', kl=0.5, alike=('b',))]
    """
    found = []
    for ratio in dict.fromkeys(row["pruning_ratio"] for row in rows if row["pruning_ratio"] is not None):
        values = {
            row["method"]: row[f"{text}_kl"]
            for row in rows
            if row["pruning_ratio"] == ratio and math.isfinite(row.get(f"{text}_kl", math.nan))
        }
        if not values:
            continue
        best = min(values, key=lambda method: values[method])
        own = errors.get((best, ratio), 0.0)
        alike = tuple(
            method
            for method, value in values.items()
            if method != best and value - values[best] < 2 * math.hypot(own, errors.get((method, ratio), 0.0))
        )
        found.append(Choice(pruning_ratio=ratio, method=best, kl=values[best], alike=alike))
    return found


def kl_error(cells: Sequence[Mapping[str, Any]], text: str) -> float:
    """Returns the standard error of the mean KL over the cells of a method, nats per token.

    Seeds share the evaluation windows: their error is that of one cell, plus that of the seeds' spread.

    Args:
        cells: Figures of the method's cells at one ratio, one per seed.
        text: The evaluation text.
    """
    found = [cell["texts"][text]["fidelity"] for cell in cells]
    windows = [float(one["kl_stderr"]) for one in found if isinstance(one.get("kl_stderr"), int | float)]
    kls = [float(one["kl"]) for one in found if isinstance(one.get("kl"), int | float)]
    spread = 0.0
    if len(kls) > 1:
        mean = math.fsum(kls) / len(kls)
        spread = math.sqrt(math.fsum((kl - mean) ** 2 for kl in kls) / (len(kls) - 1) / len(kls))
    return math.hypot(max(windows, default=0.0), spread)
