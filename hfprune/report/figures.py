"""Figures of a report, drawn by matplotlib without pyplot; the same data give the same bytes."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hfprune.report.data import QUANTITIES, ReportData, look_up, number, task_figures
from hfprune.report.frontier import X_LABELS, drawn, frontier
from hfprune.report.style import (
    BLUE,
    INK,
    MUTED,
    NARROW,
    RED,
    WIDTH,
    layer_labels,
    layer_ticks,
    legend_columns,
    new_figure,
    percent_label,
    short,
    stage_color,
    styled,
)
from hfprune.utils.files import write_bytes

DPI = 150
COLUMNS = 256

Values = np.ndarray[tuple[int], np.dtype[np.float64]]


def importance_heat_map(data: ReportData, *, narrow: bool = False) -> Figure:
    """Returns scores over rank and layer: every layer's units by falling score, with the edge of what was kept."""
    names = list(data.importance)
    image = np.stack([binned(data.importance[name]) for name in names])
    low, high = np.quantile(image[image > 0], [0.002, 0.998])
    with styled():
        figure = new_figure(NARROW if narrow else WIDTH, min(6.0, 2.4 + 0.06 * len(names)))
        axes = figure.subplots()
        axes.grid(False)
        shown = axes.imshow(
            np.log10(np.maximum(image, low)),
            extent=(0, 100, len(names) - 0.5, -0.5),
            aspect="auto",
            interpolation="none",
            cmap=colormaps["cividis"],
            vmin=math.log10(low),
            vmax=math.log10(high),
        )
        if any(name in data.kept for name in names):
            _draw_edge(axes, [_kept_share(data, name) for name in names])
        axes.set_xlim(0, 100)
        axes.set_xlabel("units of the layer, highest score first (%)")
        layer_ticks(axes, names, axes.yaxis)
        figure.colorbar(shown, ax=axes, pad=0.02, aspect=28, label="log₁₀ of the score")
    return figure


def binned(scores: Sequence[float], columns: int = COLUMNS) -> Values:
    """Returns the scores by falling value in at most ``columns`` equal parts, the mean of each; ones not finite last.

    A group with fewer units than columns repeats them, so that all rows have one length.
    """
    values = np.asarray(scores, dtype=np.float64)
    values = np.sort(np.where(np.isfinite(values), values, 0.0))[::-1]
    edges = np.arange(columns + 1) * len(values) // columns
    return np.array([values[a : max(b, a + 1)].mean() for a, b in pairwise(edges)])


def _draw_edge(axes: Axes, shares: Sequence[float]) -> None:
    x = np.repeat(np.array(shares) * 100, 2)
    y = np.repeat(np.arange(len(shares) + 1) - 0.5, 2)[1:-1]
    axes.plot(x, y, color="white", linewidth=3.2, solid_capstyle="butt")
    axes.plot(x, y, color=RED, linewidth=1.6, solid_capstyle="butt", label="edge of what was kept")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _kept_share(data: ReportData, name: str) -> float:
    kept, dense = data.kept.get(name, (0, 0))
    return kept / dense if dense else math.nan


def kept_share(data: ReportData, *, narrow: bool = False) -> Figure:
    """Returns one bar per group: the share of its units that was kept; the line is the share of all units."""
    names = list(data.kept)
    total = sum(kept for kept, _ in data.kept.values()) / sum(dense for _, dense in data.kept.values())
    with styled():
        figure = new_figure(NARROW if narrow else WIDTH, 2.8 if layer_labels(names)[0] == "layer" else 4.2)
        axes = figure.subplots()
        axes.grid(False, axis="x")
        axes.bar(range(len(names)), [_kept_share(data, name) for name in names], color=BLUE, width=0.78)
        axes.axhline(total, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label=f"all units: {100 * total:.1f} %")
        axes.set_ylim(0, 1)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_ylabel("kept units")
        axes.yaxis.set_major_formatter(FuncFormatter(percent_label))
        layer_ticks(axes, names, axes.xaxis, most=8 if narrow else 16)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    return figure


