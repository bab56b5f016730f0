"""Draws the pictures of the documentation.

python docs/pictures/draw.py [--importance RUN_FOLDER]

The lifecycle is drawn from the list below. The two plots read the tables of ``docs/results.md``, so they show no figure
that the page does not have. The heat map reads ``importance.json`` in this folder; ``--importance`` renews that file
from the ``importance.safetensors`` and ``plan.json`` of a run.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results.md"
TEAL, GREY, RED, BLUE, INK = "#00796b", "#78909c", "#c62828", "#1565c0", "#263238"
COLUMNS = 128
HIGHEST = 87
"""Perplexities above this are left out of the plot of costs."""
GRADIENTS = 1.5
"""Criteria that take at least so many forward passes read gradients."""

STEPS = (
    ("dense model", ("a Hugging Face", "folder or id"), GREY),
    ("1 calibrate", ("score every unit", "on a little text"), TEAL),
    ("2 prune", ("plan for a budget,", "cut, refit"), TEAL),
    ("3 recover", ("LoRA or all weights", "(optional)"), TEAL),
    ("pruned model", ("an ordinary", "model folder"), GREY),
)
OTHER_OUTPUTS = ("importance.safetensors", "plan.json", "checkpoints/", "report.html")


def lifecycle() -> str:
    """Returns the picture of a run as SVG: the three steps in one fit, and the file that each leaves."""
    width, height, gap = 176, 92, 26
    total = len(STEPS) * width + (len(STEPS) - 1) * gap + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} 200" role="img" '
        'font-family="system-ui, Helvetica, Arial, sans-serif">',
        "<title>A run: calibrate, prune and recover in one fit</title>",
        f'<rect width="{total}" height="200" rx="10" fill="#ffffff"/>',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>',
    ]
    first = 10 + width + gap
    inner = 3 * width + 2 * gap
    parts.append(
        f'<rect x="{first - 14}" y="12" width="{inner + 28}" height="176" rx="10" fill="#e0f2f1" stroke="{TEAL}" '
        'stroke-dasharray="5 4"/>'
        f'<text x="{first - 4}" y="32" font-size="14" fill="{TEAL}">one Lightning fit</text>'
    )
    for index, (name, lines, colour) in enumerate(STEPS):
        x = 10 + index * (width + gap)
        parts.append(f'<rect x="{x}" y="44" width="{width}" height="{height}" rx="8" fill="{colour}"/>')
        parts.append(_text(x + width / 2, 72, name, 18, "#ffffff", bold=True))
        parts += [_text(x + width / 2, 95 + 20 * k, line, 15, "#ffffff") for k, line in enumerate(lines)]
        if index:
            parts.append(
                f'<path d="M{x - gap + 2} 90H{x - 3}" stroke="{GREY}" stroke-width="2.5" marker-end="url(#a)"/>'
            )
            parts.append(_text(x + width / 2, 166, OTHER_OUTPUTS[index - 1], 14, INK, mono=True))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, size: int, fill: str, *, bold: bool = False, mono: bool = False) -> str:
    style = ' font-weight="600"' if bold else ""
    style += ' font-family="ui-monospace, Menlo, Consolas, monospace"' if mono else ""
    return f'<text x="{x:g}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="middle"{style}>{escape(text)}</text>'


def table(heading: str) -> list[list[str]]:
    """Returns the cells of the first table below a heading of ``results.md``, without its head."""
    text = RESULTS.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    rows = re.search(r"^\|.*?\n(?!\|)", text, re.M | re.S)
    if rows is None:
        raise SystemExit(f"results.md has no table below '{heading}'")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines()[2:]]


def value(cell: str) -> float:
    """Returns a table's figure, a sum where it is one: ``72.1 ± 2.3`` is 72.1, ``0.82 + 3.35`` is 4.17."""
    return sum(float(part.partition("±")[0].replace(",", "").strip("* ")) for part in cell.split("+"))


def cost_points() -> list[tuple[str, float, float]]:
    """Returns method, time in forward passes and WikiText-2 perplexity at 20 % of each measured method."""
    return [(row[0], value(row[6]), value(row[1])) for row in table("Every structured method, one-shot")]


def frontier_lines() -> list[tuple[str, list[tuple[float, float]]]]:
    """Returns name and (removed %, perplexity) of three recipes, the dense model first."""
    methods = {row[0]: row for row in table("Every structured method, one-shot")}
    fitted = {row[0]: row for row in table("One-shot, with a least-squares refit")}
    dense = value(fitted["dense"][1])
    measured = [
        value(next(row for name, row in fitted.items() if key in name)[1])
        for key in ("`configs/prune_s", "same curves")
    ]
    names = (
        ("entropy (HFPrune)", "entropy (HFPrune)"),
        ("activation norm, least squares", "activation norm, least squares"),
    )
    lines = [
        (name, [(0.0, dense), (20.0, value(methods[key][1])), (30.0, value(methods[key][4]))]) for name, key in names
    ]
    return [*lines, ("the same, widths by measured KL", [(0.0, dense), (20.0, measured[0]), (30.0, measured[1])])]


