"""Tables of a sweep, for Markdown and for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from hfprune.report import TextTable
from hfprune.report.table import to_markdown

CHANCE = "In brackets: the overlap that two choices of units at random would have."
Row = Mapping[str, Any]


def _calibration_lines(by_seed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns what calibrated, each way once; the seeds differ in the documents alone."""
    found = [
        f"Calibration: {one['source']}: {one['sequences']} sequences, {one['tokens']:,} tokens, {one['bos']}."
        for one in by_seed.values()
        if one.get("bos")
    ]
    return list(dict.fromkeys(found))


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the tables of a sweep as Markdown: figures, tasks where they were run, and how alike the methods are."""
    rows = result["rows"]
    columns = _columns(result)
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
    for table in comparisons(result):
        parts += [f"{table.title}:", to_markdown(table.headings, table.rows)]
        parts += [table.note] if table.note else []
    parts += recommended(result)
    return "\n\n".join(parts) + "\n"


def recommended(result: Mapping[str, Any]) -> list[str]:
    """Returns the recommendation of a sweep, one paragraph per ratio and one for the command."""
    found = list(result.get("recommendation") or ())
    command = result.get("recommended_command")
    return [*found, *([f"Command for the first of these: {command}"] if command else [])]


def comparisons(result: Mapping[str, Any]) -> list[TextTable]:
    """Returns how alike the methods are: correlations of their scores, and overlaps of the units that they keep."""
    scores = result["rank_correlation"]
    title = "Rank correlation of the scores (Spearman, mean over layers, first seed)"
    found = [_matrix(title, scores)] if scores else []
    chance = result.get("chance_overlap") or {}
    for ratio, kept in result["kept_overlap"].items():
        title = f"Overlap of the kept units at {float(ratio):.0%} (first seed)"
        found.append(_matrix(title, kept, chance.get(ratio), note=CHANCE if ratio in chance else ""))
    seeds = {ratio: by_method for ratio, by_method in result["seed_overlap"].items() if by_method}
    if seeds:
        names = list(dict.fromkeys(name for by_method in seeds.values() for name in by_method))
        rows = []
        for name in names:
            cells = [_with_chance(by.get(name), chance.get(r, {}).get(name, {}).get(name)) for r, by in seeds.items()]
            rows.append([name, *cells])
        headings = ["", *(f"{float(ratio):.0%}" for ratio in seeds)]
        note = CHANCE if chance else ""
        found.append(TextTable(title="Overlap of the kept units of two seeds", headings=headings, rows=rows, note=note))
    return found


def figures_table(result: Mapping[str, Any]) -> TextTable:
    """Returns perplexity, KL, JS distance, top-1 agreement and Jaccard index of every model, for the page."""
    headings, rows = _rows(result["rows"], _columns(result))
    return TextTable(title="Figures of every model", headings=headings, rows=rows)


def _columns(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns column -> heading and format."""
    columns: dict[str, tuple[str, str]] = {"parameters": ("parameters", ",.0f")}
    for text in result["protocols"]:
        columns |= {
            f"{text}_perplexity": (f"{text}: perplexity", ".2f"),
            f"{text}_kl": ("KL", ".3f"),
            f"{text}_js_distance": ("JS distance", ".3f"),
            f"{text}_top1_agreement": ("top-1", ".1%"),
            f"{text}_jaccard_15": ("Jaccard-15", ".3f"),
        }
    return columns


def _table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    return to_markdown(*_rows(rows, columns))


def _rows(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    headings = ["method", "removed", *(title for title, _ in columns.values())]
    lines = []
    for row in rows:
        ratio = row["pruning_ratio"]
        cells = [_mean(row, name, digits) for name, (_, digits) in columns.items()]
        lines.append([row["method"], "-" if ratio is None else f"{ratio:.0%}", *cells])
    return headings, lines


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


def _matrix(
    title: str, found: Mapping[str, Any], chance: Mapping[str, Any] | None = None, *, note: str = ""
) -> TextTable:
    """Returns a table of every two methods, with the values expected by chance where these are known."""
    rows = [
        [name, *(_with_chance(value, (chance or {}).get(name, {}).get(other)) for other, value in row.items())]
        for name, row in found.items()
    ]
    return TextTable(title=title, headings=["", *found], rows=rows, note=note)


def _with_chance(value: float | None, chance: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if chance is None else f"{value:.3f} ({chance:.3f})"