def convergence(data: ReportData, *, narrow: bool = False) -> Figure:
    """Returns the share of the finally kept units that were chosen after so many calibration tokens."""
    points = sorted(data.convergence, key=lambda p: p.tokens)
    tokens, overlap = [p.tokens for p in points], [p.overlap for p in points]
    chance = chance_overlap(data)
    with styled():
        figure = new_figure(NARROW if narrow else WIDTH, 3.0)
        axes = figure.subplots()
        axes.plot(tokens, overlap, color=BLUE, marker="o", label="units chosen so far", clip_on=False, zorder=3)
        if chance is not None:
            label = f"by chance: {100 * chance:.1f} %"
            axes.axhline(chance, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label=label)
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
        if 0 < tokens[0] < tokens[-1] / 30:
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 6))
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        floor = min([*overlap, *([] if chance is None else [chance])])
        axes.set_ylim(max(0.0, math.floor(floor * 20 - 0.5) / 20), 1.0)
        axes.set_xlabel("calibration tokens")
        axes.set_ylabel("overlap with the final choice")
        axes.yaxis.set_major_formatter(FuncFormatter(percent_label))
    return figure


def chance_overlap(data: ReportData) -> float | None:
    """Returns the overlap that units chosen at random would have on average; None when the kept ones are not known."""
    kept = sum(kept for kept, _ in data.kept.values())
    return sum(kept * kept / dense for kept, dense in data.kept.values()) / kept if kept else None


def training_curve(data: ReportData, *, narrow: bool = False) -> Figure:
    """Returns the losses of training and validation by optimizer step, with tokens on a second axis.

    A training loss that is not the cross-entropy has a panel of its own.
    """
    width = NARROW if narrow else WIDTH
    curves = {name: points for name, points in data.training.items() if points}
    apart = data.training_loss != "cross-entropy" and len(curves) > 1
    with styled():
        figure = new_figure(width, 5.2 if apart else 3.4)
        panels = list(figure.subplots(len(curves) if apart else 1, 1, sharex=True, squeeze=False)[:, 0])
        for index, (name, points) in enumerate(curves.items()):
            axes = panels[index if apart else 0]
            steps, losses = np.array([p[0] for p in points]), np.array([p[2] for p in points], dtype=np.float64)
            if name == "train":
                axes.plot(steps, losses, color=BLUE, linewidth=0.6, alpha=0.4)
                axes.plot(steps, smoothed(losses), color=BLUE, label="training")
            else:
                axes.plot(steps, losses, color=RED, marker="o", label=name, clip_on=False)
            axes.set_ylabel(f"{data.training_loss if name == 'train' else 'cross-entropy'} (nats/token)")
            axes.legend(loc="upper right")
        panels[-1].set_xlabel("optimizer steps")
        panels[-1].xaxis.set_major_locator(MaxNLocator(4 if narrow else 6, integer=True))
        _token_axis(panels[0], [point for points in curves.values() for point in points])
    return figure


def _token_axis(axes: Axes, points: Sequence[tuple[int, int, float]]) -> None:
    """Adds tokens on top of an axis of steps, where tokens were counted."""
    steps, tokens, _ = zip(*sorted({(0, 0, 0.0), *points}), strict=True)
    if not tokens[-1] or not steps[-1]:
        return
    rate = tokens[-1] / steps[-1]
    top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda count: count / rate))
    top.set_xlabel("tokens")
    top.xaxis.set_major_locator(MaxNLocator(4))
    top.xaxis.set_major_formatter(FuncFormatter(short))


def kl_by_position(data: ReportData, *, narrow: bool = False) -> Figure:
    """Returns KL to the dense model at every position of the windows: raw in thin, a moving average in bold lines."""
    with styled():
        figure = new_figure(NARROW if narrow else WIDTH, 3.0)
        axes = figure.subplots()
        for index, (name, values) in enumerate(kl_curves(data).items()):
            positions, color = np.arange(1, len(values) + 1), stage_color(name, index)
            axes.plot(positions, values, color=color, linewidth=0.6, alpha=0.4)
            axes.plot(positions, smoothed(values), color=color, linewidth=1.8, label=name)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.set_xlabel("position in the window (tokens)")
        axes.set_ylabel("KL to dense (nats/token)")
        columns = legend_columns(kl_curves(data), NARROW if narrow else WIDTH)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderaxespad=0.2)
    return figure