def draw_frontier() -> None:
    """Writes perplexity over the share of removed parameters."""
    figure, axes = _plot(4.2)
    for (name, points), colour, marker in zip(frontier_lines(), (RED, TEAL, BLUE), "osD", strict=True):
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    axes.set(xlabel="parameters removed (%)", ylabel="WikiText-2 perplexity", yscale="log", xticks=[0, 10, 20, 30])
    axes.set_yticks([30, 50, 75, 100, 150, 200], labels=["30", "50", "75", "100", "150", "200"])
    axes.minorticks_off()
    axes.set_title("SmolLM2-135M, one-shot, no training", fontsize=11, loc="left")
    axes.legend(frameon=False)
    _save(figure, "frontier.svg")


def draw_cost() -> None:
    """Writes perplexity over the time of scoring and fit."""
    figure, axes = _plot(4.2)
    for name, time, perplexity in cost_points():
        if perplexity > HIGHEST:
            continue
        fitted = "least squares" in name or "regression" in name
        axes.plot(time, perplexity, "o", color=TEAL if fitted else BLUE if time < GRADIENTS else RED)
        label = re.sub(r" \((HFPrune|OptiPFair|bfloat16)\)|LLM-Pruner |`", "", name).replace("least squares", "LSQ")
        left, above = _PLACES.get(label, (False, 0))
        place = {"xytext": (-7 if left else 7, above - 4), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(label, (time, perplexity), ha="right" if left else "left", **place)
    axes.set(xlabel="CPU time of scoring and fit, in forward passes", ylabel="WikiText-2 perplexity at 20 %")
    axes.set(xlim=(0, 8), ylim=(58, HIGHEST))
    axes.set_title("blue: forward pass only, red: gradients, green: with a fit", fontsize=10, loc="left")
    _save(figure, "cost.svg")


def draw_importance(data: dict[str, list[list[float]]]) -> None:
    """Writes the heat map of scores by layer and rank."""
    figure, axes = _plot(4.6)
    axes.grid(visible=False)
    rows, bottom = data["log10_score"], len(data["log10_score"]) - 0.5
    scores = sorted(score for row in rows for score in row)
    limits = {"vmin": scores[len(scores) // 100], "vmax": scores[-len(scores) // 100]}  # a few scores are far larger
    place = (0, 100, bottom, -0.5)
    shown = axes.imshow(rows, aspect="auto", interpolation="none", cmap="cividis", extent=place, **limits)
    axes.plot([100 * data["kept_share"][0][0]] * 2, [-0.5, bottom], "--", color="white", linewidth=1.5)
    axes.set(xlabel="neurons of the layer, highest score first (%)", ylabel="layer")
    axes.set_title("left of the dashed line: kept", fontsize=10, loc="left")
    figure.colorbar(shown, ax=axes, label="log₁₀ of the score", pad=0.02)
    _save(figure, "importance.svg")


_PLACES = {
    "entropy": (True, -3), "cross-entropy": (True, 5), "param_first": (False, -2), "param_mix": (False, 8),
    "Fisher": (False, -2), "Wanda-style": (False, 0), "activation norm": (False, 4), "weight range": (False, 5),
    "SlimLLM channels": (False, -9), "SDMPrune": (True, 6), "entropy, LSQ": (False, 0),
}  # fmt: skip


def _plot(height: float) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "hfprune", "axes.grid": True, "grid.alpha": 0.3})
    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None, "Creator": None})
    text = (HERE / name).read_text(encoding="utf-8")
    (HERE / name).write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def binned(scores: Sequence[float]) -> list[float]:
    """Returns the log10 of the scores, highest first, in ``COLUMNS`` equal parts."""
    import numpy as np

    parts = np.array_split(np.sort(np.asarray(scores, dtype=np.float64))[::-1], COLUMNS)
    return [round(float(np.log10(max(part.mean(), 1e-12))), 3) for part in parts]


def read_run(folder: Path) -> dict[str, list[list[float]]]:
    """Returns the heat map's data from a run's folder."""
    from safetensors.numpy import load_file

    from hfprune import PruningPlan

    scores = load_file(folder / "importance.safetensors")
    plan = PruningPlan.load(folder)
    names = [group.name for group in plan.groups if group.kind == "mlp"]
    kept = [[len(plan.keep[group.name]) / group.num_units] for group in plan.groups if group.kind == "mlp"]
    return {"log10_score": [binned(scores[name]) for name in names], "kept_share": kept}


def main(argv: Iterable[str] | None = None) -> None:
    """Writes all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--importance", type=Path)
    args = parser.parse_args(None if argv is None else list(argv))
    store = HERE / "importance.json"
    if args.importance:
        store.write_text(json.dumps(read_run(args.importance)) + "\n", encoding="utf-8")
    (HERE / "lifecycle.svg").write_text(lifecycle(), encoding="utf-8")
    draw_frontier()
    draw_cost()
    draw_importance(json.loads(store.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
