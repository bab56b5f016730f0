"""The before/after table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

_Figures = Mapping[str, Any]
_Cell = Callable[[_Figures], str]


def widths_text(widths: Sequence[int]) -> str:
    """Returns the widths of all layers in few words.

    >>> widths_text([1024, 1024]), widths_text([7, 20, 11])
    ('1,024', '7 to 20')
    """
    if not widths:
        return "mixtures of experts"
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _with_ratio(text: str, ratio: float | None) -> str:
    return text if ratio is None else f"{text} (x{ratio:.2f})"


def _mean(group: str, name: str, digits: str) -> _Cell:
    """Returns a cell of a mean and, where there is one, its standard error."""

    def cell(stage: _Figures) -> str:
        found, error = stage[group][name], stage[group].get(f"{name}_stderr")
        return format(found, digits) + ("" if error is None else f" ± {format(error, digits)}")

    return cell


_ROWS: tuple[tuple[str, _Cell], ...] = (
    ("parameters", lambda s: f"{s['parameters']:,}"),
    ("MLP width", lambda s: widths_text(s["widths"])),
    ("weights (MiB)", lambda s: f"{s['size']['weight_bytes'] / 2**20:,.0f}"),
    ("MACs (G)", lambda s: f"{s['size']['macs'] / 1e9:,.2f}"),
    ("KV cache (MiB)", lambda s: f"{s['size']['kv_cache_bytes'] / 2**20:,.1f}"),
    ("perplexity", lambda s: f"{s['perplexity']['value']:,.2f}"),
    ("KL to dense (nats/token)", _mean("fidelity", "kl", ".4f")),
    ("reverse KL", _mean("fidelity", "reverse_kl", ".4f")),
    ("Jensen-Shannon distance", _mean("fidelity", "js_distance", ".4f")),
    ("top-1 agreement", _mean("fidelity", "top1_agreement", ".1%")),
    ("top-5 Jaccard", _mean("fidelity", "jaccard_5", ".3f")),
    ("top-15 Jaccard", _mean("fidelity", "jaccard_15", ".3f")),
    ("prefill (ms)", lambda s: _with_ratio(f"{s['latency']['prefill_ms']:,.1f}", s["latency"]["prefill_ratio"])),
    (
        "decode (tokens/s)",
        lambda s: _with_ratio(f"{s['latency']['decode_tokens_per_s']:,.1f}", _inverse(s["latency"]["decode_ratio"])),
    ),
    ("peak memory (MiB)", lambda s: f"{s['latency']['peak_bytes'] / 2**20:,.0f}"),
)


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1 / ratio


def stage_table(stages: Mapping[str, _Figures]) -> Table:
    """Returns a rich table with one column per stage; a row appears when some stage has its figure.

    Args:
        stages: Stage name -> its measurements, as in ``report.json``.
    """
    table = Table(caption=_caption(stages), caption_justify="left")
    table.add_column("")
    for name in stages:
        table.add_column(name, justify="right")
    for label, cell in (*_ROWS, *_task_rows(stages)):
        cells = [_try(cell, stage) for stage in stages.values()]
        if any(text != "-" for text in cells):
            table.add_row(label, *cells)
    return table


def _task_rows(stages: Mapping[str, _Figures]) -> list[tuple[str, _Cell]]:
    """Returns a row per task, of the figure that counts for the average, and the average."""
    names = dict.fromkeys(name for stage in stages.values() for name in stage.get("zero_shot", {}).get("tasks", {}))
    rows: list[tuple[str, _Cell]] = []
    for name in names:
        metrics = [s["zero_shot"]["tasks"][name] for s in stages.values() if "zero_shot" in s]
        metric = next((m for m in ("acc_norm", "acc", "pct_stereotype") if all(m in found for found in metrics)), None)
        if metric is not None:
            rows.append((f"{name}, {metric}", _task_cell(name, metric)))
    return [*rows, ("task average", lambda s: f"{s['zero_shot']['average']:.1%}")] if rows else []


def _task_cell(name: str, metric: str) -> _Cell:
    def cell(stage: _Figures) -> str:
        found = stage["zero_shot"]["tasks"][name]
        error = found.get(f"{metric}_stderr")
        return f"{found[metric]:.1%}" + ("" if error is None else f" ± {error:.1%}")

    return cell


def _try(cell: _Cell, stage: _Figures) -> str:
    try:
        return cell(stage)
    except KeyError:  # not measured at this stage
        return "-"


def _caption(stages: Mapping[str, _Figures]) -> str | None:
    """Returns how the figures were measured; every stage was measured alike."""
    parts: dict[str, None] = {}
    for stage in stages.values():
        if "perplexity" in stage:
            parts[f"Perplexity: {stage['perplexity']['protocol']}."] = None
        if stage.get("fidelity", {}).get("dense_top_k"):
            k = stage["fidelity"]["dense_top_k"]
            parts[f"Divergences: lower bounds from the dense model's top {k} tokens."] = None
        if "size" in stage:
            parts[f"MACs and KV cache: {stage['size']['tokens']} tokens."] = None
        if "zero_shot" in stage:
            parts[_tasks(stage["zero_shot"])] = None
    timed = [stage["latency"] for stage in stages.values() if "latency" in stage]
    if timed:
        parts[_speed(timed[-1], several=len(timed) > 1)] = None
    return " ".join(parts) or None


def _speed(found: _Figures, *, several: bool) -> str:
    apart = ", at separate moments (evaluate --dense compares)" if several else ""
    turns = apart if found["prefill_ratio"] is None else ", in alternation with dense"
    return (
        f"Speed: batch 1, {found['prompt_tokens']} prompt and {found['new_tokens']} new tokens, {found['device']}, "
        f"{found['dtype']}, {found['threads']} threads, median of {found['repeats']}{turns}."
    )


def _tasks(found: _Figures) -> str:
    items = "all items" if found["limit"] is None else f"the first {found['limit']} items"
    shots = " or ".join(str(n) for n in sorted({task["num_fewshot"] for task in found["tasks"].values()}))
    return f"Tasks: lm-eval {found['harness']}, {shots}-shot, {items} of each."
