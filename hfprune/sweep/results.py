"""Results of a sweep: tables and comparisons of cells."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune.io.output_folder import REPORT_PAGE
from hfprune.report import FrontierPoint, ReportData, save_figures, write_report
from hfprune.report.data import number
from hfprune.report.run_folder import budget_text, data_text
from hfprune.sweep.grid import SweepGrid
from hfprune.sweep.recommendation import choices, kl_error
from hfprune.sweep.tables import comparisons, figures_table, markdown
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


def chance_overlap(one: Kept, other: Kept, units: Mapping[str, int]) -> float:
    """Returns the expected overlap of two choices at random that keep as many units per group as these.

    >>> chance_overlap({"x": [0, 1]}, {"x": [1, 2]}, {"x": 8})
    0.25

    Args:
        one: Kept units of one model.
        other: Kept units of the other model.
        units: Group -> units of the dense model.
    """
    shared = one.keys() & other.keys()
    common = sum(len(one[name]) * len(other[name]) / units[name] for name in shared)
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
    units: Mapping[str, int],
) -> dict[str, Any]:
    """Writes ``table.json``, ``table.csv``, ``table.md``, ``report.html`` and ``figures/``.

    Args:
        out: Output folder.
        grid: The grid.
        cells: Cell -> results, including ``dense``.
        kept: Cell -> group -> kept units.
        scores: Method -> group -> scores of the first seed.
        facts: Further entries of ``table.json``.
        units: Group -> units of the dense model.

    Returns:
        The content of ``table.json``.
    """
    text = next(iter(grid.texts))
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
        "chance_overlap": {
            f"{ratio:g}": _kept_overlap(grid, kept, ratio, units=units) for ratio in grid.pruning_ratios
        },
        "seed_overlap": {f"{ratio:g}": _seed_overlap(grid, kept, ratio) for ratio in grid.pruning_ratios},
        "protocols": {name: text["perplexity"]["protocol"] for name, text in cells["dense"]["texts"].items()},
        "speeds": _speeds(grid, cells),
        "cells": {name: dict(figures) for name, figures in cells.items()},
    }
    found = choices(rows, text, _errors(grid, cells, text))
    result["recommendation"] = [choice.text(text) for choice in found]
    result["recommended"] = [asdict(choice) for choice in found]
    if not found:
        result["recommended_command"] = None
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


def _errors(grid: SweepGrid, cells: Mapping[str, Figures], text: str) -> dict[tuple[str, float], float]:
    """Returns (method, ratio) -> standard error of its mean KL."""
    grouped: dict[tuple[str, float], list[Figures]] = {}
    for cell in grid.cells():
        grouped.setdefault((cell.method.name, cell.pruning_ratio), []).append(cells[cell.name])
    return {key: kl_error(found, text) for key, found in grouped.items()}


def _kept_overlap(
    grid: SweepGrid, kept: Mapping[str, Any], ratio: float, *, units: Mapping[str, int] | None = None
) -> dict[str, dict[str, float]]:
    """Returns the overlap of the kept sets of every two methods, for the first seed; with ``units``, that by chance."""
    first: dict[str, Any] = {}
    for cell in grid.cells():
        if cell.pruning_ratio == ratio:
            first.setdefault(cell.method.name, kept[cell.name])
    if units is not None:
        return matrix(list(first), lambda a, b: chance_overlap(first[a], first[b], units))
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
        commands=[command for command in (result["command"], result["recommended_command"]) if command],
        frontier=points,
        recommendation=result["recommendation"],
        tables=[figures_table(result), *comparisons(result)],
        facts=_page_facts(grid, result, text),
        warnings=result["warnings"],
    )


def _page_facts(grid: SweepGrid, result: Mapping[str, Any], text: str) -> dict[str, str]:
    """Returns label -> text: the model and its hash, widths, data, seeds and versions."""
    facts = {
        "Model": str(result["model"]),
        "Model hash": str(result.get("model_hash") or ""),
        "Text of the figure": f"{text}: {result['protocols'][text]}",
        "Seeds": ", ".join(map(str, grid.seeds)),
    }
    for ratio, budgets in (result.get("budgets") or {}).items():
        by_text: dict[str, list[str]] = {}
        for method, budget in budgets.items():
            by_text.setdefault(budget_text(budget), []).append(method)
        parts = [f"{found} ({', '.join(names)})" if len(by_text) > 1 else found for found, names in by_text.items()]
        facts[f"Budget at {float(ratio):.0%}"] = "; ".join(parts)
    for seed, data in (result.get("calibration") or {}).items():
        facts[f"Calibration data, seed {seed}"] = data_text(data)
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    return {label: found for label, found in facts.items() if found}
