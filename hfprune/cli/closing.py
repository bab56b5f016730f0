"""The block that ends a run: what was removed, what it cost in quality, where the results are, and what to run next."""

import math
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hfprune.cli.typed import Typed
from hfprune.io.output_folder import ADAPTER_FOLDER, MODEL_FOLDER, REPORT_PAGE
from hfprune.plan import kind_name
from hfprune.report.data import look_up, number
from hfprune.report.table import decimals, percent


def closing(report: Mapping[str, Any], folder: Path, *, typed: Typed, commands: Collection[str]) -> str:
    """Returns the block as text, one topic per paragraph.

    Args:
        report: The content of ``report.json``.
        folder: The folder of the run.
        typed: The command line that ran, of ``fit`` or ``prune``.
        commands: Commands that exist; no other is proposed.
    """
    parts = [("Removed", removed(report)), ("Quality", quality(report)), ("Results", _places(folder))]
    lines = [f"{name + ':':<9}{text}" for name, text in parts if text]
    proposed = next_commands(report, folder, typed=typed)
    shown = [f"  {purpose:<{_WIDTH}}{text}" for name, purpose, text in proposed if name in commands]
    return "\n".join([*lines, "Next:", *shown] if shown else lines)


def removed(report: Mapping[str, Any]) -> str:
    """Returns what was removed: parameters, and units or weights.

    >>> budget = {"dense_params": 1000, "params": 800, "dense_width": 24, "width": 16}
    >>> removed({"plan": {"budget": budget}})
    '200 of 1,000 parameters (20.0 %); MLP width 24 to 16'
    """
    budget = look_up(report, "plan", "budget") or {}
    parts = []
    dense, params = budget.get("dense_params"), budget.get("params")
    if dense and params and dense != params:
        parts.append(f"{dense - params:,} of {dense:,} parameters ({percent((dense - params) / dense)})")
    if budget.get("dense_width") and budget.get("width"):
        parts.append(f"MLP width {budget['dense_width']:,} to {budget['width']:,}")
    for kind, units in (budget.get("kinds") or {}).items():
        dense, kept = sum(units["dense"]), sum(units["kept"])
        if dense != kept and not (kind == "mlp" and budget.get("width")):
            parts.append(f"{dense - kept:,} of {dense:,} {kind_name(kind)}")
    found = look_up(report, "saved", "sparsity")
    if found:
        parts.append(f"{found['zeros']:,} of {found['weights']:,} weights set to zero ({found['achieved']:.2%})")
    return "; ".join(parts)


def quality(report: Mapping[str, Any]) -> str:
    """Returns perplexity by stage, and the distance of the last stage to the dense model.

    >>> stages = {"dense": {"perplexity": {"value": 20.0}}, "pruned": {"perplexity": {"value": 25.0}}}
    >>> quality({"stages": stages})
    'perplexity 20.00 dense, 25.00 pruned (+25.0 %)'
    """
    stages = report.get("stages") or {}
    known = {name: number(look_up(stage, "perplexity", "value")) for name, stage in stages.items()}
    values = {name: value for name, value in known.items() if value is not None}
    texts = []
    for name, value in values.items():
        dense = values.get("dense")
        ratio = value / dense if dense and name != "dense" else math.nan
        change = f" ({(ratio - 1) * 100:+.1f} %)" if math.isfinite(ratio) else ""
        texts.append(f"{decimals(2)(value)} {name}{change}")
    parts = [f"perplexity {', '.join(texts)}"] if texts else []
    last = next((name for name in ("recovered", "pruned") if name in stages), None)
    kl = number(look_up(stages, last, "fidelity", "kl")) if last else None
    top = number(look_up(stages, last, "fidelity", "top1_agreement")) if last else None
    if kl is not None and top is not None:
        parts.append(f"{last}: KL to dense {decimals(4)(kl)} nats/token, same top token at {percent(top)}")
    if not parts:
        return "not measured; give --data.text, or run evaluate"
    return "; ".join(parts)


def _places(folder: Path) -> str:
    places = [folder / REPORT_PAGE, f"{folder / MODEL_FOLDER}/"]
    if (folder / ADAPTER_FOLDER).is_dir():
        places.append(f"{folder / ADAPTER_FOLDER}/")
    return ", ".join(str(place) for place in places)


_WIDTH = 20


def next_commands(report: Mapping[str, Any], folder: Path, *, typed: Typed) -> list[tuple[str, str, str]]:
    """Returns (command, purpose, command line) of what a user may want next.

    Args:
        report: The content of ``report.json``.
        folder: The folder of the run.
        typed: The command line that ran.
    """
    dense = look_up(report, "config", "model", "path") or look_up(report, "plan", "model", "path")
    data = look_up(report, "config", "data") or {}
    against = ["--dense", str(dense)] if dense else []
    for option in ("revision", "subfolder"):
        if dense and (value := look_up(report, "plan", "model", option)):
            against += [f"--dense_{option}", str(value)]
    text = ["--data", str(data["text"])] if data.get("text") else []
    found = [
        ("evaluate", "measure it", shlex.join(["hfprune", "evaluate", str(folder), *against, *text])),
        ("inspect", "what was removed", shlex.join(["hfprune", "inspect", str(folder)])),
        ("chat", "talk to it", shlex.join(["hfprune", "chat", str(folder), *against])),
        ("push", "publish it", shlex.join(["hfprune", "push", str(folder), "OWNER/NAME"])),
    ]
    if (folder / ADAPTER_FOLDER).is_dir():  # evaluate reads the model without it
        found = [line for line in found if line[0] != "evaluate"]
    if typed.command == "prune":
        recovery = bool(data.get("recovery"))
        found.append(("fit", "prune and recover", _as_fit(typed, folder, recovery=recovery)))
    return found


def _as_fit(typed: Typed, folder: Path, *, recovery: bool) -> str:
    """Returns a ``prune`` command as the ``fit`` command that recovers as well, into a folder of its own.

    Args:
        typed: The command line of ``prune``.
        folder: The folder of the run.
        recovery: Whether a config names the recovery data.
    """
    settings = {"output_dir": f"{folder}-recovered"}
    if not recovery:
        settings["data.recovery"] = "FILE"
    return typed.line("fit", without=("overwrite", "ckpt_path"), settings=settings)
