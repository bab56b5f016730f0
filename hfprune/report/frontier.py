"""Frontier: quality of the models of a sweep against their size and speed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hfprune.report.data import QUANTITIES, FrontierPoint, ReportData, look_up, number
from hfprune.report.style import (
    INK,
    MUTED,
    NARROW,
    SERIES,
    WIDTH,
    legend_columns,
    new_figure,
    percent_label,
    short,
    styled,
)

_LABELS = {"perplexity": "perplexity", "kl": "KL to dense (nats/token)", "accuracy": "zero-shot accuracy"}
_STEPS = ((4, [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0]), (60, [1.0, 2.0, 5.0]))
"""Range of a logarithmic axis -> where within a decade it is labelled."""
X_LABELS = {"parameters": "parameters", "latency_ms": "prefill time (ms)"}


def frontier(data: ReportData, *, narrow: bool = False) -> Figure:
    """Returns quality against size, and against time where it was measured: one panel per quantity, a line per series.

    The dense model, from a point of series ``dense`` or else from the stage of that name, is a star and a dashed line.
    """
    dense = dense_point(data)
    rows = [x for x in X_LABELS if any(drawn(p, x, q) for p in data.frontier for q in QUANTITIES)]
    columns = [q for q in QUANTITIES if any(drawn(p, x, q) for p in data.frontier for x in rows)]
    names = list(dict.fromkeys(p.series for p in data.frontier if p.series != "dense"))
    panels = [(x, quantity) for x in rows for quantity in columns]
    with styled():
        if narrow:
            figure = new_figure(NARROW, 2.5 * len(panels) + 0.5)
        else:
            figure = new_figure(3.35 * len(columns) if len(columns) > 1 else WIDTH, 2.9 * len(rows) + 0.4)
        grid = figure.subplots(*((len(panels), 1) if narrow else (len(rows), len(columns))), squeeze=False)
        for axes, (x, quantity) in zip(grid.flat, panels, strict=True):
            for index, name in enumerate(names):
                points = [p for p in data.frontier if p.series == name and drawn(p, x, quantity)]
                _frontier_line(axes, points, x, quantity, index)
            wide = is_wide(data.frontier, quantity)
            if dense is not None and not wide:  # a KL of 0 has no logarithm
                _frontier_dense(axes, dense, x, quantity)
            _frontier_axes(axes, x, quantity, logarithmic=wide or quantity == "perplexity")
        handles = {
            label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        per_row = legend_columns(handles, figure.get_size_inches()[0], most=4)
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=per_row)
    return figure


def drawn(point: FrontierPoint, x: str, quantity: str) -> bool:
    """Returns whether a point has finite values for both axes, and above 0 where the axis is logarithmic."""
    values = [number(getattr(point, name)) for name in (x, quantity)]
    known = all(value is not None and math.isfinite(value) for value in values)
    return known and (quantity != "perplexity" or getattr(point, quantity) > 0)


def dense_point(data: ReportData) -> FrontierPoint | None:
    """Returns the dense model among the models of a sweep, or as a stage of the run."""
    point = next((point for point in data.frontier if point.series == "dense"), None)
    stage = data.stages.get("dense")
    if point is not None or stage is None:
        return point
    parameters = number(stage.get("parameters"))
    return FrontierPoint(
        label="dense",
        series="dense",
        parameters=None if parameters is None else int(parameters),
        latency_ms=number(look_up(stage, "latency", "prefill_ms")),
        perplexity=number(look_up(stage, "perplexity", "value")),
        kl=number(look_up(stage, "fidelity", "kl")),
        accuracy=number(look_up(stage, "zero_shot", "average")),
    )


def _frontier_line(axes: Axes, points: Sequence[FrontierPoint], x: str, quantity: str, index: int) -> None:
    if not points:
        return
    points = sorted(points, key=lambda p: float(getattr(p, x)))
    color, marker = SERIES[index % len(SERIES)]
    axes.errorbar(
        [getattr(p, x) for p in points],
        [getattr(p, quantity) for p in points],
        xerr=_errors(points, x),
        yerr=_errors(points, quantity),
        color=color,
        marker=marker,
        linestyle="-" if index < len(SERIES) else "--",
        elinewidth=1.0,
        capsize=2.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=points[0].series,
    )


def _errors(points: Sequence[FrontierPoint], name: str) -> Any:
    """Returns distances [2, points] down to the lowest and up to the highest value; None when no point has them."""
    if not any(name in p.spread for p in points):
        return None
    rows = []
    for p in points:
        value = float(getattr(p, name))
        low, high = p.spread.get(name, (value, value))
        rows.append((max(0.0, value - low), max(0.0, high - value)))
    return np.array(rows).T


def _frontier_dense(axes: Axes, dense: FrontierPoint, x: str, quantity: str) -> None:
    value = number(getattr(dense, quantity))
    if value is None or not math.isfinite(value):
        return
    axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    if drawn(dense, x, quantity):
        axes.plot(
            [float(getattr(dense, x))], [value], "*", color=INK, markersize=11, label="dense", zorder=4, clip_on=False
        )


WIDE = 30.0
"""Ratio of the largest to the smallest KL from which its axis is logarithmic."""


def is_wide(points: Sequence[FrontierPoint], quantity: str) -> bool:
    """Returns whether a linear axis would press the smaller values of ``quantity`` onto one line.

    That is so for KL where a baseline has collapsed. The dense model, which has a KL of 0, does not count.
    """
    if quantity != "kl":
        return False
    found = (number(getattr(p, quantity)) for p in points if p.series != "dense")
    values = [value for value in found if value is not None and math.isfinite(value) and value > 0]
    return bool(values) and max(values) >= WIDE * min(values)


def _frontier_axes(axes: Axes, x: str, quantity: str, *, logarithmic: bool) -> None:
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel(_LABELS[quantity])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if x == "parameters":
        axes.xaxis.set_major_formatter(FuncFormatter(short))
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        steps = next((labelled for ratio, labelled in _STEPS if high / low < ratio), [1.0])
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    elif quantity == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(percent_label))
    else:
        axes.set_ylim(bottom=0)
