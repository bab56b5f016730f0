"""Reads the report of a run from its folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hfprune.io.output_folder import REPORT_FILE
from hfprune.io.save import load_importance
from hfprune.plan import PLAN_FILE, PruningPlan, kind_name, skip_text
from hfprune.report.data import ConvergencePoint, Generation, ReportData, look_up, number
from hfprune.utils.errors import ConfigError
from hfprune.utils.progress import duration


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
    absent = plan.absent() if plan else frozenset()
    kept = (
        {g.name: (0 if g.name in absent else len(plan.keep[g.name]), g.num_units) for g in plan.groups} if plan else {}
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
        training=_training(report.get("training") or {}),
        training_loss="distillation" if report.get("distillation") else "cross-entropy",
        timing={str(name): float(seconds) for name, seconds in (report.get("timing") or {}).items()},
        recipe=recipe(report.get("config") or {}),
        facts=_facts(report),
        warnings=[str(text) for text in report.get("warnings") or ()],
    )


def _training(found: Mapping[str, Any]) -> dict[str, list[tuple[int, int, float]]]:
    return {
        name: [
            (int(step), int(tokens), math.nan if (value := number(loss)) is None else value)
            for step, tokens, loss in points
        ]
        for name, points in found.items()
    }


def recipe(config: Mapping[str, Any]) -> str:
    """Returns a configuration as YAML, without settings that are None; empty if there are none.

    >>> print(recipe({"model": {"path": "M", "revision": None}, "pruning_ratio": 0.2}), end="")
    model:
      path: M
    pruning_ratio: 0.2
    """
    known = _set(config)
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True) if known else ""


def _set(value: Any) -> Any:
    """Returns plain data without entries that are None, nor mappings that hold nothing else."""
    if isinstance(value, Mapping):
        found = {str(key): _set(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in found.items() if item != {}}
    return [_set(item) for item in value] if isinstance(value, list | tuple) else value


def _title(report: Mapping[str, Any], folder: Path) -> str:
    model, asked = look_up(report, "plan", "model", "path"), look_up(report, "plan", "budget", "asked")
    known = ", ".join(str(part) for part in (model, asked) if part)
    return f"Pruning {known}" if known else f"Run {folder.resolve().name}"


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns label -> text of model, budget, data, seeds and versions, as far as the report has them."""
    calibration = look_up(report, "plan", "calibration") or {}
    objective = number(calibration.get("mean_objective_nats"))
    facts = {
        "Budget": budget_text(look_up(report, "plan", "budget") or {}),
        "Model": _settings(look_up(report, "plan", "model")),
        "Units": ", ".join(look_up(report, "plan", "units") or ()),
        "Allocation": _settings(look_up(report, "plan", "allocation")),
        "Scores of layers and sub-layers": _settings(look_up(report, "plan", "depth_scores")),
        "Skipped": skip_text(look_up(report, "plan", "skip_layers")),
        "Rounds": _rounds(look_up(report, "plan", "rounds") or {}),
        "Criterion": _settings(look_up(report, "plan", "criterion")),
        "Objective": look_up(report, "plan", "objective") or "",
        "Mean objective": "" if objective is None else f"{objective:.4f} nats per token",
        "Compensation": _settings(look_up(report, "plan", "compensation")),
        "Recovery": _settings(report.get("recovery")),
        "Layout": _layout(report.get("saved") or {}),
    }
    for role, summary in (report.get("data") or {}).items():
        facts[f"{role.capitalize()} data"] = data_text(summary)
    for label, key in (("Seed", "seed_everything"), ("Data seed", "data.seed")):
        seed = look_up(report.get("config"), *key.split("."))
        facts[label] = "" if seed is None else str(seed)
    seconds = number(report.get("seconds"))
    facts["Duration"] = "" if seconds is None else duration(seconds)
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


def budget_text(budget: Mapping[str, Any]) -> str:
    """Returns what a budget means for a model: parameters, MLP width and other units, before and after."""
    parts = [str(budget["asked"])] if budget.get("asked") else []
    if budget.get("dense_params") and budget.get("params"):
        parts.append(f"parameters {budget['dense_params']:,} to {budget['params']:,}")
    if budget.get("dense_width") and budget.get("width"):
        parts.append(f"MLP width {budget['dense_width']:,} to {budget['width']:,}")
    for kind, units in (budget.get("kinds") or {}).items():
        if kind != "mlp" or not budget.get("width"):
            parts.append(f"{kind_name(kind)} {sum(units['dense']):,} to {sum(units['kept']):,} in all")
    return "; ".join(parts)


def _rounds(rounds: Mapping[str, Any]) -> str:
    number_of = rounds.get("number") or 1
    return "" if number_of == 1 else f"{number_of}, schedule {rounds.get('schedule')}"


def _settings(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return str(settings or "")
    known = ((key, value) for key, value in settings.items() if value is not None and not isinstance(value, Mapping))
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known)


def data_text(summary: Any) -> str:
    """Returns where data came from, how much of it was used and its hash."""
    if not isinstance(summary, Mapping):
        return str(summary or "")
    parts = [str(summary["source"])] if summary.get("source") else []
    counts = ("sequences", "tokens")
    parts += [f"{summary[name]:,} {name}" for name in counts if isinstance(summary.get(name), int)]
    parts += [f"dropped {count:,} ({reason})" for reason, count in (summary.get("dropped") or {}).items()]
    parts += [str(summary["bos"])] if summary.get("bos") else []
    return ", ".join(parts) + (f"; SHA-256 {str(summary['sha256'])[:12]}" if summary.get("sha256") else "")