def kl_curves(data: ReportData) -> dict[str, Values]:
    """Returns stage -> KL at every position, NaN where it is not finite; the dense model itself is left out."""
    curves: dict[str, Values] = {}
    for name, stage in data.stages.items():
        by_position = look_up(stage, "fidelity", "kl_by_position")
        if name != "dense" and by_position:
            values = np.array([math.nan if (value := number(item)) is None else value for item in by_position])
            values[~np.isfinite(values)] = math.nan
            if np.isfinite(values).any():
                curves[name] = values
    return curves


def smoothing_window(count: int) -> int:
    """Returns the odd number of positions that a moving average takes in: about a 32nd of the curve."""
    return max(1, count // 32) | 1


def smoothed(values: Values) -> Values:
    """Returns the centred moving average; at the ends, and next to values that are not finite, over fewer values."""
    half, known = smoothing_window(len(values)) // 2, np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low, high = (np.clip(np.arange(len(values)) + step, 0, len(values)) for step in (-half, half + 1))
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def zero_shot(data: ReportData, *, narrow: bool = False) -> Figure:
    """Returns bars per task and stage, with standard errors."""
    figures, bars, gap = task_figures(data), 0.8, "\n" if narrow else "  "
    stages = [name for name in data.stages if any(name in row for row in figures.values())]
    height = bars / len(stages)
    with styled():
        figure = new_figure(NARROW if narrow else WIDTH, 0.9 + len(figures) * max(0.34, 0.13 * len(stages) + 0.08))
        axes = figure.subplots()
        axes.grid(False, axis="y")
        for index, stage in enumerate(stages):
            rows = [(y, *row[stage]) for y, row in enumerate(figures.values()) if stage in row]
            offset = (index + 0.5) * height - bars / 2
            axes.barh(
                [y + offset for y, _, _ in rows],
                [value for _, value, _ in rows],
                height=height * 0.92,
                color=stage_color(stage, index),
                label=stage,
                xerr=[0.0 if error is None else error for _, _, error in rows],
                error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 0},
            )
        axes.set_yticks(range(len(figures)), [f"{task}{gap}({metric})" for task, metric in figures])
        axes.set_ylim(len(figures) - 0.45, -0.55)
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(FuncFormatter(percent_label))
        axes.set_xlabel("accuracy")
        figure.legend(loc="outside upper right", ncols=legend_columns(stages, NARROW if narrow else WIDTH))
    return figure


_DRAW: dict[str, tuple[Callable[..., Figure], Callable[[ReportData], Any]]] = {
    "frontier": (
        frontier,
        lambda data: any(drawn(p, x, q) for p in data.frontier for x in X_LABELS for q in QUANTITIES),
    ),
    "importance_heat_map": (importance_heat_map, lambda data: _has_scores(data.importance)),
    "kept_share": (kept_share, lambda data: any(dense for _, dense in data.kept.values())),
    "training_curve": (
        training_curve,
        lambda data: any(math.isfinite(loss) for points in data.training.values() for *_, loss in points),
    ),
    "convergence": (convergence, lambda data: data.convergence),
    "kl_by_position": (kl_by_position, kl_curves),
    "zero_shot": (zero_shot, task_figures),
}


def _has_scores(importance: Mapping[str, Sequence[float]]) -> bool:
    filled = all(len(scores) for scores in importance.values())
    return filled and any(0 < score < math.inf for scores in importance.values() for score in scores)


def figures(data: ReportData, *, narrow: bool = False) -> dict[str, Figure]:
    """Returns name -> figure for those that there is data for; narrow ones can be read on a phone."""
    return {name: draw(data, narrow=narrow) for name, (draw, wanted) in _DRAW.items() if wanted(data)}


def to_bytes(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """Returns the image file's content; equal figures give equal bytes."""
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def save_figures(data: ReportData, folder: str | Path) -> list[Path]:
    """Writes every figure that there is data for as ``NAME.png`` and ``NAME.svg``; returns the paths."""
    folder = Path(folder)
    paths = []
    for name, figure in figures(data).items():
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            write_bytes(path, to_bytes(figure, kind))
            paths.append(path)
    return paths
