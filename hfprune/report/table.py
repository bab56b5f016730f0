"""Tables of a report: the figures of every stage with their change from the dense model, and the models of a sweep.

The HTML page, the terminal and Markdown files show the same rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.console import Console
from rich.markdown import Markdown
from rich.measure import Measurement
from rich.table import Table

from hfprune.report.data import FrontierPoint, ReportData, look_up, number, task_figures

APART = (
    "Speeds of the models were measured at separate moments and are not compared. An evaluation together with the "
    "dense model measures them in alternation."
)
ALTERNATED = "Speeds were measured in alternation with the dense model."
Change = Literal["ratio", "points", "none"]
"""How a figure is compared with the dense model's: as a factor, as a difference in percentage points, or not."""

NONE = "–"  # noqa: RUF001
_ASCII = str.maketrans({"–": "-", "−": "-", "×": "x"})  # noqa: RUF001


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure of one stage.

    Attributes:
        text: The figure.
        spread: Its error or range, or nothing.
        change: How it compares with the dense model, or nothing.
        alarming: Whether it is not a finite number.
    """

    text: str
    spread: str = ""
    change: str = ""
    alarming: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Rows under one heading; every row is a label and a cell per stage."""

    heading: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figure:
    """One kind of figure: where it is found, how it is written."""

    label: str
    paths: tuple[str, ...]
    text: Callable[[float], str]
    change: Change = "ratio"
    stderr: str = ""
    spread: str = ""
    alternated: Callable[[Mapping[str, Any]], float | None] = lambda measured: None
    """The ratio to dense of figures that are compared only where both models were timed in alternation."""


def _times(path: str, *, inverse: bool = False) -> Callable[[Mapping[str, Any]], float | None]:
    """Returns a function that reads a ratio of times, or with ``inverse`` of speeds."""

    def read(measured: Mapping[str, Any]) -> float | None:
        ratio = number(look_up(measured, "latency", path))
        return 1 / ratio if inverse and ratio else ratio

    return read


def count(value: float) -> str:
    """Returns a whole number with separators, and a number that is not finite as a word.

    >>> count(134515008.0), count(float("inf"))
    ('134,515,008', 'infinite')
    """
    return f"{value:,.0f}" if math.isfinite(value) else words(value)


def words(value: float) -> str:
    """Returns how a number that is not finite is written."""
    return "NaN" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"


def decimals(places: int) -> Callable[[float], str]:
    """Returns a function that writes a number with ``places`` decimals, from 1e7 on in powers of ten.

    >>> decimals(2)(29.189), decimals(2)(3.2e9), decimals(4)(float("nan"))
    ('29.19', '3.20e+09', 'NaN')
    """

    def text(value: float) -> str:
        if not math.isfinite(value):
            return words(value)
        return f"{value:,.{places}f}" if abs(value) < 1e7 else f"{value:.2e}"

    return text


def percent(value: float) -> str:
    """Returns a share.

    >>> percent(0.2)
    '20.0 %'
    """
    return f"{100 * value:.1f} %" if math.isfinite(value) else words(value)


def mebibytes(value: float) -> str:
    """Returns bytes as MiB.

    >>> mebibytes(3 * 2**20)
    '3.0 MiB'
    """
    return f"{value / 2**20:,.1f} MiB" if math.isfinite(value) else words(value)


def _width(value: float) -> str:
    return decimals(1)(value).removesuffix(".0")


def _giga(value: float) -> str:
    return f"{value / 1e9:,.2f} G" if math.isfinite(value) else words(value)


def _known(label: str, name: str, text: Callable[[float], str], change: Change = "none") -> _Figure:
    return _Figure(label=label, paths=(f"fidelity.{name}",), text=text, change=change, stderr=f"fidelity.{name}_stderr")


_SIZE = (
    _Figure(label="Parameters", paths=("parameters",), text=count),
    _Figure(label="MLP width", paths=("width",), text=count),
    _Figure(label="MLP width, mean of the layers", paths=("mean_width",), text=_width, spread="widths"),
    _Figure(label="Size on disk", paths=("size.disk_bytes",), text=mebibytes),
    _Figure(label="Size of the weights", paths=("size.bytes", "size.weight_bytes"), text=mebibytes),
    _Figure(label="Multiply-accumulates", paths=("size.macs",), text=_giga),
    _Figure(label="Key-value cache", paths=("size.kv_cache_bytes",), text=mebibytes),
)
_QUALITY = (
    _Figure(label="Perplexity", paths=("perplexity.value",), text=decimals(2)),
    _known("KL to dense (nats/token)", "kl", decimals(4)),
    _known("Reverse KL (nats/token)", "reverse_kl", decimals(4)),
    _known("Jensen-Shannon distance", "js_distance", decimals(4)),
    _known("Top-1 agreement", "top1_agreement", percent),
    _known("Jaccard index of the top 5", "jaccard_5", decimals(3)),
    _known("Jaccard index of the top 15", "jaccard_15", decimals(3)),
)
_SPEED = (
    _Figure(
        label="Prefill (ms)",
        paths=("latency.prefill_ms",),
        text=decimals(1),
        change="none",
        spread="latency.prefill_spread_ms",
        alternated=_times("prefill_ratio"),
    ),
    _Figure(
        label="Decoding (tokens/s)",
        paths=("latency.decode_tokens_per_s",),
        text=decimals(1),
        change="none",
        alternated=_times("decode_ratio", inverse=True),
    ),
    _Figure(label="Peak memory", paths=("latency.peak_bytes",), text=mebibytes),
)


