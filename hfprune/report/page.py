"""HTML page: the report as one self-contained file."""

import base64
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from hfprune.report import table
from hfprune.report.data import QUANTITIES, ReportData, look_up, number, task_figures
from hfprune.report.figures import chance_overlap, figures, kl_curves, smoothing_window, to_bytes
from hfprune.report.frontier import dense_point, drawn, is_wide
from hfprune.report.style import WIDTH
from hfprune.utils.files import write_text
from hfprune.utils.progress import duration

_TEMPLATE = "page.html.jinja"


def write_report(data: ReportData, path: str | Path) -> Path:
    """Writes the page to ``path`` in one step: the file is the old one or the new one, never half of it.

    Raises:
        OutputError: It could not be written.
    """
    path = Path(path)
    write_text(path, render(data))
    return path


def render(data: ReportData) -> str:
    """Returns the page: HTML with everything in it, figures as SVG in data URIs."""
    small = figures(data, narrow=True)
    shown = [
        {
            "name": name,
            "title": _TITLES[name],
            "alt": f"{_TITLES[name]}. The caption says what the figure shows.",
            "caption": _CAPTIONS[name](data),
            "source": _uri(figure),
            "narrow": _uri(small[name]),
            "wide": figure.get_size_inches()[0] > WIDTH,
        }
        for name, figure in figures(data).items()
    ]
    headings, models = table.models(data)
    return (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            data=data,
            sections=table.summary(data),
            timing=_timing(data),
            notes=table.notes(data),
            figures=shown,
            model_headings=headings,
            models=models,
            generation_stages=list(dict.fromkeys(stage for item in data.generations for stage in item.texts)),
        )
    )


def _timing(data: ReportData) -> list[tuple[str, str, str]]:
    """Returns phase, time and share of the whole time, the longest first."""
    total = sum(data.timing.values())
    ordered = sorted(data.timing.items(), key=lambda item: -item[1])
    return [(name, duration(seconds), table.percent(seconds / total)) for name, seconds in ordered if total]


def _uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(to_bytes(figure, "svg")).decode("ascii")


@functools.cache
def _environment() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _frontier(data: ReportData) -> str:
    parts = ["One line per method" + (", against size first, then against time." if _has_time(data) else ".")]
    if any(point.spread for point in data.frontier):
        parts.append("Error bars span the seeds.")
    if dense_point(data) is not None:
        parts.append("The star and the dashed line are the dense model.")
    parts.append("Lower perplexity and KL are better, and higher accuracy. The perplexity axis is logarithmic.")
    if is_wide(data.frontier, "kl"):
        parts.append("The KL axis is logarithmic, too, because the models differ by a factor of 30 or more.")
    left_out = [
        f"{point.label} ({QUANTITY_NAMES[q]} {table.words(value)})"
        for point in data.frontier
        for q in QUANTITIES
        if (value := number(getattr(point, q))) is not None and not math.isfinite(value)
    ]
    if left_out:
        parts.append(f"Not drawn: {', '.join(left_out)}.")
    return " ".join(parts)


def _has_time(data: ReportData) -> bool:
    return any(drawn(point, "latency_ms", q) for point in data.frontier for q in QUANTITIES)


def _importance(data: ReportData) -> str:
    text = "Each row is a layer, with its units sorted by falling score. Brighter units have higher scores."
    if not any(name in data.kept for name in data.importance):
        return text
    return f"{text} Units to the left of the line were kept, units to the right of it removed."


def _kept(data: ReportData) -> str:
    kept, dense = (sum(values) for values in zip(*data.kept.values(), strict=True))
    shares = [one / whole for one, whole in data.kept.values() if whole]
    spread = (
        "the same share in every layer"
        if max(shares) - min(shares) < 5e-4
        else f"from {table.percent(min(shares))} to {table.percent(max(shares))} by layer"
    )
    return f"{kept:,} of {dense:,} units were kept ({table.percent(kept / dense)}), {spread}."


def _convergence(data: ReportData) -> str:
    points = sorted(data.convergence, key=lambda p: p.tokens)
    within = next((p for p in points if p.overlap >= 0.95), None)
    text = "Share of the kept units that calibration would have chosen if it had stopped earlier."
    if within is not None:
        text += f" It reaches {table.percent(within.overlap)} after {within.tokens:,} of {points[-1].tokens:,} tokens."
    if chance_overlap(data) is not None:
        text += " The dashed line is the overlap of a random choice."
    return text


def _training(data: ReportData) -> str:
    points = max((points for points in data.training.values()), key=len)
    steps, tokens, _ = points[-1]
    text = f"Losses over {steps:,} optimizer steps" + (f" and {tokens:,} tokens." if tokens else ".")
    if data.training.get("train"):
        window = smoothing_window(len(data.training["train"]))
        text += f" Thin: each step; bold: moving average over {window} points." if window > 1 else ""
    if data.training_loss != "cross-entropy" and data.training.get("validation"):
        text += " The training loss is that of distillation, the validation loss is cross-entropy: they do not compare."
    return text


def _positions(data: ReportData) -> str:
    window = smoothing_window(max(len(values) for values in kl_curves(data).values()))
    text = (
        "KL divergence from the dense model's predictions at each position of the evaluation windows, mean over "
        "windows."
    )
    return f"{text} Thin: as measured; bold: moving average over {window} positions." if window > 1 else text


def _zero_shot(data: ReportData) -> str:
    averages = {name: number(look_up(stage, "zero_shot", "average")) for name, stage in data.stages.items()}
    known = ", ".join(f"{name} {table.percent(value)}" for name, value in averages.items() if value is not None)
    text = f"{len(task_figures(data))} tasks, each with its measure in brackets; error bars are one standard error."
    if any(metric == "pct_stereotype" for _, metric in task_figures(data)):
        text += " pct_stereotype measures a bias: more is not better."
    return f"{text} Average: {known}." if known else text


QUANTITY_NAMES = {"perplexity": "perplexity", "kl": "KL", "accuracy": "accuracy"}
_TITLES = {
    "frontier": "Quality against size",
    "importance_heat_map": "Importance of the units",
    "kept_share": "Kept units per layer",
    "convergence": "Convergence of the choice",
    "training_curve": "Training curve",
    "kl_by_position": "Distance to the dense model by position",
    "zero_shot": "Zero-shot tasks",
}
_CAPTIONS: dict[str, Callable[[ReportData], Any]] = {
    "frontier": _frontier,
    "importance_heat_map": _importance,
    "kept_share": _kept,
    "convergence": _convergence,
    "training_curve": _training,
    "kl_by_position": _positions,
    "zero_shot": _zero_shot,
}
