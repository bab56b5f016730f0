"""Report data: the content of a report, read from the folder of a run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune.evaluation.zero_shot import MAIN_METRICS
from hfprune.io.output_folder import REPORT_FILE
from hfprune.io.save import load_importance
from hfprune.plan import PLAN_FILE, PruningPlan, kind_name
from hfprune.utils.errors import ConfigError

QUANTITIES = ("perplexity", "kl", "accuracy")
"""Measures of quality in a sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvergencePoint:
    """Agreement of an early ranking of the units with the final one.

    Attributes:
        tokens: Calibration tokens seen.
        overlap: Share of the finally kept units that would have been kept at this point, in [0, 1].
    """

    tokens: int
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One model of a sweep; what was not measured is None.

    Attributes:
        label: The model, for example ``entropy, 20 %``.
        series: The method that made it; points of one series are joined. ``dense`` marks the dense model.
        parameters: Parameters, tied weights once.
        latency_ms: Prefill time.
        perplexity: On the evaluation windows.
        kl: KL(dense || model), nats per token.
        accuracy: Mean zero-shot accuracy, in [0, 1].
        spread: Field name -> lowest and highest value over seeds.
    """

    label: str
    series: str
    parameters: int | None = None
    latency_ms: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    accuracy: float | None = None
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How the model of each stage continues one prompt.

    Attributes:
        prompt: The prompt.
        texts: Stage -> continuation.
    """

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """What a report shows; what is empty is left out of it.

    Attributes:
        title: Heading of the page.
        commands: What was typed, to be typed again.
        stages: Stage -> figures, as in ``report.json``; numbers that JSON has not are NaN, infinite, or text that says
            so.
        importance: Group -> score of every unit, groups in the order of the layers.
        kept: Group -> kept units and units of the dense model.
        convergence: How the choice of units settled while calibration went on.
        frontier: The models of a sweep.
        generations: Sample continuations.
        facts: Label -> text: budget, data, seed, versions.
        warnings: What the reader must know first.
    """

    title: str
    commands: Sequence[str] = ()
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    importance: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    convergence: Sequence[ConvergencePoint] = ()
    frontier: Sequence[FrontierPoint] = ()
    generations: Sequence[Generation] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def number(value: Any) -> float | None:
    """Returns a figure as a number, also where a strict JSON file holds it as text; None when there is none.

    >>> number("inf"), number(3), number(None)
    (inf, 3.0, None)
    """
    if isinstance(value, str) and value.lower() in ("nan", "inf", "-inf", "infinity", "-infinity"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def look_up(value: Any, *path: str) -> Any:
    """Returns what nested mappings hold at ``path``; None when a step of it is missing."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def task_figures(data: ReportData) -> dict[tuple[str, str], dict[str, tuple[float, float | None]]]:
    """Returns (task, metric) -> stage -> value and standard error, of the first main metric that some stage has."""
    tasks = {name: look_up(stage, "zero_shot", "tasks") or {} for name, stage in data.stages.items()}
    figures: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}
    for task in dict.fromkeys(name for names in tasks.values() for name in names):
        for metric in MAIN_METRICS:
            if any(look_up(names, task, metric) is not None for names in tasks.values()):
                figures[task, metric] = _stage_figures(tasks, task, metric)
                break
    return {key: row for key, row in figures.items() if row}


def _stage_figures(tasks: Mapping[str, Any], task: str, metric: str) -> dict[str, tuple[float, float | None]]:
    """Returns stage -> finite value of one task and its standard error, None where that is unknown."""
    row: dict[str, tuple[float, float | None]] = {}
    for stage, names in tasks.items():
        value, error = number(look_up(names, task, metric)), number(look_up(names, task, f"{metric}_stderr"))
        if value is not None and math.isfinite(value):
            row[stage] = (value, error if error is not None and math.isfinite(error) else None)
    return row


def read_run(folder: str | Path) -> ReportData:
    """Reads the report of a run.

    Args:
        folder: Holds ``report.json`` and, where something was pruned, ``plan.json`` and ``importance.safetensors``.

    Raises:
        ConfigError: There is no ``report.json``, or it is not one.
        PlanError: ``plan.json`` is not a plan.
    """
    folder = Path(folder)
    path = folder / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"'{folder}' has no {REPORT_FILE}: it is not the folder of a finished run.") from error
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' is not valid JSON: {error}.") from error
    try:
        return _from_report(report, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"'{path}' is not the report of a run: {type(error).__name__}: {error}.") from error


def _from_report(report: Any, folder: Path) -> ReportData:
    stages = report["stages"]
    if not all(isinstance(stage, Mapping) for stage in stages.values()):
        raise TypeError("every stage must be an object")
    plan = PruningPlan.load(folder) if (folder / PLAN_FILE).is_file() else None
    removed = plan.removed_layers() if plan else ()
    kept = (
        {g.name: (0 if g.layer in removed else len(plan.keep[g.name]), g.num_units) for g in plan.groups}
        if plan
        else {}
    )
    scores = load_importance(folder)
    names = [g.name for g in plan.groups if g.name in scores] if plan else list(scores)
    importance = {name: scores[name].tolist() for name in names}
    return ReportData(
        title=_title(report, folder),
        commands=[report["command"]] if report.get("command") else [],
        stages=stages,
        importance=importance,
        kept=kept,
        convergence=[
            ConvergencePoint(tokens=int(tokens), overlap=float(overlap))
            for tokens, overlap in report.get("convergence") or ()
        ],
        generations=[
            Generation(prompt=str(item["prompt"]), texts={str(k): str(v) for k, v in item["texts"].items()})
            for item in report.get("generations") or ()
        ],
        facts=_facts(report),
        warnings=[str(text) for text in report.get("warnings") or ()],
    )


def _title(report: Mapping[str, Any], folder: Path) -> str:
    model, asked = look_up(report, "plan", "model", "path"), look_up(report, "plan", "budget", "asked")
    known = ", ".join(str(part) for part in (model, asked) if part)
    return f"Pruning {known}" if known else f"Run {folder.resolve().name}"


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns label -> text of model, budget, data, seeds and versions, as far as the report has them."""
    calibration = look_up(report, "plan", "calibration") or {}
    objective = number(calibration.get("mean_objective_nats"))
    facts = {
        "Budget": _budget(look_up(report, "plan", "budget") or {}),
        "Model": _settings(look_up(report, "plan", "model")),
        "Criterion": _settings(look_up(report, "plan", "criterion")),
        "Objective": look_up(report, "plan", "objective") or "",
        "Mean objective": "" if objective is None else f"{objective:.4f} nats per token",
        "Compensation": _settings(look_up(report, "plan", "compensation")),
        "Recovery": _settings(report.get("recovery")),
        "Layout": _layout(report.get("saved") or {}),
    }
    for role, summary in (report.get("data") or {}).items():
        facts[f"{role.capitalize()} data"] = _data(summary)
    for label, key in (("Seed", "seed_everything"), ("Data seed", "data.seed")):
        seed = look_up(report.get("config"), *key.split("."))
        facts[label] = "" if seed is None else str(seed)
    seconds = number(report.get("seconds"))
    facts["Duration"] = "" if seconds is None else _duration(seconds)
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items())
    return {label: text for label, text in facts.items() if text}


