"""The before/after table."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

_Cell = Callable[[Mapping[str, Any]], str]

_ROWS: tuple[tuple[str, _Cell], ...] = (
    ("parameters", lambda s: f"{s['parameters']:,}"),
    ("MLP width", lambda s: f"{s['width']:,}"),
    ("perplexity", lambda s: f"{s['perplexity']['value']:,.2f}"),
    ("KL to dense (nats/token)", lambda s: f"{s['fidelity']['kl']:.4f}"),
    ("top-1 agreement", lambda s: f"{s['fidelity']['top1_agreement']:.1%}"),
    ("prefill (ms)", lambda s: f"{s['latency']['prefill_ms']:,.1f}"),
    ("decode (tokens/s)", lambda s: f"{s['latency']['decode_tokens_per_s']:,.1f}"),
)


def stage_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a rich table with one column per stage; a row appears when some stage has its figure.

    Args:
        stages: Stage name -> its measurements, as in ``report.json``.
    """
    table = Table(caption=_caption(stages), caption_justify="left")
    table.add_column("")
    for name in stages:
        table.add_column(name, justify="right")
    for label, cell in _ROWS:
        cells = [_try(cell, stage) for stage in stages.values()]
        if any(text != "-" for text in cells):
            table.add_row(label, *cells)
    return table


def _try(cell: _Cell, stage: Mapping[str, Any]) -> str:
    try:
        return cell(stage)
    except KeyError:  # not measured at this stage
        return "-"


def _caption(stages: Mapping[str, Mapping[str, Any]]) -> str | None:
    parts = []
    for stage in stages.values():
        if "perplexity" in stage:
            parts.append(f"Perplexity: {stage['perplexity']['protocol']}.")
        if "latency" in stage:
            lat = stage["latency"]
            parts.append(
                f"Speed: batch 1, {lat['prompt_tokens']} prompt and {lat['new_tokens']} new tokens, {lat['device']}, "
                f"{lat['threads']} threads, median of {lat['repeats']}."
            )
        if parts:
            return " ".join(parts)
    return None
