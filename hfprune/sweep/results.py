"""Results of a sweep: tables and comparisons of cells."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune.io.output_folder import REPORT_PAGE
from hfprune.report import FrontierPoint, ReportData, save_figures, write_report
from hfprune.report.data import number
from hfprune.report.table import to_markdown
from hfprune.sweep.grid import SweepGrid
from hfprune.utils.files import write_json, write_text

Kept = Mapping[str, Sequence[int]]
"""Group -> kept units."""


def rank_correlation(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Returns Spearman's rank correlation of scores, averaged over the common groups; ties share a rank.

    >>> import torch
    >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])
    >>> round(rank_correlation({"x": a}, {"x": b}), 3)
    0.5
    """
    found = [_spearman(scores, other[name]) for name, scores in one.items() if name in other]
    return sum(found) / len(found) if found else float("nan")


def overlap(one: Kept, other: Kept) -> float:
    """Returns the share of the kept units of ``one`` that ``other`` also keeps, in the common groups.

    >>> overlap({"x": [0, 1]}, {"x": [1, 2]})
    0.5
    """
    shared = one.keys() & other.keys()
    common = sum(len(set(one[name]) & set(other[name])) for name in shared)
    return common / sum(len(one[name]) for name in shared) if shared else float("nan")


def _spearman(one: Tensor, other: Tensor) -> float:
    from scipy.stats import spearmanr

    if any(len(scores.unique()) < 2 for scores in (one, other)):
        return float("nan")  # undefined for constant ranks
    return float(spearmanr(one.double().numpy(), other.double().numpy()).statistic)


def matrix(names: Sequence[str], value: Any) -> dict[str, dict[str, float]]:
    """Returns ``value(a, b)`` for every pair of names."""
    return {a: {b: value(a, b) for b in names} for a in names}


Figures = Mapping[str, Any]
Row = dict[str, Any]