def _layout(saved: Mapping[str, Any]) -> str:
    """Returns how the model was written, and how much of it is padding.

    >>> _layout({"layout": "padded", "parameters": 1000, "parameters_needed": 900})
    'padded; 100 of 1,000 stored parameters are padding, all zero; 900 are needed'
    """
    stored, needed = saved.get("parameters"), saved.get("parameters_needed")
    text = str(saved.get("layout") or "")
    if not stored or not needed or stored == needed:
        return text
    return f"{text}; {stored - needed:,} of {stored:,} stored parameters are padding, all zero; {needed:,} are needed"


def _budget(budget: Mapping[str, Any]) -> str:
    parts = [str(budget["asked"])] if budget.get("asked") else []
    if budget.get("dense_params") and budget.get("params"):
        parts.append(f"parameters {budget['dense_params']:,} to {budget['params']:,}")
    if budget.get("dense_width") and budget.get("width"):
        parts.append(f"MLP width {budget['dense_width']:,} to {budget['width']:,}")
    for kind, units in (budget.get("kinds") or {}).items():
        if kind != "mlp" or not budget.get("width"):
            parts.append(f"{kind_name(kind)} {sum(units['dense']):,} to {sum(units['kept']):,} in all")
    return "; ".join(parts)


def _settings(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return str(settings or "")
    known = ((key, value) for key, value in settings.items() if value is not None and not isinstance(value, Mapping))
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known)


def _data(summary: Any) -> str:
    if not isinstance(summary, Mapping):
        return str(summary or "")
    parts = [str(summary["source"])] if summary.get("source") else []
    counts = ("sequences", "tokens")
    parts += [f"{summary[name]:,} {name}" for name in counts if isinstance(summary.get(name), int)]
    parts += [f"dropped {count:,} ({reason})" for reason, count in (summary.get("dropped") or {}).items()]
    parts += [str(summary["bos"])] if summary.get("bos") else []
    return ", ".join(parts) + (f"; SHA-256 {str(summary['sha256'])[:12]}" if summary.get("sha256") else "")


def _duration(seconds: float) -> str:
    """Returns a time as people say it.

    >>> _duration(4.25), _duration(605), _duration(7384)
    ('4.2 s', '10 min 5 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