def summary(data: ReportData) -> list[Section]:
    """Returns the before/after table; a row appears when some stage has its figure."""
    kinds = (("Size", _SIZE), ("Quality", _QUALITY), ("Speed and memory", _SPEED))
    sections = [Section(heading=heading, rows=_rows(data, figures)) for heading, figures in kinds]
    average = _Figure(label="Average", paths=("zero_shot.average",), text=percent, change="points")
    sections.append(Section(heading="Zero-shot tasks", rows=_task_rows(data) + _rows(data, (average,))))
    return [section for section in sections if section.rows]


def _rows(data: ReportData, figures: tuple[_Figure, ...]) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    rows = []
    for figure in figures:
        values = {stage: _value(measured, figure.paths) for stage, measured in data.stages.items()}
        if any(value is not None for value in values.values()):
            cells = []
            for stage, value in values.items():
                base = None if stage == "dense" else values.get("dense")
                cell = _cell(value, base, figure.text, figure.change, _spread(data.stages[stage], figure))
                ratio = figure.alternated(data.stages[stage])
                cells.append(cell if ratio is None else replace(cell, change=_change(ratio, 1.0, "ratio")))
            rows.append((figure.label, tuple(cells)))
    return tuple(rows)


def _value(measured: Mapping[str, Any], paths: tuple[str, ...]) -> float | None:
    values = (number(look_up(measured, *path.split("."))) for path in paths)
    return next((value for value in values if value is not None), None)


def _spread(measured: Mapping[str, Any], figure: _Figure) -> str:
    error = number(look_up(measured, *figure.stderr.split("."))) if figure.stderr else None
    if error:
        return f"± {figure.text(error)}"
    ends = look_up(measured, *figure.spread.split(".")) if figure.spread else None
    return f"{figure.text(min(ends))} to {figure.text(max(ends))}" if ends else ""


def _task_rows(data: ReportData) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    rows = []
    for (task, metric), row in task_figures(data).items():
        dense, cells = row.get("dense", (None, None))[0], []
        for stage in data.stages:
            value, error = row.get(stage, (None, None))
            base, spread = None if stage == "dense" else dense, f"± {percent(error)}" if error else ""
            cells.append(_cell(value, base, percent, "points", spread))
        rows.append((f"{task} ({metric})", tuple(cells)))
    return tuple(rows)


def _cell(value: float | None, base: float | None, text: Callable[[float], str], change: Change, spread: str) -> Cell:
    if value is None:
        return Cell(text=NONE)
    if not math.isfinite(value):
        return Cell(text=text(value), alarming=True)
    return Cell(text=text(value), spread=spread, change=_change(value, base, change))


def _change(value: float, base: float | None, change: Change) -> str:
    """Returns ``x0.80`` or ``-3.1 points`` with typographic signs; nothing where there is nothing to compare with."""
    if base is None or not math.isfinite(base) or change == "none":
        return ""
    if change == "points":
        points = round(100 * (value - base), 1) or 0.0  # never -0.0
        return f"{points:+.1f} points".replace("-", "−")  # noqa: RUF001
    if not base:
        return ""
    ratio = value / base
    return f"×{ratio:.2f}" if 0.01 <= ratio < 1e4 else f"×{ratio:.1e}"  # noqa: RUF001


def models(data: ReportData) -> tuple[list[str], list[tuple[FrontierPoint, list[Cell]]]]:
    """Returns the headings and rows of the table of a sweep: the quantities that some model has."""
    columns: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("Parameters", "parameters", count),
        ("Prefill (ms)", "latency_ms", decimals(1)),
        ("Perplexity", "perplexity", decimals(2)),
        ("KL to dense (nats/token)", "kl", decimals(4)),
        ("Zero-shot accuracy", "accuracy", percent),
    )
    wanted = [c for c in columns if any(number(getattr(point, c[1])) is not None for point in data.frontier)]
    rows = []
    for point in data.frontier:
        cells = []
        for _, name, text in wanted:
            ends = point.spread.get(name)
            spread = f"{text(ends[0])} to {text(ends[1])}" if ends else ""
            cells.append(_cell(number(getattr(point, name)), None, text, "none", spread))
        rows.append((point, cells))
    return [heading for heading, _, _ in wanted], rows