def write_results(
    out: Path,
    grid: SweepGrid,
    cells: Mapping[str, Figures],
    kept: Mapping[str, Mapping[str, Sequence[int]]],
    scores: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes ``table.json``, ``table.csv``, ``table.md``, ``report.html`` and ``figures/``.

    Args:
        out: Output folder.
        grid: The grid.
        cells: Cell -> results, including ``dense``.
        kept: Cell -> group -> kept units.
        scores: Method -> group -> scores of the first seed.
        facts: Further entries of ``table.json``.

    Returns:
        The content of ``table.json``.
    """
    rows = [_row("dense", None, [cells["dense"]])]
    for ratio in grid.pruning_ratios:
        for method in grid.methods:
            mine = [c for c in grid.cells() if c.method is method and c.pruning_ratio == ratio]
            rows.append(_row(method.name, ratio, [cells[cell.name] for cell in mine]))
    result = {
        **facts,
        "rows": rows,
        "rank_correlation": matrix(list(scores), lambda a, b: rank_correlation(scores[a], scores[b])),
        "kept_overlap": {f"{ratio:g}": _kept_overlap(grid, kept, ratio) for ratio in grid.pruning_ratios},
        "seed_overlap": {f"{ratio:g}": _seed_overlap(grid, kept, ratio) for ratio in grid.pruning_ratios},
        "protocols": {name: text["perplexity"]["protocol"] for name, text in cells["dense"]["texts"].items()},
        "speeds": _speeds(grid, cells),
        "cells": {name: dict(figures) for name, figures in cells.items()},
    }
    write_json(out / "table.json", result)
    write_text(out / "table.csv", _csv(rows))
    write_text(out / "table.md", markdown(result))
    shown = _report(grid, result, rows)
    save_figures(shown, out / "figures")
    write_report(shown, out / REPORT_PAGE)
    return result


def _row(method: str, ratio: float | None, cells: Sequence[Figures]) -> Row:
    """Returns the means over seeds of all results, and the standard deviations of several seeds."""
    row: Row = {"method": method, "pruning_ratio": ratio, "seeds": len(cells)}
    columns = [_columns(cell) for cell in cells]
    for name in dict.fromkeys(key for column in columns for key in column):
        values = [column[name] for column in columns if name in column]
        row[name] = statistics.fmean(values)
        if len(values) > 1:
            row[f"{name}_sd"] = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
            row[f"{name}_low"], row[f"{name}_high"] = min(values), max(values)
    return row


def _columns(cell: Figures) -> dict[str, float]:
    found: dict[str, Any] = {"parameters": cell["parameters"], "macs": cell["size"]["macs"]}
    for text, figures in cell["texts"].items():
        found[f"{text}_perplexity"] = figures["perplexity"]["value"]
        for name in ("kl", "reverse_kl", "js_distance", "top1_agreement", "jaccard_15"):
            found[f"{text}_{name}"] = figures["fidelity"][name]
    if "latency" in cell:
        found["prefill_ms"] = cell["latency"]["prefill_ms"]
    if "zero_shot" in cell:
        for task, metrics in cell["zero_shot"]["tasks"].items():
            for metric in ("acc", "acc_norm", "pct_stereotype"):
                if metric in metrics:
                    found[f"{task}_{metric}"] = metrics[metric]
        found["task_average"] = cell["zero_shot"]["average"]
    return {name: value for name, raw in found.items() if (value := number(raw)) is not None}


def _speeds(grid: SweepGrid, cells: Mapping[str, Figures]) -> dict[str, Any]:
    """Returns label -> speed for models of different widths, the dense model first."""
    if "latency" not in cells["dense"]:
        return {}
    timed = [cells["dense"]["latency"], *(cells[cell.name]["latency"] for cell in grid.cells())]
    return {found["label"]: found for found in timed}


def _kept_overlap(grid: SweepGrid, kept: Mapping[str, Any], ratio: float) -> dict[str, dict[str, float]]:
    """Returns the pairwise overlap of the methods' kept units, for the first seed."""
    first: dict[str, Any] = {}
    for cell in grid.cells():
        if cell.pruning_ratio == ratio:
            first.setdefault(cell.method.name, kept[cell.name])
    return matrix(list(first), lambda a, b: overlap(first[a], first[b]))


def _seed_overlap(grid: SweepGrid, kept: Mapping[str, Any], ratio: float) -> dict[str, float]:
    """Returns method -> mean overlap of the kept units of two seeds."""
    found = {}
    for method in grid.methods:
        mine = [kept[c.name] for c in grid.cells() if c.method is method and c.pruning_ratio == ratio]
        pairs = [overlap(a, b) for i, a in enumerate(mine) for b in mine[i + 1 :]]
        if pairs:
            found[method.name] = statistics.fmean(pairs)
    return found


def _csv(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _calibration_lines(by_seed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the distinct descriptions of the calibration data; seeds only differ in documents."""
    found = [
        f"Calibration: {one['source']}: {one['sequences']} sequences, {one['tokens']:,} tokens, {one['bos']}."
        for one in by_seed.values()
        if one.get("bos")
    ]
    return list(dict.fromkeys(found))


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the tables of a sweep as Markdown: results, zero-shot tasks and similarity of methods."""
    rows = result["rows"]
    columns: dict[str, tuple[str, str]] = {"parameters": ("parameters", ",.0f")}
    for text in result["protocols"]:
        columns |= {
            f"{text}_perplexity": (f"{text}: perplexity", ".2f"),
            f"{text}_kl": ("KL", ".3f"),
            f"{text}_js_distance": ("JS distance", ".3f"),
            f"{text}_top1_agreement": ("top-1", ".1%"),
            f"{text}_jaccard_15": ("Jaccard-15", ".3f"),
        }
    tasks = {name: (name, ".1%") for name in rows[0] if name.endswith(("_acc", "_acc_norm", "_pct_stereotype"))}
    tasks = {name: cell for name, cell in tasks.items() if not (name.endswith("_acc") and f"{name}_norm" in rows[0])}
    tasks = {name: (name.replace("_acc_norm", "").replace("_acc", ""), digits) for name, (_, digits) in tasks.items()}
    if "task_average" in rows[0]:
        tasks["task_average"] = ("average", ".1%")
    parts = [_table(rows, columns)]
    parts += [f"{name}: {protocol}." for name, protocol in result["protocols"].items()]
    parts += _calibration_lines(result.get("calibration") or {})
    if tasks:
        parts.append(_table([row for row in rows if "task_average" in row], tasks))
    if result["speeds"]:
        parts.append(_speed_table(result["speeds"]))
    parts.append("Rank correlation of the scores (Spearman, mean over layers, first seed):")
    parts.append(_matrix(result["rank_correlation"]))
    for ratio, found in result["kept_overlap"].items():
        parts += [f"Overlap of the kept units at {float(ratio):.0%} (first seed):", _matrix(found)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    headings = ["method", "removed", *(title for title, _ in columns.values())]
    lines = []
    for row in rows:
        ratio = row["pruning_ratio"]
        cells = [_mean(row, name, digits) for name, (_, digits) in columns.items()]
        lines.append([row["method"], "-" if ratio is None else f"{ratio:.0%}", *cells])
    return to_markdown(headings, lines)


def _speed_table(speeds: Mapping[str, Any]) -> str:
    headings = ["removed", "prefill (ms)", "time to dense", "decode (tokens/s)", "time to dense"]
    lines = []
    for name, found in speeds.items():
        cells = [name]
        for kind, figure in (("prefill", "prefill_ms"), ("decode", "decode_tokens_per_s")):
            ratio, spread = found[f"{kind}_ratio"], found[f"{kind}_ratio_spread"]
            shown = "-" if ratio is None else f"{ratio:.3f} ({spread[0]:.3f} to {spread[1]:.3f})"
            cells += [f"{found[figure]:,.1f}", shown]
        lines.append(cells)
    first = next(iter(speeds.values()))
    settings = (
        f"Batch 1, {first['prompt_tokens']} prompt and {first['new_tokens']} new tokens, {first['device']}, "
        f"{first['dtype']}, {first['threads']} threads, median of {first['repeats']} in alternation (spread of ratios)."
    )
    return f"{to_markdown(headings, lines)}\n\n{settings}"


def _mean(row: Row, name: str, digits: str) -> str:
    if name not in row:
        return "-"
    deviation = row.get(f"{name}_sd")
    text = format(row[name], digits)
    return text if deviation is None or name == "parameters" else f"{text} ± {format(deviation, digits)}"


def _matrix(found: Mapping[str, Mapping[str, float]]) -> str:
    return to_markdown(["", *found], [[name, *(f"{v:.3f}" for v in row.values())] for name, row in found.items()])


def _report(grid: SweepGrid, result: Mapping[str, Any], rows: Sequence[Row]) -> ReportData:
    """Returns the data of the HTML report, with the Pareto plot for the first text."""
    text = next(iter(grid.texts))
    points = []
    for row in rows:
        ratio = row["pruning_ratio"]
        names = {"perplexity": f"{text}_perplexity", "kl": f"{text}_kl", "accuracy": "task_average"}
        spread = {
            field: (row[f"{name}_low"], row[f"{name}_high"]) for field, name in names.items() if f"{name}_low" in row
        }
        points.append(
            FrontierPoint(
                label=row["method"] if ratio is None else f"{row['method']}, {ratio:.0%}",
                series=row["method"],
                parameters=int(row["parameters"]),
                latency_ms=row.get("prefill_ms"),
                spread=spread,
                **{field: row.get(name) for field, name in names.items()},
            )
        )
    return ReportData(
        title=f"Sweep of {result['model']}",
        commands=[result["command"]],
        frontier=points,
        facts={"Text of the figure": f"{text}: {result['protocols'][text]}"},
        warnings=result["warnings"],
    )
