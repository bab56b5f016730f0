"""Style of the figures: the colour-blind safe palette of Okabe and Ito (2008), light grids, plain labels."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

INK, MUTED = "#1F2328", "#5F6570"
BLUE, RED, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
SERIES = tuple(zip((BLUE, RED, GREEN, PURPLE, ORANGE, SKY), "os^DvP", strict=True))
"""Colour and marker of the first six series; the next ones have the same with broken lines."""

WIDTH, NARROW = 6.4, 3.8
"""Inches, for a desk and for a phone."""
MOST_TICKS = 16

_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10,
    "axes.edgecolor": "#9AA1AB",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": "#9AA1AB",
    "ytick.color": "#9AA1AB",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "hfprune",
}


@contextmanager
def styled() -> Iterator[None]:
    """Uses the house style inside the block instead of the user's matplotlibrc."""
    with style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def stage_color(name: str, index: int) -> str:
    """Returns the colour of a stage: the same in every figure."""
    known = {"dense": MUTED, "pruned": ORANGE, "recovered": BLUE, "dense_tuned": GREEN}
    return known.get(name, SERIES[index % len(SERIES)][0])


def legend_columns(labels: Iterable[str], width: float, *, most: int = 6) -> int:
    """Returns how many legend entries fit side by side into ``width`` inches."""
    names = list(labels)
    longest = max(map(len, names), default=0)
    return max(1, min(most, len(names), int(width / (0.6 + 0.085 * longest))))


def short(value: float, position: int | None = None) -> str:
    """Returns an axis label.

    >>> short(134_000_000), short(1500), short(0.25)
    ('134 M', '1,500', '0.25')
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent_label(value: float, position: int | None = None) -> str:
    """Returns the axis label of a share.

    >>> percent_label(0.6), percent_label(0.425)
    ('60 %', '42.5 %')
    """
    return f"{100 * value:.4g} %"


def layer_labels(names: Sequence[str]) -> tuple[str, list[str]]:
    """Returns what groups are called together, and apart: their numbers where they differ in nothing else.

    >>> layer_labels(["model.layers.0.mlp", "model.layers.1.mlp"])
    ('layer', ['0', '1'])
    """
    numbers = [re.findall(r"\d+", name) for name in names]
    if len({re.sub(r"\d+", "#", name) for name in names}) == 1 and all(len(number) == 1 for number in numbers):
        return "layer", [number[0] for number in numbers]
    return "group", list(names)


def layer_ticks(axes: Axes, names: Sequence[str], axis: Axis, *, most: int = MOST_TICKS) -> None:
    """Labels ``axis`` with groups, as many of them as can be read."""
    title, labels = layer_labels(names)
    step = -(-len(names) // most)
    axis.set_major_locator(FixedLocator(list(range(0, len(names), step))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: labels[round(value)] if 0 <= value < len(labels) else ""))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(title)
    if axis is axes.xaxis and title == "group":
        axes.tick_params(axis="x", labelrotation=90)