def notes(data: ReportData) -> list[str]:
    """Returns how the figures were measured, each way once."""
    stages = list(data.stages.values())
    lines = [line for note in _STAGE_NOTES for stage in stages if (line := note(stage))]
    if timed := [latency for stage in stages if (latency := look_up(stage, "latency"))]:
        alternated = any(number(latency.get("prefill_ratio")) is not None for latency in timed)
        if alternated or len(timed) > 1:
            lines.append(ALTERNATED if alternated else APART)
    if data.facts.get("Compensation"):
        lines.append(f"Pruned: the remaining weights were refitted ({data.facts['Compensation']}).")
    if any(stage.get("zero_shot") or look_up(stage, "fidelity", "kl_stderr") for stage in stages):
        lines.append("± is one standard error.")
    return list(dict.fromkeys(lines))


def _perplexity_note(stage: Mapping[str, Any]) -> str:
    protocol = look_up(stage, "perplexity", "protocol")
    return f"Perplexity: {protocol}." if protocol else ""


def _divergence_note(stage: Mapping[str, Any]) -> str:
    k = look_up(stage, "fidelity", "dense_top_k")
    return f"Divergences: lower bounds from the dense model's top {k} tokens." if k else ""


def _size_note(stage: Mapping[str, Any]) -> str:
    tokens = look_up(stage, "size", "tokens")
    return f"Multiply-accumulates and key-value cache: {tokens} tokens." if tokens else ""


def _task_note(stage: Mapping[str, Any]) -> str:
    harness, limit = look_up(stage, "zero_shot", "harness"), look_up(stage, "zero_shot", "limit")
    if harness is None:
        return ""
    items = "all items" if limit is None else f"the first {limit} items"
    tasks = look_up(stage, "zero_shot", "tasks") or {}
    shots = " or ".join(map(str, sorted({task["num_fewshot"] for task in tasks.values() if "num_fewshot" in task})))
    return f"Tasks: lm-eval {harness}{f', {shots}-shot' if shots else ''}, {items} of each."


def _speed_note(stage: Mapping[str, Any]) -> str:
    latency = look_up(stage, "latency") or {}
    if not all(key in latency for key in ("device", "threads", "prompt_tokens", "new_tokens", "repeats")):
        return ""
    dtype = f", {latency['dtype']}" if latency.get("dtype") else ""
    return (
        f"Speed: batch 1, {latency['prompt_tokens']} prompt and {latency['new_tokens']} new tokens, "
        f"{latency['device']}{dtype}, {latency['threads']} threads, median of {latency['repeats']}."
    )


_STAGE_NOTES = (_perplexity_note, _divergence_note, _size_note, _task_note, _speed_note)


def stage_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the before/after table for the terminal: one column per stage, with the notes as its caption.

    >>> table = stage_table({"dense": {"parameters": 200}, "pruned": {"parameters": 150}})
    >>> [list(column.cells) for column in table.columns]
    [['Parameters'], ['200'], ['150 (x0.75)']]

    Args:
        stages: Stage name -> its figures, as in ``report.json``. A row appears when some stage has its figure.
    """
    data = ReportData(title="", stages=stages)
    table = Table(caption=" ".join(notes(data)) or None, caption_justify="left")
    table.add_column("", overflow="fold")
    for name in stages:
        table.add_column(name, justify="right", overflow="fold")
    for section in summary(data):
        for label, cells in section.rows:
            table.add_row(label, *map(_terminal_text, cells))
        table.add_section()
    return table


def _terminal_text(cell: Cell) -> str:
    """Returns a cell as one line of ASCII, but for ``±``: its figure, its error, and range and change in brackets."""
    error, extent = (cell.spread, "") if cell.spread.startswith("±") else ("", cell.spread)
    brackets = ", ".join(filter(None, (extent, cell.change)))
    text = " ".join(filter(None, (cell.text, error, f"({brackets})" if brackets else "")))
    return text.translate(_ASCII)


def show(content: Table | str) -> None:
    """Prints a table, or Markdown text, to standard output.

    A terminal wraps wide tables. Where the output is piped or written to a file, a table has the width that it needs,
    and Markdown is printed as it is.

    Args:
        content: A table, or Markdown.
    """
    console = Console()
    piped = not (console.is_terminal or console.is_jupyter)
    if isinstance(content, str):
        console.print(content if piped else Markdown(content), markup=False, highlight=False, soft_wrap=piped)
        return
    if piped:
        needed = Measurement.get(console, console.options.update(max_width=_WIDEST), content).maximum
        console = Console(width=max(console.width, needed))
    console.print(content)


_WIDEST = 10_000


def to_markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Returns a Markdown table.

    >>> print(to_markdown(["method", "KL"], [["entropy", "0.1"], ["a|b", "0.2"]]))
    | method | KL |
    | --- | --- |
    | entropy | 0.1 |
    | a\|b | 0.2 |

    Args:
        headings: One per column.
        rows: A text per column each.
    """
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
